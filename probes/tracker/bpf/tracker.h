/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the programs of the tracker share with Go. */
#ifndef SOCKQ_TRACKER_H
#define SOCKQ_TRACKER_H

#include "../../bpf/kernel.h"

#define EDGES 48		 /* tcpstate.MaxEdges */
#define HISTOGRAM_BUCKETS 45	 /* tracker.Buckets */
#define HISTOGRAM_FIRST 10	 /* 2^10 ticks of 2^-30 s are the first bucket's bound, 2^-20 s */
#define OTHER_NAMESPACES 0	 /* the slot of those that found no place */

/* histogram counts durations; sum is in units of 2^10 ns: a hundred thousand sockets
 * add a day to it every second.
 */
struct histogram {
	__u64 buckets[HISTOGRAM_BUCKETS];
	__u64 sum;
};

/* slot is where a namespace's counts are. */
struct slot {
	__u32 number;
	__u32 inum;
};

/* namespace_counts is what one CPU saw in a namespace. */
struct namespace_counts {
	__u64 edges[EDGES]; /* by tcpstate.Index */
	struct histogram connects;
};

/* state_seconds is what one CPU saw, of all namespaces or of one. */
struct state_histograms {
	struct histogram states[TCP_STATES];
};

enum drop_reason {
	DROP_ACCEPT_QUEUE_FULL_ACK,
	DROP_ACCEPT_QUEUE_FULL_RESET,
	DROP_ACCEPT_QUEUE_FULL_SYN,
	DROP_SYN_QUEUE_FULL,
	DROP_MAX_SYN_BACKLOG,
	DROP_NO_MEMORY,
	DROP_NO_ROUTE,
	DROP_POLICY,
	DROP_ICMP,
	DROP_OTHER,
	DROP_REASONS,
};

enum half_open_end {
	END_COMPLETED,
	END_EXPIRED,
	END_RESET,
	END_LISTENER_CLOSED,
	END_ICMP,
	END_OVERFLOW_RESET,
	END_DESTROYED,
	END_MIGRATED,
	HALF_OPEN_ENDS,
};

/* listener_labels are what series of listeners are told apart by. */
struct listener_labels {
	__u32 inum; /* of the namespace */
	__s32 ifindex;
	__u16 family;
	__u16 port;
	__u32 address[4]; /* network order; IPv4 in the first */
};

/* listener_counts is what happened at one listening socket, or before 5.12 at all
 * with the same labels.
 */
struct listener_counts {
	__u64 namespace; /* its cookie, 0 before 5.15 */
	struct listener_labels labels;
	__s32 backlog;	     /* last argument of listen() */
	__u32 reserved;
	__u64 last_listen;   /* bpf_ktime_get_ns of the return of listen(), 0: never */
	__u64 connections;
	__u64 accepts;
	__u64 last_accept; /* bpf_ktime_get_ns */
	__u64 synack_retransmits;
	__u64 drops[DROP_REASONS];
	__u64 syns;
	__u64 cookies_sent;
	__u64 cookies_validated;
	__u64 half_open_ended[HALF_OPEN_ENDS];
	__u64 abandoned;
	/* Highest in an even and in an odd minute: minute << 32 | value. */
	__u64 peak[2];
	__u64 peak_ratio[2]; /* length / (limit + 1) in units of 2^-31 */
	struct histogram accept_wait;
	struct histogram handshake; /* from the SYN to the accept queue */
};

/* Events are rare, and of many kinds. */
enum event_kind {
	EVENT_UNEXPECTED,     /* detail: from << 8 | to */
	EVENT_CONNECT_FAILED, /* detail: enum connect_error */
	EVENT_RESET_SENT,     /* detail: enum sk_rst_reason, 0 where there is none */
	EVENT_RESET_RECEIVED,
};

enum connect_error {
	CONNECT_REFUSED,
	CONNECT_TIMEOUT,
	CONNECT_HOST_UNREACHABLE,
	CONNECT_NET_UNREACHABLE,
	CONNECT_RESET,
	CONNECT_NO_PORTS,
	CONNECT_CLOSED,
	CONNECT_OTHER,
};

struct event {
	__u64 namespace;
	__u32 kind;
	__u32 detail;
};

enum lost {
	LOST_SOCKETS,	 /* no place to remember since when it is in its state */
	LOST_NAMESPACES, /* counted under OTHER_NAMESPACES */
	LOST_LISTENERS,	 /* events of listeners that found no place */
	LOST_EVENTS,
	LOST_ACCEPTS, /* whose listener cannot be told */
	LOST_KINDS,
};

#endif
