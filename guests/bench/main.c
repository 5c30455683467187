/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The benchmark guest. Command line: bench=NAME[,NAME...] (default: all) iterations=N (default: the kernel's own).
 * Prints a line for each kernel, then powers off:
 *     bench NAME iterations N checksum HEX ns N
 */
#include "bench.h"

u64 excluded_ns;

static const struct { const char *name; kernel run; u64 iterations; u32 vcpus; } kernels[] = {
    {"registers", loop_registers, 30000000, 1},
    {"loadstore", loop_load_store, 30000000, 1},
    {"callret", loop_call_return, 20000000, 1},
    {"compiled", compiled_mix, 200, 1},
    {"footprint", footprint, 60, 1},
    {"pages", loop_pages, 1000, 1},
    {"cpuid", exit_cpuid, 20000, 1},
    {"in", exit_in, 20000, 1},
    {"out", exit_out, 20000, 1},
    {"mmio", exit_mmio, 20000, 1},
    {"lapic", exit_lapic, 20000, 1},
    {"hlt-timer", halt_timer, 2000, 1},
    {"hlt-ipi", halt_ipi, 10000, 1},
    {"ipi-pingpong", ping_pong, 5000, 2},
};

/* Is name one of the comma-separated list? */
static int listed(const char *list, const char *name)
{
    size_t length = strlen(name);
    for (; *list; list++) {
        if (!strncmp(list, name, length) && (list[length] == ',' || !list[length]))
            return 1;
        while (*list && *list != ',')
            list++;
        if (!*list)
            break;
    }
    return 0;
}

void guest_main(void);
void guest_main(void)
{
    static char buffer[256], number[24];
    serial_init();
    boot_init();
    acpi_init();
    smp_init();
    map_pages();
    irq_enable();
    const char *wanted = boot_option("bench", buffer, sizeof(buffer));
    u64 asked = parse_number(boot_option("iterations", number, sizeof(number)), ~0ul);
    print("bench begins, %u vcpus, tsc %lu Hz\n", processors_running, tsc_hz);
    for (u32 i = 0; i < ARRAY_SIZE(kernels); i++) {
        if (wanted && !listed(wanted, kernels[i].name))
            continue;
        if (processors_running < kernels[i].vcpus)
            continue;
        u64 iterations = asked == ~0ul ? kernels[i].iterations : asked;
        excluded_ns = 0;
        u64 start = now_ns();
        u64 checksum = iterations ? kernels[i].run(iterations) : 0;
        u64 ns = now_ns() - start;
        print("bench %s iterations %lu checksum %lx ns %lu\n", kernels[i].name, iterations, checksum,
              ns > excluded_ns ? ns - excluded_ns : 0);
    }
    print("bench ends\n");
    power_off();
}
