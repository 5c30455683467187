// SPDX-License-Identifier: Apache-2.0
// What a client's process lacks, or loses: descriptors, memory, its root and its rights.
#include "client.h"
#include <dirent.h>
#include <sys/resource.h>

static int descriptors(void) {
    int number = 0;
    DIR *all = opendir("/proc/self/fd");
    CHECK(all);
    while (readdir(all)) number++;
    closedir(all);
    return number;
}

// A guest, or the errno of the first call that fails; nothing is left of it.
static int try_guest(void) {
    int kvm = -1, vm = -1, vcpu = -1, error = 0;
    struct kvm_run *run = MAP_FAILED;
    uint8_t *ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED || (kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) < 0 || (vm = ioctl(kvm, KVM_CREATE_VM, 0)) < 0 ||
        set_memory(vm, 0, 0, RAM_SIZE, ram) != 0 || (vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) < 0 ||
        (run = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0)) == MAP_FAILED)
        error = errno;
    else {
        memcpy(ram + CODE, OUTS, sizeof OUTS);
        vcpu_at(vcpu, CODE);
        if (ioctl(vcpu, KVM_RUN, 0) != 0) error = errno;
        else CHECK(run->exit_reason == KVM_EXIT_IO);
    }
    if (run != MAP_FAILED) munmap(run, 4096);
    int all[] = {vcpu, vm, kvm};
    for (int n = 0; n < 3; n++)
        if (all[n] >= 0) CHECK(close(all[n]) == 0);
    if (ram != MAP_FAILED) munmap(ram, RAM_SIZE);
    return error;
}

static void limit(int resource, rlim_t value) {
    struct rlimit limits;
    CHECK(getrlimit(resource, &limits) == 0);
    limits.rlim_cur = value > limits.rlim_max ? limits.rlim_max : value;
    CHECK(setrlimit(resource, &limits) == 0);
}

static void no_more_descriptors(void) {
    new_guest_works();
    new_guest_works();
    int before = descriptors(), failed = 0, worked = 0;
    for (int number = 3; number < 60; number++) {
        limit(RLIMIT_NOFILE, number);
        int error = try_guest();
        CHECK(error == 0 || error == EMFILE);
        failed += error != 0;
        worked += error == 0;
    }
    CHECK(failed && worked);
    limit(RLIMIT_NOFILE, 1024);
    new_guest_works();
    CHECK(descriptors() == before);
}

static void no_descriptors_at_the_first_open(void) {
    limit(RLIMIT_NOFILE, 4);
    CHECK(try_guest() != 0);
}

static void no_locked_memory(void) {
    limit(RLIMIT_MEMLOCK, 0);
    new_guest_works();
    CHECK(mlockall(MCL_CURRENT) == 0 || errno == ENOMEM || errno == EPERM);
    new_guest_works();
}

// As virtual machine monitors do before they run anything.
static void root_changes(void) {
    struct guest g = guest_open(OUTS, sizeof OUTS);
    char root[] = "/tmp/rootXXXXXX";
    CHECK(mkdtemp(root) && chroot(root) == 0 && chdir("/") == 0);
    CHECK(next_out(&g) == 0);
    CHECK(try_guest() == 0);
    int stats = ioctl(g.vcpu, KVM_GET_STATS_FD, 0);
    char bytes[24];
    CHECK(stats >= 0 && pread(stats, bytes, 24, 0) == 24);
    CHECK(ioctl(g.vm, KVM_CREATE_VCPU, 1) >= 0);
    CHECK(access("/dev/kvm", R_OK | W_OK) == 0 && next_out(&g) == 1);
}

static void works(void) {
    new_guest_works();
    struct guest g = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&g) == 0);
}

// Nothing is read from /proc here.
static void works_without_proc(void) { CHECK(try_guest() == 0); }
static void does_not_open(void) { CHECK(open("/dev/kvm", O_RDWR) == -1 && try_guest() == ENOENT); }

CASES(CASE(works), CASE(works_without_proc), CASE(does_not_open), CASE(no_more_descriptors), CASE(no_descriptors_at_the_first_open),
      CASE(no_locked_memory), CASE(root_changes))
