// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Every listening socket with its two queues. A listener's accept queue and
 * backlog are what sock_diag reports; the SYN queue's length is shown nowhere
 * else.
 */
#include "census.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_LISTENERS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct listener_record);
} listeners SEC(".maps");

#define DEVICE_HASH 256 /* NETDEV_HASHENTRIES */
#define DEVICE_CHAIN 64

static __noinline int name_device(struct listener_record *r, __u64 net)
{
	__u64 heads = LOADP(net, struct net, dev_index_head);
	__u64 node = LOAD64(heads + (r->ifindex & (DEVICE_HASH - 1)) * sizeof(__u64));

	for (int i = 0; i < DEVICE_CHAIN && node; i++) {
		__u64 dev = CONTAINER(node, struct net_device, index_hlist);

		if (CAST(dev, struct net_device)->ifindex == r->ifindex) {
			__u64 name = dev + bpf_core_field_offset(struct net_device, name);

			*(__u64 *)&r->device[0] = LOAD64(name);
			*(__u64 *)&r->device[8] = LOAD64(name + 8);
			return 0;
		}
		node = LOAD64(node);
	}
	return 1;
}

/* inode_number is the number of the socket's file, 0 where it has none. */
static __always_inline __u64 inode_number(__u64 sk)
{
	__u64 socket = LOADP(sk, struct sock, sk_socket);

	if (!socket)
		return 0;
	return CAST(CONTAINER(socket, struct socket_alloc, socket) + bpf_core_field_offset(struct socket_alloc, vfs_inode), struct inode)->i_ino;
}

static __always_inline void read_listener(struct listener_record *r, __u64 sk)
{
	struct sock *s = CAST(sk, struct sock);
	struct sock_common *common = CAST(sk, struct sock_common);
	__u64 net = LOADP(sk, struct sock_common, skc_net.net);
	struct net *n = CAST(net, struct net);

	r->key = sk;
	r->cookie = common->skc_cookie.counter;
	r->net_cookie = n->net_cookie;
	r->socket = inode_number(sk);
	r->inum = n->ns.inum;
	r->accept_queue = s->sk_ack_backlog;
	r->limit = s->sk_max_ack_backlog;
	r->syn_queue = CAST(sk, struct inet_connection_sock)->icsk_accept_queue.qlen.counter;
	r->drops = s->sk_drops.counter;
	r->ifindex = common->skc_bound_dev_if;
	r->family = common->skc_family;
	r->port = common->skc_num;
	if (r->family == AF_INET6) {
		r->address[0] = common->skc_v6_rcv_saddr.in6_u.u6_addr32[0];
		r->address[1] = common->skc_v6_rcv_saddr.in6_u.u6_addr32[1];
		r->address[2] = common->skc_v6_rcv_saddr.in6_u.u6_addr32[2];
		r->address[3] = common->skc_v6_rcv_saddr.in6_u.u6_addr32[3];
	} else {
		r->address[0] = common->skc_rcv_saddr;
	}
	r->device[0] = 0;
	if (r->ifindex)
		name_device(r, net);
}

#define BUCKETS 16

static __always_inline __u64 chain_of(__u64 table, __u32 bucket)
{
	__u64 head = table + (__u64)bucket * bpf_core_type_size(struct inet_listen_hashbucket);

	return LOADP(head, struct inet_listen_hashbucket, nulls_head.first);
}

/* Nearly all buckets are empty: one look for sixteen of them. Where not, what will
 * be read of the first socket of each is asked of memory at once.
 */
static __always_inline int all_empty(__u64 table, __u32 first)
{
	__u64 empty = 1, touched = 0, node[BUCKETS];

	for (int i = 0; i < BUCKETS; i++) {
		node[i] = chain_of(table, first + i);
		empty &= node[i];
	}
	if (empty)
		return 1;
#pragma unroll
	for (int i = 0; i < BUCKETS; i++)
		if (!(node[i] & 1)) {
			__u64 sk = CONTAINER(node[i], struct sock_common, skc_nulls_node);

			touched += LOADP(sk, struct sock_common, skc_net.net) + LOADP(sk, struct sock, sk_drops) +
				   LOADP(sk, struct sock, sk_ack_backlog) +
				   LOADP(sk, struct inet_connection_sock, icsk_accept_queue.qlen) + LOAD64(node[i]);
		}
	asm volatile("" : "+r"(touched));
	return 0;
}

/* add_listener returns the next node. */
static __noinline __u64 add_listener(struct walk *w, __u64 node)
{
	__u64 sk = CONTAINER(node, struct sock_common, skc_nulls_node);
	__u64 next = LOAD64(node);
	__u32 index = w->seen;
	struct listener_record *r;

	if (CAST(sk, struct sock_common)->skc_state != TCP_LISTEN)
		return next;
	r = bpf_map_lookup_elem(&listeners, &index);
	if (r)
		read_listener(r, sk);
	w->seen++;
	return next;
}

/* Most chains have one socket: an iterator for it would cost more than it does. */
static __noinline int walk_chain(struct walk *w, __u64 node, __u32 bucket)
{
	struct bpf_iter_num nodes;

	node = add_listener(w, node);
	if (!(node & 1)) {
		bpf_iter_num_new(&nodes, 0, CHAIN_MAX);
		while (!(node & 1) && bpf_iter_num_next(&nodes))
			node = add_listener(w, node);
		bpf_iter_num_destroy(&nodes);
	}
	if (node >> 1 != bucket + LISTENING_NULLS_BASE)
		w->moved++;
	return 0;
}

/* walk_listeners fills the records; w->seen counts also those that found no
 * place.
 */
SEC("syscall")
int walk_listeners(struct walk *w)
{
	struct inet_hashinfo *h = CAST(w->hashinfo, struct inet_hashinfo);
	__u64 table = LOADP(w->hashinfo, struct inet_hashinfo, lhash2);
	__u32 end = h->lhash2_mask + 1;
	struct bpf_iter_num groups, buckets;
	int *g, *b;

	if (!table)
		return 1;
	w->seen = 0;
	bpf_rcu_read_lock();
	bpf_iter_num_new(&groups, 0, (end + BUCKETS - 1) / BUCKETS);
	while ((g = bpf_iter_num_next(&groups))) {
		__u32 first = (__u32)*g * BUCKETS;

		if (all_empty(table, first))
			continue;
		bpf_iter_num_new(&buckets, first, first + BUCKETS);
		while ((b = bpf_iter_num_next(&buckets))) {
			__u32 bucket = *b;
			__u64 node = chain_of(table, bucket);

			if (bucket < end && !(node & 1))
				walk_chain(w, node, bucket);
		}
		bpf_iter_num_destroy(&buckets);
	}
	bpf_iter_num_destroy(&groups);
	bpf_rcu_read_unlock();
	return 0;
}
