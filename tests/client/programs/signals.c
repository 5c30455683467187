// SPDX-License-Identifier: Apache-2.0
// Signals and threads that end: as with the kernel's KVM_RUN, a system call.
#include "client.h"
#include <setjmp.h>
#include <sys/time.h>

static atomic_int handled;
static void on_signal(int signal) {
    (void)signal;
    handled++;
}

static struct guest g;
static atomic_int runner_tid;
static atomic_int rounds, eintrs;

// ---- KVM_RUN ends with EINTR ----------------------------------------------------------------------------------------

static void *run_until_eintr(void *unused) {
    (void)unused;
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    CHECK(g.run->exit_reason == KVM_EXIT_INTR);
    return NULL;
}

static void kick_by(int signal) {
    pthread_t thread;
    handled = 0;
    CHECK(pthread_create(&thread, NULL, run_until_eintr, NULL) == 0);
    uint32_t before = counted(&g);
    AWAIT(counted(&g), before + 1000);
    CHECK(pthread_kill(thread, signal) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(handled == 1);
}

static void handler_before_open(void) {
    handle(SIGUSR1, on_signal, 0);
    g = guest_open(COUNT, sizeof COUNT);
    for (int n = 0; n < 20; n++) kick_by(SIGUSR1);
}

static void handler_after_first_run(void) {
    g = guest_open(COUNT, sizeof COUNT);
    g.run->immediate_exit = 1;
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    g.run->immediate_exit = 0;
    handle(SIGUSR1, on_signal, 0);
    kick_by(SIGUSR1);
    signal(SIGUSR2, on_signal);
    kick_by(SIGUSR2);
}

// Other names of sigaction() and signal() that the C library has.
static void handler_by_other_functions(void) {
    extern void (*bsd_signal(int, void (*)(int)))(int);
    extern void (*sysv_signal(int, void (*)(int)))(int);
    g = guest_open(COUNT, sizeof COUNT);
    sysv_signal(SIGUSR1, on_signal);
    kick_by(SIGUSR1);
    // A handler of System V's is gone after its signal.
    struct sigaction now;
    CHECK(sigaction(SIGUSR1, NULL, &now) == 0 && now.sa_handler == SIG_DFL);
    struct {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        unsigned long mask;
    } raw;
    CHECK(sigaction(SIGUSR2, NULL, &now) == 0);
    handle(SIGUSR2, on_signal, 0);
    CHECK(syscall(SYS_rt_sigaction, SIGUSR2, NULL, &raw, 8) == 0);
    for (int n = 0; n < 3; n++) kick_by(SIGUSR2);
}

// What KVM_RUN returns for a signal, SA_RESTART or not: it is not restarted.
static void restart_flag(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGUSR1, on_signal, SA_RESTART);
    for (int n = 0; n < 5; n++) kick_by(SIGUSR1);
    handle(SIGUSR1, on_signal, SA_RESTART | SA_NODEFER);
    for (int n = 0; n < 5; n++) kick_by(SIGUSR1);
}

// The client asks for its own handler and gets it.
static void handler_is_the_clients(void) {
    struct sigaction now;
    handle(SIGUSR1, on_signal, SA_RESTART);
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGUSR2, on_signal, 0);
    for (int n = 0; n < 2; n++) {
        CHECK(sigaction(SIGUSR1, NULL, &now) == 0);
        CHECK(now.sa_handler == on_signal && !(now.sa_flags & SA_SIGINFO) && now.sa_flags & SA_RESTART);
        CHECK(sigaction(SIGUSR2, NULL, &now) == 0 && now.sa_handler == on_signal);
        CHECK(signal(SIGUSR2, on_signal) == on_signal);
        kick_by(SIGUSR2);
    }
    // One after another, as programs that put a handler back do.
    for (int n = 0; n < 20; n++) {
        struct sigaction mine = {.sa_handler = n % 2 ? on_signal : SIG_IGN}, before;
        CHECK(sigaction(SIGUSR1, &mine, &before) == 0);
        CHECK(sigaction(SIGUSR1, &before, &mine) == 0);
        CHECK(mine.sa_handler == (n % 2 ? on_signal : SIG_IGN));
    }
    kick_by(SIGUSR1);
}

