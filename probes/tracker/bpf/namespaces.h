/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What happened in each namespace, by its slot. */
#ifndef SOCKQ_NAMESPACES_H
#define SOCKQ_NAMESPACES_H

#include "counts.h"

/* The slots of namespaces. User space fills free_slots, gives back the slots of
 * namespaces that are gone, and sets how many there are.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64); /* namespace_id */
	__type(value, struct slot);
} slots SEC(".maps");

/* The last namespace of each CPU: id << 16 | slot. User space clears it before it
 * gives a slot back.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} last_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 1);
	__type(value, __u32);
} free_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32); /* slot */
	__type(value, struct namespace_counts);
} namespaces SEC(".maps");

static __noinline __u32 find_slot(__u64 id, __u32 inum)
{
	struct slot slot = {.number = OTHER_NAMESPACES, .inum = inum}, *known = bpf_map_lookup_elem(&slots, &id);

	if (known)
		return known->number;
	if (bpf_map_pop_elem(&free_slots, &slot.number))
		lose(LOST_NAMESPACES);
	if (!bpf_map_update_elem(&slots, &id, &slot, BPF_NOEXIST))
		return slot.number;
	if (slot.number) /* another CPU was faster, or there is no more room */
		bpf_map_push_elem(&free_slots, &slot.number, 0);
	known = bpf_map_lookup_elem(&slots, &id);
	if (known)
		return known->number;
	lose(LOST_NAMESPACES);
	return OTHER_NAMESPACES;
}

/* A cookie is never used again, an inode number is. */
static __always_inline __u32 slot_of(struct net *net)
{
	__u64 id = namespace_id(net), last;
	__u32 zero = 0, slot;
	volatile __u64 *memo = bpf_map_lookup_elem(&last_slots, &zero);

	if (!memo)
		return OTHER_NAMESPACES;
	last = *memo;
	if (last >> 16 == id)
		return (__u16)last;
	slot = find_slot(id, net->ns.inum);
	if (bpf_core_field_exists(struct net, net_cookie))
		*memo = id << 16 | slot;
	return slot;
}

/* find_slot_of is slot_of for a namespace that the verifier takes for a number. */
static __always_inline __u32 find_slot_of(struct net *net)
{
	__u32 inum = BPF_CORE_READ(net, ns.inum);

	if (bpf_core_field_exists(net->net_cookie))
		return find_slot(BPF_CORE_READ(net, net_cookie), inum);
	return find_slot(1ULL << 47 | inum, inum);
}

#endif
