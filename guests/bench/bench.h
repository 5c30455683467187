/* SPDX-License-Identifier: Apache-2.0 */
#pragma once
#include "guest.h"

/* One thing to measure. run() goes round its loop and returns a checksum that depends on every round. */
struct bench_kernel {
    const char *name;
    u64 (*run)(u64 iterations);
    u64 iterations; /* where the command line names none */
    u32 vcpus;      /* skipped where there are fewer */
    void (*prepare)(void); /* before the clock starts; may be 0 */
};
extern const struct bench_kernel bench_kernels[]; /* ends with a name of 0 */

/* Nanoseconds that are the measured thing's own and no overhead (a timer's set time). */
extern u64 excluded_ns;

u64 loop_registers(u64), loop_load_store(u64), loop_call_return(u64), loop_pages(u64);
u64 compiled_mix(u64);
u64 footprint(u64);
