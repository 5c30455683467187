// SPDX-License-Identifier: Apache-2.0
// Descriptors: copies of them, their order of going, and what stays behind them.
#include "client.h"
#include <sys/socket.h>
#include <sys/stat.h>

static struct guest g;

static void is_vcpu(int fd) { CHECK(vcpu_rip(fd) >= CODE); }
static void is_vm(int fd) { CHECK(ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) > 0); }

static void copies(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int one = dup(g.vcpu), two = dup2(g.vcpu, 200), three = dup3(g.vcpu, 201, O_CLOEXEC);
    int four = fcntl(g.vcpu, F_DUPFD, 300), five = fcntl(g.vcpu, F_DUPFD_CLOEXEC, 300);
    int six = syscall(SYS_dup, g.vcpu);
    int all[] = {one, two, three, four, five, six};
    CHECK(two == 200 && three == 201 && four == 300 && five == 301);
    CHECK(fcntl(one, F_GETFD) == 0 && fcntl(three, F_GETFD) == FD_CLOEXEC && fcntl(five, F_GETFD) == FD_CLOEXEC);
    CHECK(close(g.vcpu) == 0);
    for (int n = 0; n < 6; n++) {
        is_vcpu(all[n]);
        g.vcpu = all[n];
        CHECK(next_out(&g) == n);
        CHECK(close(all[n]) == 0);
        FAILS(ioctl(all[n], KVM_RUN, 0), EBADF);
    }
    // The mapping has it still: nothing is gone until that is.
    CHECK(g.run->exit_reason == KVM_EXIT_IO);
    FAILS(dup2(g.vcpu, 5), EBADF);
    // dup2() onto itself closes nothing.
    CHECK(dup2(g.vm, g.vm) == g.vm);
    is_vm(g.vm);
    FAILS(dup3(g.vm, g.vm, 0), EINVAL);
    is_vm(g.vm);
    // Over another of the KVM's.
    CHECK(dup2(g.kvm, g.vm) == g.vm);
    CHECK(ioctl(g.vm, KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
    new_guest_works();
}

static void close_on_exec_as_the_kernels(void) {
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(fcntl(g.kvm, F_GETFD) == FD_CLOEXEC);
    CHECK(fcntl(g.vm, F_GETFD) == FD_CLOEXEC);
    CHECK(fcntl(g.vcpu, F_GETFD) == FD_CLOEXEC);
    int plain = open_kvm(O_RDWR);
    CHECK(fcntl(plain, F_GETFD) == 0);
    CHECK((fcntl(plain, F_GETFL) & O_ACCMODE) == O_RDWR);
}

// Numbers are the lowest free ones, as POSIX has it.
static void numbers_are_the_lowest_free(void) {
    int first = open("/dev/null", O_RDONLY);
    CHECK(close(first) == 0);
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(g.kvm == first && g.vm == first + 1 && g.vcpu == first + 2);
    CHECK(close(g.vm) == 0);
    CHECK(open("/dev/null", O_RDONLY) == first + 1);
    FAILS(ioctl(first + 1, KVM_CREATE_VCPU, 1), ENOTTY);
    CHECK(next_out(&g) == 0);
}

// The VM is there as long as one of its vCPUs is.
static void vm_is_closed_first(void) {
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(close(g.vm) == 0);
    CHECK(close(g.kvm) == 0);
    for (int n = 0; n < 10; n++) CHECK(next_out(&g) == n);
    is_vcpu(g.vcpu);
    CHECK(close(g.vcpu) == 0);
}

static void raw_close(void) {
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(syscall(SYS_close, g.vm) == 0);
    FAILS(ioctl(g.vm, KVM_CREATE_VCPU, 1), EBADF);
    CHECK(next_out(&g) == 0);
    CHECK(syscall(SYS_close, g.vcpu) == 0);
    // The numbers are used again.
    for (int n = 0; n < 100; n++) {
        struct guest other = guest_open(OUTS, sizeof OUTS);
        CHECK(next_out(&other) == 0);
        CHECK(syscall(SYS_close, other.vcpu) == 0);
        CHECK(munmap(other.run, other.run_size) == 0);
        CHECK(syscall(SYS_close, other.vm) == 0);
        CHECK(syscall(SYS_close, other.kvm) == 0);
        CHECK(munmap(other.ram, RAM_SIZE) == 0);
    }
    CHECK(status_of("FDSize") <= 1024);
}

// A descriptor's number is what it was last made, however it was closed.
static void numbers_are_used_again(void) {
    extern void closefrom(int);
    int null = open("/dev/null", O_RDONLY);
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&g) == 0);
    is_vm(g.vm);
    int vcpu = dup(g.vcpu);
    is_vcpu(vcpu);
    CHECK(syscall(SYS_dup3, g.vm, vcpu, 0) == vcpu);
    is_vm(vcpu);
    FAILS(ioctl(vcpu, KVM_RUN, 0), ENOTTY);
    CHECK(syscall(SYS_dup2, g.vcpu, vcpu) == vcpu);
    is_vcpu(vcpu);
    CHECK(dup2(null, vcpu) == vcpu);
    FAILS(ioctl(vcpu, KVM_RUN, 0), ENOTTY);
    CHECK(dup2(g.vcpu, vcpu) == vcpu);
    is_vcpu(vcpu);
    CHECK(syscall(SYS_close_range, vcpu, vcpu, 0) == 0);
    FAILS(ioctl(vcpu, KVM_RUN, 0), EBADF);
    CHECK(syscall(SYS_dup, g.vcpu) == vcpu);
    is_vcpu(vcpu);
    CHECK(next_out(&g) == 1);
    closefrom(g.vcpu);
    FAILS(ioctl(g.vcpu, KVM_RUN, 0), EBADF);
    FAILS(ioctl(vcpu, KVM_RUN, 0), EBADF);
}

