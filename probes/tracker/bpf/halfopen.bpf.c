// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The lives of half-open requests, from the SYN to the accept queue or whatever
 * other end they find, and of connections that nobody accepts. A request's place
 * in the table of sockets keeps since when it is there and, in place of when it
 * arrived, what may be its end; what was the last when it is freed is it.
 */
#include "namespaces.h"
#include "listeners.h"
#include "seconds.h"
#include "sockets.h"
#include "watch.h"
#include "registers.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

volatile const __u32 request_begins_edge, request_completes_edge, request_ends_edge; /* tcpstate.Index */

/* What the return of a function has to know from its entry or from others. */
struct pending {
	__u64 began;
	__u64 listener;
	__u64 completed;
	__u64 cloned;
	__u64 clone; /* what goes into the accept queue for it if a final ACK brought that about */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pending);
} pendings SEC(".maps");

static __always_inline struct pending *this_pending(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&pendings, &zero);
}

/* take_pending is what the entry of a function left, which is 0 where it was missed. */
static __always_inline __u64 take_pending(__u64 *left)
{
	__u64 value = *left;

	*left = 0;
	return value;
}

static __always_inline struct sock *listener_of(struct request_sock *request)
{
	return BPF_CORE_READ(request, __req_common.skc_listener);
}

static __always_inline int listens(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_LISTEN;
}

static __always_inline __u32 slot_of_listener(struct sock *listener)
{
	return find_slot_of(BPF_CORE_READ(listener, __sk_common.skc_net.net));
}

static __always_inline void count_edge(__u32 slot, __u32 edge)
{
	struct namespace_counts *counts = bpf_map_lookup_elem(&namespaces, &slot);

	if (counts && edge < EDGES)
		add(&counts->edges[edge], 1);
}

static __always_inline void count_end(struct sock *listener, enum half_open_end end)
{
	struct listener_counts *l = counts_of(listener);

	asm volatile("" : "+r"(end)); /* the register that is checked is the one that is used */
	if (l && end < HALF_OPEN_ENDS)
		add(&l->half_open_ended[end], 1);
}

static __always_inline int begins(struct request_sock *request)
{
	struct sock *listener = listener_of(request);

	if (BPF_CORE_READ(listener, sk_protocol) != IPPROTO_TCP) /* DCCP has requests, too */
		return 0;
	if (begin_socket((__u64)request, bpf_ktime_get_ns(), TCP_NEW_SYN_RECV, HALF_OPEN_ENDS)) /* else nobody sees its end */
		count_edge(slot_of_listener(listener), request_begins_edge);
	return 0;
}

/* Who takes a request's place counts its end: accept() on another CPU may free it
 * before the function returns that put it into the accept queue. A mini-socket may
 * have left its place at the address of a request that has none.
 */
static __always_inline int take_request(__u64 request, struct place *was)
{
	return take_socket(request, was) && was->state == TCP_NEW_SYN_RECV;
}

/* A final ACK is in tcp_check_req on this CPU. */
static __always_inline int is_checked(__u64 request)
{
	struct watch *w = this_watch();

	return w && w->listener && w->request == request;
}

static __always_inline void count_completed(struct sock *listener, struct place *was)
{
	__u32 slot = slot_of_listener(listener);
	struct listener_counts *l = counts_of(listener);
	__u64 spent = bpf_ktime_get_ns() - was->since;

	count_edge(slot, request_completes_edge);
	count_end(listener, END_COMPLETED);
	observe_state(slot, TCP_SYN_RECV, spent);
	if (l)
		observe(&l->handshake, spent);
}

static __always_inline int completes(struct sock *listener, __u64 request)
{
	struct pending *p = this_pending();
	struct place was;

	if (p && p->cloned == request)
		request = p->clone;
	if (p)
		p->cloned = 0;
	if (take_request(request, &was)) /* else older than the tracker */
		count_completed(listener, &was);
	return 0;
}

/* marks keeps what may be the end of a request; tcp_abort is for all sockets. */
static __always_inline int marks(struct request_sock *request, enum half_open_end end)
{
	struct place *place = find_socket((__u64)request);

	if (place && place->state == TCP_NEW_SYN_RECV)
		place->arrived = end;
	return 0;
}

static __always_inline int timer_fires(struct timer_list *timer)
{
	__u64 request = (__u64)timer - bpf_core_field_offset(struct request_sock, rsk_timer);

	return marks((struct request_sock *)request, END_EXPIRED);
}

static __always_inline int migrates(__u64 request, struct request_sock *clone)
{
	struct sock *listener = listener_of((struct request_sock *)request);
	struct pending *p = this_pending();
	struct place was;

	if (!p)
		return 0;
	p->cloned = 0;
	if (!clone || !take_request(request, &was))
		return 0;
	count_edge(slot_of_listener(listener), request_ends_edge);
	count_end(listener, END_MIGRATED);
	/* The timer that clones it may end it at once. */
	if (begin_socket((__u64)clone, was.since, TCP_NEW_SYN_RECV, was.arrived))
		count_edge(slot_of_listener(listener_of(clone)), request_begins_edge);
	if (is_checked(request)) {
		p->cloned = request;
		p->clone = (__u64)clone;
	}
	return 0;
}

