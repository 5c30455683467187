/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that measures: bench.elf with the kernels of instructions.c, exits.elf with those of exits.c. Command line:
 *     bench=NAME[,NAME...] (default: all) iterations=N (default: the kernel's own).
 * Prints a line for each kernel, then powers off:
 *     bench NAME iterations N checksum HEX ns N
 */
#include "bench.h"

u64 excluded_ns;

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
    irq_enable();
    const char *wanted = boot_option("bench", buffer, sizeof(buffer));
    u64 asked = parse_number(boot_option("iterations", number, sizeof(number)), ~0ul);
    print("bench begins, %u vcpus, tsc %lu Hz\n", processors_running, tsc_hz);
    for (const struct bench_kernel *kernel = bench_kernels; kernel->name; kernel++) {
        if (wanted && !listed(wanted, kernel->name))
            continue;
        if (processors_running < kernel->vcpus)
            continue;
        if (kernel->prepare)
            kernel->prepare();
        u64 iterations = asked == ~0ul ? kernel->iterations : asked;
        excluded_ns = 0;
        u64 start = now_ns();
        u64 checksum = iterations ? kernel->run(iterations) : 0;
        u64 ns = now_ns() - start;
        print("bench %s iterations %lu checksum %lx ns %lu\n", kernel->name, iterations, checksum,
              ns > excluded_ns ? ns - excluded_ns : 0);
    }
    print("bench ends\n");
    power_off();
}
