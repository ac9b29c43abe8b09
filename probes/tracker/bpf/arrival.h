/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A connection in an accept queue. */
#ifndef SOCKQ_ARRIVAL_H
#define SOCKQ_ARRIVAL_H

#include "counts.h"

#define MINUTE 60000000000ULL

/* An older minute is a smaller number. */
static __always_inline void raise(__u64 *peak, __u64 value)
{
	for (int i = 0; i < 8; i++) {
		__u64 old = *(volatile __u64 *)peak;

		if (old >= value || __sync_val_compare_and_swap(peak, old, value) == old)
			return;
	}
}

static __always_inline void count_arrival(struct listener_counts *l, __u64 now, __u64 length, __u64 limit)
{
	__u64 minute = now / MINUTE;

	add(&l->connections, 1);
	raise(&l->peak[minute & 1], minute << 32 | length);
	raise(&l->peak_ratio[minute & 1], minute << 32 | (__u32)(((length << 31) + limit / 2) / (limit + 1)));
}

#endif
