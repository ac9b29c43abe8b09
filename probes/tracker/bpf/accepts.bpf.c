// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The accept queue in the kernel's own terms: what is put in, what accept() takes
 * out, whoever calls it and however, and what listen() asked for.
 */
#include "arrival.h"
#include "listeners.h"
#include "sockets.h"
#include "registers.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Further paths of MPTCP connections (MP_JOIN, RFC 8684) are accepted by nobody. */
static __always_inline int joins_connection(__u64 child)
{
	struct tcp_sock *tcp = (struct tcp_sock *)child;
	struct inet_connection_sock *connection = (struct inet_connection_sock *)child;
	struct mptcp_subflow_context *subflow;

	if (!bpf_core_field_exists(struct mptcp_subflow_context, mp_join) || !BPF_CORE_READ(tcp, is_mptcp))
		return 0;
	subflow = BPF_CORE_READ(connection, icsk_ulp_data);
	return BPF_CORE_READ_BITFIELD_PROBED(subflow, mp_join);
}

/* Both hooks are met on some kernels: the first takes the child. */
static __always_inline int arrives(struct sock *sk, __u64 child)
{
	struct listener_counts *l;
	struct cpu *cpu;
	__u32 zero = 0;

	cpu = bpf_map_lookup_elem(&cpus, &zero);
	if (!cpu || !child || cpu->child != child)
		return 0;
	cpu->child = 0;
	if (joins_connection(child))
		return 0;
	l = counts_of(sk);
	if (l)
		count_arrival(l, cpu->child_since, BPF_CORE_READ(sk, sk_ack_backlog), BPF_CORE_READ(sk, sk_max_ack_backlog));
	return 0;
}

#define ACCEPTED (1ULL << 63) /* in place.arrived */

enum turn { FIRST, AGAIN };

/* From 7.0 a task that takes the CPU from this program keeps others there from being
 * seen: another one, AGAIN, takes what this one misses. Whichever is met first marks
 * the child's place; without one only FIRST counts.
 */
static __always_inline int accepts(struct sock *sk, __u64 child, enum turn turn)
{
	struct listener_counts *l;
	struct place *place;
	__u64 now, arrived;

	if (!child || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP) /* DCCP has accept queues, too */
		return 0;
	place = find_socket(child);
	arrived = place ? place->arrived : 0;
	if (!arrived && turn == AGAIN)
		return 0;
	if (arrived && (arrived & ACCEPTED || __sync_val_compare_and_swap(&place->arrived, arrived, arrived | ACCEPTED) != arrived))
		return 0;
	l = counts_of(sk);
	if (!l)
		return 0;
	now = bpf_ktime_get_ns();
	add(&l->accepts, 1);
	l->last_accept = now;
	if (arrived)
		observe(&l->accept_wait, now - arrived);
	return 0;
}

SEC("fexit/inet_csk_complete_hashdance")
int BPF_PROG(child_added_4, struct sock *sk, __u64 child, void *request, int own, void *taken)
{
	return taken ? arrives(sk, child) : 0;
}

/* With SYN cookies and Fast Open, and for all connections before 5.16. */
SEC("fexit/inet_csk_reqsk_queue_add")
int BPF_PROG(child_queued_3, struct sock *sk, void *request, __u64 child, void *queued)
{
	return queued ? arrives(sk, child) : 0;
}

/* It has two arguments since 6.10. */
SEC("fexit/inet_csk_accept")
int BPF_PROG(child_accepted_4, struct sock *sk, int flags, void *err, int kern, __u64 child)
{
	return accepts(sk, child, FIRST);
}

SEC("fexit/inet_csk_accept")
int BPF_PROG(child_accepted_2, struct sock *sk, void *arg, __u64 child)
{
	return accepts(sk, child, FIRST);
}

SEC("fexit/inet_csk_accept")
int BPF_PROG(child_accepted_again_2, struct sock *sk, void *arg, __u64 child)
{
	return accepts(sk, child, AGAIN);
}

static __always_inline int listens(struct socket *socket, int backlog)
{
	struct sock *sk = BPF_CORE_READ(socket, sk), *subflow = sk;
	struct mptcp_sock *mptcp = (struct mptcp_sock *)sk;
	struct listener_counts *l;

	if (BPF_CORE_READ(sk, sk_protocol) == IPPROTO_MPTCP && bpf_core_field_exists(struct mptcp_sock, first))
		subflow = BPF_CORE_READ(mptcp, first);
	if (!subflow || BPF_CORE_READ(subflow, sk_protocol) != IPPROTO_TCP || BPF_CORE_READ(subflow, __sk_common.skc_state) != TCP_LISTEN)
		return 0;
	l = counts_of(subflow);
	if (!l)
		return 0;
	l->backlog = backlog;
	l->last_listen = bpf_ktime_get_ns();
	return 0;
}

/* Another thread may have put something else there meanwhile. */
SEC("fexit/__sys_listen")
int BPF_PROG(listen_returned_2, int fd, int backlog, int failed)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **files = BPF_CORE_READ(table, fd), *file = NULL;
	struct socket *socket;

	if (failed || (__u32)fd >= BPF_CORE_READ(table, max_fds) || bpf_probe_read_kernel(&file, sizeof(file), files + fd) || !file)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	return socket && BPF_CORE_READ(socket, file) == file ? listens(socket, backlog) : 0;
}

/* From 6.11, also for io_uring. */
SEC("fexit/__sys_listen_socket")
int BPF_PROG(listen_succeeded_2, struct socket *socket, int backlog, int failed)
{
	return failed ? 0 : listens(socket, backlog);
}
