// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* All sockets by state and with their byte queues, in one lockless pass over
 * the kernel's tables. A chain of the established table ends in its bucket's
 * number, so a walk that was carried into another chain notices.
 */
#include "slots.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* The ports that namespaces listen on: net_cookie << 16 | port, and the census
 * that saw it last.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_LISTENING_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} listening SEC(".maps");

/* Connections that wait for accept() although their client has closed, by
 * net_cookie << 16 | port.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_GAVE_UP);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct gave_up_count);
} gave_up SEC(".maps");

/* Without a struct socket, nobody has accepted it: close() would have left
 * CLOSE_WAIT.
 */
static __noinline int count_gave_up(__u32 census, __u64 port, __u32 inum)
{
	struct gave_up_count first = { .census = census, .connections = 1, .inum = inum };
	struct gave_up_count *g = bpf_map_lookup_elem(&gave_up, &port);

	if (!g || g->census != census)
		return bpf_map_update_elem(&gave_up, &port, &first, BPF_ANY);
	g->connections++;
	return 0;
}

static __always_inline void count_queues(struct walk *w, struct namespace_sockets *ns, __u64 cookie, __u64 sk, __u16 port)
{
	struct tcp_sock *tp = CAST(sk, struct tcp_sock);
	__s32 receive = tp->rcv_nxt - tp->copied_seq;
	__s32 send = tp->write_seq - tp->snd_una;
	struct queue_sums *q;
	__u32 *seen;
	__u64 key;

	/* No lock: the application or the peer may move one of two meanwhile. */
	if (receive < 0)
		receive = 0;
	if (send < 0)
		send = 0;
	if (!receive && !send)
		return;
	key = cookie << 16 | port;
	seen = bpf_map_lookup_elem(&listening, &key);
	q = &ns->queues[seen && *seen == w->census ? 0 : 1];
	q->receive_bytes += receive;
	q->send_bytes += send;
	if (q->receive_max_bytes < receive)
		q->receive_max_bytes = receive;
	if (q->send_max_bytes < send)
		q->send_max_bytes = send;
}

static __always_inline void count_socket(struct walk *w, struct cursor *at, __u64 node, int queues)
{
	__u64 sk = CONTAINER(node, struct sock_common, skc_nulls_node);
	struct sock_common *common = CAST(sk, struct sock_common);
	__u8 state = common->skc_state;
	struct namespace_sockets *ns = slot_of(at, LOADP(sk, struct sock_common, skc_net.net));

	if (w->cookie && w->cookie != at->cookie)
		return;
	if (!ns) {
		w->lost++;
		return;
	}
	if (state == TCP_TIME_WAIT)
		state = CAST(sk, struct inet_timewait_sock)->tw_substate;
	else if (queues && state != TCP_NEW_SYN_RECV)
		count_queues(w, ns, at->cookie, sk, common->skc_num);
	if (state == TCP_NEW_SYN_RECV)
		state = TCP_SYN_RECV;
	if (state < TCP_STATES)
		ns->states[state]++;
	if (queues && state == TCP_CLOSE_WAIT && !CAST(sk, struct sock)->sk_socket &&
	    count_gave_up(w->census, at->cookie << 16 | common->skc_num, ns->inum))
		w->lost++;
}

static __always_inline void count_listener(struct walk *w, struct cursor *at, __u64 sk)
{
	struct sock_common *common = CAST(sk, struct sock_common);
	struct namespace_sockets *ns = slot_of(at, LOADP(sk, struct sock_common, skc_net.net));
	__u64 port = at->cookie << 16 | common->skc_num;
	__u32 census = w->census;

	if (!ns) {
		w->lost++;
		return;
	}
	if (common->skc_state == TCP_LISTEN)
		ns->states[TCP_LISTEN]++;
	if (bpf_map_update_elem(&listening, &port, &census, BPF_ANY))
		w->lost++;
}

