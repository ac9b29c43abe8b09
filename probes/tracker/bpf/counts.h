/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where events are counted. All counters are added to atomically: a program may
 * be interrupted by another one on the same CPU.
 */
#ifndef SOCKQ_COUNTS_H
#define SOCKQ_COUNTS_H

#include "tracker.h"

/* What a CPU remembers from one program to the next. */
struct cpu {
	/* The child that was made of a request last and whose arrival at its
	 * listener is still to come: tcp_child_process does both in one softirq.
	 */
	__u64 child;
	__u64 child_since;
	__u64 child_net;
	__u64 taken_over; /* by state_changed_again */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cpu);
} cpus SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LOST_KINDS);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline void add(__u64 *counter, __u64 n)
{
	__sync_fetch_and_add(counter, n);
}

static __always_inline void lose(__u32 what)
{
	__u64 *n = bpf_map_lookup_elem(&lost, &what);

	if (n)
		add(n, 1);
}

/* The inode number stands in where the kernel gives no cookie unasked (before
 * 5.15): with a bit that no cookie reaches.
 */
static __always_inline __u64 namespace_id(struct net *net)
{
	if (bpf_core_field_exists(net->net_cookie))
		return net->net_cookie;
	return 1ULL << 47 | net->ns.inum;
}

/* bucket_of takes the duration in ticks of 2^-30 s, of which 2^30 / 10^9 =
 * 1 + 77324 / 2^20 go into a nanosecond, and finds the power of two that it does
 * not exceed.
 */
__noinline __u32 bucket_of(__u64 ns)
{
	__u64 ticks = ns + ((ns >> 10) * 77324 >> 10) - 1;
	__u32 bits = 0;

	if ((__s64)ns <= 0) /* another CPU's clock may be some ns behind */
		return 0;
	for (__u32 half = 32; half; half >>= 1)
		if (ticks >> half) {
			ticks >>= half;
			bits += half;
		}
	bits += ticks;
	if (bits < HISTOGRAM_FIRST)
		return 0;
	bits -= HISTOGRAM_FIRST;
	return bits < HISTOGRAM_BUCKETS ? bits : HISTOGRAM_BUCKETS - 1;
}

static __always_inline void observe(struct histogram *h, __u64 ns)
{
	__u32 bucket = bucket_of(ns);

	if (bucket >= HISTOGRAM_BUCKETS)
		return;
	add(&h->buckets[bucket], 1);
	add(&h->sum, (__s64)(ns + 512) >> 10);
}

#endif
