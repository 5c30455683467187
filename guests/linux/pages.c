// SPDX-License-Identifier: Apache-2.0
// Uses memory in a Linux guest: for `softkvm bench overcommit`, `softkvm bench page-reporting` and tests of the balloon.
// Freestanding x86-64.
//
//   pages hog MIB                    touches so much memory, and ends
//   pages fault TASKS MIB SECONDS    processes that map MIB each, touch every page and unmap it, again and again
//   pages check MIB PAGES            maps, fills, verifies and unmaps parts of MIB until PAGES pages were verified
//
// Each prints one line: "hog N pages", "fault N pages in NS ns", "check N pages, lost L, not zero Z".

typedef unsigned long u64;

enum { SYS_write = 1, SYS_mmap = 9, SYS_munmap = 11, SYS_fork = 57, SYS_exit = 60, SYS_wait4 = 61, SYS_clock_gettime = 228 };
enum { PROT_READ_WRITE = 3, MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_ANONYMOUS = 0x20, MAP_NORESERVE = 0x4000 };
enum { CLOCK_MONOTONIC = 1, PAGE = 4096, PARTS = 16, TASKS_MAX = 64 };

static long system_call(long number, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = -1; // mmap's descriptor
    register long r9 __asm__("r9") = 0;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static void print(const char *text)
{
    long length = 0;
    while (text[length])
        length++;
    system_call(SYS_write, 1, (long)text, length, 0);
}

static void print_number(u64 value)
{
    char digits[24];
    int at = sizeof digits - 1;
    digits[at] = 0;
    do
        digits[--at] = '0' + value % 10;
    while (value /= 10);
    print(digits + at);
}

static u64 number(const char *text)
{
    u64 value = 0;
    while (*text >= '0' && *text <= '9')
        value = 10 * value + *text++ - '0';
    return value;
}

static void fail(const char *what)
{
    print(what);
    print("\n");
    system_call(SYS_exit, 1, 0, 0, 0);
}

static char *map(u64 size, long flags)
{
    long address = system_call(SYS_mmap, 0, size, PROT_READ_WRITE, flags | MAP_ANONYMOUS | MAP_NORESERVE);
    if (address < 0 && address > -PAGE)
        fail("pages: no memory");
    return (char *)address;
}

static void unmap(char *address, u64 size)
{
    system_call(SYS_munmap, (long)address, size, 0, 0);
}

static u64 now(void)
{
    u64 time[2];
    system_call(SYS_clock_gettime, CLOCK_MONOTONIC, (long)time, 0, 0);
    return time[0] * 1000000000 + time[1];
}

static void touch(char *memory, u64 size)
{
    for (u64 at = 0; at < size; at += PAGE)
        *(volatile char *)(memory + at) = 1;
}

static void hog(u64 size)
{
    touch(map(size, MAP_PRIVATE), size);
    print("hog ");
    print_number(size / PAGE);
    print(" pages\n");
}

static void fault(u64 tasks, u64 size, u64 seconds)
{
    volatile u64 *counts = (volatile u64 *)map(PAGE, MAP_SHARED);
    u64 start = now(), end = start + seconds * 1000000000, sum = 0;
    for (u64 task = 0; task < tasks; task++) {
        long child = system_call(SYS_fork, 0, 0, 0, 0);
        if (child < 0)
            fail("pages: no process");
        if (child)
            continue;
        do {
            char *memory = map(size, MAP_PRIVATE);
            touch(memory, size);
            unmap(memory, size);
            counts[task] += size / PAGE;
        } while (now() < end);
        system_call(SYS_exit, 0, 0, 0, 0);
    }
    for (u64 task = 0; task < tasks; task++)
        system_call(SYS_wait4, -1, 0, 0, 0);
    u64 time = now() - start;
    for (u64 task = 0; task < tasks; task++)
        sum += counts[task];
    print("fault ");
    print_number(sum);
    print(" pages in ");
    print_number(time);
    print(" ns\n");
}

// The two words of a page, at places that depend on the page, which say that it is that page in that round.
static u64 *word(char *page, u64 index, int second)
{
    u64 offset = index * 0x9E3779B97F4A7C15ul >> 56 & 0xFF; // of 512 words
    return (u64 *)page + offset + (second ? 256 : 0);
}

static u64 pattern(u64 index, u64 round)
{
    return (index << 32 | round) * 0xD6E8FEB86659FD93ul | 1;
}

static void check(u64 size, u64 wanted)
{
    static char *memory[PARTS];
    static u64 rounds[PARTS];
    u64 part_size = size / PARTS & -PAGE, pages = part_size / PAGE;
    u64 verified = 0, lost = 0, dirty = 0, random = 1;
    for (u64 round = 1; verified < wanted; round++) {
        random = random * 6364136223846793005ul + 1442695040888963407ul;
        u64 part = random >> 33 & (PARTS - 1);
        if (memory[part]) {
            for (u64 page = 0; page < pages; page++) {
                char *at = memory[part] + page * PAGE;
                u64 expected = pattern(part * pages + page, rounds[part]);
                if (*word(at, page, 0) != expected || *word(at, page, 1) != ~expected)
                    lost++;
            }
            verified += pages;
            unmap(memory[part], part_size);
            memory[part] = 0;
        } else {
            memory[part] = map(part_size, MAP_PRIVATE);
            rounds[part] = round;
            for (u64 page = 0; page < pages; page++) {
                char *at = memory[part] + page * PAGE;
                if (*word(at, page, 0) || *word(at, page, 1))
                    dirty++;
                u64 value = pattern(part * pages + page, round);
                *word(at, page, 0) = value;
                *word(at, page, 1) = ~value;
            }
        }
    }
    print("check ");
    print_number(verified);
    print(" pages, lost ");
    print_number(lost);
    print(", not zero ");
    print_number(dirty);
    print("\n");
}

static int is(const char *text, const char *word)
{
    while (*text && *text == *word)
        text++, word++;
    return *text == *word;
}

__attribute__((used)) static void start(long *stack)
{
    long count = stack[0];
    char **arguments = (char **)stack + 1;
    if (count == 3 && is(arguments[1], "hog"))
        hog(number(arguments[2]) << 20);
    else if (count == 5 && is(arguments[1], "fault") && number(arguments[2]) <= TASKS_MAX)
        fault(number(arguments[2]), number(arguments[3]) << 20, number(arguments[4]));
    else if (count == 4 && is(arguments[1], "check"))
        check(number(arguments[2]) << 20, number(arguments[3]));
    else
        fail("pages hog MIB | fault TASKS MIB SECONDS | check MIB PAGES");
    system_call(SYS_exit, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\nand $-16, %rsp\ncall start\n");
