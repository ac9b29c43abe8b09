// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Every change of state of a full socket: which edge it was, how long the socket
 * had been in the state that it leaves, and what became of a connect().
 */
#include "events.h"
#include "seconds.h"
#include "sockets.h"
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ECONNABORTED 103
#define ECONNRESET 104
#define ENETUNREACH 101
#define EPIPE 32
#define ETIMEDOUT 110
#define ECONNREFUSED 111
#define EHOSTUNREACH 113

#define SEEN 4
#define SEEN_SHIFT 10

struct seen_bucket {
	__u64 events[SEEN]; /* 0: free */
};

/* Changes of state that state_changed saw and state_changed_again did not yet, by
 * socket: from 7.0 a task may go on on another CPU between the two.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << SEEN_SHIFT);
	__type(key, __u32);
	__type(value, struct seen_bucket);
} seen SEC(".maps");

volatile const __u8 edges[16][16];	/* tcpstate.Index + 1, 0: unexpected */
volatile const __u8 destroy_is_traced;	/* socket_destroyed forgets sockets */
volatile const __u8 time_wait_is_traced; /* socket_waits tells what becomes a mini-socket */
volatile const __u8 misses_are_taken_over; /* state_changed_again comes after state_changed */

/* tcp_time_wait and an orphan's FIN_WAIT2 end the full socket while a time-wait
 * mini-socket lives on: the tracepoint says CLOSE. It is the truth where the
 * connection was ended by force.
 */
static __always_inline int hides_time_wait(struct sock *sk, __u32 from, __u32 to)
{
	int err;

	if (to != TCP_CLOSE || (from != TCP_FIN_WAIT2 && from != TCP_CLOSING))
		return 0;
	if (time_wait_is_traced && find_socket((__u64)sk)) /* which goes_on_as has asked */
		return 0;
	err = sk->sk_err;
	return err != ECONNRESET && err != EPIPE && err != ETIMEDOUT && err != ECONNABORTED;
}

/* goes_on_as is the state of the mini-socket that takes a closing socket over. */
static __always_inline __u32 goes_on_as(struct sock *sk, __u32 from, __u32 to)
{
	struct place *place;

	if (!time_wait_is_traced || to != TCP_CLOSE || (from != TCP_FIN_WAIT2 && from != TCP_CLOSING))
		return to;
	place = find_socket((__u64)sk);
	return place && place->waits_as ? place->waits_as : to;
}

static __always_inline __u32 connect_error(struct sock *sk)
{
	switch (sk->sk_err) {
	case ECONNREFUSED:
		return CONNECT_REFUSED;
	case ETIMEDOUT:
		return CONNECT_TIMEOUT;
	case EHOSTUNREACH:
		return CONNECT_HOST_UNREACHABLE;
	case ENETUNREACH:
		return CONNECT_NET_UNREACHABLE;
	case ECONNRESET:
		return CONNECT_RESET;
	case 0:
		/* inet_hash_connect found no port, or the one asked for is
		 * taken: no SYN was made yet.
		 */
		if (!BPF_CORE_READ((struct inet_sock *)sk, inet_sport) ||
		    !BPF_CORE_READ((struct tcp_sock *)sk, write_seq))
			return CONNECT_NO_PORTS;
		return CONNECT_CLOSED;
	}
	return CONNECT_OTHER;
}

/* Where both ends opened at once a connect() fails in SYN_RECV, as children of
 * listeners do that lost their request to another CPU.
 */
static __always_inline int connect_failed(struct sock *sk, __u32 from, __u32 to)
{
	struct place *place;

	if (to != TCP_CLOSE || from != TCP_SYN_RECV)
		return to == TCP_CLOSE && from == TCP_SYN_SENT;
	place = find_socket((__u64)sk);
	return place && !place->arrived;
}

static __always_inline struct namespace_counts *
count_edge(struct sock *sk, struct net *net, __u32 slot, __u32 from, __u32 to, int timed)
{
	struct namespace_counts *counts = bpf_map_lookup_elem(&namespaces, &slot);
	__u32 edge = edges[from & 15][to & 15] - 1U;

	if (!counts)
		return NULL;
	asm volatile("" : "+r"(edge)); /* the register that is checked is the one that is used */
	if (edge >= EDGES)
		count_event(net, EVENT_UNEXPECTED, from << 8 | to);
	else if (!hides_time_wait(sk, from, to))
		add(&counts->edges[edge], 1);
	if (timed && connect_failed(sk, from, to))
		count_event(net, EVENT_CONNECT_FAILED, connect_error(sk));
	return counts;
}

/* remember_child until sk_data_ready tells whose child it is. It has its listener's
 * cookie and port on older kernels, its own on newer ones.
 */
static __always_inline void remember_child(struct sock *sk, struct cpu *cpu, __u64 now)
{
	cpu->child = (__u64)sk;
	cpu->child_since = now;
	cpu->child_net = (__u64)sk->__sk_common.skc_net.net;
}

