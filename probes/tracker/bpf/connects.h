/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A connect() without a route fails before the socket is in SYN_SENT. Where it had
 * been, it has made a sequence number, and the change back was counted.
 */
#ifndef SOCKQ_CONNECTS_H
#define SOCKQ_CONNECTS_H

#include "events.h"

#define SOCK_STREAM 1
#define EPERM 1
#define EACCES 13
#define EINVAL 22
#define ENETUNREACH 101
#define ENOBUFS 105
#define EHOSTUNREACH 113

/* False where what connect() returned is told by a change of state, or by nobody. */
static __always_inline int fails_without_syn(__s64 returned, __u32 *error)
{
	switch (-returned) {
	case ENETUNREACH:
		*error = CONNECT_NET_UNREACHABLE;
		return 1;
	case EHOSTUNREACH:
		*error = CONNECT_HOST_UNREACHABLE;
		return 1;
	case EPERM:
	case EACCES:
	case EINVAL:
	case ENOBUFS:
		*error = CONNECT_OTHER;
		return 1;
	}
	return 0;
}

#endif
