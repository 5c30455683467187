// SPDX-License-Identifier: Apache-2.0
// What the clients of these tests share: a guest in real mode, checks, and cases by name.
//
// A program is a set of cases; `program CASE` does one and exits with 0, or says on stderr which check has failed.
// What a case expects is the kernel's: with CLIENT_ON_HOST=1 in the environment it may be run on the host's own KVM.
#ifndef CLIENT_H
#define CLIENT_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RAM_SIZE = 0x20000, CODE = 0x1000 };

static void client_fail(const char *file, int line, const char *what) {
    int error = errno;
    dprintf(2, "%s:%d: %s (errno %d, %s)\n", file, line, what, error, strerror(error));
    _exit(1);
}

// What has to hold.
#define CHECK(condition) ((condition) ? (void)0 : client_fail(__FILE__, __LINE__, #condition))
// What has to fail, and how.
#define FAILS(call, error)                                                                                             \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        CHECK((call) == -1 && errno == (error));                                                                       \
    } while (0)

// A descriptor of /dev/kvm has to be softkvm's, whatever the host has: its files are in memory.
static inline void check_ours(int fd) {
    char link[64], file[64] = {0};
    CHECK(fd >= 0);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    CHECK(getenv("CLIENT_ON_HOST") || (readlink(link, file, sizeof file - 1) > 0 && !strncmp(file, "/memfd:kvm", 10)));
}

static inline int open_kvm(int flags) {
    int fd = open("/dev/kvm", flags);
    check_ours(fd);
    return fd;
}

struct guest {
    int kvm, vm, vcpu;
    uint8_t *ram;
    struct kvm_run *run;
    size_t run_size;
};

// Has the vCPU go on at an address of segment 0, in real mode.
static inline void vcpu_at(int vcpu, uint64_t rip) {
    struct kvm_sregs sregs;
    CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
    struct kvm_regs regs = {.rip = rip, .rflags = 2, .rsp = 0x8000};
    CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
}

static inline uint64_t vcpu_rip(int vcpu) {
    struct kvm_regs regs;
    CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
    return regs.rip;
}

static inline struct kvm_run *map_run(int kvm, int vcpu, size_t *size) {
    int bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    CHECK(bytes >= 4096);
    struct kvm_run *run = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    CHECK(run != MAP_FAILED);
    if (size) *size = bytes;
    return run;
}

static inline int set_memory(int vm, uint32_t slot, uint64_t at, size_t size, void *memory) {
    struct kvm_userspace_memory_region region = {
        .slot = slot, .guest_phys_addr = at, .memory_size = size, .userspace_addr = (uintptr_t)memory};
    return ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

// A VM with memory from address 0 and one vCPU, about to run `code`.
static inline struct guest guest_open(const void *code, size_t size) {
    struct guest g;
    g.kvm = open_kvm(O_RDWR | O_CLOEXEC);
    CHECK(ioctl(g.kvm, KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
    CHECK((g.vm = ioctl(g.kvm, KVM_CREATE_VM, 0)) >= 0);
    g.ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(g.ram != MAP_FAILED);
    memcpy(g.ram + CODE, code, size);
    CHECK(set_memory(g.vm, 0, 0, RAM_SIZE, g.ram) == 0);
    CHECK((g.vcpu = ioctl(g.vm, KVM_CREATE_VCPU, 0)) >= 0);
    g.run = map_run(g.kvm, g.vcpu, &g.run_size);
    vcpu_at(g.vcpu, CODE);
    return g;
}

static inline void guest_close(struct guest *g) {
    CHECK(munmap(g->run, g->run_size) == 0);
    CHECK(close(g->vcpu) == 0);
    CHECK(close(g->vm) == 0);
    CHECK(close(g->kvm) == 0);
    CHECK(munmap(g->ram, RAM_SIZE) == 0);
}

// jmp $
static const uint8_t SPIN[] = {0xEB, 0xFE};
// again: inc dword [0x2000]; jmp again
static const uint8_t COUNT[] = {0x66, 0xFF, 0x06, 0x00, 0x20, 0xEB, 0xF9};
// again: out 0x10, al; inc al; jmp again
static const uint8_t OUTS[] = {0xE6, 0x10, 0xFE, 0xC0, 0xEB, 0xFA};

static inline uint32_t counted(const struct guest *g) { return *(volatile uint32_t *)(g->ram + 0x2000); }

// Runs to the next `out 0x10, al`; returns what it has put out.
static inline int next_out(const struct guest *g) {
    CHECK(ioctl(g->vcpu, KVM_RUN, 0) == 0);
    CHECK(g->run->exit_reason == KVM_EXIT_IO && g->run->io.port == 0x10);
    return *((uint8_t *)g->run + g->run->io.data_offset);
}

// A guest of one's own that works, whatever has been before.
static inline void new_guest_works(void) {
    struct guest g = guest_open(OUTS, sizeof OUTS);
    for (int n = 0; n < 3; n++) CHECK(next_out(&g) == n);
    guest_close(&g);
}

static inline void sleep_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t) && errno == EINTR) {
    }
}

static inline void handle(int signal, void *handler, int flags) {
    struct sigaction action = {.sa_flags = flags};
    action.sa_handler = (void (*)(int))handler;
    sigemptyset(&action.sa_mask);
    CHECK(sigaction(signal, &action, NULL) == 0);
}

// Waits until a number is at least so much; for as long as the test may take.
#define AWAIT(what, least)                                                                                             \
    while ((what) < (least)) sleep_ms(1)

static inline int count_of(const char *directory) {
    char command[256];
    int number = -1;
    snprintf(command, sizeof command, "ls %s | wc -l", directory);
    FILE *out = popen(command, "r");
    CHECK(out && fscanf(out, "%d", &number) == 1);
    pclose(out);
    return number;
}

// A number of /proc/self/status.
static inline long status_of(const char *name) {
    char line[256];
    long number = -1;
    FILE *file = fopen("/proc/self/status", "r");
    CHECK(file);
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':') number = atol(line + strlen(name) + 1);
    fclose(file);
    return number;
}

struct client_case {
    const char *name;
    void (*function)(void);
};

static inline int run_cases(const struct client_case *cases, int argc, char **argv) {
    for (; cases->name; cases++) {
        if (argc > 1 && !strcmp(argv[1], cases->name)) {
            cases->function();
            return 0;
        }
        if (argc == 1) puts(cases->name);
    }
    if (argc > 1) fprintf(stderr, "no case %s\n", argv[1]);
    return argc > 1;
}

#define CASE(name) {#name, name}
#define CASES(...)                                                                                                     \
    int main(int argc, char **argv) {                                                                                  \
        static const struct client_case cases[] = {__VA_ARGS__, {0}};                                                  \
        return run_cases(cases, argc, argv);                                                                           \
    }
#endif
