/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A Multiboot test program for the tests of `softkvm unittests`: the first argument says what it does. It reports as
 * kvm-unit-tests' programs do: lines on COM1, the exit status through port 0xF4.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct info {
    u32 flags, memory_lower, memory_upper, boot_device, command_line, module_count, modules;
    u32 symbols[4], map_length, map;
};
struct module { u32 start, end, text, reserved; };
struct map_entry { u32 size, base, base_high, length, length_high, type; };

enum { TRAMPOLINE = 0x2000, RESUME = 0x3000, HPET = 0xfed00000, LAPIC = 0xfee00000, IOAPIC = 0xfec00000 };

extern char trampoline[], trampoline_end[], resume[], resume_end[], real[], real_end[];
extern volatile u32 processors_up;
void go_real(void);
void triple_fault(void);

static void outb(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static void outw(u16 port, u16 value) { asm volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static void outl(u16 port, u32 value) { asm volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u32 inl(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static volatile u32 *at(u32 address)
{
    asm("" : "+r"(address)); /* the compiler shall not know that there is no object */
    return (volatile u32 *)address;
}

static void print(const char *text)
{
    for (; *text; text++)
        outb(0x3f8, *text);
}

static void print_number(u32 value)
{
    char digits[12], *p = digits + 11;
    *p = 0;
    do
        *--p = '0' + value % 10;
    while (value /= 10);
    print(p);
}

__attribute__((noreturn)) void quit(u32 code)
{
    outl(0xf4, code);
    for (;;)
        asm volatile("cli; hlt");
}

static int same(const char *a, const char *b)
{
    for (; *a && *a == *b; a++, b++)
        ;
    return *a == *b;
}

static u32 tests, failures;

static void check(int good, const char *what)
{
    tests++;
    failures += !good;
    print(good ? "PASS: " : "FAIL: ");
    print(what);
    print("\n");
}

static u32 summary(void)
{
    print("SUMMARY: ");
    print_number(tests);
    print(" tests");
    if (failures) {
        print(", ");
        print_number(failures);
        print(" unexpected failures");
    }
    print("\n");
    return failures ? 1 : 0;
}

static void copy(u32 to, const char *from, const char *end)
{
    for (char *p = (char *)to; from < end;)
        *p++ = *from++;
}

/* A line as kvm-unit-tests' vmexit prints it: a name, and the ticks that one round takes. */
static void time_cpuid(void)
{
    enum { ROUNDS = 1000 };
    u32 first, last, a, b, c, d;
    asm volatile("rdtsc" : "=a"(first) : : "edx");
    for (u32 i = 0; i < ROUNDS; i++)
        asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(0), "c"(0));
    asm volatile("rdtsc" : "=a"(last) : : "edx");
    print("cpuid ");
    print_number((last - first) / ROUNDS);
    print("\n");
}

static u32 fw_cfg(u16 item, u32 bytes)
{
    u32 value = 0;
    outw(0x510, item);
    for (u32 i = 0; i < bytes; i++)
        value |= (u32)inb(0x511) << (8 * i);
    return value;
}

static u32 pci_read(u32 device, u32 reg)
{
    outl(0xcf8, 1u << 31 | device << 11 | reg);
    return inl(0xcfc);
}

__attribute__((noinline)) static void hang_here(void)
{
    for (;;)
        asm volatile("pause");
}

static void smp(void)
{
    u32 wanted = fw_cfg(5, 2) - 1;
    copy(TRAMPOLINE, trampoline, trampoline_end);
    *at(LAPIC + 0xf0) = 0x1ff;
    *at(LAPIC + 0x300) = 3 << 18 | 1 << 14 | 5 << 8;                    /* INIT to all others */
    *at(LAPIC + 0x300) = 3 << 18 | 1 << 14 | 6 << 8 | TRAMPOLINE >> 12; /* start-up */
    while (processors_up < wanted)
        asm volatile("pause");
    print("processors up: ");
    print_number(processors_up + 1);
    print("\n");
}

static const struct map_entry *largest(const struct info *info)
{
    const struct map_entry *best = 0, *entry = (const void *)info->map;
    for (; (u32)entry < info->map + info->map_length; entry = (const void *)((u32)entry + entry->size + 4))
        if (entry->type == 1 && (!best || entry->length > best->length))
            best = entry;
    return best;
}

static void platform(const struct info *info)
{
    outl(0xe0, 0x12345678);
    check(inl(0xe0) == 0x12345678 && inb(0xe1) == 0x56 && inb(0xe8) == 0x78, "test device: latch");
    *at(0xff000010) = 0xcafe;
    check(*at(0xff000010) == 0xcafe && *at(0xff00fffc) == 0, "test device: memory");
    outl(0xe4, 0x400000);
    check(1, "test device: flush");
    *at(IOAPIC) = 0x10 + 2 * 20;
    *at(IOAPIC + 0x10) = 1 << 16 | 1 << 15 | 0x30; /* masked, level triggered */
    outb(0x2000 + 20, 1);
    outb(0x2000 + 20, 0);
    check(1, "test device: interrupt line");
    check(fw_cfg(0, 4) == 0x554d4551, "fw_cfg: signature");
    check(fw_cfg(3, 4) >> 20 == info->memory_upper / 1024 + 1, "fw_cfg: memory size");
    const struct map_entry *entry = largest(info);
    check(entry && entry->base == 0x100000 && entry->length >> 10 == info->memory_upper, "memory map");
    u32 before = *at(HPET + 0xf0);
    check(*at(HPET + 4) == 10000000 && !before, "HPET: stands");
    *at(HPET + 0x10) = 1;
    before = *at(HPET + 0xf0);
    check(*at(HPET + 0xf0) > before, "HPET: runs");
    check(pci_read(0, 0) == 0x12378086, "PCI: host bridge");
    u32 device = 0;
    while (device < 32 && pci_read(device, 0) != 0x00051b36)
        device++;
    check(device < 32, "PCI: test device");
    volatile u8 *bar = (volatile u8 *)(pci_read(device, 0x10) & ~15u);
    bar[0] = 0;
    check(bar[1] == 1 && *at((u32)bar + 4) == 2048, "PCI test device: header");
    bar[2048] = bar[8];
    check(*at((u32)bar + 12) == 1, "PCI test device: an access that leaves KVM");
    bar[0] = 1;
    bar[2049] = bar[8];
    check(*at((u32)bar + 12) == 1, "PCI test device: an eventfd");
}

static void rtc_write(u8 reg, u8 value)
{
    outb(0x70, reg);
    outb(0x71, value);
}

static u8 rtc_read(u8 reg)
{
    outb(0x70, reg);
    return inb(0x71);
}

static void sleep(void)
{
    u32 rsdp = 0xe0000;
    while (*at(rsdp) != 0x20445352 || *at(rsdp + 4) != 0x20525450) /* "RSD PTR " */
        rsdp += 16;
    u32 rsdt = *at(rsdp + 16), fadt = 0;
    for (u32 i = 36; i < *at(rsdt + 4); i += 4)
        if (*at(*at(rsdt + i)) == 0x50434146) /* "FACP" */
            fadt = *at(rsdt + i);
    copy(RESUME, resume, resume_end);
    *at(*at(fadt + 36) + 12) = RESUME;
    outw((u16)*at(fadt + 56) + 2, 1 << 10); /* RTC_EN */
    rtc_read(0x0c);
    rtc_write(1, 0xc0);
    rtc_write(3, 0xc0);
    rtc_write(5, 0xc0);
    rtc_write(0x0b, rtc_read(0x0b) | 0x20);
    print("sleeping\n");
    *at(0x4f0) = 0;
    outw((u16)*at(fadt + 64), 1 << 13 | 1 << 10);
    *at(0x4f0) = 1;
    quit(1);
}

u32 main(u32 magic, const struct info *info)
{
    char *words = (char *)info->command_line, *what;
    if (magic != 0x2badb002)
        return 2;
    for (what = words; *what && *what != ' '; what++)
        ;
    while (*what == ' ')
        what++;
    if (same(what, "pass")) {
        check(1, "the first check");
        print("SKIP: the second check\n");
        tests++;
        print("SUMMARY: 2 tests, 1 skipped\n");
        return 0;
    }
    if (same(what, "fail")) {
        check(1, "the first check");
        check(0, "the second check <&>");
        return summary();
    }
    if (same(what, "skip")) {
        print("SKIP: nothing to check\nSUMMARY: 1 tests, 1 skipped\n");
        return 77 >> 1;
    }
    if (same(what, "abort"))
        return 127 >> 1;
    if (same(what, "hang")) {
        print("about to hang\n");
        hang_here();
    }
    if (same(what, "halt"))
        for (;;)
            asm volatile("cli; hlt");
    if (same(what, "crash"))
        triple_fault();
    if (same(what, "smp")) {
        smp();
        return 0;
    }
    if (same(what, "environment")) {
        const struct module *module = (const void *)info->modules;
        for (u32 i = 0; info->module_count && module->start + i < module->end; i++)
            outb(0x3f8, ((const char *)module->start)[i]);
        return info->module_count == 1 ? 0 : 1;
    }
    if (same(what, "platform")) {
        platform(info);
        return summary();
    }
    if (same(what, "cpuid")) {
        time_cpuid();
        return 0;
    }
    if (same(what, "sleep"))
        sleep();
    if (same(what, "real")) {
        copy(RESUME, real, real_end);
        go_real();
    }
    print("arguments: ");
    print(what);
    print("\n");
    return 0;
}
