// SPDX-License-Identifier: Apache-2.0
// The many ways of Unix: signals that are waited for, older functions for them, children from threads, daemons, namespaces,
// calls by number.
#include "client.h"
#include <sched.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>

extern char **environ;
static struct guest g;
static atomic_int handled, eintrs, tid, stop;
static pthread_t runner;

static void on_signal(int signal) {
    (void)signal;
    handled++;
}

// KVM_RUN ends by a signal.
static void is_interrupted(void) {
    errno = 0;
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    eintrs++;
}

// ---- waited for -----------------------------------------------------------------------------------------------------

static sigset_t set_of(int signal) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal);
    return set;
}

// As QEMU has it: a signal that is blocked but in KVM_RUN, and that nobody handles.
static void *runs_and_waits(void *unused) {
    sigset_t set = set_of(SIGUSR1), pending;
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    struct {
        struct kvm_signal_mask head;
        uint64_t bits;
    } in_run = {.head = {.len = 8}, .bits = 0};
    CHECK(ioctl(g.vcpu, KVM_SET_SIGNAL_MASK, &in_run) == 0);
    int fd = signalfd(-1, &set, SFD_NONBLOCK);
    CHECK(fd >= 0);
    for (int n = 0; n < 30; n++) {
        tid = n + 1;
        is_interrupted();
        CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1));
        if (n % 2) {
            struct signalfd_siginfo info;
            CHECK(read(fd, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1);
            CHECK(info.ssi_code == SI_TKILL && info.ssi_pid == (uint32_t)getpid());
        } else {
            struct timespec none = {0, 0};
            siginfo_t info;
            CHECK(sigtimedwait(&set, &info, &none) == SIGUSR1 && info.si_pid == getpid());
        }
        CHECK(sigpending(&pending) == 0 && !sigismember(&pending, SIGUSR1));
    }
    return unused;
}
static void signals_that_are_waited_for(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGUSR1, on_signal, 0);
    CHECK(pthread_create(&runner, NULL, runs_and_waits, NULL) == 0);
    for (int n = 1; n <= 30; n++) {
        AWAIT(tid, n);
        CHECK(pthread_kill(runner, SIGUSR1) == 0);
        AWAIT(eintrs, n);
    }
    CHECK(pthread_join(runner, NULL) == 0);
    CHECK(handled == 0);
}

static void *runs_until_stopped(void *unused) {
    tid = syscall(SYS_gettid);
    while (!stop) is_interrupted();
    return unused;
}
static siginfo_t last;
static void on_info(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    last = *info;
    handled++;
}
static void a_timer_for_one_thread(void) {
    g = guest_open(COUNT, sizeof COUNT);
    handle(SIGRTMIN, on_info, SA_SIGINFO);
    CHECK(pthread_create(&runner, NULL, runs_until_stopped, NULL) == 0);
    AWAIT(tid, 1);
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN, .sigev_value = {.sival_int = 77}};
    event._sigev_un._tid = tid;
    timer_t timer;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    struct itimerspec every = {{0, 5000000}, {0, 5000000}};
    CHECK(timer_settime(timer, 0, &every, NULL) == 0);
    AWAIT(eintrs, 20);
    stop = 1;
    CHECK(pthread_join(runner, NULL) == 0);
    CHECK(timer_delete(timer) == 0);
    CHECK(handled >= 20 && last.si_code == SI_TIMER && last.si_value.sival_int == 77);
}

// ---- stacks and older functions -------------------------------------------------------------------------------------

static char *alternate;
enum { STACK = 256 << 10 };
static atomic_int elsewhere;
static void on_stack(int signal) {
    char here;
    stack_t now;
    (void)signal;
    CHECK(sigaltstack(NULL, &now) == 0 && now.ss_flags == SS_ONSTACK && now.ss_sp == alternate);
    elsewhere += !(&here >= alternate && &here < alternate + STACK);
    handled++;
}
static void *runs_with_a_stack(void *unused) {
    stack_t stack = {.ss_sp = alternate, .ss_size = STACK}, now;
    CHECK(sigaltstack(&stack, NULL) == 0);
    runs_until_stopped(NULL);
    CHECK(sigaltstack(NULL, &now) == 0 && now.ss_sp == alternate && now.ss_size == STACK && now.ss_flags == 0);
    return unused;
}
static void handlers_on_a_stack_of_their_own(void) {
    g = guest_open(COUNT, sizeof COUNT);
    alternate = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    handle(SIGUSR1, on_stack, SA_ONSTACK);
    CHECK(pthread_create(&runner, NULL, runs_with_a_stack, NULL) == 0);
    AWAIT(tid, 1);
    for (int n = 1; n <= 20; n++) {
        stop = n == 20;
        CHECK(pthread_kill(runner, SIGUSR1) == 0);
        AWAIT(handled, n);
    }
    CHECK(pthread_join(runner, NULL) == 0);
    CHECK(elsewhere == 0);
}

