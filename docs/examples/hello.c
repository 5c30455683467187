// SPDX-License-Identifier: Apache-2.0
// A KVM client: a guest in real mode that says hello on a serial port.
//   cc -o hello hello.c && softkvm exec -- ./hello
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { RAM = 0x10000, ENTRY = 0x1000, SERIAL = 0x3F8 };

static const uint8_t guest[] = {
    0xBE, 0x0F, 0x10,  // 1000: mov si, text
    0xBA, 0xF8, 0x03,  // 1003: mov dx, 0x3F8
    0xAC,              // 1006: again: lodsb
    0x84, 0xC0,        // 1007: test al, al
    0x74, 0x03,        // 1009: jz done
    0xEE,              // 100B: out dx, al
    0xEB, 0xF8,        // 100C: jmp again
    0xF4,              // 100E: done: hlt
    'h', 'e', 'l', 'l', 'o', ' ', 'f', 'r', 'o', 'm', ' ', 'C', '\n', 0};

static int request(int fd, unsigned long number, unsigned long argument, const char *name) {
    int result = ioctl(fd, number, argument);
    if (result < 0) err(1, "%s", name);
    return result;
}
#define KVM(fd, name, argument) request(fd, name, (unsigned long)(argument), #name)

int main(void) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) err(1, "/dev/kvm");
    int vm = KVM(kvm, KVM_CREATE_VM, 0);
    uint8_t *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED) err(1, "RAM");
    memcpy(ram + ENTRY, guest, sizeof guest);
    struct kvm_userspace_memory_region region = {.memory_size = RAM, .userspace_addr = (uintptr_t)ram};
    KVM(vm, KVM_SET_USER_MEMORY_REGION, &region);

    int vcpu = KVM(vm, KVM_CREATE_VCPU, 0);
    int size = KVM(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED) err(1, "kvm_run");
    struct kvm_sregs sregs;
    KVM(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    KVM(vcpu, KVM_SET_SREGS, &sregs);
    struct kvm_regs regs = {.rip = ENTRY, .rflags = 2};
    KVM(vcpu, KVM_SET_REGS, &regs);

    for (;;) {
        if (ioctl(vcpu, KVM_RUN, 0) < 0 && errno != EINTR) err(1, "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_HLT) return 0;
        if (run->exit_reason != KVM_EXIT_IO || run->io.port != SERIAL) errx(1, "exit %u", run->exit_reason);
        putchar(*((uint8_t *)run + run->io.data_offset));
    }
}
