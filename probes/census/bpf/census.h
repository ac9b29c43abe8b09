/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the programs of the census share with Go. */
#ifndef SOCKQ_CENSUS_H
#define SOCKQ_CENSUS_H

#include "../../bpf/kernel.h"

#define MAX_NAMESPACES 4096
#define MAX_LISTENERS 65536
#define MAX_LISTENING_PORTS 65536
#define MAX_GAVE_UP 16384
#define MAX_PROCESSES 16384
#define MAX_HELD_SOCKETS 131072
#define CHAIN_MAX (1 << 22) /* no chain is longer; the verifier wants a number */
/* A call ends after this many nodes, so that none holds a CPU for long. */
#define NODES_PER_CALL 16384
#define FILES_PER_CALL 16384
#define HOLDERS_PER_CALL 32
/* include/net/inet_hashtables.h: a listening chain ends in its bucket's number
 * above this.
 */
#define LISTENING_NULLS_BASE (1U << 29)
#define SYSCTLS 8
#define EVENTS 20

/* walk is the argument of a call and its result: the buckets [start, end) of a
 * table; at return start is the bucket to go on with.
 */
struct walk {
	__u64 hashinfo; /* struct inet_hashinfo, from namespace_record */
	__u64 cookie;	/* count this namespace only; 0: all */
	__u32 census;	/* number of this census, to tell old listening ports */
	__u32 start;
	__u32 end;
	__u32 seen;  /* nodes visited by this call */
	__u32 moved; /* chains that ended as another one: a socket moved under the walk */
	__u32 lost;  /* sockets that found no place */
};

/* Connections whose client closed them before accept(), of one port. */
struct gave_up_count {
	__u32 census; /* that counted them */
	__u32 connections;
	__u32 inum;
};

struct namespace_record {
	__u64 net;
	__u64 cookie;
	__u64 hashinfo;
	__u32 inum;
	__u32 initial;
	__s32 sysctls[SYSCTLS];
	__u64 events[EVENTS];
};

/* list_walk is the result of a walk over the namespaces: those found, also when
 * there are more than records.
 */
struct list_walk {
	__u32 found;
	__u32 first_is_initial;
};

struct queue_sums {
	__u64 receive_bytes;
	__u64 send_bytes;
	__u64 receive_max_bytes;
	__u64 send_max_bytes;
};

struct namespace_sockets {
	__u64 cookie;
	__u64 inum;
	__u64 states[TCP_STATES];
	struct queue_sums queues[2]; /* inbound, outbound */
};

struct listener_record {
	__u64 key;
	__u64 cookie;
	__u64 net_cookie;
	__u64 socket;
	__u32 inum;
	__u32 accept_queue;
	__u32 limit;
	__u32 syn_queue;
	__u32 drops;
	__s32 ifindex;
	__u16 family;
	__u16 port;
	__u32 address[4]; /* network order; IPv4 in the first */
	char device[16];
};

/* reading is one reading of all files: its number and what it came to. */
struct reading {
	__u32 number;
	__u32 files;
	__u32 processes; /* records in use */
	__u32 lost_sockets;
	__u32 lost_processes;
};

struct process_key {
	__u64 net_cookie;
	__u32 inum;
	__u32 pid;
};

struct process_record {
	struct process_key key;
	char comm[16];
	__u64 close_wait;
	__u64 fin_wait2;
	__u64 oldest_close_wait; /* ns */
	__u64 oldest_fin_wait2;
	struct queue_sums queues[2]; /* inbound, outbound */
};

/* holder_record is written for each listener in each process; those without a
 * PID mean nothing.
 */
struct holder_record {
	__u64 socket;
	__u32 pid;
	__u32 pad;
	char comm[16];
};

/* held_socket is a connection that a reading met. */
struct held_socket {
	__u64 socket; /* inode number: the address alone may be another socket's by now */
	__u64 since;  /* in this state, on the clock of bpf_ktime_get_ns */
	__u32 reading;
	__u32 state;
};

#endif
