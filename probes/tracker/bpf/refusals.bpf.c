// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What became of each SYN and each final ACK: the kernel's own counters say that a
 * listener refused it, and most of the time why; the rest is found out by what
 * failed on the way. Kernels do not say to whom it happened, these programs do.
 */
#include "listeners.h"
#include "sockets.h"
#include "watch.h"
#include "registers.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline int listens(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_LISTEN;
}

/* A final ACK gets here with its listener, one of Fast Open with the child. */
static __always_inline int watch_begins(struct sock *sk, __u64 request)
{
	struct watch *w = this_watch();

	if (!w)
		return 0;
	w->listener = 0;
	if (listens(sk))
		begin_watch(w, sk, request);
	return 0;
}

/* mark_request keeps what may be the end of a request; the last one is it. */
static __always_inline void mark_request(__u64 request, enum half_open_end end)
{
	struct place *place = find_socket(request);

	if (place && place->state == TCP_NEW_SYN_RECV)
		place->arrived = end;
}

/* tcp_req_err frees the request before it returns. Requests outlive their listener. */
static __always_inline int icmp_begins(struct request_sock *request)
{
	struct watch *w = this_watch();

	mark_request((__u64)request, END_ICMP);
	if (w)
		begin_watch(w, BPF_CORE_READ(request, __req_common.skc_listener), 0);
	return 0;
}

static __always_inline int syn_begins(struct sock *sk)
{
	struct listener_counts *l;

	watch_begins(sk, 0);
	l = counts_of(sk);
	if (l)
		add(&l->syns, 1);
	return 0;
}

/* tcp_conn_request looks at max_syn_backlog last, where there are no SYN cookies. */
static __always_inline enum drop_reason why_syn(struct watch *w)
{
	struct inet_connection_sock *listener = (struct inet_connection_sock *)w->listener;
	struct netns_ipv4 *ipv4 = &BPF_CORE_READ((struct sock *)listener, __sk_common.skc_net.net)->ipv4;
	int most = BPF_CORE_READ(ipv4, sysctl_max_syn_backlog);

	if (counted(w, WATCHED_LISTEN_OVERFLOWS))
		return DROP_ACCEPT_QUEUE_FULL_SYN;
	if (counted(w, WATCHED_SYN_QUEUE_FULL))
		return DROP_SYN_QUEUE_FULL;
	if (w->found & 1 << DROP_NO_MEMORY)
		return DROP_NO_MEMORY;
	if (w->found & 1 << DROP_POLICY)
		return DROP_POLICY;
	if (w->found & 1 << DROP_NO_ROUTE)
		return DROP_NO_ROUTE;
	if (!BPF_CORE_READ(ipv4, sysctl_tcp_syncookies) &&
	    most - BPF_CORE_READ(listener, icsk_accept_queue.qlen.counter) < most >> 2)
		return DROP_MAX_SYN_BACKLOG;
	return DROP_OTHER;
}

static __always_inline enum drop_reason why_ack(struct watch *w)
{
	struct sock *listener = (struct sock *)w->listener;
	struct net *net = BPF_CORE_READ(listener, __sk_common.skc_net.net);

	if (!counted(w, WATCHED_LISTEN_OVERFLOWS))
		return DROP_OTHER;
	if (w->request && BPF_CORE_READ(net, ipv4.sysctl_tcp_abort_on_overflow))
		return DROP_ACCEPT_QUEUE_FULL_RESET;
	return DROP_ACCEPT_QUEUE_FULL_ACK;
}

/* watch_ends tells what was dropped meanwhile. */
static __always_inline struct listener_counts *watch_ends(struct watch *w, __u64 *drops)
{
	struct listener_counts *l;

	if (!w || !w->listener)
		return NULL;
	*drops = counted(w, WATCHED_LISTEN_DROPS);
	l = counts_of((struct sock *)w->listener);
	if (!l)
		w->listener = 0;
	return l;
}

static __always_inline void count_drops(struct listener_counts *l, enum drop_reason reason, __u64 drops)
{
	asm volatile("" : "+r"(reason)); /* the register that is checked is the one that is used */
	if (reason < DROP_REASONS)
		add(&l->drops[reason], drops);
}

static __always_inline int syn_ends(void)
{
	struct watch *w = this_watch();
	struct listener_counts *l;
	__u64 drops;

	l = watch_ends(w, &drops);
	if (!l)
		return 0;
	add(&l->cookies_sent, counted(w, WATCHED_COOKIES_SENT));
	if (drops)
		count_drops(l, why_syn(w), drops);
	w->listener = 0;
	return 0;
}

static __always_inline int ack_ends(__u64 returned)
{
	struct watch *w = this_watch();
	enum drop_reason reason;
	struct listener_counts *l;
	__u64 drops;

	l = watch_ends(w, &drops);
	if (!l)
		return 0;
	reason = why_ack(w);
	if (drops)
		count_drops(l, reason, drops);
	if (!returned && !(drops && reason == DROP_ACCEPT_QUEUE_FULL_ACK))
		mark_request(w->request, drops ? END_OVERFLOW_RESET : END_RESET);
	w->listener = 0;
	return 0;
}

static __always_inline int cookie_ends(void)
{
	struct watch *w = this_watch();
	struct listener_counts *l;
	__u64 drops;

	l = watch_ends(w, &drops);
	if (!l)
		return 0;
	add(&l->cookies_validated, counted(w, WATCHED_COOKIES_VALIDATED));
	if (drops)
		count_drops(l, why_ack(w), drops);
	w->listener = 0;
	return 0;
}

