/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Since when each socket is in its state: a hash table in an array, since a look
 * into BPF's own hash costs as much as the whole rest of an event. A socket has
 * its place in one bucket; when that is full the socket is not remembered, and
 * counted as lost. Needs atomic compare and exchange (5.12).
 */
#ifndef SOCKQ_SOCKETS_H
#define SOCKQ_SOCKETS_H

#include "counts.h"

#define PLACES 16	/* tracker.places */
#define BUCKETS_SHIFT 14 /* by default */

struct place {
	__u64 since;	/* bpf_ktime_get_ns of the last change of state */
	__u64 arrived;	/* in an accept queue; 0: not a listener's child; top bit: accepted */
	__u32 state;
	__u32 waits_as; /* the state of the mini-socket that takes over; 0: none */
};

struct sockets_bucket {
	__u64 sk[PLACES]; /* 0: free */
	struct place places[PLACES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << BUCKETS_SHIFT);
	__type(key, __u32);
	__type(value, struct sockets_bucket);
} sockets SEC(".maps");

volatile const __u32 sockets_shift = 32 - BUCKETS_SHIFT; /* what of a hash is not the bucket's number */

static __always_inline struct sockets_bucket *bucket_of_socket(__u64 sk)
{
	__u32 bucket;

	/* The verifier takes a pointer's lower half for a number, not the whole. */
	asm volatile("%0 = %1" : "=w"(bucket) : "w"((__u32)sk));
	bucket = bucket * 0x9e3779b1U >> sockets_shift; /* Fibonacci hashing */
	return bpf_map_lookup_elem(&sockets, &bucket);
}

static __always_inline __u32 find_place(struct sockets_bucket *b, __u64 sk)
{
	for (__u32 i = 0; i < PLACES; i++)
		if (b->sk[i] == sk)
			return i;
	return PLACES;
}

static __always_inline struct place *find_socket(__u64 sk)
{
	struct sockets_bucket *b = bucket_of_socket(sk);
	__u32 i;

	if (!b)
		return NULL;
	i = find_place(b, sk);
	return i < PLACES ? &b->places[i] : NULL;
}

/* A place that the socket's predecessor at the same address left is taken over.
 * False where there is none.
 */
static __always_inline int begin_socket(__u64 sk, __u64 now, __u32 state, __u64 arrived)
{
	struct sockets_bucket *b = bucket_of_socket(sk);
	__u32 i;

	if (!b)
		return 0;
	i = find_place(b, sk);
	if (i >= PLACES)
		for (i = 0; i < PLACES; i++)
			if (!b->sk[i] && !__sync_val_compare_and_swap(&b->sk[i], 0, sk))
				break;
	if (i >= PLACES) {
		lose(LOST_SOCKETS);
		return 0;
	}
	b->places[i].since = now;
	b->places[i].arrived = arrived;
	b->places[i].state = state;
	b->places[i].waits_as = 0;
	return 1;
}

static __always_inline void end_socket(__u64 sk)
{
	struct sockets_bucket *b = bucket_of_socket(sk);
	__u32 i;

	if (!b)
		return;
	i = find_place(b, sk);
	if (i < PLACES)
		*(volatile __u64 *)&b->sk[i] = 0;
}

/* take_socket ends it for one alone of those that may end it at the same time. */
static __always_inline int take_socket(__u64 sk, struct place *was)
{
	struct sockets_bucket *b = bucket_of_socket(sk);
	__u32 i;

	if (!b)
		return 0;
	i = find_place(b, sk);
	if (i >= PLACES)
		return 0;
	*was = b->places[i];
	return __sync_val_compare_and_swap(&b->sk[i], sk, 0) == sk;
}

#endif
