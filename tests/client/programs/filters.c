// SPDX-License-Identifier: Apache-2.0
// Filters of system calls, and system calls by number.
#include "client.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>

// Allows nothing but the end of the process.
static struct sock_filter nothing[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
};
static struct sock_fprog program = {sizeof nothing / sizeof *nothing, nothing};

static void by_seccomp(void) {
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0);
}
static void by_seccomp_for_all_threads(void) {
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0);
}
static void by_prctl(void) {
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0);
}
static void strict_by_seccomp(void) { CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 0, NULL) == 0); }
static void strict_by_prctl(void) { CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0) == 0); }

static void (*filter)(void);

static void *filtered(void *unused) {
    filter();
    new_guest_works();
    return unused;
}

// Before the first open of /dev/kvm, after it, and on a thread whose others have none.
static void guests_run(void (*how)(void)) {
    filter = how;
    how();
    new_guest_works();
    how();
    new_guest_works();
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, filtered, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}
static void filter_by_seccomp(void) { guests_run(by_seccomp); }
static void filter_for_all_threads(void) { guests_run(by_seccomp_for_all_threads); }
static void filter_by_prctl(void) { guests_run(by_prctl); }
static void strict_mode_by_seccomp(void) { guests_run(strict_by_seccomp); }
static void strict_mode_by_prctl(void) { guests_run(strict_by_prctl); }

// As libseccomp finds out what the kernel has: seccomp(2) and its errors.
static void questions_are_the_kernels(void) {
    uint32_t allow = SECCOMP_RET_ALLOW;
    CHECK(syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &allow) == 0);
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, NULL), EFAULT);
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, NULL), EFAULT);
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 1u << 31, &program), EINVAL);
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 1, NULL), EINVAL);
    FAILS(syscall(SYS_seccomp, 99, 0, NULL), EINVAL);
    FAILS(prctl(PR_SET_SECCOMP, 99, 0, 0, 0), EINVAL);
    CHECK(prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == status_of("Seccomp"));
}

// ---- what is wrong with a filter --------------------------------------------------------------------------------------

static int install(unsigned length, const void *instructions) {
    struct sock_fprog wrong = {length, (struct sock_filter *)instructions};
    errno = 0;
    int one = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &wrong) == 0 ? 0 : errno;
    errno = 0;
    int other = prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &wrong, 0, 0) == 0 ? 0 : errno;
    CHECK(one == other);
    return one;
}

static const struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};

static void wrong_filters_are_refused(void) {
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    new_guest_works();
    for (int n = 0; n < 5; n++) {
        void *const wild[] = {NULL, (void *)8, (void *)0x7fffffffe000, (void *)-8, (void *)0xffff800000000000};
        FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, wild[n]), EFAULT);
        FAILS(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, wild[n], 0, 0), EFAULT);
        CHECK(install(1, wild[n]) == (n ? EFAULT : EINVAL));
        CHECK(install(0, wild[n]) == EINVAL);
    }
    // Over the end of what is mapped.
    char *pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mprotect(pages + 4096, 4096, PROT_NONE) == 0);
    memcpy(pages + 4096 - sizeof allow, allow, sizeof allow);
    CHECK(install(2, pages + 4096 - sizeof allow) == EFAULT);
    CHECK(install(1, pages + 4096 - sizeof allow) == 0);
    memcpy(pages + 4096 - 8, &(struct sock_fprog){1, (struct sock_filter *)allow}, 8);
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, pages + 4096 - 8), EFAULT);
    static struct sock_filter many[4097];
    for (int n = 0; n < 4097; n++) many[n] = allow[0];
    CHECK(install(0, many) == EINVAL && install(4097, many) == EINVAL && install(65535, many) == EINVAL);
    CHECK(install(4096, many) == 0);
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
    static const struct sock_filter wrong[][3] = {
        {ALLOW, ALLOW, BPF_STMT(BPF_LD | BPF_IMM, 0)},                       // no end
        {BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 2, 0), ALLOW, ALLOW},         // beyond the end
        {BPF_STMT(BPF_JMP | BPF_JA, 2), ALLOW, ALLOW},                        //
        {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 2), ALLOW, ALLOW},                // not aligned
        {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 64), ALLOW, ALLOW},               // beyond seccomp_data
        {BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 0), ALLOW, ALLOW},                // not a word
        {BPF_STMT(BPF_LDX | BPF_B | BPF_MSH, 0), ALLOW, ALLOW},               // of sockets' filters
        {BPF_STMT(BPF_ALU | BPF_DIV | BPF_K, 0), ALLOW, ALLOW},               //
        {BPF_STMT(BPF_LD | BPF_MEM, 0), ALLOW, ALLOW},                        // a word that nobody has written
        {BPF_STMT(BPF_ST, 16), ALLOW, ALLOW},                                 // or that there is not
        {BPF_STMT(0xFFFF, 0), ALLOW, ALLOW},                                  //
    };
    for (unsigned n = 0; n < sizeof wrong / sizeof *wrong; n++) CHECK(install(3, wrong[n]) == EINVAL);
    struct sock_fprog good = {1, (struct sock_filter *)allow};
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 1u << 30, &good), EINVAL);
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 0, &good), EINVAL);
    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_LOG, &good) == 0);
    new_guest_works();
}

