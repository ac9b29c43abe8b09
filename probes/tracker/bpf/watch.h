/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the kernel itself counts while one of its functions runs: the difference of
 * the TcpExt counters of this CPU between entry and return. Softirqs are off all
 * the while, so that nothing else counts there.
 */
#ifndef SOCKQ_WATCH_H
#define SOCKQ_WATCH_H

#include "counts.h"

enum watched {
	WATCHED_LISTEN_OVERFLOWS,
	WATCHED_LISTEN_DROPS,
	WATCHED_SYN_QUEUE_FULL,
	WATCHED_COOKIES_SENT,
	WATCHED_COOKIES_VALIDATED,
	WATCHED,
};

/* What was found out meanwhile (enum drop_reason: 1 << reason). */
struct watch {
	__u64 listener; /* struct sock; 0: nobody watches */
	__u64 request;
	__u64 counters; /* the namespace's TcpExt counters of this CPU */
	__u64 before[WATCHED];
	__u32 found;
	__u32 reserved;
	__u64 offset; /* of this CPU's copies of per-CPU variables */
	__u64 number; /* of a pointer: through memory it becomes one */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct watch);
} watches SEC(".maps");

/* Set before the program is loaded: the numbers of the counters in struct linux_mib. */
volatile const __u32 counter_index[WATCHED];

static __always_inline struct watch *this_watch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&watches, &zero);
}

/* Where this CPU keeps its copy of our map's element tells where it keeps others. */
static __always_inline __u64 this_cpu_offset(struct watch *w)
{
	volatile __u64 *number = &w->number;
	__u64 own, base = 0;

	if (w->offset)
		return w->offset;
	*number = (__u64)w;
	own = *number;
	*number = (__u64)&watches;
	bpf_probe_read_kernel(&base, sizeof(base), (void *)(*number + bpf_core_field_offset(struct bpf_array, pptrs)));
	return w->offset = own - base;
}

static __always_inline __u64 counter(struct watch *w, enum watched which)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(w->counters + counter_index[which] * sizeof(value)));
	return value;
}

static __always_inline void begin_watch(struct watch *w, struct sock *listener, __u64 request)
{
	w->listener = (__u64)listener;
	w->request = request;
	w->found = 0;
	w->counters = (__u64)BPF_CORE_READ(listener, __sk_common.skc_net.net, mib.net_statistics) + this_cpu_offset(w);
	for (int i = 0; i < WATCHED; i++)
		w->before[i] = counter(w, i);
}

static __always_inline __u64 counted(struct watch *w, enum watched which)
{
	return counter(w, which) - w->before[which];
}

#endif
