/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Rare events, by the namespace and by what they were. */
#ifndef SOCKQ_EVENTS_H
#define SOCKQ_EVENTS_H

#include "namespaces.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct event);
	__type(value, __u64);
} events SEC(".maps");

static __noinline int count_event(struct net *net, __u32 kind, __u32 detail)
{
	struct event event = {.namespace = namespace_id(net), .kind = kind, .detail = detail};
	__u64 *n = bpf_map_lookup_elem(&events, &event), zero = 0;

	if (!n) {
		find_slot(event.namespace, net->ns.inum);
		if (!bpf_map_lookup_elem(&slots, &event.namespace))
			event.namespace = 0; /* of those without a place */
		bpf_map_update_elem(&events, &event, &zero, BPF_NOEXIST);
		n = bpf_map_lookup_elem(&events, &event);
	}
	if (n)
		add(n, 1);
	else
		lose(LOST_EVENTS);
	return 0;
}

#endif