static pthread_t main_thread;
static void *signals_soon(void *signal) {
    sleep_ms(30);
    CHECK(pthread_kill(main_thread, (long)signal) == 0);
    return NULL;
}
static pthread_t soon(long signal) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, signals_soon, (void *)signal) == 0);
    return thread;
}
static void ends_by(long signal) {
    pthread_t thread = soon(signal);
    int before = handled;
    is_interrupted();
    CHECK(handled == before + 1);
    CHECK(pthread_join(thread, NULL) == 0);
}
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
static void older_functions(void) {
    g = guest_open(COUNT, sizeof COUNT);
    main_thread = pthread_self();
    CHECK(sigset(SIGUSR1, on_signal) == SIG_DFL);
    ends_by(SIGUSR1);
    ends_by(SIGUSR1);
    struct sigaction now;
    CHECK(sigaction(SIGUSR1, NULL, &now) == 0 && now.sa_handler == on_signal);
    CHECK(signal(SIGUSR1, on_signal) == on_signal);
    CHECK(siginterrupt(SIGUSR1, 0) == 0);
    ends_by(SIGUSR1);
    CHECK(siginterrupt(SIGUSR1, 1) == 0);
    ends_by(SIGUSR1);
    CHECK(sigaction(SIGUSR1, NULL, &now) == 0 && now.sa_handler == on_signal && !(now.sa_flags & SA_RESTART));
    // Held, it comes when it is released; ignored, it does not.
    CHECK(sigset(SIGUSR1, SIG_HOLD) == on_signal);
    int before = handled;
    CHECK(pthread_join(soon(SIGUSR1), NULL) == 0 && handled == before);
    CHECK(sigrelse(SIGUSR1) == 0 && handled == before + 1);
    CHECK(sighold(SIGUSR1) == 0 && raise(SIGUSR1) == 0 && handled == before + 1);
    CHECK(sigrelse(SIGUSR1) == 0 && handled == before + 2);
    CHECK(sigignore(SIGUSR1) == 0);
    handle(SIGUSR2, on_signal, 0);
    pthread_t thread = soon(SIGUSR1);
    ends_by(SIGUSR2);
    CHECK(pthread_join(thread, NULL) == 0 && handled == before + 3);
    CHECK(sigset(SIGUSR1, SIG_DFL) == SIG_IGN);
    CHECK(sigaction(SIGUSR1, NULL, &now) == 0 && now.sa_handler == SIG_DFL);
}

// ---- children -------------------------------------------------------------------------------------------------------

static void child_ends(pid_t child, int expected) {
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == expected);
}
static void *spawns(void *unused) {
    for (int n = 0; n < 8; n++) {
        pid_t pid = vfork();
        if (!pid) {
            execl("/bin/true", "true", NULL);
            _exit(1);
        }
        child_ends(pid, 0);
        char *argv[] = {"sh", "-c", "exit 3", NULL};
        CHECK(posix_spawnp(&pid, "sh", NULL, NULL, argv, environ) == 0);
        child_ends(pid, 3 << 8);
        CHECK(system("exit 5") == 5 << 8);
        FILE *out = popen("echo 42", "r");
        int number = 0;
        CHECK(out && fscanf(out, "%d", &number) == 1 && number == 42 && pclose(out) == 0);
    }
    return unused;
}
static void *runs_its_own(void *unused) {
    struct guest mine = guest_open(OUTS, sizeof OUTS);
    for (int n = 0; !stop; n++) CHECK(next_out(&mine) == (n & 255));
    guest_close(&mine);
    return unused;
}
static void children_from_threads(void) {
    pthread_t threads[6];
    for (int n = 0; n < 6; n++) CHECK(pthread_create(&threads[n], NULL, n < 3 ? spawns : runs_its_own, NULL) == 0);
    for (int n = 0; n < 6; n++) {
        stop = n >= 3;
        CHECK(pthread_join(threads[n], NULL) == 0);
    }
}

static void becomes_a_daemon(void) {
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&g) == 0);
    int ends[2];
    CHECK(pipe(ends) == 0);
    pid_t pid = fork();
    if (!pid) {
        CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
        CHECK(daemon(1, 1) == 0);
        FAILS(ioctl(g.vcpu, KVM_RUN, 0), EIO);
        new_guest_works();
        CHECK(write(ends[1], "x", 1) == 1);
        exit(0);
    }
    child_ends(pid, 0);
    char byte;
    CHECK(close(ends[1]) == 0 && read(ends[0], &byte, 1) == 1);
    CHECK(next_out(&g) == 1);
}