static void timer(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGALRM, on_signal, SA_RESTART);
    struct itimerval every = {{0, 2000}, {0, 2000}};
    CHECK(setitimer(ITIMER_REAL, &every, NULL) == 0);
    for (int n = 0; n < 50; n++) FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    CHECK(handled >= 50);
}

// Halted with the kernel's chips: asleep, not in guest code.
static void halted(void) {
    static const uint8_t HLT[] = {0xFA, 0xF4};
    g.kvm = open_kvm(O_RDWR);
    CHECK((g.vm = ioctl(g.kvm, KVM_CREATE_VM, 0)) >= 0);
    CHECK(ioctl(g.vm, KVM_CREATE_IRQCHIP, 0) == 0);
    g.ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(g.ram + CODE, HLT, sizeof HLT);
    CHECK(set_memory(g.vm, 0, 0, RAM_SIZE, g.ram) == 0);
    CHECK((g.vcpu = ioctl(g.vm, KVM_CREATE_VCPU, 0)) >= 0);
    g.run = map_run(g.kvm, g.vcpu, &g.run_size);
    vcpu_at(g.vcpu, CODE);
    handle(SIGUSR1, on_signal, SA_RESTART);
    for (int n = 0; n < 10; n++) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, run_until_eintr, NULL) == 0);
        // It may come before KVM_RUN as well.
        do {
            sleep_ms(n);
            CHECK(pthread_kill(thread, SIGUSR1) == 0);
        } while (pthread_tryjoin_np(thread, NULL));
    }
    CHECK(handled >= 10);
}

// What has no handler: an ignored signal ends nothing, a stop is none.
static void ignored(void) {
    g = guest_open(OUTS, sizeof OUTS);
    signal(SIGUSR1, SIG_IGN);
    for (int n = 0; n < 10; n++) {
        raise(SIGUSR1);
        raise(SIGWINCH);
        CHECK(next_out(&g) == n);
    }
}

// What comes with a signal is what was sent.
static siginfo_t got;
static void on_info(int signal, siginfo_t *info, void *context) {
    (void)signal;
    CHECK(context);
    got = *info;
    handled++;
}
static void siginfo(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGRTMIN + 3, on_info, SA_SIGINFO);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_until_eintr, NULL) == 0);
    AWAIT(counted(&g), 1000);
    CHECK(pthread_sigqueue(thread, SIGRTMIN + 3, (union sigval){.sival_int = 4711}) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(handled == 1 && got.si_value.sival_int == 4711 && got.si_pid == getpid() && got.si_code == SI_QUEUE);
}

// ---- KVM_SET_SIGNAL_MASK --------------------------------------------------------------------------------------------

static void set_mask(uint64_t bits) {
    struct {
        struct kvm_signal_mask head;
        uint64_t bits;
    } __attribute__((packed)) mask = {{8}, bits};
    CHECK(ioctl(g.vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
}

static void block(int how, int signal) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal);
    CHECK(pthread_sigmask(how, &set, NULL) == 0);
}

static int is_pending(int signal) {
    sigset_t set;
    sigpending(&set);
    return sigismember(&set, signal);
}

// QEMU's old way: blocked in the thread, open in KVM_RUN; pending before, or sent meanwhile.
static void *mask_thread(void *unused) {
    (void)unused;
    block(SIG_BLOCK, SIGUSR1);
    set_mask(~0ull & ~(1ull << (SIGUSR1 - 1)));
    runner_tid = gettid();
    for (int n = 0; n < 20; n++) {
        FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
        eintrs++;
        CHECK(handled == 0);
        CHECK(is_pending(SIGUSR1));
        siginfo_t info;
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        struct timespec none = {0, 0};
        CHECK(sigtimedwait(&set, &info, &none) == SIGUSR1);
        CHECK(!is_pending(SIGUSR1));
    }
    return NULL;
}
static void mask_open_in_run(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGUSR1, on_signal, 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, mask_thread, NULL) == 0);
    AWAIT(runner_tid, 1);
    for (int n = 0; n < 20; n++) {
        CHECK(pthread_kill(thread, SIGUSR1) == 0);
        AWAIT(eintrs, n + 1);
        sleep_ms(n % 3);
    }
    CHECK(pthread_join(thread, NULL) == 0);
}

