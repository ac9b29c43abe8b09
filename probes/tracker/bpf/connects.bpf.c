// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* connect() where it fails before there is a state to change, whoever calls it: a
 * system call, io_uring, or sendmsg() with MSG_FASTOPEN.
 */
#include "connects.h"
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline int has_sent_syn(struct sock *tcp)
{
	return BPF_CORE_READ(tcp, __sk_common.skc_state) != TCP_CLOSE || BPF_CORE_READ((struct tcp_sock *)tcp, write_seq);
}

static __always_inline int connect_ends(struct socket *socket, int returned)
{
	struct sock *sk = socket->sk, *tcp = sk;
	__u32 error;

	if (!fails_without_syn(returned, &error) || !sk || sk->sk_type != SOCK_STREAM)
		return 0;
	if (sk->sk_protocol == IPPROTO_MPTCP && bpf_core_field_exists(struct mptcp_sock, first))
		tcp = BPF_CORE_READ((struct mptcp_sock *)sk, first); /* a TCP socket carries it, once there is one */
	else if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (tcp ? has_sent_syn(tcp) : sk->__sk_common.skc_state != TCP_CLOSE)
		return 0;
	return count_event(sk->__sk_common.skc_net.net, EVENT_CONNECT_FAILED, error);
}

/* Before 6.6 MPTCP calls it once more, for the TCP socket. */
SEC("fexit/__inet_stream_connect")
int BPF_PROG(connect_ended_5, struct socket *socket, void *address, int length, int flags, int sends, int returned)
{
	struct sock *sk = socket->sk;

	if (bpf_core_field_exists(struct mptcp_sock, subflow) && sk && sk->sk_protocol == IPPROTO_MPTCP)
		return 0;
	return connect_ends(socket, returned);
}

/* A security module refuses before the protocol is asked. */
SEC("fexit/security_socket_connect")
int BPF_PROG(connect_allowed_3, struct socket *socket, void *address, int length, int returned)
{
	return connect_ends(socket, returned);
}
