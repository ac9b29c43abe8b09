// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* A peer for the census: the kernel's own iterator over TCP sockets, which locks
 * each bucket and shows one namespace.
 */
#include "../../bpf/kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct bpf_iter_meta {
	__u64 seq_num;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

#pragma clang attribute pop

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64[TCP_STATES]);
} states SEC(".maps");

SEC("iter/tcp")
int count_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	__u64(*counts)[TCP_STATES];
	__u32 zero = 0;
	__u8 state;

	if (!sk)
		return 0;
	state = sk->skc_state;
	if (state == TCP_TIME_WAIT)
		state = CAST(sk, struct inet_timewait_sock)->tw_substate;
	if (state == TCP_NEW_SYN_RECV)
		state = TCP_SYN_RECV;
	counts = bpf_map_lookup_elem(&states, &zero);
	if (counts && state < TCP_STATES)
		(*counts)[state]++;
	return 0;
}
