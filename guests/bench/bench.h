/* SPDX-License-Identifier: Apache-2.0 */
#pragma once
#include "guest.h"

/* A kernel runs its loop and returns a checksum that depends on every round. */
typedef u64 (*kernel)(u64 iterations);

/* Of exits.c: nanoseconds that are the measured thing's own and no overhead (a timer's set time). */
extern u64 excluded_ns;

u64 loop_registers(u64), loop_load_store(u64), loop_call_return(u64), loop_pages(u64);
u64 compiled_mix(u64);
u64 footprint(u64);
u64 exit_cpuid(u64), exit_in(u64), exit_out(u64), exit_mmio(u64), exit_lapic(u64);
u64 halt_timer(u64), halt_ipi(u64), ping_pong(u64);
void map_pages(void);