// It takes CAP_SYS_ADMIN, or to renounce more rights for good.
static void a_filter_takes_a_right(void) {
    struct {
        uint32_t version, pid;
    } header = {0x20080522, 0};
    uint32_t sets[6];
    new_guest_works();
    CHECK(syscall(SYS_capget, &header, sets) == 0);
    sets[0] &= ~(1u << 21);
    CHECK(syscall(SYS_capset, &header, sets) == 0);
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0);
    CHECK(install(1, allow) == EACCES && install(0, allow) == EINVAL && install(1, (void *)8) == EACCES);
    FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, (void *)8), EFAULT);
    FAILS(prctl(PR_SET_NO_NEW_PRIVS, 2, 0, 0, 0), EINVAL);
    CHECK(install(1, allow) == EACCES);
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
    CHECK(install(1, allow) == 0 && install(1, (void *)8) == EFAULT);
    new_guest_works();
}

// Everything by number, as a program without a C library's wrappers has it.
static void calls_by_number(void) {
    int kvm = syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR | O_CLOEXEC);
    check_ours(kvm);
    CHECK(syscall(SYS_ioctl, kvm, KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
    FAILS(syscall(SYS_ioctl, kvm, _IO(KVMIO, 0xFE), 0), EINVAL);
    int vm = syscall(SYS_ioctl, kvm, KVM_CREATE_VM, 0);
    uint8_t *ram =
        (void *)syscall(SYS_mmap, NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0L);
    CHECK(ram != MAP_FAILED);
    memcpy(ram + CODE, OUTS, sizeof OUTS);
    CHECK(set_memory(vm, 0, 0, RAM_SIZE, ram) == 0);
    int vcpu = syscall(SYS_ioctl, vm, KVM_CREATE_VCPU, 0);
    int size = syscall(SYS_ioctl, kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = (void *)syscall(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0L);
    CHECK(run != MAP_FAILED);
    vcpu_at(vcpu, CODE);
    CHECK(syscall(SYS_ioctl, vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_IO);
    CHECK(syscall(SYS_munmap, ram, RAM_SIZE) == 0);
    FAILS(syscall(SYS_ioctl, vcpu, KVM_RUN, 0), EFAULT);
    CHECK(syscall(SYS_munmap, run, size) == 0);
    CHECK(syscall(SYS_close, vcpu) == 0 && syscall(SYS_close, vm) == 0 && syscall(SYS_close, kvm) == 0);
    FAILS(syscall(SYS_ioctl, vm, KVM_CHECK_EXTENSION, 0), EBADF);
    new_guest_works();
}

CASES(CASE(filter_by_seccomp), CASE(filter_for_all_threads), CASE(filter_by_prctl), CASE(strict_mode_by_seccomp),
      CASE(strict_mode_by_prctl), CASE(questions_are_the_kernels), CASE(wrong_filters_are_refused),
      CASE(a_filter_takes_a_right), CASE(calls_by_number))