/* begins_life tells a socket's first change of state from those of its life. */
static __always_inline int begins_life(__u32 from, __u32 to)
{
	return from == TCP_CLOSE || (from == TCP_LISTEN && to == TCP_SYN_RECV);
}

static __always_inline void time_state(struct sock *sk, struct cpu *cpu, struct namespace_counts *counts, __u32 slot,
				       __u32 from, __u32 to)
{
	__u32 connects = from == TCP_SYN_SENT && to == TCP_ESTABLISHED;
	struct place *place;
	__u64 now, spent;

	if (begins_life(from, to)) {
		now = bpf_ktime_get_ns();
		begin_socket((__u64)sk, now, to, from == TCP_LISTEN ? now : 0);
		if (from == TCP_LISTEN)
			remember_child(sk, cpu, now);
		return;
	}
	if (to == TCP_CLOSE && cpu->child == (__u64)sk)
		cpu->child = 0; /* another CPU made a child of the same request */
	if (connects || (observed & (1 << from | 1 << to))) {
		place = find_socket((__u64)sk);
		if (!place) /* older than the tracker */
			return;
		now = bpf_ktime_get_ns();
		spent = now - place->since;
		if (place->state == from && connects)
			observe(&counts->connects, spent);
		/* A child was a request before, which had that time. */
		if (place->state == from && !(from == TCP_SYN_RECV && place->arrived))
			observe_state(slot, from, spent);
		place->since = now;
		place->state = to;
	}
	if (to == TCP_CLOSE && !destroy_is_traced)
		end_socket((__u64)sk);
}

/* The kernel does not start a program that runs already on that CPU: state_changed
 * misses a change that an interrupt brings there, about one in a million, and from
 * 7.0 those of tasks that take the CPU from it. There state_changed_again comes
 * after it and takes what it did not see. An event that finds both running is lost;
 * the kernel counts it.
 */
static __always_inline __u64 seen_as(__u64 sk, __u32 from, __u32 to)
{
	__u32 low;

	asm volatile("%0 = %1" : "=w"(low) : "w"((__u32)sk)); /* as bucket_of_socket */
	return (__u64)(1 << 8 | from << 4 | to) << 32 | low;
}

static __always_inline struct seen_bucket *bucket_of_event(__u64 event)
{
	__u32 bucket = (__u32)event * 0x9e3779b1U >> (32 - SEEN_SHIFT); /* Fibonacci hashing */

	return bpf_map_lookup_elem(&seen, &bucket);
}

static __always_inline void remember_seen(__u64 event)
{
	struct seen_bucket *b = bucket_of_event(event);

	if (!b)
		return;
	for (int i = 0; i < SEEN; i++)
		if (!b->events[i] && !__sync_val_compare_and_swap(&b->events[i], 0, event))
			return;
	/* The other program missed that many. */
	for (int i = 1; i < SEEN; i++)
		*(volatile __u64 *)&b->events[i] = 0;
	*(volatile __u64 *)&b->events[0] = event;
}

static __always_inline int was_seen(__u64 event)
{
	struct seen_bucket *b = bucket_of_event(event);

	if (!b)
		return 0;
	for (int i = 0; i < SEEN; i++)
		if (b->events[i] == event && __sync_val_compare_and_swap(&b->events[i], event, 0) == event)
			return 1;
	return 0;
}

enum turn { ONLY, FIRST, AGAIN };

static __always_inline int change_state(struct sock *sk, __u32 from, __u32 to, enum turn turn)
{
	struct namespace_counts *counts;
	__u32 zero = 0, slot;
	int timed = turn != ONLY;
	struct cpu *cpu;
	struct net *net;

	/* MPTCP's own sockets have another protocol; its subflows are TCP. */
	if (from == to || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	cpu = bpf_map_lookup_elem(&cpus, &zero);
	if (!cpu)
		return 0;
	if (turn == FIRST && misses_are_taken_over)
		remember_seen(seen_as((__u64)sk, from, to));
	if (turn == AGAIN) {
		if (was_seen(seen_as((__u64)sk, from, to)))
			return 0;
		add(&cpu->taken_over, 1);
	}
	to = goes_on_as(sk, from, to);
	if (to == from)
		return 0;
	net = sk->__sk_common.skc_net.net;
	slot = slot_of(net);
	counts = count_edge(sk, net, slot, from, to, timed);
	if (!counts || !timed)
		return 0;
	if (to == TCP_LISTEN) /* gives it one, so that all programs can read it */
		bpf_get_socket_cookie(sk);
	time_state(sk, cpu, counts, slot, from, to);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_changed, struct sock *sk, int from, int to)
{
	return change_state(sk, from, to, FIRST);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_changed_again, struct sock *sk, int from, int to)
{
	return change_state(sk, from, to, AGAIN);
}

/* For kernels before 5.12. */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_changed_untimed, struct sock *sk, int from, int to)
{
	return change_state(sk, from, to, ONLY);
}

/* The kernel uses the address again at once. */
SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(socket_destroyed, struct sock *sk)
{
	end_socket((__u64)sk);
	return 0;
}
