// SPDX-License-Identifier: Apache-2.0
// /dev/kvm by its path, whatever the host has there, and what is told of its descriptors.
#include "client.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>

static const char *DEVICE = "/dev/kvm";

static void is_device(const struct stat *s) {
    CHECK(S_ISCHR(s->st_mode) && (s->st_mode & 0600) == 0600);
    CHECK(major(s->st_rdev) == 10 && minor(s->st_rdev) == 232);
    CHECK(s->st_size == 0 && s->st_blocks == 0 && s->st_nlink == 1);
}
static void is_device_x(const struct statx *s) {
    CHECK((s->stx_mask & STATX_BASIC_STATS) == STATX_BASIC_STATS);
    CHECK(S_ISCHR(s->stx_mode) && s->stx_rdev_major == 10 && s->stx_rdev_minor == 232 && s->stx_size == 0);
}

static void it_is_a_character_device(void) {
    struct stat s;
    struct statx x;
    CHECK(stat(DEVICE, &s) == 0);
    is_device(&s);
    CHECK(lstat(DEVICE, &s) == 0);
    is_device(&s);
    CHECK(fstatat(-1, DEVICE, &s, AT_SYMLINK_NOFOLLOW) == 0);
    is_device(&s);
    CHECK(statx(AT_FDCWD, DEVICE, 0, STATX_BASIC_STATS, &x) == 0);
    is_device_x(&x);
    CHECK(syscall(SYS_stat, DEVICE, &s) == 0);
    is_device(&s);
    CHECK(syscall(SYS_lstat, DEVICE, &s) == 0);
    is_device(&s);
    CHECK(syscall(SYS_newfstatat, AT_FDCWD, DEVICE, &s, 0) == 0);
    is_device(&s);
    CHECK(syscall(SYS_statx, AT_FDCWD, DEVICE, 0, STATX_BASIC_STATS, &x) == 0);
    is_device_x(&x);
    FAILS(fstatat(AT_FDCWD, DEVICE, &s, 0x80000), EINVAL);
    char *path = realpath(DEVICE, NULL), room[4096];
    CHECK(path && !strcmp(path, DEVICE));
    free(path);
    CHECK(realpath(DEVICE, room) == room && !strcmp(room, DEVICE));
    FAILS(readlink(DEVICE, room, sizeof room), EINVAL);
}

static void it_may_be_read_and_written(void) {
    CHECK(access(DEVICE, F_OK) == 0 && access(DEVICE, R_OK | W_OK) == 0);
    CHECK(euidaccess(DEVICE, R_OK | W_OK) == 0 && eaccess(DEVICE, W_OK) == 0);
    CHECK(faccessat(-1, DEVICE, R_OK, 0) == 0 && faccessat(AT_FDCWD, DEVICE, R_OK | W_OK, AT_EACCESS) == 0);
    CHECK(syscall(SYS_access, DEVICE, R_OK | W_OK) == 0);
    CHECK(syscall(SYS_faccessat, AT_FDCWD, DEVICE, R_OK | W_OK) == 0);
    CHECK(syscall(SYS_faccessat2, AT_FDCWD, DEVICE, R_OK | W_OK, 0) == 0);
    FAILS(access(DEVICE, X_OK), EACCES);
    FAILS(access(DEVICE, R_OK | X_OK), EACCES);
    FAILS(access(DEVICE, 8), EINVAL);
    FAILS(faccessat(AT_FDCWD, DEVICE, R_OK, 0x8000), EINVAL);
}

static int works(int fd) {
    check_ours(fd);
    CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
    int flags = fcntl(fd, F_GETFL);
    CHECK(close(fd) == 0);
    return flags & ~0100000; // the kernel's O_LARGEFILE
}

