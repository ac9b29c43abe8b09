/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What happened at each listening socket, by its cookie. User space takes the
 * entries of those that are gone.
 */
#ifndef SOCKQ_LISTENERS_H
#define SOCKQ_LISTENERS_H

#include "counts.h"
#include <bpf/bpf_endian.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64); /* cookie, or address where there is none */
	__type(value, struct listener_counts);
} listeners SEC(".maps");

static const struct listener_counts no_counts;

static __noinline struct listener_counts *begin_listener(__u64 key, struct sock *sk)
{
	struct listener_counts *l;
	struct net *net;

	bpf_map_update_elem(&listeners, &key, &no_counts, BPF_NOEXIST);
	l = bpf_map_lookup_elem(&listeners, &key);
	if (!l) {
		lose(LOST_LISTENERS);
		return NULL;
	}
	net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	if (bpf_core_field_exists(net->net_cookie))
		l->namespace = BPF_CORE_READ(net, net_cookie);
	l->inum = BPF_CORE_READ(net, ns.inum);
	l->ifindex = BPF_CORE_READ(sk, __sk_common.skc_bound_dev_if);
	l->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	/* Its number is gone already where what waits in the queue is forgotten. */
	l->port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	if (l->family == AF_INET6)
		BPF_CORE_READ_INTO(&l->address, sk, __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32);
	else
		l->address[0] = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
	return l;
}

static __always_inline struct listener_counts *find_listener(__u64 key, struct sock *sk)
{
	struct listener_counts *l = bpf_map_lookup_elem(&listeners, &key);

	return l ? l : begin_listener(key, sk);
}

#endif
