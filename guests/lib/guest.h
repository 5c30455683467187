/* SPDX-License-Identifier: Apache-2.0 */
/* What bare-metal guests share. Single-threaded unless it says otherwise. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef u64 size_t;

#define CPUS_MAX 64
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* --- instructions --- */

static inline u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline void outb(u16 port, u8 v) { asm volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outw(u16 port, u16 v) { asm volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }

static inline u64 rdtsc(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

struct cpuid { u32 eax, ebx, ecx, edx; };

static inline struct cpuid cpuid(u32 leaf, u32 subleaf)
{
    struct cpuid r;
    asm volatile("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(leaf), "c"(subleaf));
    return r;
}

static inline u64 rdmsr(u32 msr)
{
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (u64)high << 32 | low;
}

static inline void wrmsr(u32 msr, u64 v)
{
    asm volatile("wrmsr" : : "c"(msr), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}

static inline void cpu_pause(void) { asm volatile("pause" : : : "memory"); }
static inline void irq_enable(void) { asm volatile("sti" : : : "memory"); }
static inline void irq_disable(void) { asm volatile("cli" : : : "memory"); }
/* Interrupts are enabled only once HLT began (STI's shadow), so none is lost between a check and the halt. */
static inline void irq_enable_and_halt(void) { asm volatile("sti; hlt" : : : "memory"); }

/* --- string.c --- */

void *memset(void *to, int value, size_t count);
void *memcpy(void *to, const void *from, size_t count);
int memcmp(const void *a, const void *b, size_t count);
size_t strlen(const char *s);
int strcmp(const char *a, const char *b);
int strncmp(const char *a, const char *b, size_t count);

/* --- serial.c: COM1 --- */

#define SERIAL_IRQ 4
void serial_init(void);
void serial_write(const char *s, size_t count);
int serial_read(void); /* the next character, or -1 */
void serial_irq(void);
/* %c %s %d %u %x with l, width, 0 and -; %% */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);

/* --- boot.c: what the loader told us --- */

struct memory_range { u64 start, size; u32 type; };
#define MEMORY_RAM 1
extern struct memory_range memory_map[64];
extern unsigned memory_ranges;
extern char command_line[512];
extern u64 rsdp_address;
void boot_init(void);
/* The value of "name=value" in the command line (up to a space, or within quotes), or 0. */
const char *boot_option(const char *name, char *buffer, size_t size);
u64 parse_number(const char *s, u64 otherwise);

/* --- acpi.c --- */

struct acpi {
    u32 cpu_count;
    u8 apic_ids[CPUS_MAX];
    u64 lapic_address;
    u64 ioapic_address; /* 0: none */
    u32 ioapic_gsi_base;
    u32 serial_gsi;
    u16 pm1a_cnt, pm1b_cnt, pm_timer; /* 0: none */
    u8 s5_typ_a, s5_typ_b, s5_known;
    u16 reset_port;
    u8 reset_value;
};
extern struct acpi acpi;
void acpi_init(void);
__attribute__((noreturn)) void power_off(void);
__attribute__((noreturn)) void reboot(void);

/* --- trap.c --- */

struct trap_frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};
typedef void (*trap_handler)(struct trap_frame *);
void trap_init(void);      /* once */
void trap_init_cpu(void);  /* on each processor */
void trap_set(u8 vector, trap_handler handler); /* interrupts; the end-of-interrupt is signalled for them */

/* --- apic.c --- */

#define VECTOR_TIMER 0x40
#define VECTOR_IPI 0x41
#define VECTOR_SERIAL 0x42
#define VECTOR_SPURIOUS 0xff
extern u64 tsc_hz, lapic_hz;
u32 lapic_read(u32 reg);
void lapic_write(u32 reg, u32 value);
void lapic_init(void);     /* on each processor */
void lapic_eoi(void);
u32 lapic_id(void);
void lapic_ipi(u32 apic_id, u8 vector);
void lapic_self_ipi(u8 vector);
void lapic_timer_periodic(u32 hz);
void lapic_timer_oneshot(u32 count);
void lapic_timer_stop(void);
void ioapic_route(u32 gsi, u8 vector, u32 apic_id);
void time_init(void);      /* measures tsc_hz and lapic_hz */
void delay_us(u32 us);
u64 now_ns(void);          /* since time_init */

/* --- smp.c --- */

struct processor {
    u32 index, apic_id;
    volatile u32 running;
    volatile u64 timer_irqs, ipi_irqs, serial_irqs;
    void (*volatile work)(struct processor *);
    volatile u64 work_result;
};
extern struct processor processors[CPUS_MAX];
extern u32 processors_running;
struct processor *this_processor(void);
void smp_init(void);       /* starts all others; they wait halted for work */
void smp_call(u32 index, void (*work)(struct processor *));
void smp_wait(u32 index);
