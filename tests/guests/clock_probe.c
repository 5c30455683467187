// SPDX-License-Identifier: Apache-2.0
// Compares the clock sources of a Linux guest with the machine's time, for test_clocks.py. Freestanding x86-64.
//
// Arguments are names of clock sources. Port PROBE + 12 answers which of them is wanted; the program switches to it,
// says so at PROBE + 16, and then lets the machine read the clock again and again: a write to PROBE, the clock, then its
// nanoseconds to PROBE + 4 (low half) and PROBE + 8 (high half). So each value of the clock was read between two moments
// that the machine knows.

enum { PROBE = 0x1A00, CLOCK_MONOTONIC_RAW = 4, STDOUT = 1 };
enum { SYS_read = 0, SYS_write = 1, SYS_open = 2, SYS_close = 3, SYS_nanosleep = 35, SYS_exit = 60, SYS_iopl = 172,
       SYS_clock_gettime = 228 };
enum { O_RDONLY = 0, O_WRONLY = 1 };
enum { READINGS = 4000, CHANGES = 8 };  // of one burst at most, and until its end

typedef struct {
    long seconds, nanoseconds;
} timespec;

static const char CURRENT[] = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

static long system_call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

static void out(unsigned offset, unsigned value)
{
    __asm__ volatile("outl %0, %w1" : : "a"(value), "d"(PROBE + offset) : "memory");
}

static unsigned in(unsigned offset)
{
    unsigned value;
    __asm__ volatile("inl %w1, %0" : "=a"(value) : "d"(PROBE + offset) : "memory");
    return value;
}

static void nap(void)
{
    timespec time = {0, 20 * 1000 * 1000};
    system_call(SYS_nanosleep, (long)&time, 0, 0);
}

static long length(const char *text)
{
    long count = 0;
    while (text[count])
        count++;
    return count;
}

static int is_current(const char *name)
{
    char text[64];
    long file = system_call(SYS_open, (long)CURRENT, O_RDONLY, 0);
    long count = system_call(SYS_read, file, (long)text, sizeof text);
    system_call(SYS_close, file, 0, 0);
    long expected = length(name);
    if (count != expected + 1)
        return 0;
    for (long i = 0; i < expected; i++)
        if (text[i] != name[i])
            return 0;
    return 1;
}

static void switch_to(const char *name)
{
    while (!is_current(name)) {  // the kernel takes its time to register some
        long file = system_call(SYS_open, (long)CURRENT, O_WRONLY, 0);
        system_call(SYS_write, file, (long)name, length(name));
        system_call(SYS_close, file, 0, 0);
        nap();
    }
}

static void burst(void)
{
    long before = 0;
    for (int reading = 0, changes = 0; reading < READINGS && changes < CHANGES; reading++) {
        timespec now;
        out(0, 0);
        system_call(SYS_clock_gettime, CLOCK_MONOTONIC_RAW, (long)&now, 0);
        long nanoseconds = now.seconds * 1000000000 + now.nanoseconds;
        out(4, nanoseconds);
        out(8, nanoseconds >> 32);
        changes += nanoseconds != before;
        before = nanoseconds;
    }
}

__attribute__((used)) static void probe(long *stack)
{
    long count = stack[0] - 1;
    char **names = (char **)(stack + 2);
    long current = -1;
    system_call(SYS_iopl, 3, 0, 0);
    for (;;) {
        long wanted = in(12);
        if (wanted >= count)
            system_call(SYS_exit, 0, 0, 0);
        if (wanted != current) {
            switch_to(names[wanted]);
            current = wanted;
            out(16, wanted);
        }
        burst();
        nap();
    }
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call probe\n");
