/* SPDX-License-Identifier: Apache-2.0 */
/* The demonstration guest: starts everything a machine has, shows it, and takes commands on COM1. */
#include "guest.h"

/* --- what the processor is --- */

struct feature { u32 leaf; u8 reg, bit; const char *name; };

/* AMD APM vol. 3, appendix E. reg: 1 EBX, 2 ECX, 3 EDX. */
static const struct feature features[] = {
    {1, 3, 0, "fpu"}, {1, 3, 4, "tsc"}, {1, 3, 6, "pae"}, {1, 3, 8, "cx8"}, {1, 3, 9, "apic"}, {1, 3, 13, "pge"},
    {1, 3, 23, "mmx"}, {1, 3, 24, "fxsr"}, {1, 3, 25, "sse"}, {1, 3, 26, "sse2"}, {1, 2, 0, "sse3"},
    {1, 2, 1, "pclmulqdq"}, {1, 2, 9, "ssse3"}, {1, 2, 13, "cx16"}, {1, 2, 17, "pcid"}, {1, 2, 19, "sse4.1"},
    {1, 2, 20, "sse4.2"}, {1, 2, 21, "x2apic"}, {1, 2, 22, "movbe"}, {1, 2, 23, "popcnt"},
    {1, 2, 24, "tsc-deadline"}, {1, 2, 25, "aes"}, {1, 2, 26, "xsave"}, {1, 2, 28, "avx"}, {1, 2, 30, "rdrand"},
    {1, 2, 31, "hypervisor"}, {7, 1, 0, "fsgsbase"}, {7, 1, 3, "bmi1"}, {7, 1, 5, "avx2"}, {7, 1, 7, "smep"},
    {7, 1, 8, "bmi2"}, {7, 1, 10, "invpcid"}, {7, 1, 18, "rdseed"}, {7, 1, 19, "adx"}, {7, 1, 20, "smap"},
    {7, 1, 23, "clflushopt"}, {7, 1, 24, "clwb"}, {7, 1, 29, "sha"}, {7, 2, 2, "umip"}, {7, 2, 3, "pku"},
    {7, 2, 16, "la57"}, {0x80000001, 3, 11, "syscall"}, {0x80000001, 3, 20, "nx"}, {0x80000001, 3, 26, "pdpe1gb"},
    {0x80000001, 3, 27, "rdtscp"}, {0x80000001, 3, 29, "lm"}, {0x80000001, 2, 2, "svm"}, {0x80000001, 2, 5, "abm"},
};

static int has_feature(const struct feature *feature)
{
    u32 highest = cpuid(feature->leaf & 0x80000000, 0).eax;
    if (feature->leaf > highest)
        return 0;
    struct cpuid r = cpuid(feature->leaf, 0);
    u32 values[] = {r.eax, r.ebx, r.ecx, r.edx};
    return values[feature->reg] >> feature->bit & 1;
}

static void show_cpu(void)
{
    struct cpuid r = cpuid(0, 0);
    u32 vendor[4] = {r.ebx, r.edx, r.ecx, 0}, brand[13] = {0};
    print("processor   %s", (char *)vendor);
    if (cpuid(0x80000000, 0).eax >= 0x80000004) {
        for (u32 i = 0; i < 3; i++) {
            r = cpuid(0x80000002 + i, 0);
            brand[4 * i] = r.eax, brand[4 * i + 1] = r.ebx, brand[4 * i + 2] = r.ecx, brand[4 * i + 3] = r.edx;
        }
        const char *name = (const char *)brand;
        while (*name == ' ')
            name++;
        print(", %s", name);
    }
    u32 signature = cpuid(1, 0).eax, family = signature >> 8 & 15, model = signature >> 4 & 15;
    if (family == 15) {
        family += signature >> 20 & 255;
        model |= signature >> 12 & 0xf0;
    }
    print("\n            family %u, model %u, stepping %u\nfeatures   ", family, model, signature & 15);
    u32 column = 11;
    for (u32 i = 0; i < ARRAY_SIZE(features); i++) {
        if (!has_feature(&features[i]))
            continue;
        if (column + strlen(features[i].name) > 76) {
            print("\n           ");
            column = 11;
        }
        print(" %s", features[i].name);
        column += 1 + (u32)strlen(features[i].name);
    }
    print("\n");
    if (cpuid(1, 0).ecx >> 31) {
        r = cpuid(0x40000000, 0);
        u32 hypervisor[4] = {r.ebx, r.ecx, r.edx, 0};
        print("hypervisor  %s\n", (char *)hypervisor);
    }
    print("vcpus       %u of %u running, APIC ids", processors_running, acpi.cpu_count);
    for (u32 i = 0; i < processors_running; i++)
        print(" %u", processors[i].apic_id);
    print("\n");
}

static void show_memory(void)
{
    static const char *const types[] = {"?", "RAM", "reserved", "ACPI", "ACPI NVS", "unusable", "disabled", "persistent"};
    u64 ram = 0;
    for (unsigned i = 0; i < memory_ranges; i++)
        if (memory_map[i].type == MEMORY_RAM)
            ram += memory_map[i].size;
    print("memory      %lu KiB of RAM\n", ram >> 10);
    for (unsigned i = 0; i < memory_ranges; i++) {
        u32 type = memory_map[i].type;
        print("            %012lx-%012lx %s\n", memory_map[i].start, memory_map[i].start + memory_map[i].size - 1,
              types[type < ARRAY_SIZE(types) ? type : 0]);
    }
}

static u8 cmos(u8 index)
{
    outb(0x70, index);
    return inb(0x71);
}

