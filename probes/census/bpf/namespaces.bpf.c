// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Every network namespace of the node, those without a process or a socket
 * included, with its settings and TcpExt counters, by following the kernel's
 * own list. Nothing is entered and no file is read.
 */
#include "census.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_NAMESPACES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct namespace_record);
} namespaces SEC(".maps");

/* Our own per-CPU variable: where each CPU keeps its copy tells the offset
 * under which it keeps every other one (__per_cpu_offset).
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} anchor SEC(".maps");

/* Set before the program is loaded. event_index are the numbers of the counters
 * in struct linux_mib, which differ between kernels; 0 for one that is not there.
 */
volatile const __u32 event_index[EVENTS];
volatile const __u32 cpus;

static __always_inline void read_events(struct namespace_record *r, __u64 mib)
{
	__u32 zero = 0;
	__u64 base = LOADP(CAST(&anchor, struct bpf_array), struct bpf_array, pptrs);
	struct bpf_iter_num it;
	int *cpu;

	for (int i = 0; i < EVENTS; i++)
		r->events[i] = 0;
	bpf_iter_num_new(&it, 0, cpus);
	while ((cpu = bpf_iter_num_next(&it))) {
		volatile __u64 *own = bpf_map_lookup_percpu_elem(&anchor, &zero, *cpu);
		__u64 copy;

		if (!own)
			continue;
		/* Through memory a pointer becomes a number to calculate with. */
		*own = (__u64)own;
		copy = *own + mib - base;
		for (int i = 0; i < EVENTS; i++)
			if (event_index[i])
				r->events[i] += LOAD64(copy + event_index[i] * sizeof(unsigned long));
	}
	bpf_iter_num_destroy(&it);
}

static __always_inline void read_namespace(struct namespace_record *r, __u64 net)
{
	struct net *n = CAST(net, struct net);

	r->net = net;
	r->cookie = n->net_cookie;
	r->inum = n->ns.inum;
	r->hashinfo = LOADP(net, struct net, ipv4.tcp_death_row.hashinfo);
	r->sysctls[0] = n->core.sysctl_somaxconn;
	r->sysctls[1] = n->ipv4.sysctl_max_syn_backlog;
	r->sysctls[2] = n->ipv4.sysctl_tcp_syncookies;
	r->sysctls[3] = n->ipv4.sysctl_tcp_abort_on_overflow;
	r->sysctls[4] = n->ipv4.sysctl_tcp_synack_retries;
	r->sysctls[5] = n->ipv4.sysctl_tcp_syn_retries;
	r->sysctls[6] = n->ipv4.sysctl_tcp_fin_timeout;
	r->sysctls[7] = n->ipv4.tcp_death_row.sysctl_max_tw_buckets;
	read_events(r, LOADP(net, struct net, mib.net_statistics));
}

/* walk_namespaces starts at the caller's namespace and follows the ring back to
 * it. The ring's head is no struct net: every real one has the same operations.
 */
SEC("syscall")
int walk_namespaces(struct list_walk *w)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 own = LOADP(LOADP(task, struct task_struct, nsproxy), struct nsproxy, net_ns);
	__u64 ops = LOADP(own, struct net, ns.ops);
	__u64 first = own + bpf_core_field_offset(struct net, list);
	__u64 link = first;
	__u32 after_head = 0;
	struct bpf_iter_num it;

	w->found = 0;
	bpf_rcu_read_lock();
	bpf_iter_num_new(&it, 0, MAX_NAMESPACES * 16);
	while (bpf_iter_num_next(&it)) {
		__u64 net = CONTAINER(link, struct net, list);

		if (LOADP(net, struct net, ns.ops) == ops) {
			__u32 index = w->found;
			struct namespace_record *r = bpf_map_lookup_elem(&namespaces, &index);

			if (r) {
				read_namespace(r, net);
				r->initial = after_head;
			}
			w->found++;
			after_head = 0;
		} else {
			after_head = 1;
		}
		link = LOADP(link, struct list_head, next);
		if (link == first)
			break;
	}
	bpf_iter_num_destroy(&it);
	bpf_rcu_read_unlock();
	w->first_is_initial = after_head; /* the head came last: the first record is init_net's */
	return 0;
}
