// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What comes in at a listener: connections into the accept queue and how long it
 * gets, final ACKs that it does not take, SYN-ACKs that have to be sent again.
 */
#include "arrival.h"
#include "listeners.h"
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

volatile const __u32 listen_overflow; /* SKB_DROP_REASON_TCP_LISTEN_OVERFLOW (6.17+) */

static __always_inline int listens(struct sock *sk)
{
	/* Other families listen, too. */
	return sk->__sk_common.skc_state == TCP_LISTEN && sk->sk_protocol == IPPROTO_TCP;
}

/* It gives the listener a cookie where it has none. */
static __always_inline struct listener_counts *counts_by_cookie(struct sock *sk)
{
	return find_listener(bpf_get_socket_cookie(sk), sk);
}

/* joins_connection tells whether a child is a further path of an MPTCP connection
 * (MP_JOIN, RFC 8684), which nobody accepts.
 */
static __always_inline int joins_connection(__u64 child)
{
	if (!bpf_core_field_exists(struct mptcp_subflow_context, mp_join) || !CAST(child, struct tcp_sock)->is_mptcp)
		return 0;
	return BPF_CORE_READ_BITFIELD_PROBED(
		(struct mptcp_subflow_context *)LOADP(child, struct inet_connection_sock, icsk_ulp_data), mp_join);
}

/* It comes twice for a connection: the first time after the child's change of
 * state on this CPU, when the child is in the queue.
 */
SEC("tp_btf/sk_data_ready")
int BPF_PROG(connection_arrived, struct sock *sk)
{
	struct listener_counts *l;
	struct cpu *cpu;
	__u32 zero = 0;
	int joins;

	if (!listens(sk))
		return 0;
	cpu = bpf_map_lookup_elem(&cpus, &zero);
	if (!cpu || !cpu->child || cpu->child_net != (__u64)sk->__sk_common.skc_net.net)
		return 0;
	joins = joins_connection(cpu->child);
	cpu->child = 0;
	if (joins)
		return 0;
	l = counts_by_cookie(sk);
	if (!l)
		return 0;
	count_arrival(l, cpu->child_since, sk->sk_ack_backlog, sk->sk_max_ack_backlog);
	return 0;
}

/* rx_sk may be a time-wait mini-socket for other reasons. */
SEC("tp_btf/kfree_skb")
int BPF_PROG(final_ack_refused, struct sk_buff *skb, void *location, __u32 reason, struct sock *sk)
{
	struct listener_counts *l;
	__u32 drop = DROP_ACCEPT_QUEUE_FULL_ACK;

	if (reason != listen_overflow || !sk || !listens(sk))
		return 0;
	/* The kernel says so, too, where it has no memory for the child. */
	if (sk->sk_ack_backlog <= sk->sk_max_ack_backlog)
		return 0;
	l = counts_by_cookie(sk);
	if (!l)
		return 0;
	if (sk->__sk_common.skc_net.net->ipv4.sysctl_tcp_abort_on_overflow)
		drop = DROP_ACCEPT_QUEUE_FULL_RESET;
	add(&l->drops[drop], 1);
	return 0;
}

/* For Fast Open sk is the child. */
SEC("tp_btf/tcp_retransmit_synack")
int BPF_PROG(synack_retransmitted, struct sock *sk, struct request_sock *req)
{
	struct listener_counts *l;

	if (!listens(sk))
		return 0;
	l = counts_by_cookie(sk);
	if (l)
		add(&l->synack_retransmits, 1);
	return 0;
}
