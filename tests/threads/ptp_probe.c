// SPDX-License-Identifier: Apache-2.0
// Reads the PTP clock of a Linux guest for test_ptp.py. Freestanding x86-64.
//
// Each value of /dev/ptp0 is read between two writes to the machine's device at PROBE, which notes when they come; then
// its nanoseconds go to PROBE + 4 (low half) and PROBE + 8 (high half). Then PTP_SYS_OFFSET_PRECISE gives the PTP clock
// and CLOCK_MONOTONIC_RAW at one moment, which go to PROBE + 12 and the ports behind it.

enum { PROBE = 0x1A00, STDOUT = 1, READINGS = 200 };
enum { SYS_write = 1, SYS_open = 2, SYS_ioctl = 16, SYS_exit = 60, SYS_iopl = 172, SYS_clock_gettime = 228 };
enum { O_RDWR = 2 };

typedef struct {
    long seconds, nanoseconds;
} timespec;

typedef struct {
    long seconds;
    unsigned nanoseconds, reserved;
} ptp_clock_time;

struct {
    ptp_clock_time device, realtime, monotonic_raw;
    unsigned reserved[4];
} precise;

#define PTP_SYS_OFFSET_PRECISE (3ul << 30 | sizeof precise << 16 | '=' << 8 | 8)

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

static void out64(unsigned offset, unsigned long value)
{
    out(offset, (unsigned)value);
    out(offset + 4, (unsigned)(value >> 32));
}

static void leave(const char *text, long size, int status)
{
    system_call(SYS_write, STDOUT, (long)text, size);
    system_call(SYS_exit, status, 0, 0);
}

#define LEAVE(text, status) leave(text "\n", sizeof text, status)

__attribute__((force_align_arg_pointer)) void _start(void)
{
    if (system_call(SYS_iopl, 3, 0, 0))
        LEAVE("no ports", 1);
    long file = system_call(SYS_open, (long)"/dev/ptp0", O_RDWR, 0);
    if (file < 0)
        LEAVE("no /dev/ptp0", 1);
    for (int n = 0; n < READINGS; n++) {
        timespec time;
        out(0, 0);
        if (system_call(SYS_clock_gettime, ~file << 3 | 3, (long)&time, 0))
            LEAVE("the clock cannot be read", 1);
        out64(4, time.seconds * 1000000000ul + time.nanoseconds);
        if (system_call(SYS_ioctl, file, PTP_SYS_OFFSET_PRECISE, (long)&precise))
            LEAVE("no precise offset", 1);
        out64(12, precise.device.seconds * 1000000000ul + precise.device.nanoseconds);
        out64(20, precise.monotonic_raw.seconds * 1000000000ul + precise.monotonic_raw.nanoseconds);
    }
    LEAVE("ptp read", 0);
}
