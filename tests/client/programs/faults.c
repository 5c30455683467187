// SPDX-License-Identifier: Apache-2.0
// SIGSEGV and SIGBUS: a client's own faults are its handler's, a guest's are KVM_RUN's result.
#include "client.h"
#include <setjmp.h>
#include <sys/resource.h>

static struct guest g;
static sigjmp_buf out;
static atomic_int handled, chained;
static void *volatile where;
static const size_t PAGE = 4096;

static void on_fault(int signal, siginfo_t *info, void *context) {
    (void)context;
    handled++;
    where = info->si_addr;
    siglongjmp(out, signal);
}

static void install(int flags) {
    handle(SIGSEGV, on_fault, SA_SIGINFO | flags);
    handle(SIGBUS, on_fault, SA_SIGINFO | flags);
}

// Memory that faults with SIGSEGV, and with SIGBUS.
static uint8_t *protected_page(void) {
    uint8_t *page = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED);
    return page;
}
static int file;
static uint8_t *truncated_page(void) {
    file = memfd_create("short", 0);
    uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(page != MAP_FAILED);
    return page;
}

static void own_faults_are_handled(void) {
    uint8_t *no = protected_page(), *gone = truncated_page();
    for (volatile int n = 0; n < 5; n++) {
        handled = 0;
        if (!sigsetjmp(out, 1)) *(volatile uint8_t *)(no + 5) = 1;
        CHECK(handled == 1 && where == no + 5);
        if (!sigsetjmp(out, 1)) *(volatile uint8_t *)(gone + 7) = 1;
        CHECK(handled == 2 && where == gone + 7);
    }
}

// Requests on memory that is not there fail, and the client's handler sees nothing of it.
static void requests_fault_silently(void) {
    handled = 0;
    FAILS(ioctl(g.vcpu, KVM_GET_REGS, protected_page()), EFAULT);
    FAILS(ioctl(g.vcpu, KVM_SET_REGS, truncated_page()), EFAULT);
    // again: mov [0x9000], al; the page of which is not there
    static const uint8_t STORE[] = {0xA2, 0x00, 0x90, 0xE6, 0x10, 0xEB, 0xF9};
    uint8_t before[sizeof STORE];
    memcpy(before, g.ram + CODE, sizeof STORE);
    memcpy(g.ram + CODE, STORE, sizeof STORE);
    vcpu_at(g.vcpu, CODE);
    next_out(&g);
    CHECK(mprotect(g.ram + 0x9000, PAGE, PROT_NONE) == 0);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EFAULT);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EFAULT);
    CHECK(vcpu_rip(g.vcpu) == CODE);
    CHECK(mprotect(g.ram + 0x9000, PAGE, PROT_READ | PROT_WRITE) == 0);
    next_out(&g);
    memcpy(g.ram + CODE, before, sizeof STORE);
    CHECK(handled == 0);
}

static void handler_before_open(void) {
    install(0);
    g = guest_open(OUTS, sizeof OUTS);
    own_faults_are_handled();
    requests_fault_silently();
    own_faults_are_handled();
}

static void handler_after_open(void) {
    g = guest_open(OUTS, sizeof OUTS);
    requests_fault_silently();
    install(0);
    own_faults_are_handled();
    requests_fault_silently();
    own_faults_are_handled();
}

static void handler_by_other_functions(void) {
    g = guest_open(OUTS, sizeof OUTS);
    requests_fault_silently();
    signal(SIGSEGV, SIG_DFL);
    signal(SIGBUS, SIG_DFL);
    requests_fault_silently();
    // As a program does that has no C library: only later looks can find it.
    struct {
        void *handler;
        unsigned long flags;
        void *restorer;
        unsigned long mask;
    } raw = {0};
    install(0);
    CHECK(syscall(SYS_rt_sigaction, SIGSEGV, NULL, &raw, 8) == 0);
    raw.handler = on_fault;
    CHECK(syscall(SYS_rt_sigaction, SIGSEGV, &raw, NULL, 8) == 0);
    CHECK(syscall(SYS_rt_sigaction, SIGBUS, &raw, NULL, 8) == 0);
    sleep_ms(50);
    g.run->immediate_exit = 1;
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    g.run->immediate_exit = 0;
    requests_fault_silently();
    own_faults_are_handled();
}

static void on_alternate_stack(void) {
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    CHECK(sigaltstack(&stack, NULL) == 0);
    g = guest_open(OUTS, sizeof OUTS);
    install(SA_ONSTACK);
    own_faults_are_handled();
    requests_fault_silently();
    own_faults_are_handled();
}

