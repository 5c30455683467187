/* SPDX-License-Identifier: Apache-2.0 */
/* The kernels of bench.elf: instructions, memory, pages. */
#include "bench.h"

/* Mapped 64 MiB by 4 KiB pages at 4 GiB, on physical 32..96 MiB. */
enum { PAGES = 16384, FIRST = 32 << 20 };
extern u64 page_root[512];
static u64 tables[PAGES] __attribute__((aligned(4096)));
static u64 directory[512] __attribute__((aligned(4096)));

static void map_pages(void)
{
    u64 *pointers = (u64 *)(page_root[0] & ~0xffful);
    for (u64 i = 0; i < PAGES; i++)
        tables[i] = (FIRST + (i << 12)) | 3;
    for (u64 i = 0; i < PAGES / 512; i++)
        directory[i] = (u64)&tables[i * 512] | 3;
    pointers[4] = (u64)directory | 3;
}

const struct bench_kernel bench_kernels[] = {
    {"registers", loop_registers, 30000000, 1, 0},
    {"loadstore", loop_load_store, 30000000, 1, 0},
    {"callret", loop_call_return, 20000000, 1, 0},
    {"compiled", compiled_mix, 200, 1, 0},
    {"footprint", footprint, 60, 1, 0},
    {"pages", loop_pages, 1000, 1, map_pages},
    {0, 0, 0, 0, 0},
};