// Blocked in KVM_RUN, open in the thread: comes behind it, and does not end it.
static void mask_blocked_in_run(void) {
    g = guest_open(OUTS, sizeof OUTS);
    handle(SIGUSR1, on_signal, 0);
    set_mask(1ull << (SIGUSR1 - 1));
    // again: mov ecx, 0x800000; dec ecx; jnz; out
    static const uint8_t LONG[] = {0x66, 0xB9, 0, 0, 0x80, 0, 0x66, 0x49, 0x75, 0xFC, 0xE6, 0x10, 0xEB, 0xF2};
    memcpy(g.ram + CODE, LONG, sizeof LONG);
    struct itimerval once = {{0, 0}, {0, 1000}};
    handle(SIGALRM, on_signal, 0);
    set_mask(1ull << (SIGALRM - 1));
    CHECK(setitimer(ITIMER_REAL, &once, NULL) == 0);
    next_out(&g);
    AWAIT(handled, 1);
    CHECK(handled == 1);
}

// A mask goes away with a null pointer; a set of another size is EINVAL, as the kernel has it.
static void mask_arguments(void) {
    g = guest_open(COUNT, sizeof COUNT);
    struct {
        struct kvm_signal_mask head;
        uint64_t bits[2];
    } mask = {{16}, {0}};
    FAILS(ioctl(g.vcpu, KVM_SET_SIGNAL_MASK, &mask), EINVAL);
    mask.head.len = 4;
    FAILS(ioctl(g.vcpu, KVM_SET_SIGNAL_MASK, &mask), EINVAL);
    FAILS(ioctl(g.vcpu, KVM_SET_SIGNAL_MASK, (void *)8), EFAULT);
    handle(SIGUSR1, on_signal, 0);
    block(SIG_BLOCK, SIGUSR1);
    set_mask(0);
    raise(SIGUSR1);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    CHECK(handled == 0 && is_pending(SIGUSR1));
    CHECK(ioctl(g.vcpu, KVM_SET_SIGNAL_MASK, NULL) == 0);
    memcpy(g.ram + CODE, OUTS, sizeof OUTS);
    vcpu_at(g.vcpu, CODE);
    CHECK(next_out(&g) == 0);
    CHECK(handled == 0 && is_pending(SIGUSR1));
    block(SIG_UNBLOCK, SIGUSR1);
    CHECK(handled == 1);
}

// ---- immediate_exit -------------------------------------------------------------------------------------------------

