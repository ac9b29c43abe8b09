// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Sockets that are bound, but neither listening nor connected: they are in no
 * table but bhash2 (6.1+), whose chains hold every socket with a local port.
 * Same rule as inet_diag_dump_icsk for TCPF_BOUND_INACTIVE: CLOSE, with a port.
 *
 * bhash2 is no RCU table. The memory of a socket stays a socket inside a
 * read-side section, a bind bucket's may be reused: an entry is believed only
 * where the socket, the bucket and the namespace point at each other.
 */
#include "slots.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline __u64 bind_node_offset(void)
{
	if (bpf_core_field_exists(struct sock___bind2, sk_bind2_node))
		return bpf_core_field_offset(struct sock___bind2, sk_bind2_node);
	return bpf_core_field_offset(struct sock_common, skc_bind_node);
}

static __always_inline void count_bound(struct walk *w, struct cursor *at, __u64 sk, __u64 tb2)
{
	struct sock_common *common = CAST(sk, struct sock_common);
	struct namespace_sockets *ns;
	__u64 net;

	if (common->skc_state != TCP_CLOSE || !common->skc_num)
		return;
	if (LOADP(sk, struct inet_connection_sock, icsk_bind2_hash) != tb2)
		return;
	net = LOADP(sk, struct sock_common, skc_net.net);
	if (net != LOADP(tb2, struct inet_bind2_bucket, ib_net.net))
		return;
	ns = slot_of(at, net);
	if (!ns)
		w->lost++;
	else
		ns->states[TCP_CLOSE]++;
}

SEC("syscall")
int walk_bound(struct walk *w)
{
	struct inet_hashinfo *h = CAST(w->hashinfo, struct inet_hashinfo);
	__u64 table = LOADP(w->hashinfo, struct inet_hashinfo, bhash2);
	struct cursor at = { .slot = NO_SLOT };
	struct bpf_iter_num buckets, chain, nodes;
	__u64 bind_node = bind_node_offset();
	__u32 end = h->bhash_size;
	int *b;

	if (!table)
		return 1;
	if (w->end < end)
		end = w->end;
	w->seen = 0;
	bpf_rcu_read_lock();
	bpf_iter_num_new(&buckets, w->start, end);
	while ((b = bpf_iter_num_next(&buckets))) {
		__u64 head = table + (__u64)(__u32)*b * bpf_core_type_size(struct inet_bind_hashbucket);
		__u64 link = LOADP(head, struct inet_bind_hashbucket, chain.first);

		w->start = *b + 1;
		if (!link)
			continue;
		bpf_iter_num_new(&chain, 0, CHAIN_MAX);
		while (link && bpf_iter_num_next(&chain)) {
			__u64 tb2 = CONTAINER(link, struct inet_bind2_bucket, node);
			__u64 node = LOADP(tb2, struct inet_bind2_bucket, owners.first);

			bpf_iter_num_new(&nodes, 0, CHAIN_MAX);
			while (node && bpf_iter_num_next(&nodes)) {
				count_bound(w, &at, node - bind_node, tb2);
				w->seen++;
				node = LOAD64(node);
			}
			bpf_iter_num_destroy(&nodes);
			link = LOAD64(link);
		}
		bpf_iter_num_destroy(&chain);
		if (w->seen >= NODES_PER_CALL)
			break;
	}
	bpf_iter_num_destroy(&buckets);
	bpf_rcu_read_unlock();
	return 0;
}
