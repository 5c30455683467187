// SPDX-License-Identifier: Apache-2.0
// A guest that sleeps at a page of a userfaultfd: signals end KVM_RUN, and who changes slots does not wait for it.
#include "client.h"
#include <linux/userfaultfd.h>
#include <poll.h>

// mov al, [0x2000]; out 0x10, al
static const uint8_t LOAD[] = {0xA0, 0x00, 0x20, 0xE6, 0x10};

static struct guest g;
static int uffd;
static atomic_int handled;

static void on_signal(int signal) {
    (void)signal;
    handled++;
}

// A guest whose page at 0x2000 nobody has provided yet.
static void guest_asleep_open(void) {
    g = guest_open(LOAD, sizeof LOAD);
    CHECK((uffd = syscall(SYS_userfaultfd, O_CLOEXEC | 1)) >= 0); // UFFD_USER_MODE_ONLY
    struct uffdio_api api = {.api = UFFD_API};
    CHECK(ioctl(uffd, UFFDIO_API, &api) == 0);
    struct uffdio_register range = {
        .range = {.start = (uintptr_t)g.ram + 0x2000, .len = 0x1000}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK(ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
}

// Waits until the guest sleeps.
static void sleeps(void) {
    struct pollfd ready = {.fd = uffd, .events = POLLIN};
    struct uffd_msg message;
    CHECK(poll(&ready, 1, 30000) == 1);
    CHECK(read(uffd, &message, sizeof message) == sizeof message);
    CHECK(message.event == UFFD_EVENT_PAGEFAULT);
    sleep_ms(5);
}

static void provide(int value) {
    static uint8_t page[0x1000] __attribute__((aligned(0x1000)));
    memset(page, value, sizeof page);
    struct uffdio_copy copy = {.dst = (uintptr_t)g.ram + 0x2000, .src = (uintptr_t)page, .len = sizeof page};
    CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0);
}

static void *run_until_eintr(void *unused) {
    (void)unused;
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    CHECK(g.run->exit_reason == KVM_EXIT_INTR && vcpu_rip(g.vcpu) == CODE);
    return NULL;
}

static void kicked_by(int signal) {
    pthread_t thread;
    handled = 0;
    CHECK(pthread_create(&thread, NULL, run_until_eintr, NULL) == 0);
    sleeps();
    CHECK(pthread_kill(thread, signal) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void signal_ends_the_run(void) {
    handle(SIGUSR1, on_signal, 0);
    guest_asleep_open();
    for (int n = 0; n < 3; n++) {
        kicked_by(SIGUSR1);
        CHECK(handled == 1);
    }
    provide(0x5A);
    CHECK(next_out(&g) == 0x5A);
}

// As VMMs do: the signal is blocked, but in KVM_RUN.
static void signal_of_the_mask_ends_the_run(void) {
    sigset_t all;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    handle(SIGUSR1, on_signal, 0);
    guest_asleep_open();
    struct {
        struct kvm_signal_mask head;
        uint64_t set;
    } mask = {.head = {.len = 8}, .set = ~(1ull << (SIGUSR1 - 1))};
    CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
    CHECK(ioctl(g.vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
    kicked_by(SIGUSR1);
    provide(0x21);
    CHECK(next_out(&g) == 0x21);
}

static void *run_to_mmio(void *unused) {
    (void)unused;
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0);
    CHECK(g.run->exit_reason == KVM_EXIT_MMIO && g.run->mmio.phys_addr == 0x2000);
    return NULL;
}

static void slot_goes(void) {
    pthread_t thread;
    guest_asleep_open();
    CHECK(set_memory(g.vm, 0, 0, 0, NULL) == 0);
    CHECK(set_memory(g.vm, 0, 0, 0x2000, g.ram) == 0);
    CHECK(set_memory(g.vm, 1, 0x2000, 0x1000, g.ram + 0x2000) == 0);
    CHECK(pthread_create(&thread, NULL, run_to_mmio, NULL) == 0);
    sleeps();
    CHECK(set_memory(g.vm, 1, 0x2000, 0, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void *run_to_out(void *unused) {
    (void)unused;
    CHECK(next_out(&g) == 0x33);
    return NULL;
}

static void log_is_read(void) {
    pthread_t thread;
    guest_asleep_open();
    CHECK(pthread_create(&thread, NULL, run_to_out, NULL) == 0);
    sleeps();
    uint8_t bits[RAM_SIZE / 0x1000 / 8 + 8] = {0};
    struct kvm_userspace_memory_region region = {
        .flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = RAM_SIZE, .userspace_addr = (uintptr_t)g.ram};
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    struct kvm_dirty_log log = {.dirty_bitmap = bits};
    CHECK(ioctl(g.vm, KVM_GET_DIRTY_LOG, &log) == 0);
    provide(0x33);
    CHECK(pthread_join(thread, NULL) == 0);
}

CASES(CASE(signal_ends_the_run), CASE(signal_of_the_mask_ends_the_run), CASE(slot_goes), CASE(log_is_read))
