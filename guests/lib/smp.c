/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The other processors: started by INIT and start-up IPIs, then halted until there is work for them.
 * Source: AMD APM vol. 2, section 16.5 (interprocessor interrupts).
 */
#include "guest.h"

enum { TRAMPOLINE = 0x8000, MSR_GS_BASE = 0xc0000101 };
enum { LAPIC_ICR_LOW = 0x300, LAPIC_ICR_HIGH = 0x310, ICR_INIT = 0x4500, ICR_STARTUP = 0x4600 };

extern const u8 ap_trampoline[], ap_trampoline_end[];
extern volatile u32 ap_next;

struct processor processors[CPUS_MAX];
u32 processors_running;

struct processor *this_processor(void)
{
    struct processor *processor;
    asm("mov %%gs:0, %0" : "=r"(processor));
    return processor;
}

static struct processor *anchors[CPUS_MAX];

static void timer_irq(struct trap_frame *frame) { (void)frame; this_processor()->timer_irqs++; }
static void ipi_irq(struct trap_frame *frame) { (void)frame; this_processor()->ipi_irqs++; }
static void serial_irq_handler(struct trap_frame *frame)
{
    (void)frame;
    this_processor()->serial_irqs++;
    serial_irq();
}

static void processor_init(u32 index)
{
    anchors[index] = &processors[index];
    wrmsr(MSR_GS_BASE, (u64)&anchors[index]);
    trap_init_cpu();
    lapic_init();
    processors[index].index = index;
    processors[index].apic_id = lapic_id();
}

void ap_main(u32 index);
void ap_main(u32 index)
{
    processor_init(index);
    struct processor *me = &processors[index];
    __atomic_fetch_add(&processors_running, 1, __ATOMIC_SEQ_CST);
    me->running = 1;
    for (;;) {
        irq_disable();
        if (!me->work) {
            irq_enable_and_halt();
            continue;
        }
        irq_enable();
        me->work(me);
        __atomic_store_n(&me->work, (void (*)(struct processor *))0, __ATOMIC_SEQ_CST);
    }
}

static void send(u32 apic_id, u32 command)
{
    lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
    lapic_write(LAPIC_ICR_LOW, command);
}

void smp_init(void)
{
    outb(0x21, 0xff); /* the old interrupt controllers are not used */
    outb(0xa1, 0xff);
    trap_init();
    trap_set(VECTOR_TIMER, timer_irq);
    trap_set(VECTOR_IPI, ipi_irq);
    trap_set(VECTOR_SERIAL, serial_irq_handler);
    processor_init(0);
    processors[0].running = 1;
    processors_running = 1;
    time_init();
    memcpy((void *)TRAMPOLINE, ap_trampoline, (size_t)(ap_trampoline_end - ap_trampoline));
    for (u32 i = 0; i < acpi.cpu_count; i++) {
        u32 id = acpi.apic_ids[i], before = processors_running;
        if (acpi.cpu_count == 1 || id == processors[0].apic_id)
            continue;
        send(id, ICR_INIT);
        delay_us(200);
        for (int attempt = 0; attempt < 2 && *(volatile u32 *)&processors_running == before; attempt++) {
            send(id, ICR_STARTUP | TRAMPOLINE >> 12);
            u64 end = now_ns() + (attempt ? 1000000000 : 20000000);
            while (*(volatile u32 *)&processors_running == before && now_ns() < end)
                cpu_pause();
        }
    }
}

void smp_call(u32 index, void (*work)(struct processor *))
{
    __atomic_store_n(&processors[index].work, work, __ATOMIC_SEQ_CST);
    lapic_ipi(processors[index].apic_id, VECTOR_IPI);
}

void smp_wait(u32 index)
{
    while (processors[index].work)
        cpu_pause();
}
