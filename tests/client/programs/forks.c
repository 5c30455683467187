// SPDX-License-Identifier: Apache-2.0
// Children of a client: what they inherit is the parent's, what they open is their own.
#include "client.h"
#include <sched.h>
#include <spawn.h>

extern char **environ;
static struct guest g;

static void *run_on(void *unused) {
    for (;;) CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 || errno == EINTR);
    return unused;
}

static void child_ends(pid_t child) {
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

// As the kernel has it: a VM belongs to the address space that has made it.
static void inherited_is_eio(void) {
    struct kvm_regs regs;
    FAILS(ioctl(g.vm, KVM_CREATE_VCPU, 5), EIO);
    FAILS(ioctl(g.vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), EIO);
    FAILS(ioctl(g.vcpu, KVM_GET_REGS, &regs), EIO);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EIO);
}

static void child(void) {
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&g) == 0);
    for (int n = 0; n < 3; n++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (!pid) {
            inherited_is_eio();
            new_guest_works();
            CHECK(close(g.vcpu) == 0 && close(g.vm) == 0);
            new_guest_works();
            exit(0);
        }
        CHECK(next_out(&g) == 2 * n + 1);
        child_ends(pid);
        CHECK(next_out(&g) == 2 * n + 2);
    }
    guest_close(&g);
    new_guest_works();
}

static void grandchild(void) {
    g = guest_open(OUTS, sizeof OUTS);
    pid_t pid = fork();
    if (!pid) {
        struct guest before = g;
        g = guest_open(OUTS, sizeof OUTS);
        CHECK(next_out(&g) == 0);
        pid = fork();
        if (!pid) {
            inherited_is_eio();
            g = before;
            inherited_is_eio();
            new_guest_works();
            exit(0);
        }
        child_ends(pid);
        CHECK(next_out(&g) == 1);
        exit(0);
    }
    child_ends(pid);
    CHECK(next_out(&g) == 0);
}

static void while_another_thread_runs(void) {
    g = guest_open(COUNT, sizeof COUNT);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_on, NULL) == 0);
    AWAIT(counted(&g), 1000);
    for (int n = 0; n < 20; n++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (!pid) {
            inherited_is_eio();
            new_guest_works();
            _exit(0);
        }
        uint32_t before = counted(&g);
        child_ends(pid);
        AWAIT(counted(&g) - before, 1);
    }
    exit(0);
}

// vfork(), posix_spawn(), system(), popen(): nothing of ours runs in between.
static void spawned(void) {
    g = guest_open(COUNT, sizeof COUNT);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_on, NULL) == 0);
    AWAIT(counted(&g), 1000);
    for (int n = 0; n < 5; n++) {
        pid_t pid = vfork();
        if (!pid) {
            execl("/bin/true", "true", NULL);
            _exit(1);
        }
        child_ends(pid);
        char *argv[] = {"sh", "-c", "exit 0", NULL};
        CHECK(posix_spawnp(&pid, "sh", NULL, NULL, argv, environ) == 0);
        child_ends(pid);
        CHECK(system("exit 3") == 3 << 8);
        FILE *out = popen("echo 42", "r");
        int number = 0;
        CHECK(out && fscanf(out, "%d", &number) == 1 && number == 42);
        CHECK(pclose(out) == 0);
    }
    exit(0);
}

// A program that is executed finds /dev/kvm, too.
static void opens_it(void) { new_guest_works(); }
static void executed(void) {
    g = guest_open(OUTS, sizeof OUTS);
    for (int n = 0; n < 3; n++) {
        pid_t pid = n % 2 ? fork() : vfork();
        if (!pid) {
            execl("/proc/self/exe", "forks", "opens_it", NULL);
            _exit(1);
        }
        child_ends(pid);
        CHECK(next_out(&g) == n);
    }
    // In the place of this one; what is close-on-exec goes, and nobody is left who has it.
    execl("/proc/self/exe", "forks", "opens_it", NULL);
    CHECK(0);
}
static void executed_from_a_thread_that_runs_a_guest(void) {
    g = guest_open(COUNT, sizeof COUNT);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_on, NULL) == 0);
    AWAIT(counted(&g), 1000);
    execl("/proc/self/exe", "forks", "opens_it", NULL);
    CHECK(0);
}

