/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The few facts of the ACPI tables that a small guest needs: processors, interrupt controllers, power management.
 * Source: ACPI specification 6.4: 5.2.5 RSDP, 5.2.8 XSDT, 5.2.9 FADT, 5.2.12 MADT, 7.4.2 \_S5, 20.2 AML encoding.
 */
#include "guest.h"

struct acpi acpi = {.cpu_count = 1, .lapic_address = 0xfee00000, .serial_gsi = SERIAL_IRQ};

struct header {
    char signature[4];
    u32 length;
    u8 revision, checksum;
    char oem[6 + 8 + 4 + 4 + 4];
} __attribute__((packed));

#define MAPPED_END (1ul << 32)

static u32 get32(const u8 *p) { return p[0] | p[1] << 8 | p[2] << 16 | (u32)p[3] << 24; }
static u64 get64(const u8 *p) { return get32(p) | (u64)get32(p + 4) << 32; }

/* A table of a sensible length whose bytes add up to zero, or 0. */
static const struct header *table_at(u64 address)
{
    const struct header *table = (const void *)address;
    if (!address || address + sizeof(*table) > MAPPED_END)
        return 0;
    if (table->length < sizeof(*table) || table->length > 1 << 20 || address + table->length > MAPPED_END)
        return 0;
    u8 sum = 0;
    for (u32 i = 0; i < table->length; i++)
        sum += ((const u8 *)table)[i];
    return sum ? 0 : table;
}

static u64 find_rsdp(void)
{
    if (rsdp_address && rsdp_address < MAPPED_END)
        return rsdp_address;
    for (u64 at = 0xe0000; at < 0x100000; at += 16)
        if (!memcmp((const void *)at, "RSD PTR ", 8))
            return at;
    return 0;
}

static void read_madt(const struct header *madt)
{
    const u8 *p = (const u8 *)madt + 44, *end = (const u8 *)madt + madt->length;
    u32 count = 0;
    acpi.lapic_address = get32((const u8 *)madt + 36);
    for (; p + 2 <= end && p[1] >= 2 && p + p[1] <= end; p += p[1]) {
        if (p[0] == 0 && p[1] >= 8 && get32(p + 4) & 1) { /* an enabled processor */
            if (count < CPUS_MAX)
                acpi.apic_ids[count++] = p[3];
        } else if (p[0] == 1 && p[1] >= 12 && !acpi.ioapic_address) {
            acpi.ioapic_address = get32(p + 4);
            acpi.ioapic_gsi_base = get32(p + 8);
        } else if (p[0] == 2 && p[1] >= 10 && p[3] == SERIAL_IRQ) { /* source override */
            acpi.serial_gsi = get32(p + 4);
        }
    }
    if (count)
        acpi.cpu_count = count;
}

/* An integer of AML: a byte constant, a prefixed byte, or zero/one. */
static const u8 *aml_byte(const u8 *p, u8 *value)
{
    if (*p == 0x0a)
        p++;
    *value = *p++;
    return p;
}

static void read_dsdt(const struct header *dsdt)
{
    const u8 *p = (const u8 *)dsdt + sizeof(*dsdt), *end = (const u8 *)dsdt + dsdt->length;
    for (; p + 12 < end; p++) {
        if (memcmp(p, "_S5_", 4) || p[4] != 0x12) /* NameString, PackageOp */
            continue;
        p += 5;
        p += 1 + (*p >> 6); /* PkgLength */
        p++;                /* NumElements */
        p = aml_byte(p, &acpi.s5_typ_a);
        aml_byte(p, &acpi.s5_typ_b);
        acpi.s5_known = 1;
        return;
    }
}

static void read_fadt(const struct header *fadt)
{
    const u8 *f = (const u8 *)fadt;
    if (fadt->length < 116)
        return;
    acpi.pm1a_cnt = (u16)get32(f + 64);
    acpi.pm1b_cnt = (u16)get32(f + 68);
    acpi.pm_timer = (u16)get32(f + 76);
    if (fadt->length >= 129 && get32(f + 112) & 1 << 10 && f[116] == 1) { /* RESET_REG_SUP, in I/O space */
        acpi.reset_port = (u16)get64(f + 120);
        acpi.reset_value = f[128];
    }
    u64 dsdt_address = fadt->length >= 148 ? get64(f + 140) : 0;
    const struct header *dsdt = table_at(dsdt_address ? dsdt_address : get32(f + 40));
    if (dsdt)
        read_dsdt(dsdt);
}

void acpi_init(void)
{
    const u8 *rsdp = (const u8 *)find_rsdp();
    if (!rsdp)
        return;
    u64 xsdt = rsdp[15] >= 2 ? get64(rsdp + 24) : 0;
    const struct header *root = table_at(xsdt ? xsdt : get32(rsdp + 16));
    if (!root)
        return;
    u32 width = xsdt ? 8 : 4;
    for (u32 at = sizeof(*root); at + width <= root->length; at += width) {
        const u8 *p = (const u8 *)root + at;
        const struct header *table = table_at(width == 8 ? get64(p) : get32(p));
        if (!table)
            continue;
        if (!memcmp(table->signature, "APIC", 4))
            read_madt(table);
        else if (!memcmp(table->signature, "FACP", 4))
            read_fadt(table);
    }
}

static __attribute__((noreturn)) void halt_for_ever(void)
{
    for (;;)
        asm volatile("cli; hlt");
}

void power_off(void)
{
    irq_disable();
    if (acpi.s5_known && acpi.pm1a_cnt) {
        outw(acpi.pm1a_cnt, (u16)(acpi.s5_typ_a << 10 | 1 << 13));
        if (acpi.pm1b_cnt)
            outw(acpi.pm1b_cnt, (u16)(acpi.s5_typ_b << 10 | 1 << 13));
        delay_us(1000000); /* a machine may need a moment */
    }
    print("this machine has no power-off that works: halted\n");
    halt_for_ever();
}

void reboot(void)
{
    irq_disable();
    if (acpi.reset_port)
        outb(acpi.reset_port, acpi.reset_value);
    delay_us(10000);
    outb(0x64, 0xfe); /* the keyboard controller's reset line */
    delay_us(10000);
    /* No interrupt table: the next exception is a triple fault. */
    static const struct { u16 limit; u64 base; } __attribute__((packed)) none = {0, 0};
    asm volatile("lidt %0; int3" : : "m"(none));
    halt_for_ever();
}
