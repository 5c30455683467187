// SPDX-License-Identifier: Apache-2.0
// A client that a sanitizer looks at: it finds this program's faults, and nothing else.
#include <sys/eventfd.h>

#include "client.h"

static atomic_int handled, over;

static void on_signal(int signal) {
    (void)signal;
    handled++;
}

static void *kick(void *thread) {
    while (!over) {
        pthread_kill(*(pthread_t *)thread, SIGUSR1);
        sleep_ms(5);
    }
    return NULL;
}

static void *in_thread(void *unused) {
    new_guest_works();
    return unused;
}

// Requests, wild pointers, a signal that ends KVM_RUN, threads of the client and, for an irqfd and a timer, of KVM.
static void clean(void) {
    handle(SIGUSR1, on_signal, 0);
    struct guest g = guest_open(SPIN, sizeof SPIN);
    FAILS(ioctl(g.vcpu, KVM_GET_REGS, (void *)0x10), EFAULT);
    FAILS(ioctl(g.vcpu, KVM_SET_REGS, (void *)(1UL << 46)), EFAULT);
    FAILS(ioctl(g.vcpu, KVM_SET_REGS, (void *)-4096L), EFAULT);
    uint8_t *heap = malloc(sizeof(struct kvm_msr_list) + 1000 * sizeof(uint32_t));
    struct kvm_msr_list *list = (struct kvm_msr_list *)heap;
    list->nmsrs = 1000;
    CHECK(ioctl(g.kvm, KVM_GET_MSR_INDEX_LIST, list) == 0 && list->nmsrs > 0 && list->indices[list->nmsrs - 1]);
    free(heap);

    pthread_t thread, self = pthread_self();
    CHECK(pthread_create(&thread, NULL, kick, &self) == 0);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EINTR);
    over = 1;
    CHECK(handled > 0 && pthread_join(thread, NULL) == 0);
    guest_close(&g);

    pid_t child = fork();
    if (!child) exit(0);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);

    int vm = ioctl((g.kvm = open_kvm(O_RDWR)), KVM_CREATE_VM, 0), event = eventfd(0, 0);
    CHECK(vm >= 0 && event >= 0 && ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
    struct kvm_pit_config pit = {0};
    CHECK(ioctl(vm, KVM_CREATE_PIT2, &pit) == 0);
    struct kvm_irqfd irqfd = {.fd = event, .gsi = 4};
    CHECK(ioctl(vm, KVM_IRQFD, &irqfd) == 0);
    uint64_t one = 1;
    for (int n = 0; n < 20; n++) CHECK(write(event, &one, sizeof one) == sizeof one);
    sleep_ms(100);

    pthread_t threads[3];
    for (int n = 0; n < 3; n++) CHECK(pthread_create(&threads[n], NULL, in_thread, NULL) == 0);
    for (int n = 0; n < 3; n++) CHECK(pthread_join(threads[n], NULL) == 0);
    // The VM is left open: KVM has what it has of it when the process ends.
}

static void __attribute__((noinline)) lose(void) {
    uint8_t *memory = malloc(4321);
    CHECK(memory);
    memory[0] = 1;
    __asm__ volatile("" ::"r"(memory) : "memory");
}

// A leak of the client's own, in the middle of requests.
static void leak(void) {
    clean();
    lose();
    new_guest_works();
}

CASES(CASE(clean), CASE(leak))
