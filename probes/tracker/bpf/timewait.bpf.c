// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The lives of time-wait mini-sockets: those in TIME_WAIT, and those that stand in
 * for an orphan in FIN_WAIT2. The tracepoint says CLOSE when one takes over; its
 * full socket's place says what it is.
 */
#include "namespaces.h"
#include "seconds.h"
#include "sockets.h"
#include "registers.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

volatile const __u32 waits_edge, ends_edge, orphan_ends_edge; /* tcpstate.Index */

/* What tcp_timewait_state_process works on. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} processed SEC(".maps");

static __always_inline __u32 state_of(__u64 tw)
{
	return BPF_CORE_READ((struct inet_timewait_sock *)tw, tw_substate);
}

static __always_inline __u32 slot_of_waiting(__u64 tw)
{
	return find_slot_of(BPF_CORE_READ((struct inet_timewait_sock *)tw, __tw_common.skc_net.net));
}

static __always_inline void count_edge(__u32 slot, __u32 edge)
{
	struct namespace_counts *counts = bpf_map_lookup_elem(&namespaces, &slot);

	if (counts && edge < EDGES)
		add(&counts->edges[edge], 1);
}

/* DCCP's sockets wait, too. A mini-socket has no sk_protocol. */
static __always_inline int is_tcp(__u64 tw)
{
	struct inet_timewait_sock *waiting = (struct inet_timewait_sock *)tw;
	char first = 0;

	BPF_CORE_READ_INTO(&first, waiting, __tw_common.skc_prot, name[0]);
	return first == 'T'; /* TCP, TCPv6 */
}

static __always_inline int begins(__u64 tw, __u64 sk)
{
	struct place *place = find_socket(sk);
	__u64 now = bpf_ktime_get_ns();
	__u32 state = state_of(tw);

	if (BPF_CORE_READ((struct sock *)sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	if (!place) { /* older than the tracker: nobody knows since when */
		begin_socket(sk, 0, 0, 0);
		place = find_socket(sk);
	}
	if (!place)
		return 0;
	place->waits_as = state;
	if (state == TCP_TIME_WAIT)
		begin_socket(tw, now, state, 0);
	else
		begin_socket(tw, place->state == state ? place->since : 0, state, 0);
	return 0;
}

static __always_inline void leaves(__u32 slot, struct place *place, __u32 state, __u64 now)
{
	if (place->since && place->state == state)
		observe_state(slot, state, now - place->since);
}

/* An orphan's FIN has come. */
static __always_inline int waits(__u64 tw, struct place *place)
{
	__u32 slot = slot_of_waiting(tw);
	__u64 now = bpf_ktime_get_ns();

	count_edge(slot, waits_edge);
	leaves(slot, place, TCP_FIN_WAIT2, now);
	place->since = now;
	place->state = TCP_TIME_WAIT;
	return 0;
}

static __always_inline int process_begins(__u64 tw)
{
	__u64 *now_processed;
	__u32 zero = 0;

	if (state_of(tw) != TCP_FIN_WAIT2)
		return 0;
	now_processed = bpf_map_lookup_elem(&processed, &zero);
	if (!now_processed)
		return 0;
	if (!find_socket(tw)) /* older than the tracker */
		begin_socket(tw, 0, TCP_FIN_WAIT2, 0);
	*now_processed = tw;
	return 0;
}

static __always_inline int process_ends(void)
{
	struct place *place;
	__u32 zero = 0;
	__u64 *tw = bpf_map_lookup_elem(&processed, &zero);

	if (!tw || !*tw)
		return 0;
	place = find_socket(*tw); /* gone if the mini-socket is */
	if (place && place->state == TCP_FIN_WAIT2 && state_of(*tw) == TCP_TIME_WAIT)
		waits(*tw, place);
	*tw = 0;
	return 0;
}

static __always_inline int ends(__u64 tw)
{
	struct place was = {};
	int known = take_socket(tw, &was);
	__u32 slot, state = state_of(tw);

	if (!known && !is_tcp(tw))
		return 0;
	slot = slot_of_waiting(tw);
	count_edge(slot, state == TCP_TIME_WAIT ? ends_edge : orphan_ends_edge);
	if (known)
		leaves(slot, &was, state, bpf_ktime_get_ns());
	return 0;
}

SEC("fentry/inet_twsk_hashdance")
int BPF_PROG(socket_waits, __u64 tw, __u64 sk)
{
	return begins(tw, sk);
}

SEC("kprobe/inet_twsk_hashdance")
int BPF_KPROBE(socket_waits_kprobe, __u64 tw, __u64 sk)
{
	return begins(tw, sk);
}

SEC("fentry/tcp_timewait_state_process")
int BPF_PROG(segment_for_waiting, __u64 tw)
{
	return process_begins(tw);
}

SEC("kprobe/tcp_timewait_state_process")
int BPF_KPROBE(segment_for_waiting_kprobe, __u64 tw)
{
	return process_begins(tw);
}

SEC("fexit/tcp_timewait_state_process")
int BPF_PROG(segment_processed)
{
	return process_ends();
}

SEC("kretprobe/tcp_timewait_state_process")
int BPF_KRETPROBE(segment_processed_kprobe)
{
	return process_ends();
}

SEC("fentry/inet_twsk_kill")
int BPF_PROG(waiting_ends, __u64 tw)
{
	return ends(tw);
}

SEC("kprobe/inet_twsk_kill")
int BPF_KPROBE(waiting_ends_kprobe, __u64 tw)
{
	return ends(tw);
}
