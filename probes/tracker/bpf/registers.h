/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The registers at a kprobe, as libbpf's macros name them. */
#ifndef SOCKQ_REGISTERS_H
#define SOCKQ_REGISTERS_H

#if defined(__TARGET_ARCH_x86)
struct pt_regs {
	unsigned long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
	unsigned long orig_rax, rip, cs, eflags, rsp, ss;
};
#elif defined(__TARGET_ARCH_arm64)
struct pt_regs;
struct user_pt_regs {
	__u64 regs[31];
	__u64 sp, pc, pstate;
};
#endif

#include <bpf/bpf_tracing.h>

#endif