static __always_inline int icmp_ends(void)
{
	struct watch *w = this_watch();
	struct listener_counts *l;
	__u64 drops;

	l = watch_ends(w, &drops);
	if (!l)
		return 0;
	if (drops)
		count_drops(l, DROP_ICMP, drops);
	w->listener = 0;
	return 0;
}

static __always_inline int found(enum drop_reason reason)
{
	struct watch *w = this_watch();

	if (w && w->listener)
		w->found |= 1 << reason;
	return 0;
}

SEC("fentry/tcp_conn_request")
int BPF_PROG(syn_arrived, void *rsk_ops, void *af_ops, struct sock *sk)
{
	return syn_begins(sk);
}

SEC("kprobe/tcp_conn_request")
int BPF_KPROBE(syn_arrived_kprobe, void *rsk_ops, void *af_ops, struct sock *sk)
{
	return syn_begins(sk);
}

SEC("fexit/tcp_conn_request")
int BPF_PROG(syn_answered)
{
	return syn_ends();
}

SEC("kretprobe/tcp_conn_request")
int BPF_KRETPROBE(syn_answered_kprobe)
{
	return syn_ends();
}

SEC("fexit/inet_reqsk_alloc")
int BPF_PROG(request_allocated_3, void *ops, void *listener, int attach, void *request)
{
	return request ? 0 : found(DROP_NO_MEMORY);
}

SEC("kretprobe/inet_reqsk_alloc")
int BPF_KRETPROBE(request_allocated_kprobe, void *request)
{
	return request ? 0 : found(DROP_NO_MEMORY);
}

SEC("fexit/security_inet_conn_request")
int BPF_PROG(request_allowed_3, void *sk, void *skb, void *request, int refused)
{
	return refused ? found(DROP_POLICY) : 0;
}

SEC("kretprobe/security_inet_conn_request")
int BPF_KRETPROBE(request_allowed_kprobe, int refused)
{
	return refused ? found(DROP_POLICY) : 0;
}

/* It has one argument more since 5.13 and another one since 6.10. */
SEC("fexit/tcp_v4_route_req")
int BPF_PROG(request_routed_3, void *sk, void *flow, void *request, void *route)
{
	return route ? 0 : found(DROP_NO_ROUTE);
}

SEC("fexit/tcp_v4_route_req")
int BPF_PROG(request_routed_4, void *sk, void *skb, void *flow, void *request, void *route)
{
	return route ? 0 : found(DROP_NO_ROUTE);
}

SEC("fexit/tcp_v4_route_req")
int BPF_PROG(request_routed_5, void *sk, void *skb, void *flow, void *request, __u32 isn, void *route)
{
	return route ? 0 : found(DROP_NO_ROUTE);
}

SEC("kretprobe/tcp_v4_route_req")
int BPF_KRETPROBE(request_routed_kprobe, void *route)
{
	return route ? 0 : found(DROP_NO_ROUTE);
}

SEC("fentry/tcp_check_req")
int BPF_PROG(final_ack_arrived, struct sock *sk, void *skb, void *request)
{
	return watch_begins(sk, (__u64)request);
}

SEC("kprobe/tcp_check_req")
int BPF_KPROBE(final_ack_arrived_kprobe, struct sock *sk, void *skb, void *request)
{
	return watch_begins(sk, (__u64)request);
}

/* It has one argument more since 6.14. */
SEC("fexit/tcp_check_req")
int BPF_PROG(final_ack_taken_5, void *sk, void *skb, void *request, int fastopen, void *stolen, void *child)
{
	return ack_ends((__u64)child);
}

SEC("fexit/tcp_check_req")
int BPF_PROG(final_ack_taken_6, void *sk, void *skb, void *request, int fastopen, void *stolen, void *reason, void *child)
{
	return ack_ends((__u64)child);
}

SEC("kretprobe/tcp_check_req")
int BPF_KRETPROBE(final_ack_taken_kprobe, void *child)
{
	return ack_ends((__u64)child);
}

SEC("fentry/cookie_v4_check")
int BPF_PROG(cookie_arrived, struct sock *sk)
{
	return watch_begins(sk, 0);
}

SEC("kprobe/cookie_v4_check")
int BPF_KPROBE(cookie_arrived_kprobe, struct sock *sk)
{
	return watch_begins(sk, 0);
}

SEC("fexit/cookie_v4_check")
int BPF_PROG(cookie_taken)
{
	return cookie_ends();
}

SEC("kretprobe/cookie_v4_check")
int BPF_KRETPROBE(cookie_taken_kprobe)
{
	return cookie_ends();
}

/* tcp_req_err takes the request as a struct sock. */
SEC("fentry/tcp_req_err")
int BPF_PROG(request_failed, struct request_sock *request)
{
	return icmp_begins(request);
}

SEC("kprobe/tcp_req_err")
int BPF_KPROBE(request_failed_kprobe, struct request_sock *request)
{
	return icmp_begins(request);
}

SEC("fexit/tcp_req_err")
int BPF_PROG(request_dropped_void)
{
	return icmp_ends();
}

SEC("kretprobe/tcp_req_err")
int BPF_KRETPROBE(request_dropped_void_kprobe)
{
	return icmp_ends();
}