/* LISTEN sockets stand in a table of their own, shared by all namespaces. */
SEC("syscall")
int walk_listening(struct walk *w)
{
	struct inet_hashinfo *h = CAST(w->hashinfo, struct inet_hashinfo);
	__u64 table = LOADP(w->hashinfo, struct inet_hashinfo, lhash2);
	struct cursor at = { .slot = NO_SLOT };
	struct bpf_iter_num buckets, nodes;
	__u32 end = h->lhash2_mask + 1;
	int *b;

	if (!table)
		return 1;
	if (w->end < end)
		end = w->end;
	w->seen = 0;
	bpf_rcu_read_lock();
	bpf_iter_num_new(&buckets, w->start, end);
	while ((b = bpf_iter_num_next(&buckets))) {
		__u32 bucket = *b;
		__u64 head = table + (__u64)bucket * bpf_core_type_size(struct inet_listen_hashbucket);
		__u64 node = LOADP(head, struct inet_listen_hashbucket, nulls_head.first);

		w->start = bucket + 1;
		if (!(node & 1)) {
			bpf_iter_num_new(&nodes, 0, CHAIN_MAX);
			while (!(node & 1) && bpf_iter_num_next(&nodes)) {
				__u64 sk = CONTAINER(node, struct sock_common, skc_nulls_node);

				node = LOAD64(node);
				w->seen++;
				count_listener(w, &at, sk);
			}
			bpf_iter_num_destroy(&nodes);
		}
		if (node >> 1 != bucket + LISTENING_NULLS_BASE)
			w->moved++;
		if (w->seen >= NODES_PER_CALL)
			break;
	}
	bpf_iter_num_destroy(&buckets);
	bpf_rcu_read_unlock();
	return 0;
}

/* Eight buckets share a cache line. One look tells whether they are all empty;
 * where not, their chains are followed side by side first, so that the sockets
 * are asked of memory at once and not one after the other.
 */
#define BUCKETS 8
#define AHEAD 4

static __always_inline int all_empty(__u64 table, __u32 first)
{
	__u64 line = table + (__u64)first * bpf_core_type_size(struct inet_ehash_bucket);
	__u64 empty = 1, touched = 0, node[BUCKETS];

	for (int i = 0; i < BUCKETS; i++) {
		node[i] = LOAD64(line + i * bpf_core_type_size(struct inet_ehash_bucket));
		empty &= node[i];
	}
	if (empty)
		return 1;
#pragma unroll
	for (int depth = 0; depth < AHEAD; depth++)
#pragma unroll
		for (int i = 0; i < BUCKETS; i++)
			if (!(node[i] & 1)) {
				touched += LOADP(CONTAINER(node[i], struct sock_common, skc_nulls_node), struct sock_common, skc_net.net);
				node[i] = LOAD64(node[i]);
			}
	asm volatile("" : "+r"(touched));
	return 0;
}

static __always_inline int walk_connected(struct walk *w, int queues)
{
	struct inet_hashinfo *h = CAST(w->hashinfo, struct inet_hashinfo);
	__u64 table = LOADP(w->hashinfo, struct inet_hashinfo, ehash);
	struct cursor at = { .slot = NO_SLOT };
	struct bpf_iter_num lines, buckets, nodes;
	__u32 end = h->ehash_mask + 1;
	int *l, *b;

	if (!table)
		return 1;
	if (w->end < end)
		end = w->end;
	w->seen = 0;
	bpf_rcu_read_lock();
	bpf_iter_num_new(&lines, w->start / BUCKETS, (end + BUCKETS - 1) / BUCKETS);
	while ((l = bpf_iter_num_next(&lines))) {
		__u32 first = (__u32)*l * BUCKETS;

		w->start = first + BUCKETS;
		if (all_empty(table, first))
			continue;
		bpf_iter_num_new(&buckets, first, first + BUCKETS);
		while ((b = bpf_iter_num_next(&buckets))) {
			__u32 bucket = *b;
			__u64 node = LOAD64(table + (__u64)bucket * bpf_core_type_size(struct inet_ehash_bucket));

			if (bucket >= end)
				break;
			if (!(node & 1)) {
				bpf_iter_num_new(&nodes, 0, CHAIN_MAX);
				while (!(node & 1) && bpf_iter_num_next(&nodes)) {
					__u64 next = LOAD64(node);

					count_socket(w, &at, node, queues);
					w->seen++;
					node = next;
				}
				bpf_iter_num_destroy(&nodes);
			}
			if (node >> 1 != bucket)
				w->moved++;
		}
		bpf_iter_num_destroy(&buckets);
		if (w->seen >= NODES_PER_CALL)
			break;
	}
	bpf_iter_num_destroy(&lines);
	bpf_rcu_read_unlock();
	return 0;
}

SEC("syscall")
int walk_states(struct walk *w)
{
	return walk_connected(w, 0);
}

SEC("syscall")
int walk_queues(struct walk *w)
{
	return walk_connected(w, 1);
}
