// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* RST segments sent and received. */
#include "events.h"
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

volatile const __u8 has_reason; /* tcp_send_reset tells why (6.10+) */

/* sk is NULL where nobody listens (6.12+; before, such a RST is not traced), and
 * may be a mini-socket; skb is NULL when a socket resets on its own.
 */
SEC("tp_btf/tcp_send_reset")
int BPF_PROG(reset_sent, struct sock *sk, struct sk_buff *skb)
{
	__u32 reason = 0;
	struct net *net;

	if (sk)
		net = sk->__sk_common.skc_net.net;
	else if (skb)
		net = skb->dev->nd_net.net;
	else
		return 0;
	if (has_reason)
		reason = ctx[2];
	count_event(net, EVENT_RESET_SENT, reason);
	return 0;
}

SEC("tp_btf/tcp_receive_reset")
int BPF_PROG(reset_received, struct sock *sk)
{
	count_event(sk->__sk_common.skc_net.net, EVENT_RESET_RECEIVED, 0);
	return 0;
}
