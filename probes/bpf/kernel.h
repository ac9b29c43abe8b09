/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The kernel types that sockq reads: only the fields read, relocated by CO-RE
 * when the program is loaded. Layouts differ between kernels; names do not,
 * unless a comment says so.
 */
#ifndef SOCKQ_KERNEL_H
#define SOCKQ_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262

/* include/net/tcp_states.h */
enum {
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT,
	TCP_SYN_RECV,
	TCP_FIN_WAIT1,
	TCP_FIN_WAIT2,
	TCP_TIME_WAIT,
	TCP_CLOSE,
	TCP_CLOSE_WAIT,
	TCP_LAST_ACK,
	TCP_LISTEN,
	TCP_CLOSING,
	TCP_NEW_SYN_RECV,
	TCP_STATES,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct hlist_nulls_head {
	struct hlist_nulls_node *first;
};

struct hlist_nulls_node {
	struct hlist_nulls_node *next;
};

struct list_head {
	struct list_head *next;
};

/* A 64-bit number at an address of our choice is read as one of these. */
struct timespec64 {
	__s64 tv_sec;
};

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	__s64 counter;
} atomic64_t;

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	union {
		__u32 u6_addr32[4];
	} in6_u;
};

struct proto {
	char name[32];
};

struct sock_common {
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	int skc_bound_dev_if;
	struct hlist_node skc_bind_node; /* 6.8+, in tb2->owners */
	struct proto *skc_prot;
	possible_net_t skc_net;
	struct in6_addr skc_v6_rcv_saddr;
	struct sock *skc_listener; /* of a request */
	atomic64_t skc_cookie;
	struct hlist_nulls_node skc_nulls_node;
};

struct sock {
	struct sock_common __sk_common;
	atomic_t sk_drops;
	__u32 sk_ack_backlog;
	__u32 sk_max_ack_backlog;
	__u16 sk_type;
	__u16 sk_protocol;
	int sk_err;
	struct socket *sk_socket;
};

/* 6.1 to 6.7: commit 770041d337a8 moved the node to skc_bind_node. */
struct sock___bind2 {
	struct hlist_node sk_bind2_node;
};

struct request_sock_queue {
	atomic_t qlen;
};

struct mptcp_subflow_context {
	__u32 mp_join : 1;
};

struct inet_connection_sock {
	void *icsk_ulp_data;
	struct request_sock_queue icsk_accept_queue;
	struct inet_bind2_bucket *icsk_bind2_hash;
};

struct inet_sock {
	__be16 inet_sport;
};

struct mptcp_sock {
	struct sock *first; /* the subflow of a listener, or a connection's first */
	struct socket *subflow; /* through 6.5 */
};

struct timer_list {
	__u32 flags;
};

struct request_sock {
	struct sock_common __req_common;
	struct timer_list rsk_timer;
	struct sock *sk; /* the child, once it is in the accept queue */
};

struct tcp_sock {
	__u32 rcv_nxt;
	__u32 copied_seq;
	__u32 write_seq;
	__u32 snd_una;
	_Bool is_mptcp;
};

struct inet_timewait_sock {
	struct sock_common __tw_common;
	volatile unsigned char tw_substate;
};

struct inet_ehash_bucket {
	struct hlist_nulls_head chain;
};

struct inet_listen_hashbucket {
	struct hlist_nulls_head nulls_head;
};

struct inet_bind_hashbucket {
	struct hlist_head chain;
};

struct inet_bind2_bucket {
	possible_net_t ib_net;
	struct hlist_node node;
	struct hlist_head owners;
};

struct inet_hashinfo {
	struct inet_ehash_bucket *ehash;
	unsigned int ehash_mask;
	struct inet_bind_hashbucket *bhash2;
	unsigned int bhash_size;
	unsigned int lhash2_mask;
	struct inet_listen_hashbucket *lhash2;
};

struct inet_timewait_death_row {
	struct inet_hashinfo *hashinfo;
	int sysctl_max_tw_buckets;
};

struct ns_common {
	unsigned int inum;
	const struct proc_ns_operations *ops;
};

struct netns_core {
	int sysctl_somaxconn;
};

struct linux_mib {
	unsigned long mibs[1];
};

struct netns_mib {
	struct linux_mib *net_statistics; /* per CPU */
};

struct netns_ipv4 {
	struct inet_timewait_death_row tcp_death_row;
	__u8 sysctl_tcp_syn_retries;
	__u8 sysctl_tcp_synack_retries;
	__u8 sysctl_tcp_syncookies;
	__u8 sysctl_tcp_abort_on_overflow;
	int sysctl_tcp_fin_timeout; /* jiffies */
	int sysctl_max_syn_backlog;
};

struct net {
	struct list_head list;
	struct ns_common ns;
	struct hlist_head *dev_index_head;
	struct netns_core core;
	struct netns_mib mib;
	struct netns_ipv4 ipv4;
	__u64 net_cookie;
};

struct net_device {
	char name[16];
	int ifindex;
	struct hlist_node index_hlist;
	possible_net_t nd_net;
};

struct sk_buff {
	struct net_device *dev;
};

struct inode {
	unsigned short i_mode;
	unsigned long i_ino;
};

struct file {
	void *private_data;
	struct inode *f_inode;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct socket {
	struct file *file;
	struct sock *sk;
};

struct socket_alloc {
	struct socket socket;
	struct inode vfs_inode;
};

struct nsproxy {
	struct net *net_ns;
};

struct upid {
	int nr;
};

struct pid {
	unsigned int level; /* of the innermost PID namespace that has a number for it */
	struct upid numbers[1];
};

struct task_struct {
	struct nsproxy *nsproxy;
	struct files_struct *files;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	char comm[16];
};

struct bpf_array {
	void *pptrs[1];
};

#pragma clang attribute pop

struct bpf_iter_num {
	__u64 __opaque[1];
} __attribute__((aligned(8)));

extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym;
extern void bpf_rcu_read_lock(void) __ksym;
extern void bpf_rcu_read_unlock(void) __ksym;
extern int bpf_iter_num_new(struct bpf_iter_num *it, int start, int end) __ksym;
extern int *bpf_iter_num_next(struct bpf_iter_num *it) __ksym;
extern void bpf_iter_num_destroy(struct bpf_iter_num *it) __ksym;

/* CAST reads kernel memory as a type; a bad address reads as zero (6.2+). */
#define CAST(addr, type) ((type *)bpf_rdonly_cast((void *)(addr), bpf_core_type_id_kernel(type)))
#define LOAD64(addr) ((__u64)CAST(addr, struct timespec64)->tv_sec)
/* LOADP reads a pointer field as a number, so that it can be kept and compared. */
#define LOADP(addr, type, field) LOAD64((__u64)(addr) + bpf_core_field_offset(type, field))
#define CONTAINER(addr, type, field) ((__u64)(addr) - bpf_core_field_offset(type, field))

#endif