static void show_time(void)
{
    while (cmos(10) & 0x80)
        cpu_pause();
    u64 ns = now_ns();
    print("clock       20%02x-%02x-%02x %02x:%02x:%02x (real-time clock)\n", cmos(9), cmos(8), cmos(7), cmos(4), cmos(2),
          cmos(0));
    print("timer       local APIC %lu kHz, TSC %lu kHz\n", lapic_hz / 1000, tsc_hz / 1000);
    print("up          %lu.%06lu s, %lu timer interrupts\n", ns / 1000000000, ns % 1000000000 / 1000,
          processors[0].timer_irqs);
}

static void show_interrupts(void)
{
    print("vcpu  timer     ipi       serial\n");
    for (u32 i = 0; i < processors_running; i++)
        print("%-4u  %-8lu  %-8lu  %-8lu\n", i, processors[i].timer_irqs, processors[i].ipi_irqs,
              processors[i].serial_irqs);
}

/* --- a few measurements --- */

static void spin(struct processor *me)
{
    u64 loops = 4000000;
    asm volatile("1: dec %0; jnz 1b" : "+r"(loops));
    me->work_result = 2 * 4000000;
}

static void report(const char *what, u64 count, u64 ns)
{
    if (!ns)
        ns = 1;
    print("  %-28s %8lu ns each, %lu in %lu us\n", what, ns / count, count, ns / 1000);
}

static void run_bench(void)
{
    u64 start = now_ns(), ns;
    for (u32 i = 1; i < processors_running; i++)
        smp_call(i, spin);
    spin(&processors[0]);
    for (u32 i = 1; i < processors_running; i++)
        smp_wait(i);
    ns = now_ns() - start;
    print("  %u vcpus, 8 M instructions each: %lu MIPS together\n", processors_running,
          processors_running * 8000000ul * 1000 / (ns ? ns : 1));

    enum { COUNT = 2000 };
    start = now_ns();
    for (int i = 0; i < COUNT; i++)
        cpuid(0, 0);
    report("CPUID", COUNT, now_ns() - start);
    start = now_ns();
    for (int i = 0; i < COUNT; i++)
        inb(0x3ff);
    report("IN from the serial port", COUNT, now_ns() - start);
    start = now_ns();
    for (int i = 0; i < COUNT; i++)
        lapic_read(0x30);
    report("read of the local APIC", COUNT, now_ns() - start);
    start = now_ns();
    for (int i = 0; i < COUNT; i++) {
        u64 seen = processors[0].ipi_irqs;
        irq_disable();
        lapic_self_ipi(VECTOR_IPI);
        while (processors[0].ipi_irqs == seen)
            irq_enable_and_halt();
    }
    irq_enable();
    report("IPI to itself and HLT", COUNT, now_ns() - start);
}

/* --- the prompt --- */

static void help(void);

static const struct command { const char *name; void (*run)(void); const char *help; } commands[] = {
    {"help", help, "this list"},
    {"cpu", show_cpu, "the processor, its features, the vCPUs"},
    {"mem", show_memory, "the memory map"},
    {"time", show_time, "the clocks"},
    {"irq", show_interrupts, "interrupts taken by each vCPU"},
    {"bench", run_bench, "a few measurements"},
    {"reboot", reboot, "reset the machine"},
    {"poweroff", power_off, "switch the machine off"},
};

static void help(void)
{
    for (u32 i = 0; i < ARRAY_SIZE(commands); i++)
        print("  %-10s %s\n", commands[i].name, commands[i].help);
}

static void execute(const char *line)
{
    if (!*line)
        return;
    for (u32 i = 0; i < ARRAY_SIZE(commands); i++)
        if (!strcmp(line, commands[i].name)) {
            commands[i].run();
            return;
        }
    print("no command '%s'; help lists them\n", line);
}

static int wait_for_character(void)
{
    for (;;) {
        irq_disable();
        serial_irq(); /* also by polling, at the timer's rate */
        int c = serial_read();
        if (c >= 0) {
            irq_enable();
            return c;
        }
        irq_enable_and_halt();
    }
}

static void read_line(char *line, size_t size)
{
    size_t length = 0;
    for (;;) {
        int c = wait_for_character();
        if (c == '\r' || c == '\n') {
            print("\n");
            line[length] = 0;
            return;
        }
        if ((c == 8 || c == 127) && length) {
            length--;
            print("\b \b");
        } else if (c >= ' ' && c < 127 && length < size - 1) {
            line[length++] = (char)c;
            print("%c", c);
        }
    }
}

void guest_main(void);
void guest_main(void)
{
    static char run[256], line[80];
    serial_init();
    print("\nsoftkvm: demonstration guest\n\n");
    boot_init();
    acpi_init();
    smp_init();
    ioapic_route(acpi.serial_gsi, VECTOR_SERIAL, processors[0].apic_id);
    outb(0x3f9, 0x01); /* receive interrupts */
    lapic_timer_periodic(20);
    irq_enable();
    show_cpu();
    show_memory();
    show_time();
    print("\nhelp lists the commands\n");

    /* Commands of the command line first: run="cpu; bench; poweroff" */
    if (boot_option("run", run, sizeof(run))) {
        for (char *s = run; *s;) {
            while (*s == ' ' || *s == ';')
                s++;
            char *start = s;
            while (*s && *s != ';')
                s++;
            if (*s)
                *s++ = 0;
            print("> %s\n", start);
            execute(start);
        }
    }
    for (;;) {
        print("> ");
        read_line(line, sizeof(line));
        execute(line);
    }
}
