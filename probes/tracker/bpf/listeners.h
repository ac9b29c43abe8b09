/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What happened at each listening socket. User space takes the entries of those
 * that are gone.
 */
#ifndef SOCKQ_LISTENERS_H
#define SOCKQ_LISTENERS_H

#include "counts.h"
#include <bpf/bpf_endian.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64); /* cookie, or what stands in for it: see counts_of */
	__type(value, struct listener_counts);
} listeners SEC(".maps");

static const struct listener_counts no_counts;

/* Before 5.12 no program can give a socket a cookie. Set before the program is loaded. */
volatile const __u8 cookies_are_missing;

static __always_inline void read_labels(struct listener_labels *to, struct sock *sk)
{
	to->inum = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	to->ifindex = BPF_CORE_READ(sk, __sk_common.skc_bound_dev_if);
	to->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	/* Its number is gone already where what waits in the queue is forgotten. */
	to->port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	if (to->family == AF_INET6)
		BPF_CORE_READ_INTO(&to->address, sk, __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32);
	else
		to->address[0] = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
}

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
	read_labels(&l->labels, sk);
	return l;
}

static __always_inline struct listener_counts *find_listener(__u64 key, struct sock *sk)
{
	struct listener_counts *l = bpf_map_lookup_elem(&listeners, &key);

	return l ? l : begin_listener(key, sk);
}

static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 32;
}

/* Cookies are counted up from 1: none has the top bit. Of 2^63 keys two of a map
 * full of listeners share one with a probability of 2^-32.
 */
static __noinline __u64 key_of_labels(struct sock *sk)
{
	struct listener_labels l = {};
	__u64 key = 0;

	read_labels(&l, sk);
	key = mix(key, (__u64)l.inum << 32 | (__u32)l.ifindex);
	key = mix(key, (__u64)l.family << 16 | l.port);
	key = mix(key, (__u64)l.address[0] << 32 | l.address[1]);
	key = mix(key, (__u64)l.address[2] << 32 | l.address[3]);
	return key | 1ULL << 63;
}

/* A listener without a cookie goes by its address if that is one that was there
 * before the tracker: all later ones are given a cookie. Before 5.12 any may lack
 * it, and the next socket at an address would be taken for the one before: there
 * it goes by its labels, which it shares with others of its series only.
 */
static __always_inline struct listener_counts *counts_of(struct sock *sk)
{
	__u64 key = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);

	if (!key)
		key = cookies_are_missing ? key_of_labels(sk) : (__u64)sk;
	return find_listener(key, sk);
}

#endif
