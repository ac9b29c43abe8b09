// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What applications do: listen(), accept(), and connect() where it fails before
 * there is a state to change. All of it is read when the call returns.
 */
#include "connects.h"
#include "listeners.h"
#include "sockets.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* events/syscalls/sys_exit_NAME/format */
struct syscall_exit {
	__u64 common;
	__s64 nr;
	__s64 ret;
};

/* The arguments are still where they were when the call began. */
#if defined(__TARGET_ARCH_x86)
struct pt_regs {
	unsigned long di;
	unsigned long si;
} __attribute__((preserve_access_index));
#define FIRST_ARGUMENT() (registers()->di)
#define SECOND_ARGUMENT() (registers()->si)
#elif defined(__TARGET_ARCH_arm64)
struct pt_regs {
	__u64 regs[31];
	__u64 orig_x0;
} __attribute__((preserve_access_index));
#define FIRST_ARGUMENT() (registers()->orig_x0)
#define SECOND_ARGUMENT() (registers()->regs[1])
#endif

static __always_inline struct pt_regs *registers(void)
{
	return CAST(bpf_task_pt_regs(bpf_get_current_task_btf()), struct pt_regs);
}

/* tcp_socket is the current process' TCP socket with that descriptor, for MPTCP
 * the TCP socket that carries it; 0 for anything else, also where another thread
 * put something else there meanwhile.
 */
static __always_inline __u64 tcp_socket(__u32 fd)
{
	struct fdtable *table = bpf_get_current_task_btf()->files->fdt;
	__u64 file, socket, sk;
	__u16 protocol;

	if (fd >= table->max_fds)
		return 0;
	file = LOAD64((__u64)table->fd + fd * sizeof(struct file *));
	socket = LOADP(file, struct file, private_data);
	if (!socket || LOADP(socket, struct socket, file) != file)
		return 0;
	sk = LOADP(socket, struct socket, sk);
	if (CAST(sk, struct sock)->sk_type != SOCK_STREAM)
		return 0;
	protocol = CAST(sk, struct sock)->sk_protocol;
	if (protocol == IPPROTO_MPTCP && bpf_core_field_exists(struct mptcp_sock, first)) {
		sk = LOADP(sk, struct mptcp_sock, first);
		protocol = CAST(sk, struct sock)->sk_protocol;
	}
	return protocol == IPPROTO_TCP ? sk : 0;
}

static __always_inline struct listener_counts *counts_of_listener(__u64 sk)
{
	if (!sk || CAST(sk, struct sock_common)->skc_state != TCP_LISTEN)
		return NULL;
	return counts_of((struct sock *)sk);
}

static __noinline int accepted(__u32 fd)
{
	__u64 child = tcp_socket(fd), listener = tcp_socket(FIRST_ARGUMENT()), now = bpf_ktime_get_ns();
	struct listener_counts *l = counts_of_listener(listener);
	struct place *place;

	if (!l) {
		if (child) /* another thread has closed the listener */
			lose(LOST_ACCEPTS);
		return 0;
	}
	add(&l->accepts, 1);
	l->last_accept = now;
	place = child ? find_socket(child) : NULL;
	if (place && place->arrived)
		observe(&l->accept_wait, now - place->arrived);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_accept4")
int accept4_returned(struct syscall_exit *call)
{
	return call->ret < 0 ? 0 : accepted(call->ret);
}

SEC("tracepoint/syscalls/sys_exit_accept")
int accept_returned(struct syscall_exit *call)
{
	return call->ret < 0 ? 0 : accepted(call->ret);
}

SEC("tracepoint/syscalls/sys_exit_listen")
int listen_returned(struct syscall_exit *call)
{
	struct listener_counts *l;

	if (call->ret)
		return 0;
	l = counts_of_listener(tcp_socket(FIRST_ARGUMENT()));
	if (!l)
		return 0;
	l->backlog = SECOND_ARGUMENT();
	l->last_listen = bpf_ktime_get_ns();
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_connect")
int connect_returned(struct syscall_exit *call)
{
	__u32 error;
	__u64 sk;

	if (!fails_without_syn(call->ret, &error))
		return 0;
	sk = tcp_socket(FIRST_ARGUMENT());
	if (!sk || CAST(sk, struct sock_common)->skc_state != TCP_CLOSE || CAST(sk, struct tcp_sock)->write_seq)
		return 0;
	count_event(CAST(LOADP(sk, struct sock_common, skc_net.net), struct net), EVENT_CONNECT_FAILED, error);
	return 0;
}