static atomic_int stop;
static void set_immediate_exit(int signal) {
    (void)signal;
    g.run->immediate_exit = 1;
    handled++;
}
// A handler sets immediate_exit: whether the signal comes before KVM_RUN, in it or behind it, it ends. A guest that never
// exits by itself would otherwise go on for ever.
static void *immediate_thread(void *unused) {
    (void)unused;
    runner_tid = gettid();
    while (!stop) {
        if (ioctl(g.vcpu, KVM_RUN, 0) == 0) continue;
        CHECK(errno == EINTR);
        g.run->immediate_exit = 0;
        rounds++;
    }
    return NULL;
}
static void immediate_exit_race(void) {
    g = guest_open(SPIN, sizeof SPIN);
    handle(SIGUSR1, set_immediate_exit, 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, immediate_thread, NULL) == 0);
    AWAIT(runner_tid, 1);
    for (int n = 0; n < 10000; n++) {
        int before = rounds;
        CHECK(pthread_kill(thread, SIGUSR1) == 0);
        for (int spin = 0; rounds == before; spin++)
            if (spin > 1000) sched_yield();
    }
    stop = 1;
    CHECK(pthread_kill(thread, SIGUSR1) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void immediate_exit_runs_nothing(void) {
    g = guest_open(OUTS, sizeof OUTS);
    g.run->immediate_exit = 1;
    for (int n = 0; n < 100; n++) FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    CHECK(vcpu_rip(g.vcpu) == CODE);
    g.run->immediate_exit = 0;
    CHECK(next_out(&g) == 0);
    // What is left of an instruction is done.
    g.run->immediate_exit = 1;
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    CHECK(vcpu_rip(g.vcpu) == CODE + 2);
}

// ---- handlers that do not return ------------------------------------------------------------------------------------

static sigjmp_buf out;
static void jump_out(int signal) {
    handled++;
    siglongjmp(out, signal);
}

static void *use_it(void *unused) {
    (void)unused;
    struct kvm_regs regs;
    CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
    new_guest_works();
    return NULL;
}

static void longjmp_out(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGALRM, jump_out, 0);
    for (int n = 0; n < 30; n++) {
        if (!sigsetjmp(out, 1)) {
            struct itimerval once = {{0, 0}, {0, 500 + 200 * n}};
            CHECK(setitimer(ITIMER_REAL, &once, NULL) == 0);
            for (;;) ioctl(g.vcpu, KVM_RUN, 0);
        }
        CHECK(handled == n + 1);
        use_it(NULL);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, use_it, NULL) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
    }
    g.run->immediate_exit = 1;
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
}

// Out of other requests, too: whatever a timer meets.
static void longjmp_out_of_anything(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGALRM, jump_out, 0);
    volatile int jumps = 0;
    volatile int known[64];
    volatile int many = 0;
    while (jumps < 60) {
        if (sigsetjmp(out, 1)) {
            jumps++;
            continue;
        }
        struct itimerval once = {{0, 0}, {0, 100 + 97 * jumps}};
        CHECK(setitimer(ITIMER_REAL, &once, NULL) == 0);
        for (;;) {
            struct kvm_regs regs;
            struct kvm_sregs sregs;
            CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
            CHECK(ioctl(g.vcpu, KVM_GET_SREGS, &sregs) == 0);
            CHECK(ioctl(g.vcpu, KVM_SET_SREGS, &sregs) == 0);
            if (many < 64) {
                // One that is made and not noted is lost, as with the kernel's.
                known[many] = ioctl(g.kvm, KVM_CREATE_VM, 0);
                CHECK(known[many] >= 0);
                many++;
            }
        }
    }
    struct itimerval none = {{0, 0}, {0, 0}};
    CHECK(setitimer(ITIMER_REAL, &none, NULL) == 0);
    for (int n = 0; n < many; n++) CHECK(close(known[n]) == 0);
    use_it(NULL);
}

static void end_thread(int signal) {
    (void)signal;
    pthread_exit((void *)42);
}
static void *run_for_ever(void *unused) {
    for (;;) ioctl(g.vcpu, KVM_RUN, 0);
    return unused;
}
static void thread_ends_in_handler(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGUSR1, end_thread, 0);
    for (int n = 0; n < 20; n++) {
        pthread_t thread;
        void *result;
        uint32_t before = counted(&g);
        CHECK(pthread_create(&thread, NULL, run_for_ever, NULL) == 0);
        AWAIT(counted(&g), before + 1000);
        CHECK(pthread_kill(thread, SIGUSR1) == 0);
        CHECK(pthread_join(thread, &result) == 0 && result == (void *)42);
        use_it(NULL);
    }
}

// ---- cancellation ---------------------------------------------------------------------------------------------------

