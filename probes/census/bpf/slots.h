/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where sockets are counted: a slot for each namespace, given out as the walks
 * meet one.
 */
#ifndef SOCKQ_SLOTS_H
#define SOCKQ_SLOTS_H

#include "census.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_NAMESPACES);
	__type(key, __u64); /* net_cookie */
	__type(value, __u32);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_NAMESPACES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct namespace_sockets);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u32);
} slots_used SEC(".maps");

#define NO_SLOT MAX_NAMESPACES

static __noinline __u32 find_slot(__u64 net, __u64 cookie)
{
	__u32 *known = bpf_map_lookup_elem(&slots, &cookie);
	__u32 zero = 0, slot, *used;
	struct namespace_sockets *ns;

	if (known)
		return *known;
	used = bpf_map_lookup_elem(&slots_used, &zero);
	if (!used)
		return NO_SLOT;
	slot = *used;
	ns = bpf_map_lookup_elem(&sockets, &slot);
	if (!ns || bpf_map_update_elem(&slots, &cookie, &slot, BPF_ANY))
		return NO_SLOT;
	ns->cookie = cookie;
	ns->inum = CAST(net, struct net)->ns.inum;
	*used = slot + 1;
	return slot;
}

/* One namespace's sockets tend to stand together: the last one is remembered. */
struct cursor {
	__u64 net;
	__u64 cookie;
	__u32 slot;
};

static __always_inline struct namespace_sockets *slot_of(struct cursor *at, __u64 net)
{
	if (net != at->net) {
		at->net = net;
		at->cookie = CAST(net, struct net)->net_cookie;
		at->slot = find_slot(net, at->cookie);
	}
	return bpf_map_lookup_elem(&sockets, &at->slot);
}

#endif