static void children_leave_nothing(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int fds = 0, threads = 0;
    long kib = 0;
    for (int n = 0; n < 1000; n++) {
        if (n == 50) {
            fds = count_of("/proc/self/fd");
            threads = status_of("Threads");
            kib = status_of("VmRSS");
        }
        pid_t pid = n % 2 ? fork() : vfork();
        CHECK(pid >= 0);
        if (!pid && n % 2 == 0) _exit(0);
        if (!pid) {
            if (n % 4 == 1) new_guest_works();
            _exit(0);
        }
        child_ends(pid, 0);
        CHECK(next_out(&g) == (n & 255));
    }
    CHECK(count_of("/proc/self/fd") == fds);
    CHECK(status_of("Threads") == threads);
    CHECK(status_of("VmRSS") < kib + 10000);
}

// ---- the end --------------------------------------------------------------------------------------------------------

static void *runs_for_ever(void *unused) {
    for (;;) CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 || errno == EINTR);
    return unused;
}
static void ends_while_a_guest_runs(void (*how)(void)) {
    struct rlimit none = {0, 0};
    CHECK(setrlimit(RLIMIT_CORE, &none) == 0);
    g = guest_open(COUNT, sizeof COUNT);
    CHECK(pthread_create(&runner, NULL, runs_for_ever, NULL) == 0);
    AWAIT(counted(&g), 1000);
    how();
}
static void access_nothing(void) { *(volatile int *)16 = 1; }
static void illegal(void) { __asm__ volatile("ud2"); }
static void kill_itself(void) { kill(getpid(), SIGTERM); }
static void quit(void) { quick_exit(7); }
static void segmentation_fault(void) { ends_while_a_guest_runs(access_nothing); }
static void illegal_instruction(void) { ends_while_a_guest_runs(illegal); }
static void aborted(void) { ends_while_a_guest_runs(abort); }
static void terminated(void) {
    ends_while_a_guest_runs(kill_itself);
    for (;;) pause();
}
static void quick(void) { ends_while_a_guest_runs(quit); }

// ---- namespaces, and calls by number ----------------------------------------------------------------------------------

static void namespaces(void) {
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&g) == 0);
    CHECK(unshare(CLONE_FS) == 0);
    new_guest_works();
    if (unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC) == 0) new_guest_works();
    int own = open("/proc/self/ns/mnt", O_RDONLY);
    CHECK(own >= 0 && (setns(own, 0) == 0 || errno == EPERM || errno == EINVAL));
    new_guest_works();
    CHECK(next_out(&g) == 1);
}

static void calls_about_memory_and_copies_by_number(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int copy = syscall(SYS_fcntl, g.vcpu, F_DUPFD_CLOEXEC, 100);
    CHECK(copy >= 100 && fcntl(copy, F_GETFD) == FD_CLOEXEC);
    CHECK(syscall(SYS_close_range, g.vcpu, g.vcpu, 0) == 0);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EBADF);
    g.vcpu = copy;
    CHECK(next_out(&g) == 0);
    CHECK(syscall(SYS_close_range, copy, copy, 4 /* CLOSE_RANGE_CLOEXEC */) == 0 && next_out(&g) == 1);
    CHECK(syscall(SYS_mprotect, g.ram, RAM_SIZE, PROT_NONE) == 0);
    struct kvm_translation there = {.linear_address = CODE};
    CHECK(ioctl(g.vcpu, KVM_TRANSLATE, &there) == 0);
    vcpu_at(g.vcpu, CODE);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EFAULT);
    CHECK(syscall(SYS_mprotect, g.ram, RAM_SIZE, PROT_READ | PROT_WRITE) == 0);
    vcpu_at(g.vcpu, CODE);
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 && g.run->exit_reason == KVM_EXIT_IO);
    // The guest sees what is there now.
    uint8_t before[sizeof OUTS];
    memcpy(before, g.ram + CODE, sizeof before);
    CHECK(syscall(SYS_madvise, g.ram, RAM_SIZE, MADV_DONTNEED) == 0 && g.ram[CODE] == 0);
    g.ram[CODE] = 0xF4;
    vcpu_at(g.vcpu, CODE);
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 && g.run->exit_reason == KVM_EXIT_HLT);
    void *moved = (void *)syscall(SYS_mremap, g.ram, RAM_SIZE, RAM_SIZE * 2, MREMAP_MAYMOVE, NULL);
    CHECK(moved != MAP_FAILED);
    if (moved != g.ram) {
        vcpu_at(g.vcpu, CODE);
        FAILS(ioctl(g.vcpu, KVM_RUN, 0), EFAULT);
    }
    new_guest_works();
}

CASES(CASE(signals_that_are_waited_for), CASE(a_timer_for_one_thread), CASE(handlers_on_a_stack_of_their_own),
      CASE(older_functions), CASE(children_from_threads), CASE(becomes_a_daemon), CASE(children_leave_nothing),
      CASE(segmentation_fault), CASE(illegal_instruction), CASE(aborted), CASE(terminated),
      CASE(quick), CASE(namespaces), CASE(calls_about_memory_and_copies_by_number))
