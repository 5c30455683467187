// SPDX-License-Identifier: Apache-2.0
// What requests cost a client of /dev/kvm: a line "NAME ns" each, the median of batches. The guest is `out 0x10, al` in
// a loop, so that every KVM_RUN is one exit to userspace.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

enum { RAM_SIZE = 0x10000, CODE = 0x1000, BATCHES = 101, CALLS = 200 };

static int call(int fd, unsigned long request, void *argument) {
    int result = ioctl(fd, request, argument);
    if (result < 0) {
        perror("ioctl");
        exit(1);
    }
    return result;
}

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(const char *name, int fd, unsigned long request, void *argument) {
    static double batches[BATCHES];
    for (int n = 0; n < BATCHES; n++) {
        double start = now_ns();
        for (int i = 0; i < CALLS; i++) call(fd, request, argument);
        batches[n] = (now_ns() - start) / CALLS;
    }
    qsort(batches, BATCHES, sizeof batches[0], compare);
    printf("%s %.0f\n", name, batches[BATCHES / 2]);
}

int main(int argc, char **argv) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        perror("/dev/kvm");
        return 1;
    }
    if (argc > 1 && !strcmp(argv[1], "open")) return 0;
    int vm = call(kvm, KVM_CREATE_VM, NULL);
    unsigned char *ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = RAM_SIZE, .userspace_addr = (unsigned long)ram};
    call(vm, KVM_SET_USER_MEMORY_REGION, &slot);
    memcpy(ram + CODE, "\xE6\x10\xEB\xFC", 4);
    int vcpu = call(vm, KVM_CREATE_VCPU, NULL);
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_fpu fpu;
    static struct kvm_xsave xsave;
    struct kvm_mp_state state;
    call(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    call(vcpu, KVM_SET_SREGS, &sregs);
    call(vcpu, KVM_GET_REGS, &regs);
    regs.rip = CODE;
    regs.rflags = 2;
    call(vcpu, KVM_SET_REGS, &regs);
    measure("run", vcpu, KVM_RUN, NULL);
    measure("get_mp_state", vcpu, KVM_GET_MP_STATE, &state);
    measure("get_regs", vcpu, KVM_GET_REGS, &regs);
    measure("set_regs", vcpu, KVM_SET_REGS, &regs);
    measure("get_sregs", vcpu, KVM_GET_SREGS, &sregs);
    measure("set_sregs", vcpu, KVM_SET_SREGS, &sregs);
    measure("get_fpu", vcpu, KVM_GET_FPU, &fpu);
    measure("set_fpu", vcpu, KVM_SET_FPU, &fpu);
    measure("get_xsave", vcpu, KVM_GET_XSAVE, &xsave);
    measure("set_xsave", vcpu, KVM_SET_XSAVE, &xsave);
    return 0;
}