static __always_inline int ends(struct request_sock *request)
{
	struct sock *listener;
	struct place was;
	__u32 end, slot;

	if (!take_request((__u64)request, &was))
		return 0;
	listener = listener_of(request);
	/* accept() was faster than the end of request_completed's function, or it
	 * adds a path to an MPTCP connection (MP_JOIN), which has no accept queue:
	 * of others nothing is freed before tcp_check_req returns.
	 */
	if (BPF_CORE_READ(request, sk) || is_checked((__u64)request)) {
		count_completed(listener, &was);
		return 0;
	}
	end = was.arrived;
	if (end != END_DESTROYED && !listens(listener))
		end = END_LISTENER_CLOSED;
	if (end == HALF_OPEN_ENDS) /* nobody said why */
		end = END_DESTROYED;
	slot = slot_of_listener(listener);
	count_edge(slot, request_ends_edge);
	count_end(listener, end);
	observe_state(slot, TCP_SYN_RECV, bpf_ktime_get_ns() - was.since);
	return 0;
}

static __always_inline int abandons(struct sock *sk)
{
	struct listener_counts *l;

	if (BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP) /* DCCP has accept queues, too */
		return 0;
	l = counts_of(sk);
	if (l)
		add(&l->abandoned, 1);
	return 0;
}

/* 5.10 returns nothing; it has one argument less since 7.0. False where the same
 * request was there already.
 */
SEC("fexit/inet_csk_reqsk_queue_hash_add")
int BPF_PROG(request_began_void, void *sk, struct request_sock *request)
{
	return begins(request);
}

SEC("fexit/inet_csk_reqsk_queue_hash_add")
int BPF_PROG(request_began_3, void *sk, struct request_sock *request, unsigned long timeout, __u64 added)
{
	return added & 0xff ? begins(request) : 0;
}

SEC("fexit/inet_csk_reqsk_queue_hash_add")
int BPF_PROG(request_began_2, void *sk, struct request_sock *request, __u64 added)
{
	return added & 0xff ? begins(request) : 0;
}

SEC("kprobe/inet_csk_reqsk_queue_hash_add")
int BPF_KPROBE(request_began_entry_kprobe, void *sk, __u64 request)
{
	struct pending *p = this_pending();

	if (p)
		p->began = request;
	return 0;
}

SEC("kretprobe/inet_csk_reqsk_queue_hash_add")
int BPF_KRETPROBE(request_began_kprobe, __u64 added)
{
	struct pending *p = this_pending();
	__u64 request = p ? take_pending(&p->began) : 0;

	return request && added & 0xff ? begins((struct request_sock *)request) : 0;
}

SEC("kretprobe/inet_csk_reqsk_queue_hash_add")
int BPF_KRETPROBE(request_began_void_kprobe)
{
	struct pending *p = this_pending();
	__u64 request = p ? take_pending(&p->began) : 0;

	return request ? begins((struct request_sock *)request) : 0;
}

SEC("fexit/inet_csk_complete_hashdance")
int BPF_PROG(request_completed_4, struct sock *sk, void *child, __u64 request, int own, void *taken)
{
	return taken ? completes(sk, request) : 0;
}

SEC("kprobe/inet_csk_complete_hashdance")
int BPF_KPROBE(request_completed_entry_kprobe, __u64 sk, void *child, __u64 request)
{
	struct pending *p = this_pending();

	if (p) {
		p->listener = sk;
		p->completed = request;
	}
	return 0;
}

SEC("kretprobe/inet_csk_complete_hashdance")
int BPF_KRETPROBE(request_completed_kprobe, void *taken)
{
	struct pending *p = this_pending();
	__u64 request = p ? take_pending(&p->completed) : 0;

	return request && taken ? completes((struct sock *)p->listener, request) : 0;
}

SEC("kprobe/reqsk_timer_handler")
int BPF_KPROBE(request_timer_fired_kprobe, struct timer_list *timer)
{
	return timer_fires(timer);
}

SEC("kprobe/tcp_abort")
int BPF_KPROBE(socket_aborted_kprobe, struct request_sock *request)
{
	return marks(request, END_DESTROYED);
}

SEC("kprobe/inet_reqsk_clone")
int BPF_KPROBE(request_cloned_entry_kprobe, __u64 request)
{
	struct pending *p = this_pending();

	if (p)
		p->cloned = request;
	return 0;
}

SEC("kretprobe/inet_reqsk_clone")
int BPF_KRETPROBE(request_cloned_kprobe, struct request_sock *clone)
{
	struct pending *p = this_pending();
	__u64 request = p ? take_pending(&p->cloned) : 0;

	return request ? migrates(request, clone) : 0;
}

SEC("kprobe/tcp_v4_reqsk_destructor")
int BPF_KPROBE(request_ended_kprobe, struct request_sock *request)
{
	return ends(request);
}

SEC("kprobe/inet_child_forget")
int BPF_KPROBE(connection_abandoned_kprobe, struct sock *sk)
{
	return abandons(sk);
}

SEC("fentry/reqsk_timer_handler")
int BPF_PROG(request_timer_fired, struct timer_list *timer)
{
	return timer_fires(timer);
}

SEC("fentry/tcp_abort")
int BPF_PROG(socket_aborted, struct request_sock *request)
{
	return marks(request, END_DESTROYED);
}

SEC("fexit/inet_reqsk_clone")
int BPF_PROG(request_cloned_2, __u64 request, void *listener, struct request_sock *clone)
{
	return migrates(request, clone);
}

SEC("fentry/tcp_v4_reqsk_destructor")
int BPF_PROG(request_ended, struct request_sock *request)
{
	return ends(request);
}

SEC("fentry/inet_child_forget")
int BPF_PROG(connection_abandoned, struct sock *sk)
{
	return abandons(sk);
}
