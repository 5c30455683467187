// SPDX-License-Identifier: Apache-2.0
// CPUID that a client executes tells of the processor that its KVM has, and a client's own SIGILL stays its own.
#include "client.h"
#include <cpuid.h>
#include <setjmp.h>

static sigjmp_buf out;
static atomic_int handled;
static void *volatile where;

// A function of its own: its bytes are what is replaced.
__attribute__((noinline)) static void cpuid(unsigned leaf, unsigned subleaf, unsigned values[4]) {
    __cpuid_count(leaf, subleaf, values[0], values[1], values[2], values[3]);
}

struct cpuids {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[256];
};

static const struct kvm_cpuid_entry2 *supported(int kvm, unsigned leaf, unsigned subleaf) {
    static struct cpuids all = {.head.nent = 256};
    if (all.head.nent == 256) CHECK(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &all) == 0);
    for (unsigned n = 0; n < all.head.nent; n++)
        if (all.entries[n].function == leaf && all.entries[n].index == subleaf) return &all.entries[n];
    return NULL;
}

static void is_the_one_of_kvm(void) {
    int kvm = open("/dev/kvm", O_RDWR);
    CHECK(kvm >= 0);
    unsigned values[4];
    cpuid(0, 0, values);
    const struct kvm_cpuid_entry2 *vendor = supported(kvm, 0, 0);
    CHECK(vendor && values[1] == vendor->ebx && values[2] == vendor->ecx && values[3] == vendor->edx);
    CHECK(values[1] == signature_AMD_ebx && values[2] == signature_AMD_ecx && values[3] == signature_AMD_edx);
    cpuid(1, 0, values);
    CHECK(values[0] == supported(kvm, 1, 0)->eax); // family, model, stepping
    cpuid(0x80000001, 0, values);
    CHECK(values[2] & 1 << 2); // SVM
}

static void on_illegal(int signal, siginfo_t *info, void *context) {
    (void)context;
    handled++;
    where = info->si_addr;
    siglongjmp(out, signal);
}

extern const uint8_t illegal[];
__attribute__((noinline)) static void execute_illegal(void) { __asm__ volatile(".globl illegal\nillegal: ud2"); }

static void illegal_instructions_are_the_clients(void) {
    struct sigaction now;
    handle(SIGILL, on_illegal, SA_SIGINFO);
    CHECK(sigaction(SIGILL, NULL, &now) == 0 && now.sa_sigaction == on_illegal);
    for (volatile int n = 0; n < 3; n++) {
        handled = 0;
        if (!sigsetjmp(out, 1)) execute_illegal();
        CHECK(handled == 1 && where == illegal);
        is_the_one_of_kvm();
        CHECK(handled == 1);
    }
    // As at abort(): without a handler it is the end.
    pid_t child = fork();
    if (!child) {
        signal(SIGILL, SIG_DFL);
        execute_illegal();
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGILL);
}

// What it chooses its own code by has to be there: the host executes it.
__attribute__((target("avx"))) static void use_avx(void) { __asm__ volatile("vxorps %%ymm0, %%ymm0, %%ymm0\nvzeroupper" ::: "xmm0"); }
static void instructions_that_it_names_can_be_executed(void) {
    unsigned values[4];
    cpuid(1, 0, values);
    if ((values[2] & (bit_AVX | bit_OSXSAVE)) == (bit_AVX | bit_OSXSAVE)) use_avx();
    if (values[2] & bit_SSE4_2) {
        uint32_t sum = 0;
        __asm__ volatile("crc32b %1, %0" : "+r"(sum) : "r"((uint8_t)1));
    }
    if (values[2] & bit_POPCNT) __asm__ volatile("popcnt %%rax, %%rax" ::: "rax");
    cpuid(7, 0, values);
    if (values[1] & bit_BMI) __asm__ volatile("andn %%eax, %%eax, %%eax" ::: "eax");
    if (values[1] & bit_BMI2) __asm__ volatile("rorx $1, %%eax, %%eax" ::: "eax");
    uint8_t from[4096], to[4096];
    memset(from, 7, sizeof from);
    memmove(to, from, sizeof from); // which the C library has chosen by CPUID
    CHECK(!memcmp(to, from, sizeof from) && strlen((char *)"/dev/kvm") == 8);
    new_guest_works();
}

CASES(CASE(is_the_one_of_kvm), CASE(illegal_instructions_are_the_clients),
      CASE(instructions_that_it_names_can_be_executed))
