/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The times that sockets spend in each state. */
#ifndef SOCKQ_SECONDS_H
#define SOCKQ_SECONDS_H

#include "counts.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32); /* 0, or the namespace's slot */
	__type(value, struct state_histograms);
} state_seconds SEC(".maps");

volatile const __u32 observed;		/* states whose duration is told: 1 << state */
volatile const __u8 per_namespace;	/* they are counted by namespace */

static __always_inline void observe_state(__u32 slot, __u32 state, __u64 spent)
{
	__u32 key = per_namespace ? slot : 0;
	struct state_histograms *seconds;

	if (!(observed & 1 << state))
		return;
	seconds = bpf_map_lookup_elem(&state_seconds, &key);
	asm volatile("" : "+r"(state)); /* the register that is checked is the one that is used */
	if (seconds && state < TCP_STATES)
		observe(&seconds->states[state], spent);
}

#endif
