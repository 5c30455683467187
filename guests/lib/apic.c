/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Local APIC, I/O APIC and the clocks measured against the ACPI PM timer (or the PIT where there is none).
 * Source: AMD APM vol. 2, chapter 16; 82093AA data sheet; ACPI specification 4.8.2.1; 8254 data sheet.
 */
#include "guest.h"

enum {
    LAPIC_ID = 0x20, LAPIC_TPR = 0x80, LAPIC_EOI = 0xb0, LAPIC_SPURIOUS = 0xf0, LAPIC_ICR_LOW = 0x300,
    LAPIC_ICR_HIGH = 0x310, LAPIC_LVT_TIMER = 0x320, LAPIC_LVT_LINT0 = 0x350, LAPIC_TIMER_INITIAL = 0x380,
    LAPIC_TIMER_CURRENT = 0x390, LAPIC_TIMER_DIVIDE = 0x3e0,
};
enum { MSR_APIC_BASE = 0x1b, APIC_ENABLE = 1 << 11, LVT_MASKED = 1 << 16, LVT_PERIODIC = 1 << 17 };
enum { PM_TIMER_HZ = 3579545, PIT_HZ = 1193182, MEASURE_HZ = 50 };

u64 tsc_hz, lapic_hz;
static u64 tsc_start;

u32 lapic_read(u32 reg) { return *(volatile u32 *)(acpi.lapic_address + reg); }
void lapic_write(u32 reg, u32 value) { *(volatile u32 *)(acpi.lapic_address + reg) = value; }
void lapic_eoi(void) { lapic_write(LAPIC_EOI, 0); }
u32 lapic_id(void) { return lapic_read(LAPIC_ID) >> 24; }

void lapic_init(void)
{
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | APIC_ENABLE);
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_LVT_LINT0, LVT_MASKED);
    lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
    lapic_write(LAPIC_TIMER_DIVIDE, 0xb); /* by 1 */
    lapic_write(LAPIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS);
}

void lapic_ipi(u32 apic_id, u8 vector)
{
    lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
    lapic_write(LAPIC_ICR_LOW, vector);
}

void lapic_self_ipi(u8 vector) { lapic_write(LAPIC_ICR_LOW, 1 << 18 | vector); }

void lapic_timer_oneshot(u32 count)
{
    lapic_write(LAPIC_LVT_TIMER, VECTOR_TIMER);
    lapic_write(LAPIC_TIMER_INITIAL, count);
}

void lapic_timer_periodic(u32 hz)
{
    lapic_write(LAPIC_LVT_TIMER, LVT_PERIODIC | VECTOR_TIMER);
    lapic_write(LAPIC_TIMER_INITIAL, (u32)(lapic_hz / hz));
}

void lapic_timer_stop(void)
{
    lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
    lapic_write(LAPIC_TIMER_INITIAL, 0);
}

void ioapic_route(u32 gsi, u8 vector, u32 apic_id)
{
    if (!acpi.ioapic_address || gsi < acpi.ioapic_gsi_base)
        return;
    volatile u32 *select = (volatile u32 *)acpi.ioapic_address, *data = select + 4;
    u32 entry = 0x10 + 2 * (gsi - acpi.ioapic_gsi_base);
    *select = entry + 1;
    *data = apic_id << 24;
    *select = entry;
    *data = vector; /* fixed, physical, edge, high */
}

/* A moment: what three clocks showed, read as close to each other as exits allow. */
struct moment { u64 tsc; u32 lapic, reference; };

static struct moment moment(int pm_timer)
{
    struct moment m;
    m.reference = pm_timer ? inl(acpi.pm_timer) : 0;
    m.tsc = rdtsc();
    m.lapic = lapic_read(LAPIC_TIMER_CURRENT);
    return m;
}

/* Take the rates over 1/hz s of the reference clock. */
static void measure(u32 hz)
{
    u64 reference_hz, ticks;
    struct moment first, last;
    lapic_write(LAPIC_TIMER_INITIAL, 0xffffffff);
    if (acpi.pm_timer) {
        reference_hz = PM_TIMER_HZ;
        first = moment(1);
        do {
            last = moment(1);
            ticks = (last.reference - first.reference) & 0xffffff;
        } while (ticks < reference_hz / hz);
    } else {
        reference_hz = PIT_HZ;
        ticks = reference_hz / hz;
        outb(0x61, (u8)((inb(0x61) & ~2) | 1)); /* gate on, speaker off */
        outb(0x43, 0xb0);                       /* channel 2, mode 0 */
        outb(0x42, (u8)ticks);
        outb(0x42, (u8)(ticks >> 8));
        first = moment(0);
        while (!(inb(0x61) & 0x20))
            cpu_pause();
        last = moment(0);
    }
    lapic_hz = (u64)(first.lapic - last.lapic) * reference_hz / ticks;
    tsc_hz = (last.tsc - first.tsc) * reference_hz / ticks;
    lapic_write(LAPIC_TIMER_INITIAL, 0);
}

void time_init(void)
{
    measure(1000); /* so that the code is warm */
    measure(MEASURE_HZ);
    tsc_start = rdtsc();
}

u64 now_ns(void)
{
    u64 ticks = rdtsc() - tsc_start;
    return ticks / tsc_hz * 1000000000 + ticks % tsc_hz * 1000000000 / tsc_hz;
}

void delay_us(u32 us)
{
    u64 end = rdtsc() + tsc_hz * us / 1000000;
    while (rdtsc() < end)
        cpu_pause();
}