static atomic_int cleaned;
static void cleanup(void *argument) {
    CHECK(argument == &g);
    struct kvm_regs regs;
    CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
    cleaned++;
}
// ioctl() is no cancellation point: the thread is cancelled at one behind KVM_RUN, with its cleanup handlers.
static void *cancelled_thread(void *unused) {
    (void)unused;
    pthread_cleanup_push(cleanup, &g);
    for (;;) {
        ioctl(g.vcpu, KVM_RUN, 0);
        pthread_testcancel();
    }
    pthread_cleanup_pop(0);
    return NULL;
}
static void cancel_deferred(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGUSR1, on_signal, 0);
    for (int n = 0; n < 10; n++) {
        pthread_t thread;
        void *result;
        uint32_t before = counted(&g);
        CHECK(pthread_create(&thread, NULL, cancelled_thread, NULL) == 0);
        AWAIT(counted(&g), before + 1000);
        CHECK(pthread_cancel(thread) == 0);
        CHECK(pthread_kill(thread, SIGUSR1) == 0);
        CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
        CHECK(cleaned == n + 1);
        use_it(NULL);
    }
}

static void *asynchronous_thread(void *unused) {
    (void)unused;
    pthread_cleanup_push(cleanup, &g);
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
    for (;;) ioctl(g.vcpu, KVM_RUN, 0);
    pthread_cleanup_pop(0);
    return NULL;
}
// The C library's signal ends KVM_RUN as any other does, and the thread behind it.
static void cancel_asynchronous(void) {
    g = guest_open(COUNT, sizeof COUNT);
    for (int n = 0; n < 10; n++) {
        pthread_t thread;
        void *result;
        uint32_t before = counted(&g);
        CHECK(pthread_create(&thread, NULL, asynchronous_thread, NULL) == 0);
        AWAIT(counted(&g), before + 1000);
        CHECK(pthread_cancel(thread) == 0);
        CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
        CHECK(cleaned == n + 1);
        use_it(NULL);
    }
}

// ---- threads come and go --------------------------------------------------------------------------------------------

static void *short_life(void *unused) {
    (void)unused;
    new_guest_works();
    return NULL;
}
static void threads_end_while_others_run(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGUSR1, set_immediate_exit, 0);
    pthread_t runner, others[4];
    CHECK(pthread_create(&runner, NULL, immediate_thread, NULL) == 0);
    AWAIT(counted(&g), 1000);
    for (int n = 0; n < 20; n++) {
        uint32_t before = counted(&g);
        for (int i = 0; i < 4; i++) CHECK(pthread_create(&others[i], NULL, short_life, NULL) == 0);
        for (int i = 0; i < 4; i++) CHECK(pthread_join(others[i], NULL) == 0);
        AWAIT(counted(&g) - before, 1);
    }
    stop = 1;
    CHECK(pthread_kill(runner, SIGUSR1) == 0);
    CHECK(pthread_join(runner, NULL) == 0);
    guest_close(&g);
    AWAIT(2 - status_of("Threads"), 0);
}

// The process ends while a guest runs: at once, with its own status.
static void *exit_soon(void *unused) {
    (void)unused;
    AWAIT(counted(&g), 1000);
    exit(0);
}
static void exit_under_a_guest(void) {
    g = guest_open(COUNT, sizeof COUNT);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, exit_soon, NULL) == 0);
    run_for_ever(NULL);
}
static void main_thread_ends_first(void) {
    g = guest_open(COUNT, sizeof COUNT);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_until_eintr, NULL) == 0);
    AWAIT(counted(&g), 1000);
    CHECK(pthread_create(&thread, NULL, exit_soon, NULL) == 0);
    pthread_exit(NULL);
}

CASES(CASE(handler_before_open), CASE(handler_after_first_run), CASE(handler_by_other_functions), CASE(restart_flag),
      CASE(handler_is_the_clients), CASE(timer), CASE(halted), CASE(ignored), CASE(siginfo), CASE(mask_open_in_run),
      CASE(mask_blocked_in_run), CASE(mask_arguments), CASE(immediate_exit_race), CASE(immediate_exit_runs_nothing),
      CASE(longjmp_out), CASE(longjmp_out_of_anything), CASE(thread_ends_in_handler), CASE(cancel_deferred),
      CASE(cancel_asynchronous), CASE(threads_end_while_others_run), CASE(exit_under_a_guest),
      CASE(main_thread_ends_first))