// A handler that knows nothing of a fault calls the one that was there before.
static struct sigaction previous;
static void on_fault_or_before(int signal, siginfo_t *info, void *context) {
    CHECK(++chained < 10);
    CHECK(previous.sa_flags & SA_SIGINFO);
    previous.sa_sigaction(signal, info, context);
}
static void handlers_call_the_one_before(void) {
    install(0);
    g = guest_open(OUTS, sizeof OUTS);
    requests_fault_silently();
    struct sigaction mine = {.sa_flags = SA_SIGINFO}, now;
    mine.sa_sigaction = on_fault_or_before;
    CHECK(sigaction(SIGSEGV, &mine, &previous) == 0);
    CHECK(previous.sa_sigaction == on_fault);
    CHECK(sigaction(SIGSEGV, NULL, &now) == 0 && now.sa_sigaction == on_fault_or_before);
    own_faults_are_handled();
    CHECK(chained == 5);
    chained = 0;
    requests_fault_silently();
    CHECK(chained == 0);
    // Put back, as after a probe.
    CHECK(sigaction(SIGSEGV, &previous, NULL) == 0);
    own_faults_are_handled();
    CHECK(chained == 0);
    // Many.
    for (int n = 0; n < 100; n++) {
        mine.sa_flags = SA_SIGINFO | (n % 2 ? SA_NODEFER : 0) | (n % 3 ? SA_RESTART : 0);
        CHECK(sigaction(SIGSEGV, &mine, &now) == 0);
        CHECK(now.sa_sigaction == on_fault);
        CHECK(sigaction(SIGSEGV, &now, &mine) == 0 && mine.sa_sigaction == on_fault_or_before);
    }
    requests_fault_silently();
    own_faults_are_handled();
}

// Without a handler it is the end, as without us.
static int ends_by(void (*function)(void)) {
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        function();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}
static void fault_segv(void) { *(volatile uint8_t *)protected_page() = 1; }
static void fault_bus(void) { *(volatile uint8_t *)truncated_page() = 1; }
static void raise_segv(void) { raise(SIGSEGV); }
static void reset_and_fault(void) {
    signal(SIGSEGV, SIG_DFL);
    fault_segv();
}
static void abort_it(void) { abort(); }
static void without_a_handler(void) {
    g = guest_open(OUTS, sizeof OUTS);
    requests_fault_silently();
    CHECK(ends_by(fault_segv) == SIGSEGV);
    CHECK(ends_by(fault_bus) == SIGBUS);
    CHECK(ends_by(raise_segv) == SIGSEGV);
    CHECK(ends_by(abort_it) == SIGABRT);
    install(0);
    CHECK(ends_by(reset_and_fault) == SIGSEGV);
}
static void one_shot(int signal) {
    (void)signal;
    handled++;
}
// SA_RESETHAND: once, and then the end.
static void reset_hand(void) {
    handle(SIGSEGV, one_shot, SA_RESETHAND);
    fault_segv();
}
static void handler_for_once(void) {
    g = guest_open(OUTS, sizeof OUTS);
    requests_fault_silently();
    CHECK(ends_by(reset_hand) == SIGSEGV);
}

// ---- memory that goes under a vCPU that runs ------------------------------------------------------------------------

static void *run_until_fault(void *unused) {
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EFAULT);
    return unused;
}