static void ranges(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int low = g.vcpu;
    CHECK(dup2(g.vcpu, 400) == 400 && dup2(g.kvm, 401) == 401);
    CHECK(close_range(3, low, 0) == 0);
    FAILS(ioctl(low, KVM_RUN, 0), EBADF);
    g.vcpu = 400;
    CHECK(next_out(&g) == 0);
    // Everything, as daemons do: then the KVM's own are gone with the client's, and new ones work all the same.
    CHECK(close_range(3, ~0u, 0) == 0);
    new_guest_works();
    g = guest_open(OUTS, sizeof OUTS);
    for (int fd = 3; fd < 1024; fd++) close(fd);
    new_guest_works();
    g = guest_open(OUTS, sizeof OUTS);
    extern void closefrom(int);
    closefrom(3);
    new_guest_works();
}

static void send_fd(int socket, int fd) {
    char byte = 0, control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    CHECK(sendmsg(socket, &message, 0) == 1);
}
static int receive_fd(int socket) {
    int fd;
    char byte, control[CMSG_SPACE(sizeof fd)];
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    CHECK(recvmsg(socket, &message, 0) == 1);
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}
static void *receiver(void *argument) {
    int socket = *(int *)argument;
    g.vcpu = receive_fd(socket);
    CHECK(next_out(&g) == 0);
    g.vm = receive_fd(socket);
    int vcpu = ioctl(g.vm, KVM_CREATE_VCPU, 1);
    CHECK(vcpu >= 0);
    CHECK(close(vcpu) == 0);
    return NULL;
}
static void over_a_socket(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    send_fd(pair[0], g.vcpu);
    CHECK(close(g.vcpu) == 0);
    send_fd(pair[0], g.vm);
    CHECK(close(g.vm) == 0);
    // In nobody's table now, but under way.
    new_guest_works();
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, receiver, &pair[1]) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(next_out(&g) == 1);
}

static void mapping_outlives_its_descriptor(void) {
    g = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&g) == 0);
    CHECK(close(g.vcpu) == 0);
    CHECK(close(g.vm) == 0);
    new_guest_works();
    CHECK(g.run->exit_reason == KVM_EXIT_IO && g.run->io.port == 0x10);
    g.run->immediate_exit = 1;
    CHECK(munmap(g.run, g.run_size) == 0);
    // More than there is.
    g = guest_open(OUTS, sizeof OUTS);
    uint8_t *more = mmap(NULL, 1 << 20, PROT_READ, MAP_SHARED, g.vcpu, 0);
    CHECK(more == MAP_FAILED || !memcmp(more, g.run, 64));
}

// ---- memory for guests alone ----------------------------------------------------------------------------------------

// As in Linux 6.8's <linux/kvm.h>, which may be younger than the system's.
struct region2 {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
    uint32_t guest_memfd, pad1;
    uint64_t pad2[14];
};
struct create_guest_memfd {
    uint64_t size, flags, reserved[6];
};
struct attributes {
    uint64_t address, size, attributes, flags;
};
#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)
#define SET_ATTRIBUTES _IOW(KVMIO, 0xd2, struct attributes)
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct create_guest_memfd)
enum { SW_PROTECTED_VM = 1, MEM_GUEST_MEMFD = 1 << 2, ATTRIBUTE_PRIVATE = 1 << 3 };