// A child that is the one to go on, as daemons do before they open anything.
static void daemon_opens_it(void) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    pid_t pid = fork();
    if (!pid) {
        CHECK(setsid() > 0);
        if (fork()) _exit(0);
        new_guest_works();
        CHECK(write(ends[1], "", 1) == 1);
        exit(0);
    }
    child_ends(pid);
    char byte;
    close(ends[1]);
    CHECK(read(ends[0], &byte, 1) == 1);
}

// Many threads that fork, run guests and open new ones.
static void *forks_and_runs(void *unused) {
    struct guest mine = guest_open(OUTS, sizeof OUTS);
    for (int n = 0; n < 15; n++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (!pid) {
            if (n % 3 == 0) new_guest_works();
            _exit(0);
        }
        CHECK(next_out(&mine) == n);
        child_ends(pid);
    }
    guest_close(&mine);
    return unused;
}
static void from_many_threads(void) {
    pthread_t threads[4];
    for (int n = 0; n < 4; n++) CHECK(pthread_create(&threads[n], NULL, forks_and_runs, NULL) == 0);
    for (int n = 0; n < 4; n++) CHECK(pthread_join(threads[n], NULL) == 0);
    new_guest_works();
}

// Forks while another thread opens /dev/kvm for the first time.
static void *opens_first(void *unused) {
    new_guest_works();
    return unused;
}
static void while_another_thread_opens(void) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, opens_first, NULL) == 0);
    for (int n = 0; n < 10; n++) {
        sleep_ms(10 * n);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (!pid) {
            alarm(60);
            new_guest_works();
            exit(0);
        }
        child_ends(pid);
    }
    CHECK(pthread_join(thread, NULL) == 0);
}

// A child that begins on a stack of its own, without its parent's memory, and ends with its function.
static int tries_on_its_stack(void *here) {
    char byte;
    CHECK((char *)&byte < (char *)here && (char *)&byte > (char *)here - 0x20000);
    FAILS(open("/dev/kvm", O_RDWR), ENODEV);
    return 0;
}

// What fork() cannot do, the kernel does; such a child is told that it has no KVM, and so is one on its parent's memory.
static void separate_children_have_none(void) {
    g = guest_open(OUTS, sizeof OUTS);
    static const int flags[] = {CLONE_FS | SIGCHLD, CLONE_FILES | SIGCHLD, CLONE_SYSVSEM | SIGCHLD};
    for (int n = 0; n < 4; n++) {
        pid_t pid = n < 3 ? (pid_t)syscall(SYS_clone, flags[n], 0, 0, 0, 0) : vfork();
        CHECK(pid >= 0);
        if (!pid) {
            errno = 0;
            _exit(open("/dev/kvm", O_RDWR) != -1 || errno != ENODEV);
        }
        child_ends(pid);
        CHECK(next_out(&g) == n);
    }
    char *stack = mmap(NULL, 0x20000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pid_t number = 0, pid = clone(tries_on_its_stack, stack + 0x20000, SIGCHLD | CLONE_PARENT_SETTID, stack + 0x20000, &number);
    CHECK(pid > 0 && number == pid);
    child_ends(pid);
}

// Forks while other threads make requests all the time, on each other's files, too, and close and open files.
static atomic_int over, last = -1;
static void *makes_requests(void *unused) {
    while (!over) {
        int kvm = open_kvm(O_RDWR);
        for (int n = 0; n < 20; n++) CHECK(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP) == 1);
        int others = atomic_exchange(&last, kvm);
        // It may go meanwhile.
        for (int n = 0; n < 20; n++) ioctl(last, KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP);
        if (others >= 0) CHECK(close(others) == 0);
    }
    return unused;
}
static void while_other_threads_make_requests(void) {
    pthread_t threads[3];
    for (int n = 0; n < 3; n++) CHECK(pthread_create(&threads[n], NULL, makes_requests, NULL) == 0);
    for (int n = 0; n < 100; n++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (!pid) {
            alarm(60);
            close(open_kvm(O_RDWR));
            _exit(0);
        }
        child_ends(pid);
    }
    over = 1;
    for (int n = 0; n < 3; n++) CHECK(pthread_join(threads[n], NULL) == 0);
}

CASES(CASE(child), CASE(grandchild), CASE(while_another_thread_runs), CASE(spawned), CASE(opens_it), CASE(executed),
      CASE(executed_from_a_thread_that_runs_a_guest), CASE(daemon_opens_it), CASE(from_many_threads),
      CASE(while_another_thread_opens), CASE(while_other_threads_make_requests),
      CASE(separate_children_have_none))