// again: inc dword [0x3000]; jmp again: in a slot of its own.
static uint8_t *memory_of(int fd) {
    static const uint8_t COUNT3[] = {0x66, 0xFF, 0x06, 0x00, 0x30, 0xEB, 0xF9};
    memcpy(g.ram + CODE, COUNT3, sizeof COUNT3);
    CHECK(set_memory(g.vm, 0, 0, 0, g.ram) == 0);
    CHECK(set_memory(g.vm, 0, 0, 0x3000, g.ram) == 0);
    uint8_t *memory = mmap(NULL, 0x2000, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    CHECK(memory != MAP_FAILED);
    CHECK(set_memory(g.vm, 1, 0x3000, 0x2000, memory) == 0);
    vcpu_at(g.vcpu, CODE);
    return memory;
}

static void goes_under_a_vcpu(int fd, void (*take)(uint8_t *, int)) {
    install(0);
    g = guest_open(COUNT, sizeof COUNT);
    install(0);
    for (int n = 0; n < 5; n++) {
        pthread_t thread;
        if (fd >= 0) CHECK(ftruncate(fd, 0x2000) == 0);
        uint8_t *memory = memory_of(fd);
        *(volatile uint32_t *)memory = 0;
        CHECK(pthread_create(&thread, NULL, run_until_fault, NULL) == 0);
        AWAIT(*(volatile uint32_t *)memory, 1000u);
        take(memory, fd);
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(handled == 0);
        CHECK(set_memory(g.vm, 1, 0x3000, 0, memory) == 0);
        munmap(memory, 0x2000);
        if (fd < 0) own_faults_are_handled();
        handled = 0;
    }
}
static void unmap(uint8_t *memory, int fd) {
    (void)fd;
    CHECK(munmap(memory, 0x2000) == 0);
}
static void shorten(uint8_t *memory, int fd) {
    (void)memory;
    CHECK(ftruncate(fd, 0) == 0);
}
static void protect(uint8_t *memory, int fd) {
    (void)fd;
    CHECK(mprotect(memory, 0x2000, PROT_NONE) == 0);
}
static void read_only(uint8_t *memory, int fd) {
    (void)fd;
    CHECK(mprotect(memory, 0x2000, PROT_READ) == 0);
}
static void cover(uint8_t *memory, int fd) {
    (void)fd;
    CHECK(mmap(memory, 0x2000, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == memory);
}
static void move_away(uint8_t *memory, int fd) {
    (void)fd;
    CHECK(mremap(memory, 0x2000, 0x4000, MREMAP_MAYMOVE) != MAP_FAILED);
}
static void ram_is_unmapped(void) { goes_under_a_vcpu(-1, unmap); }
static void ram_is_truncated(void) { goes_under_a_vcpu(memfd_create("ram", 0), shorten); }
static void ram_is_protected(void) { goes_under_a_vcpu(-1, protect); }
static void ram_is_read_only(void) { goes_under_a_vcpu(-1, read_only); }
static void ram_is_covered(void) { goes_under_a_vcpu(-1, cover); }
static void ram_is_moved(void) { goes_under_a_vcpu(-1, move_away); }
static void ram_file_is_unmapped(void) { goes_under_a_vcpu(memfd_create("ram", 0), unmap); }

// Other memory comes in the place of the code that a vCPU is in: that is what it executes next.
static void *run_until_out(void *unused) {
    CHECK(next_out(&g) == 0);
    return unused;
}
static void ram_is_replaced(void) {
    g = guest_open(COUNT, sizeof COUNT);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_until_out, NULL) == 0);
    AWAIT(counted(&g), 1000u);
    uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED);
    // nop, wherever the guest is in its loop; xor ax, ax; out 0x10, al; jmp $
    memset(page, 0x90, 0x10);
    memcpy(page + 0x10, "\x31\xC0\xE6\x10\xEB\xFE", 6);
    CHECK(mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, g.ram + CODE) == g.ram + CODE);
    CHECK(pthread_join(thread, NULL) == 0);
}

// As many VMs as there may be descriptors: the last is told, too.
static void ram_is_replaced_in_the_last_of_many(void) {
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = limit.rlim_max < 4096 ? limit.rlim_max : 4096;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    int many = limit.rlim_cur < 4096 ? (int)limit.rlim_cur / 2 : 1000, kvm = open_kvm(O_RDWR);
    for (int n = 0; n < many; n++) CHECK(ioctl(kvm, KVM_CREATE_VM, 0) >= 0);
    ram_is_replaced();
}

// What a thread that faults does, the others go on.
static void client_faults_while_a_guest_runs(void) {
    g = guest_open(COUNT, sizeof COUNT);
    install(0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_until_fault, NULL) == 0);
    AWAIT(counted(&g), 1000);
    for (int n = 0; n < 100; n++) own_faults_are_handled();
    CHECK(mprotect(g.ram, RAM_SIZE, PROT_NONE) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

CASES(CASE(handler_before_open), CASE(handler_after_open), CASE(handler_by_other_functions), CASE(on_alternate_stack),
      CASE(handlers_call_the_one_before), CASE(without_a_handler), CASE(handler_for_once), CASE(ram_is_unmapped),
      CASE(ram_is_truncated), CASE(ram_is_protected), CASE(ram_is_read_only), CASE(ram_is_covered), CASE(ram_is_moved),
      CASE(ram_file_is_unmapped), CASE(ram_is_replaced),
      CASE(ram_is_replaced_in_the_last_of_many), CASE(client_faults_while_a_guest_runs))
