// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Who has TCP sockets open: every file of every process of the reader's PID
 * namespace (iter/task_file). It runs in the reader's context, one reading at a
 * time, and holds a reference to each file meanwhile.
 *
 * Up to 6.1 there is no bpf_rdonly_cast, so what is behind a file is read by
 * bpf_probe_read_kernel.
 */
#include "census.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define SOCK_STREAM 1

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

#pragma clang attribute pop

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct reading);
} readings SEC(".maps");

/* The ports that namespaces listen on: inum << 16 | port, and the reading that
 * was told so last.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_LISTENING_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} ports SEC(".maps");

/* Connections that count, by their address: a further file of one is not counted,
 * and one that waits for the application to close it is known again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_HELD_SOCKETS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct held_socket);
} held SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PROCESSES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct process_key);
	__type(value, __u32);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_PROCESSES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct process_record);
} processes SEC(".maps");

/* Fills the reader's buffer, which ends its call. */
static const struct holder_record pause[HOLDERS_PER_CALL];

/* pid_of is the process' number as the reader's PID namespace has it, 0 once it has
 * ended.
 */
static __always_inline __u32 pid_of(struct task_struct *task)
{
	struct task_struct *reader = (struct task_struct *)bpf_get_current_task();
	struct pid *pid = task->group_leader->thread_pid;
	__u32 level = BPF_CORE_READ(reader, thread_pid, level);
	__u32 nr = 0;

	bpf_probe_read_kernel(&nr, sizeof(nr), (void *)pid + bpf_core_field_offset(struct pid, numbers) +
						       level * bpf_core_type_size(struct upid) +
						       bpf_core_field_offset(struct upid, nr));
	return nr;
}

static __always_inline struct process_record *find_process(struct reading *r, struct task_struct *task, __u32 pid, struct net *net)
{
	struct process_key key = { .inum = BPF_CORE_READ(net, ns.inum), .pid = pid };
	struct process_record *p;
	__u32 *known, slot;

	if (bpf_core_field_exists(net->net_cookie)) /* 5.12+ */
		key.net_cookie = BPF_CORE_READ(net, net_cookie);
	known = bpf_map_lookup_elem(&slots, &key);
	if (known) {
		slot = *known;
		return bpf_map_lookup_elem(&processes, &slot);
	}
	slot = r->processes;
	p = bpf_map_lookup_elem(&processes, &slot);
	if (!p || bpf_map_update_elem(&slots, &key, &slot, BPF_ANY))
		return NULL;
	__builtin_memset(p, 0, sizeof(*p));
	p->key = key;
	bpf_probe_read_kernel(p->comm, sizeof(p->comm), task->group_leader->comm);
	r->processes = slot + 1;
	return p;
}

static __always_inline void add_queues(struct reading *r, struct process_record *p, __u16 port, __s32 receive, __s32 send)
{
	__u64 key = (__u64)p->key.inum << 16 | port;
	__u32 *told = bpf_map_lookup_elem(&ports, &key);
	struct queue_sums *q = &p->queues[told && *told == r->number ? 0 : 1];

	q->receive_bytes += receive;
	q->send_bytes += send;
	if (q->receive_max_bytes < receive)
		q->receive_max_bytes = receive;
	if (q->send_max_bytes < send)
		q->send_max_bytes = send;
}

static __always_inline int count_connection(struct reading *r, struct task_struct *task, __u64 inode, struct sock *sk, __u8 state)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	__s32 receive = BPF_CORE_READ(tp, rcv_nxt) - BPF_CORE_READ(tp, copied_seq);
	__s32 send = BPF_CORE_READ(tp, write_seq) - BPF_CORE_READ(tp, snd_una);
	struct held_socket met = { .socket = inode, .reading = r->number, .state = state };
	__u64 key = (__u64)sk, now;
	struct process_record *p;
	struct held_socket *before;
	__u32 pid;

	/* No lock: the application or the peer may move one of two meanwhile. */
	if (receive < 0)
		receive = 0;
	if (send < 0)
		send = 0;
	if (state != TCP_CLOSE_WAIT && state != TCP_FIN_WAIT2 && !receive && !send)
		return 0;
	pid = pid_of(task);
	if (!pid) /* it just ended: whoever else has it open holds it */
		return 0;
	before = bpf_map_lookup_elem(&held, &key);
	if (before && before->socket == met.socket && before->reading == met.reading)
		return 0;
	now = bpf_ktime_get_ns();
	met.since = before && before->socket == met.socket && before->state == state ? before->since : now;
	if (bpf_map_update_elem(&held, &key, &met, BPF_ANY)) {
		r->lost_sockets++;
		return 0;
	}
	p = find_process(r, task, pid, BPF_CORE_READ(sk, __sk_common.skc_net.net));
	if (!p) {
		r->lost_processes++;
		return 0;
	}
	if (state == TCP_CLOSE_WAIT) {
		p->close_wait++;
		if (p->oldest_close_wait < now - met.since)
			p->oldest_close_wait = now - met.since;
	} else if (state == TCP_FIN_WAIT2) {
		p->fin_wait2++;
		if (p->oldest_fin_wait2 < now - met.since)
			p->oldest_fin_wait2 = now - met.since;
	}
	if (receive || send)
		add_queues(r, p, BPF_CORE_READ(sk, __sk_common.skc_num), receive, send);
	return 0;
}

/* tcp_socket is the socket behind a file, for MPTCP the TCP socket that carries
 * it; 0 for anything else.
 */
static __always_inline struct sock *tcp_socket(struct file *file)
{
	struct socket *socket = file->private_data;
	__u16 protocol;
	struct sock *sk;

	if ((file->f_inode->i_mode & S_IFMT) != S_IFSOCK || !socket)
		return NULL;
	sk = BPF_CORE_READ(socket, sk);
	if (!sk || BPF_CORE_READ(sk, sk_type) != SOCK_STREAM)
		return NULL;
	protocol = BPF_CORE_READ(sk, sk_protocol);
	if (protocol == IPPROTO_MPTCP && bpf_core_field_exists(struct mptcp_sock, first)) {
		sk = BPF_CORE_READ((struct mptcp_sock *)sk, first);
		if (sk)
			protocol = BPF_CORE_READ(sk, sk_protocol);
	}
	return protocol == IPPROTO_TCP ? sk : NULL;
}

static __always_inline int write_holder(struct seq_file *seq, struct task_struct *task, __u64 inode)
{
	struct holder_record holder = { .socket = inode, .pid = pid_of(task) };

	bpf_probe_read_kernel(holder.comm, sizeof(holder.comm), task->group_leader->comm);
	bpf_seq_write(seq, &holder, sizeof(holder));
	return 0;
}

SEC("iter/task_file")
int read_file(struct bpf_iter__task_file *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct reading *r;
	struct sock *sk;
	__u32 zero = 0;
	__u64 inode;
	__u8 state;

	if (!file || !task)
		return 0;
	r = bpf_map_lookup_elem(&readings, &zero);
	if (!r)
		return 0;
	if (++r->files % FILES_PER_CALL == 0)
		bpf_seq_write(seq, pause, sizeof(pause));
	sk = tcp_socket(file);
	if (!sk)
		return 0;
	inode = file->f_inode->i_ino;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == TCP_LISTEN)
		return write_holder(seq, task, inode);
	if (state == TCP_CLOSE)
		return 0;
	return count_connection(r, task, inode, sk, state);
}