static void open_has_its_flags(void) {
    static const int kept[] = {O_RDONLY, O_WRONLY, O_RDWR, O_RDWR | O_NONBLOCK, O_RDWR | O_APPEND, O_RDWR | O_SYNC};
    for (unsigned n = 0; n < sizeof kept / sizeof *kept; n++) CHECK(works(open_kvm(kept[n])) == kept[n]);
    CHECK(works(open(DEVICE, O_RDWR | O_CREAT | O_TRUNC | O_NOCTTY, 0600)) == O_RDWR);
    CHECK((works(open(DEVICE, O_RDWR | O_NOFOLLOW)) & O_ACCMODE) == O_RDWR);
    FAILS(open(DEVICE, O_RDWR | O_DIRECTORY), ENOTDIR);
    FAILS(open(DEVICE, O_RDWR | O_TMPFILE, 0600), ENOTDIR);
    FAILS(open(DEVICE, O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
    FAILS(open(DEVICE, O_RDWR | O_DIRECT), EINVAL);
    int vm;
    CHECK((vm = ioctl(open_kvm(O_RDONLY), KVM_CREATE_VM, 0)) >= 0);
    CHECK((fcntl(vm, F_GETFL) & O_ACCMODE) == O_RDWR);
}

static void other_functions_open_it(void) {
    CHECK(works(open64(DEVICE, O_RDWR)) == O_RDWR && works(openat(-1, DEVICE, O_RDWR)) == O_RDWR);
    CHECK(works(openat64(AT_FDCWD, DEVICE, O_RDWR)) == O_RDWR && works(creat(DEVICE, 0600)) == O_WRONLY);
    CHECK(works(syscall(SYS_open, DEVICE, O_RDWR)) == O_RDWR && works(syscall(SYS_creat, DEVICE, 0600)) == O_WRONLY);
    struct {
        uint64_t flags, mode, resolve;
    } how = {O_RDWR | O_CLOEXEC, 0, 0};
    int fd = syscall(SYS_openat2, AT_FDCWD, DEVICE, &how, sizeof how);
    if (fd >= 0 || errno != ENOSYS) CHECK(works(fd) == O_RDWR);
    FAILS(syscall(SYS_openat2, AT_FDCWD, DEVICE, (void *)8, sizeof how), EFAULT);
    FAILS(syscall(SYS_openat2, AT_FDCWD, DEVICE, &how, 1), EINVAL);
    static const char *modes[] = {"r", "r+", "w", "a", "r+e", "rb+"};
    for (int n = 0; n < 6; n++) {
        FILE *file = fopen(DEVICE, modes[n]);
        CHECK(file);
        check_ours(fileno(file));
        CHECK(ioctl(fileno(file), KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
        CHECK((fcntl(fileno(file), F_GETFD) == FD_CLOEXEC) == (n == 4));
        CHECK(fclose(file) == 0);
    }
    CHECK(!fopen(DEVICE, "wx") && errno == EEXIST);
    new_guest_works();
}

static void other_words_for_its_path(void) {
    if (access("/dev", F_OK) != 0) return;
    static const char *paths[] = {"//dev/kvm", "/dev//kvm", "/dev/./kvm", "/dev/../dev/kvm", "/proc/../dev/kvm"};
    struct stat s;
    for (int n = 0; n < 5; n++) {
        CHECK(works(open(paths[n], O_RDWR)) == O_RDWR);
        CHECK(access(paths[n], R_OK | W_OK) == 0 && stat(paths[n], &s) == 0);
        is_device(&s);
    }
    int dev = open("/dev", O_RDONLY | O_DIRECTORY);
    CHECK(works(openat(dev, "kvm", O_RDWR)) == O_RDWR && works(openat(dev, "./kvm", O_RDWR)) == O_RDWR);
    CHECK(fstatat(dev, "kvm", &s, 0) == 0);
    is_device(&s);
    CHECK(chdir("/dev") == 0);
    CHECK(works(open("kvm", O_RDWR)) == O_RDWR && access("kvm", R_OK) == 0);
    CHECK(chdir("/") == 0);
    CHECK(works(open("dev/kvm", O_RDWR)) == O_RDWR);
    // Others have that name as well.
    FAILS(open("kvm", O_RDWR), ENOENT);
    FAILS(access("/proc/kvm", F_OK), ENOENT);
    FAILS(open("/dev/xkvm", O_RDWR), ENOENT);
    CHECK(open("/dev/kvm/", O_RDWR) == -1 && open("/dev/kvm/x", O_RDWR) == -1);
}

// What the kernel says of a path that is none, and where there is no room for the answer.
static void wild_pointers(void) {
    struct stat s;
    struct statx x;
    static void *const wild[] = {NULL, (void *)8, (void *)0x7fffffffe000, (void *)-1, (void *)0xffff800000000000};
    for (int n = 0; n < 5; n++) {
        char *path = wild[n];
        FAILS(open(path, O_RDWR), EFAULT);
        FAILS(openat(AT_FDCWD, path, O_RDWR), EFAULT);
        FAILS(access(path, F_OK), EFAULT);
        FAILS(stat(path, &s), EFAULT);
        FAILS(syscall(SYS_open, path, O_RDWR), EFAULT);
        FAILS(stat(DEVICE, (struct stat *)path), EFAULT);
        FAILS(statx(AT_FDCWD, DEVICE, 0, STATX_BASIC_STATS, (struct statx *)path), EFAULT);
        FAILS(readlink(path, (char *)&x, sizeof x), EFAULT);
    }
    // At the end of what is mapped, with and without its own end, and over the end of a page.
    char *pages = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mprotect(pages + 2 * 4096, 4096, PROT_NONE) == 0);
    char *end = pages + 2 * 4096;
    CHECK(works(open(strcpy(end - 9, DEVICE), O_RDWR)) == O_RDWR);
    memcpy(end - 8, DEVICE, 8);
    FAILS(open(end - 8, O_RDWR), EFAULT);
    FAILS(access(end - 8, F_OK), EFAULT);
    CHECK(works(open(strcpy(pages + 4092, DEVICE), O_RDWR)) == O_RDWR);
    char *longer = malloc(6000);
    memset(longer, 'x', 6000);
    memcpy(longer + 5990, "/dev/kvm", 9);
    FAILS(open(longer, O_RDWR), ENAMETOOLONG);
}

// ---- descriptors -----------------------------------------------------------------------------------------------------

static struct guest g;

static void descriptors_are_a_device_and_anonymous_files(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int all[] = {g.kvm, g.vm, g.vcpu, ioctl(g.vm, KVM_GET_STATS_FD, 0), dup(g.kvm), dup(g.vcpu)};
    for (int n = 0; n < 6; n++) {
        int fd = all[n];
        struct stat s, t, u;
        struct statx x;
        CHECK(fstat(fd, &s) == 0 && fstatat(fd, "", &t, AT_EMPTY_PATH) == 0 && syscall(SYS_fstat, fd, &u) == 0);
        CHECK(statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &x) == 0);
        CHECK(s.st_mode == t.st_mode && s.st_mode == u.st_mode && s.st_mode == x.stx_mode);
        if (n == 0 || n == 4) {
            is_device(&s);
            is_device_x(&x);
            CHECK(stat(DEVICE, &t) == 0 && t.st_mode == s.st_mode && t.st_ino == s.st_ino && t.st_dev == s.st_dev);
        } else {
            CHECK((s.st_mode & S_IFMT) == 0 && s.st_size == 0 && x.stx_size == 0 && x.stx_rdev_major == 0);
        }
        FAILS(fstat(fd, (struct stat *)8), EFAULT);
    }
    // What is none of them is what it is.
    struct stat s;
    int file = memfd_create("other", 0);
    CHECK(ftruncate(file, 5) == 0 && fstat(file, &s) == 0 && S_ISREG(s.st_mode) && s.st_size == 5);
    CHECK(write(file, "12345", 5) == 5 && lseek(file, 0, SEEK_END) == 5 && pread(file, &s, 5, 0) == 5);
    CHECK(dup2(file, g.kvm) == g.kvm && fstat(g.kvm, &s) == 0 && S_ISREG(s.st_mode));
    CHECK(next_out(&g) == 0);
}

static void nothing_can_be_read_or_written(void) {
    g = guest_open(OUTS, sizeof OUTS);
    char bytes[16] = {0};
    struct iovec part = {bytes, sizeof bytes};
    int all[] = {g.kvm, g.vm, g.vcpu};
    for (int n = 0; n < 3; n++) {
        int fd = all[n], positioned = n ? ESPIPE : EINVAL;
        FAILS(read(fd, bytes, sizeof bytes), EINVAL);
        FAILS(read(fd, bytes, 0), EINVAL);
        FAILS(readv(fd, &part, 1), EINVAL);
        FAILS(write(fd, bytes, sizeof bytes), EINVAL);
        FAILS(write(fd, bytes, 0), EINVAL);
        FAILS(writev(fd, &part, 1), EINVAL);
        FAILS(pread(fd, bytes, sizeof bytes, 0), positioned);
        FAILS(preadv(fd, &part, 1, 0), positioned);
        FAILS(pwrite(fd, bytes, sizeof bytes, 0), positioned);
        FAILS(pwritev(fd, &part, 1, 0), positioned);
        FAILS(syscall(SYS_read, fd, bytes, sizeof bytes), EINVAL);
        FAILS(syscall(SYS_write, fd, bytes, sizeof bytes), EINVAL);
        FAILS(syscall(SYS_pwrite64, fd, bytes, sizeof bytes, 0L), positioned);
        for (int whence = SEEK_SET; whence <= SEEK_HOLE; whence++) CHECK(lseek(fd, 100, whence) == 0);
        FAILS(lseek(fd, 0, 99), EINVAL);
        FAILS(ftruncate(fd, 0), EINVAL);
        struct pollfd ready = {fd, POLLIN | POLLOUT, 0};
        CHECK(poll(&ready, 1, 0) == 1 && ready.revents == (POLLIN | POLLOUT));
        int epoll = epoll_create1(0);
        struct epoll_event event = {.events = EPOLLIN};
        FAILS(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), EPERM);
        CHECK(close(epoll) == 0);
    }
    int one = open_kvm(O_RDONLY), other = open_kvm(O_WRONLY);
    FAILS(read(one, bytes, 1), EINVAL);
    FAILS(write(one, bytes, 1), EBADF);
    FAILS(read(other, bytes, 1), EBADF);
    FAILS(write(other, bytes, 1), EINVAL);
    int stats = ioctl(g.vm, KVM_GET_STATS_FD, 0);
    CHECK(stats >= 0 && read(stats, bytes, 8) == 8 && lseek(stats, 0, SEEK_CUR) == 8 && lseek(stats, 0, SEEK_SET) == 8);
    FAILS(write(stats, bytes, 1), EBADF);
    CHECK(g.run->exit_reason == 0 && next_out(&g) == 0);
}

static void only_a_vcpu_can_be_mapped(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int stats = ioctl(g.vm, KVM_GET_STATS_FD, 0);
    int all[] = {g.kvm, g.vm, stats};
    int *there = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *there = 42;
    for (int n = 0; n < 3; n++) {
        errno = 0;
        CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, all[n], 0) == MAP_FAILED && errno == ENODEV);
        errno = 0;
        CHECK(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, all[n], 4096) == MAP_FAILED && errno == ENODEV);
        errno = 0;
        CHECK(mmap(NULL, 0, PROT_READ, MAP_SHARED, all[n], 0) == MAP_FAILED && errno == EINVAL);
        errno = 0;
        CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, all[n], 1) == MAP_FAILED && errno == EINVAL);
        errno = 0;
        CHECK(mmap(there, 4096, PROT_READ, MAP_SHARED | MAP_FIXED, all[n], 0) == MAP_FAILED && errno == ENODEV);
        CHECK(*there == 42);
    }
    // The page of kvm_run, that of port I/O, and anywhere that one likes; private copies, too.
    uint8_t *copy = mmap(there, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, g.vcpu, 0);
    CHECK(copy == (uint8_t *)there && next_out(&g) == 0);
    uint8_t *data = mmap(NULL, 4096, PROT_READ, MAP_SHARED, g.vcpu, g.run->io.data_offset & ~4095L);
    CHECK(data != MAP_FAILED && next_out(&g) == 1 && data[g.run->io.data_offset & 4095] == 1);
}

CASES(CASE(it_is_a_character_device), CASE(it_may_be_read_and_written), CASE(open_has_its_flags),
      CASE(other_functions_open_it), CASE(other_words_for_its_path), CASE(wild_pointers),
      CASE(descriptors_are_a_device_and_anonymous_files), CASE(nothing_can_be_read_or_written),
      CASE(only_a_vcpu_can_be_mapped))