static void guest_memory(void) {
    int kvm = open_kvm(O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, SW_PROTECTED_VM);
    CHECK(vm >= 0);
    struct create_guest_memfd wanted = {.size = RAM_SIZE};
    int fd = ioctl(vm, CREATE_GUEST_MEMFD, &wanted);
    CHECK(fd >= 0);
    FAILS(ioctl(vm, CREATE_GUEST_MEMFD, NULL), EFAULT);
    struct stat described;
    char byte = 0;
    CHECK(fstat(fd, &described) == 0);
    CHECK(S_ISREG(described.st_mode) && described.st_size == RAM_SIZE);
    FAILS(read(fd, &byte, 1), EINVAL);
    FAILS(write(fd, &byte, 1), EINVAL);
    CHECK(mmap(NULL, RAM_SIZE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == ENODEV);
    FAILS(ioctl(fd, KVM_CREATE_VCPU, 0), ENOTTY);

    uint8_t *ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static const uint8_t code[] = {0xC6, 0x06, 0x00, 0x20, 0x42, 0xA0, 0x00, 0x20, 0xE6, 0x10}; // [0x2000] = 0x42; al = it; out
    memcpy(ram + CODE, code, sizeof code);
    struct region2 region = {.flags = MEM_GUEST_MEMFD, .memory_size = RAM_SIZE, .userspace_addr = (uintptr_t)ram,
                             .guest_memfd = fd};
    CHECK(ioctl(vm, SET_REGION2, &region) == 0);
    struct attributes private = {.address = 0x2000, .size = 0x1000, .attributes = ATTRIBUTE_PRIVATE};
    CHECK(ioctl(vm, SET_ATTRIBUTES, &private) == 0);
    CHECK(close(fd) == 0);
    g.vm = vm;
    g.vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    CHECK(g.vcpu >= 0);
    g.run = mmap(NULL, 0x3000, PROT_READ | PROT_WRITE, MAP_SHARED, g.vcpu, 0);
    CHECK(g.run != MAP_FAILED);
    vcpu_at(g.vcpu, CODE);
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 && g.run->exit_reason == KVM_EXIT_IO);
    CHECK(((uint8_t *)g.run)[g.run->io.data_offset] == 0x42);
    CHECK(ram[0x2000] == 0); // the guest has it, the process has not
}

// ---- nothing grows --------------------------------------------------------------------------------------------------

static void cycle(void) {
    int kvm = open_kvm(O_RDWR | O_CLOEXEC);
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    CHECK(vm >= 0 && close(vm) == 0 && close(kvm) == 0);
}
static void cycle_with_vcpu(void) {
    struct guest one = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&one) == 0);
    guest_close(&one);
}
static void grows_not(void (*function)(void), int warm, int many) {
    for (int n = 0; n < warm; n++) function();
    int fds = count_of("/proc/self/fd"), threads = status_of("Threads");
    long kib = status_of("VmRSS"), maps = status_of("VmSize");
    for (int n = 0; n < many; n++) function();
    CHECK(count_of("/proc/self/fd") == fds);
    CHECK(status_of("Threads") == threads);
    // What is garbage until it is collected comes and goes; one vCPU's would be more than that, times `many`.
    CHECK(status_of("VmRSS") < kib + 35000);
    CHECK(status_of("VmSize") < maps + 200000);
}
static void vms_leave_nothing(void) { grows_not(cycle, 200, 9000); }
static void vcpus_leave_nothing(void) { grows_not(cycle_with_vcpu, 200, 1000); }
static void *in_a_thread(void *unused) {
    cycle_with_vcpu();
    return unused;
}
static void thread_cycle(void) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, in_a_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}
static void threads_leave_nothing(void) { grows_not(thread_cycle, 100, 500); }

CASES(CASE(copies), CASE(close_on_exec_as_the_kernels), CASE(numbers_are_the_lowest_free), CASE(vm_is_closed_first),
      CASE(raw_close), CASE(numbers_are_used_again), CASE(ranges), CASE(over_a_socket),
      CASE(mapping_outlives_its_descriptor), CASE(guest_memory), CASE(vms_leave_nothing), CASE(vcpus_leave_nothing), CASE(threads_leave_nothing))
