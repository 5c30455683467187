/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One exit after the other: what a round trip to the hypervisor and, for some, to the machine costs. This is the guest of
 * `softkvm bench vmexit`.
 */
#include "bench.h"

enum { SCRATCH = 0x3ff }; /* the serial port's scratch register */
#define HOLE ((volatile u32 *)0xfe000000) /* memory space with nothing in it */

static u64 exit_cpuid(u64 iterations)
{
    u64 sum = 0;
    while (iterations--)
        sum += cpuid(0, 0).ebx;
    return sum;
}

static u64 exit_in(u64 iterations)
{
    u64 sum = 0;
    outb(SCRATCH, 3);
    while (iterations--)
        sum += inb(SCRATCH);
    return sum;
}

static u64 exit_out(u64 iterations)
{
    while (iterations--)
        outb(SCRATCH, (u8)iterations);
    return inb(SCRATCH);
}

static u64 exit_mmio(u64 iterations)
{
    u64 sum = 0;
    for (; sum < iterations; sum++)
        (void)*HOLE; /* what an empty place reads is the machine's affair */
    return sum;
}

static u64 exit_lapic(u64 iterations)
{
    u64 sum = 0;
    while (iterations--)
        sum += lapic_read(0x30) & 0xff;
    return sum;
}

/* The time from a timer's moment to the handler's end, 100 us after it was set. */
static u64 halt_timer(u64 iterations)
{
    enum { US = 100 };
    u64 count = lapic_hz * US / 1000000, rounds = iterations;
    while (iterations--) {
        u64 seen = processors[0].timer_irqs;
        irq_disable();
        lapic_timer_oneshot((u32)count);
        while (*(volatile u64 *)&processors[0].timer_irqs == seen) {
            irq_enable_and_halt();
            irq_disable();
        }
        irq_enable();
    }
    excluded_ns = rounds * US * 1000;
    return processors[0].timer_irqs;
}

static u64 halt_ipi(u64 iterations)
{
    u64 start = processors[0].ipi_irqs;
    while (iterations--) {
        u64 seen = processors[0].ipi_irqs;
        irq_disable();
        lapic_self_ipi(VECTOR_IPI);
        while (*(volatile u64 *)&processors[0].ipi_irqs == seen) {
            irq_enable_and_halt();
            irq_disable();
        }
        irq_enable();
    }
    return processors[0].ipi_irqs - start;
}

/* Vcpu 0 wakes vcpu 1 and halts until vcpu 1 wakes it: two wake-ups a round. */
static volatile u64 rounds_left;
/* Vcpu 1 starts to count when the interrupt that called it has come: the next one is the first round's. */
static volatile u32 called, answering;

static void answer(struct processor *me)
{
    while (!called)
        asm volatile("pause");
    u64 seen = me->ipi_irqs;
    answering = 1;
    while (rounds_left) {
        irq_disable();
        while (*(volatile u64 *)&me->ipi_irqs == seen && rounds_left) {
            irq_enable_and_halt();
            irq_disable();
        }
        irq_enable();
        if (me->ipi_irqs == seen)
            break;
        seen = me->ipi_irqs;
        lapic_ipi(processors[0].apic_id, VECTOR_IPI);
    }
}

static u64 ping_pong(u64 iterations)
{
    u64 start = processors[0].ipi_irqs;
    rounds_left = iterations;
    u64 before = processors[1].ipi_irqs;
    called = answering = 0;
    smp_call(1, answer);
    while (*(volatile u64 *)&processors[1].ipi_irqs == before)
        asm volatile("pause");
    called = 1;
    while (!answering)
        asm volatile("pause");
    for (;;) {
        u64 seen = processors[0].ipi_irqs;
        lapic_ipi(processors[1].apic_id, VECTOR_IPI);
        irq_disable();
        while (*(volatile u64 *)&processors[0].ipi_irqs == seen) {
            irq_enable_and_halt();
            irq_disable();
        }
        irq_enable();
        if (!--rounds_left)
            break;
    }
    lapic_ipi(processors[1].apic_id, VECTOR_IPI); /* it may halt still */
    smp_wait(1);
    return processors[0].ipi_irqs - start;
}

const struct bench_kernel bench_kernels[] = {
    {"cpuid", exit_cpuid, 20000, 1, 0},
    {"in", exit_in, 20000, 1, 0},
    {"out", exit_out, 20000, 1, 0},
    {"mmio", exit_mmio, 20000, 1, 0},
    {"lapic", exit_lapic, 20000, 1, 0},
    {"hlt-timer", halt_timer, 2000, 1, 0},
    {"hlt-ipi", halt_ipi, 10000, 1, 0},
    {"ipi-pingpong", ping_pong, 5000, 2, 0},
    {0, 0, 0, 0, 0},
};
