// SPDX-License-Identifier: Apache-2.0
// Bad input: every request says what is wrong with it by the documented errno, whatever it is given.
#include "client.h"
#include <stddef.h>

static struct guest g;
static const size_t PAGE = 4096;

static const void *wild[] = {(void *)8, (void *)0x7fffffffe000, (void *)-1, (void *)0xffff800000000000, (void *)-4096, NULL};

#define REQUESTS(X)                                                                                                    \
    X(KVM_SET_USER_MEMORY_REGION, 1) X(KVM_CREATE_PIT2, 1) X(KVM_IRQFD, 1) X(KVM_IOEVENTFD, 1)                          \
    X(KVM_SET_GSI_ROUTING, 1) X(KVM_SIGNAL_MSI, 1) X(KVM_SET_CLOCK, 1) X(KVM_GET_CLOCK, 1) X(KVM_ENABLE_CAP, 1)         \
    X(KVM_GET_DIRTY_LOG, 1) X(KVM_GET_REGS, 2) X(KVM_SET_REGS, 2) X(KVM_GET_SREGS, 2) X(KVM_SET_SREGS, 2)               \
    X(KVM_GET_FPU, 2) X(KVM_SET_FPU, 2) X(KVM_GET_MSRS, 2) X(KVM_SET_MSRS, 2) X(KVM_SET_CPUID2, 2) X(KVM_GET_CPUID2, 2) \
    X(KVM_GET_XSAVE, 2) X(KVM_SET_XSAVE, 2) X(KVM_GET_XCRS, 2) X(KVM_SET_XCRS, 2) X(KVM_GET_DEBUGREGS, 2)               \
    X(KVM_SET_DEBUGREGS, 2) X(KVM_GET_VCPU_EVENTS, 2) X(KVM_SET_VCPU_EVENTS, 2) X(KVM_GET_MP_STATE, 2)                  \
    X(KVM_SET_MP_STATE, 2) X(KVM_TRANSLATE, 2) X(KVM_INTERRUPT, 2) X(KVM_SET_GUEST_DEBUG, 2) X(KVM_GET_SUPPORTED_CPUID, 0) \
    X(KVM_GET_EMULATED_CPUID, 0) X(KVM_GET_MSR_INDEX_LIST, 0) X(KVM_GET_MSR_FEATURE_INDEX_LIST, 0)

static const struct {
    const char *name;
    unsigned long number;
    int file; // 0: the system's, 1: a VM's, 2: a vCPU's
} requests[] = {
#define ROW(name, file) {#name, name, file},
    REQUESTS(ROW)};
enum { MANY = sizeof requests / sizeof *requests };

static int file_of(int n) { return requests[n].file == 0 ? g.kvm : requests[n].file == 1 ? g.vm : g.vcpu; }

#define CHECK_ROW(n, condition)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            dprintf(2, "%s: ", requests[n].name);                                                                      \
            CHECK(condition);                                                                                          \
        }                                                                                                              \
    } while (0)

static void wild_pointers(void) {
    g = guest_open(OUTS, sizeof OUTS);
    for (int n = 0; n < MANY; n++)
        for (unsigned w = 0; w < sizeof wild / sizeof *wild; w++) {
            errno = 0;
            int result = ioctl(file_of(n), requests[n].number, wild[w]);
            CHECK_ROW(n, result == -1 && errno == EFAULT);
        }
    // What is asked for first is a field: that of the last pointers is behind all addresses.
    for (intptr_t at = -1; at > -16; at--) FAILS(ioctl(g.vcpu, KVM_GET_NESTED_STATE, at), EFAULT);
    CHECK(next_out(&g) == 0);
}

// At the end of what is mapped: a byte less than there has to be.
static void structures_that_end_too_early(void) {
    g = guest_open(OUTS, sizeof OUTS);
    uint8_t *page = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mprotect(page + PAGE, PAGE, PROT_NONE) == 0);
    for (int n = 0; n < MANY; n++) {
        size_t size = _IOC_SIZE(requests[n].number);
        if (size > PAGE || requests[n].number == KVM_GET_XSAVE || requests[n].number == KVM_SET_XSAVE) continue;
        errno = 0;
        int result = ioctl(file_of(n), requests[n].number, page + PAGE - size + 1);
        CHECK_ROW(n, result == -1 && errno == EFAULT);
    }
    // Counted entries behind the end.
    struct kvm_msrs *msrs = (void *)(page + PAGE - sizeof *msrs);
    msrs->nmsrs = 1;
    FAILS(ioctl(g.vcpu, KVM_GET_MSRS, msrs), EFAULT);
    FAILS(ioctl(g.vcpu, KVM_SET_MSRS, msrs), EFAULT);
    struct kvm_cpuid2 *cpuid = (void *)(page + PAGE - sizeof *cpuid);
    cpuid->nent = 1;
    FAILS(ioctl(g.vcpu, KVM_SET_CPUID2, cpuid), EFAULT);
    cpuid->nent = 200;
    FAILS(ioctl(g.kvm, KVM_GET_SUPPORTED_CPUID, cpuid), EFAULT);
    CHECK(next_out(&g) == 0);
}

static void read_only_memory(void) {
    g = guest_open(OUTS, sizeof OUTS);
    uint8_t *page = mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int n = 0; n < MANY; n++) {
        unsigned long number = requests[n].number;
        if (_IOC_DIR(number) != _IOC_READ) continue;
        errno = 0;
        int result = ioctl(file_of(n), number, page);
        CHECK_ROW(n, result == -1 && errno == EFAULT);
    }
    // It may be read.
    struct kvm_regs regs;
    CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
    CHECK(mprotect(page, PAGE, PROT_READ | PROT_WRITE) == 0);
    memcpy(page, &regs, sizeof regs);
    CHECK(mprotect(page, PAGE, PROT_READ) == 0);
    CHECK(ioctl(g.vcpu, KVM_SET_REGS, page) == 0);
    FAILS(ioctl(g.vcpu, KVM_GET_REGS, page), EFAULT);
    CHECK(next_out(&g) == 0);
}

// E2BIG, and how many there are where the API says so.
static void lists_that_are_too_short(void) {
    g = guest_open(OUTS, sizeof OUTS);
    struct {
        struct kvm_msr_list head;
        uint32_t indices[4096];
    } msrs = {.head = {.nmsrs = 0}};
    FAILS(ioctl(g.kvm, KVM_GET_MSR_INDEX_LIST, &msrs), E2BIG);
    uint32_t number = msrs.head.nmsrs;
    CHECK(number > 10 && number < 4096);
    msrs.head.nmsrs = number - 1;
    msrs.indices[0] = 0xdeadbeef;
    FAILS(ioctl(g.kvm, KVM_GET_MSR_INDEX_LIST, &msrs), E2BIG);
    CHECK(msrs.head.nmsrs == number && msrs.indices[0] == 0xdeadbeef);
    msrs.head.nmsrs = number + 5;
    msrs.indices[number] = 0xdeadbeef;
    CHECK(ioctl(g.kvm, KVM_GET_MSR_INDEX_LIST, &msrs) == 0);
    CHECK(msrs.head.nmsrs == number && msrs.indices[number] == 0xdeadbeef);
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[512];
    } cpuid = {.head = {.nent = 1}};
    FAILS(ioctl(g.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), E2BIG);
    cpuid.head.nent = 512;
    CHECK(ioctl(g.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) == 0);
    uint32_t leaves = cpuid.head.nent;
    CHECK(leaves > 5 && leaves < 512);
    CHECK(ioctl(g.vcpu, KVM_SET_CPUID2, &cpuid) == 0);
    cpuid.head.nent = leaves - 1;
    FAILS(ioctl(g.vcpu, KVM_GET_CPUID2, &cpuid), E2BIG);
    cpuid.head.nent = leaves;
    CHECK(ioctl(g.vcpu, KVM_GET_CPUID2, &cpuid) == 0 && cpuid.head.nent == leaves);
    cpuid.head.nent = 0xffffffff;
    FAILS(ioctl(g.vcpu, KVM_SET_CPUID2, &cpuid), E2BIG);
    // Huge counts are refused before anything is read or made room for.
    struct kvm_msrs many = {.nmsrs = 0xffffffff};
    FAILS(ioctl(g.vcpu, KVM_GET_MSRS, &many), E2BIG);
    FAILS(ioctl(g.vcpu, KVM_SET_MSRS, &many), E2BIG);
    struct kvm_irq_routing routing = {.nr = 0xffffffff};
    CHECK(ioctl(g.vm, KVM_CREATE_IRQCHIP, 0) == -1);
    errno = 0;
    CHECK(ioctl(g.vm, KVM_SET_GSI_ROUTING, &routing) == -1 && errno != EFAULT);
    CHECK(next_out(&g) == 0);
}

// What is wrong with the request is said before an array that it points to is read, so that its size costs nothing.
static void arrays_are_read_last(void) {
    g = guest_open(OUTS, sizeof OUTS);
    size_t huge = 512 << 20;
    uint8_t *array = mmap(NULL, huge, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(array != MAP_FAILED);
    long most = status_of("VmHWM");
    struct kvm_clear_dirty_log log = {.slot = 0x7fff, .num_pages = 0xffffffff, .dirty_bitmap = array};
    for (int n = 0; n < 2; n++, log.dirty_bitmap = (void *)8) {
        log.slot = 0x10000, log.first_page = 0;
        FAILS(ioctl(g.vm, KVM_CLEAR_DIRTY_LOG, &log), EINVAL);
        log.slot = 5;
        FAILS(ioctl(g.vm, KVM_CLEAR_DIRTY_LOG, &log), ENOENT);
        log.first_page = 1;
        FAILS(ioctl(g.vm, KVM_CLEAR_DIRTY_LOG, &log), EINVAL);
    }
    uint8_t *ram = mmap(NULL, 128 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region slot = {
        .slot = 5, .flags = KVM_MEM_LOG_DIRTY_PAGES, .guest_phys_addr = 1 << 24, .memory_size = 128 * PAGE,
        .userspace_addr = (uintptr_t)ram};
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
    log.first_page = 0;
    FAILS(ioctl(g.vm, KVM_CLEAR_DIRTY_LOG, &log), EINVAL);
    log.num_pages = 128, log.first_page = 64;
    FAILS(ioctl(g.vm, KVM_CLEAR_DIRTY_LOG, &log), EINVAL);
    log.num_pages = 64;
    FAILS(ioctl(g.vm, KVM_CLEAR_DIRTY_LOG, &log), EFAULT);
    log.num_pages = 0, log.first_page = 128;
    CHECK(ioctl(g.vm, KVM_CLEAR_DIRTY_LOG, &log) == 0);

    struct kvm_msr_filter filter = {.flags = 2};
    filter.ranges[0] = (struct kvm_msr_filter_range){.flags = 3, .nmsrs = 64, .bitmap = (void *)8};
    FAILS(ioctl(g.vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL);
    filter.flags = 0;
    FAILS(ioctl(g.vm, KVM_X86_SET_MSR_FILTER, &filter), EFAULT);
    filter.ranges[1] = (struct kvm_msr_filter_range){.flags = 4, .nmsrs = 64, .bitmap = array};
    FAILS(ioctl(g.vm, KVM_X86_SET_MSR_FILTER, &filter), EFAULT);
    filter.ranges[0].flags = 4;
    FAILS(ioctl(g.vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL);
    filter.ranges[0].flags = 3, filter.ranges[0].nmsrs = 0xffffffff;
    FAILS(ioctl(g.vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL);
    CHECK(status_of("VmHWM") < most + 65536);
    CHECK(next_out(&g) == 0);
}

static void requests_of_other_files(void) {
    g = guest_open(OUTS, sizeof OUTS);
    int files[] = {g.kvm, g.vm, g.vcpu};
    static uint8_t room[8192];
    for (int n = 0; n < MANY; n++)
        for (int f = 0; f < 3; f++) {
            if (f == requests[n].file || (requests[n].number == KVM_ENABLE_CAP && f == 2)) continue;
            errno = 0;
            int result = ioctl(files[f], requests[n].number, room);
            // The kernel's own: KVM_GET_MSRS of the system.
            if (f == 0 && requests[n].number == KVM_GET_MSRS) continue;
            CHECK_ROW(n, result == -1 && (errno == ENOTTY || errno == EINVAL));
        }
    FAILS(ioctl(g.vm, KVM_CREATE_VM, 0), ENOTTY);
    FAILS(ioctl(g.kvm, KVM_CREATE_VCPU, 0), EINVAL);
    FAILS(ioctl(g.vm, KVM_RUN, 0), ENOTTY);
    FAILS(ioctl(g.kvm, KVM_RUN, 0), EINVAL);
    FAILS(ioctl(g.vcpu, KVM_CREATE_VCPU, 0), EINVAL);
    // No request of anybody's, and of other devices.
    for (unsigned number = 0; number < 256; number++)
        for (int f = 0; f < 3; f++) {
            errno = 0;
            CHECK(ioctl(files[f], _IOC(3, 0xAE, number, 0x1ff7), room) == -1);
            CHECK(errno == (f == 1 ? ENOTTY : EINVAL));
        }
    int devices[] = {open("/dev/null", O_RDWR), memfd_create("other", 0)};
    for (int n = 0; n < 2; n++) {
        FAILS(ioctl(devices[n], KVM_GET_API_VERSION, 0), ENOTTY);
        FAILS(ioctl(devices[n], KVM_RUN, 0), ENOTTY);
    }
    FAILS(ioctl(-1, KVM_RUN, 0), EBADF);
    FAILS(ioctl(9999, KVM_RUN, 0), EBADF);
    CHECK(next_out(&g) == 0);
}

static void arguments_that_must_be_none(void) {
    g = guest_open(OUTS, sizeof OUTS);
    FAILS(ioctl(g.kvm, KVM_GET_API_VERSION, 1), EINVAL);
    FAILS(ioctl(g.kvm, KVM_GET_VCPU_MMAP_SIZE, 1), EINVAL);
    FAILS(ioctl(g.vcpu, KVM_RUN, 1), EINVAL);
    FAILS(ioctl(g.kvm, KVM_CREATE_VM, 12345678), EINVAL);
    FAILS(ioctl(g.vm, KVM_CREATE_VCPU, 0), EEXIST);
    FAILS(ioctl(g.vm, KVM_CREATE_VCPU, 0xffffffffu), EINVAL);
    CHECK(ioctl(g.vm, KVM_CHECK_EXTENSION, 0x7fffffff) == 0);
    CHECK(next_out(&g) == 0);
}

// ---- one vCPU, two threads ------------------------------------------------------------------------------------------

static atomic_int ran;
static void *runs(void *unused) {
    for (int n = 0; n < 500; n++) {
        CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0);
        ran++;
    }
    return unused;
}
static void *asks(void *unused) {
    struct kvm_regs regs;
    while (ran < 1500) CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
    return unused;
}
static void one_vcpu_in_many_threads(void) {
    // again: inc dword [0x2000]; out 0x10, al; jmp again
    static const uint8_t BOTH[] = {0x66, 0xFF, 0x06, 0x00, 0x20, 0xE6, 0x10, 0xEB, 0xF7};
    g = guest_open(BOTH, sizeof BOTH);
    pthread_t threads[4];
    for (int n = 0; n < 4; n++) CHECK(pthread_create(&threads[n], NULL, n < 3 ? runs : asks, NULL) == 0);
    for (int n = 0; n < 4; n++) CHECK(pthread_join(threads[n], NULL) == 0);
    CHECK(counted(&g) == 1500);
}

// ---- a fuzzer -------------------------------------------------------------------------------------------------------

static uint64_t next(uint64_t *state) { // xorshift64*
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Dull;
}

// In each of four threads, four times over.
enum { SHARED = 4, FUZZ_ROUNDS = 6500 };
static atomic_int shared[3][SHARED]; // the system's, VMs' and vCPUs'
static atomic_int succeeded;

static void *fuzz(void *seed) {
    uint64_t state = (uintptr_t)seed;
    uint8_t *room = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *memory = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mprotect(room + 7 * PAGE, PAGE, PROT_NONE) == 0);
    for (int n = 0; n < FUZZ_ROUNDS; n++) {
        uint64_t random = next(&state);
        int row = (random >> 8) % MANY, kind = requests[row].file;
        unsigned long number = requests[row].number;
        switch ((random >> 24) % 32) {
        case 0: number = KVM_CREATE_VM; kind = 0; break;
        case 1: number = KVM_CREATE_VCPU; kind = 1; break;
        case 2: number = KVM_RUN; kind = 2; break;
        case 3: number = _IOC((random >> 32) & 3, 0xAE, (random >> 34) & 255, (random >> 42) & 0x3fff); break;
        case 4: number = KVM_CREATE_IRQCHIP; kind = 1; break;
        case 5: number = KVM_CHECK_EXTENSION; kind = 1; break;
        case 6: number = KVM_GET_LAPIC; kind = 2; break;
        case 7: number = KVM_SET_LAPIC; kind = 2; break;
        default: break;
        }
        if ((random >> 29) % 8 == 0) kind = random % 3;
        int fd = shared[kind][random % SHARED];
        void *argument = room + (random >> 40) % (7 * PAGE) / 8 * 8;
        switch ((random >> 58) % 8) {
        case 0: argument = (void *)(uintptr_t)(random >> 56); break;
        case 1: argument = room + 7 * PAGE - (random >> 48) % 64; break;
        case 2: argument = (void *)(uintptr_t)wild[(random >> 48) % 6]; break;
        case 3:
            for (int i = 0; i < 8; i++) ((uint64_t *)room)[(random >> 40) % 256 + i] = next(&state) >> next(&state) % 64;
            argument = room + (random >> 40) % 256 * 8;
            break;
        default: memset(room, 0, 4096);
        }
        if (number == KVM_SET_USER_MEMORY_REGION) {
            struct kvm_userspace_memory_region *region = argument = room;
            *region = (struct kvm_userspace_memory_region){random & 3, random >> 4 & 3, (random >> 6 & 31) * PAGE,
                                                           (random >> 11 & 15) * PAGE, (uintptr_t)memory};
        }
        if (number == KVM_RUN) argument = NULL; // ended by a signal, as it may go on for ever
        int result = ioctl(fd, number, argument);
        CHECK(result >= -1);
        succeeded += result >= 0;
        if (result >= 0 && (number == KVM_CREATE_VM || number == KVM_CREATE_VCPU)) {
            close(atomic_exchange(&shared[number == KVM_CREATE_VM ? 1 : 2][random % SHARED], result));
        } else if (result > 2 && _IOC_NR(number) == 0xCE) {
            close(result); // statistics
        }
        if (random % 97 == 0) {
            int copy = dup(fd);
            if (copy >= 0) close(copy);
        }
    }
    munmap(memory, 16 * PAGE);
    munmap(room, 8 * PAGE);
    return NULL;
}

static void fuzz_once(int round) {
    pthread_t threads[4];
    for (int n = 0; n < SHARED; n++) {
        shared[0][n] = open_kvm(O_RDWR | O_CLOEXEC);
        CHECK((shared[1][n] = ioctl(shared[0][n], KVM_CREATE_VM, 0)) >= 0);
        CHECK((shared[2][n] = ioctl(shared[1][n], KVM_CREATE_VCPU, 0)) >= 0);
    }
    for (int n = 0; n < 4; n++)
        CHECK(pthread_create(&threads[n], NULL, fuzz, (void *)(uintptr_t)(0x9E3779B97F4A7C15ull * (4 * round + n + 1))) == 0);
    for (int left = 4; left; sleep_ms(1))
        for (int n = 0; n < 4; n++) {
            if (!threads[n]) continue;
            CHECK(pthread_kill(threads[n], SIGUSR1) == 0);
            if (pthread_tryjoin_np(threads[n], NULL) == 0) threads[n] = 0, left--;
        }
    for (int n = 0; n < SHARED; n++)
        for (int kind = 0; kind < 3; kind++) close(shared[kind][n]);
}

static void on_signal(int signal) { (void)signal; }

static void fuzzer(void) {
    handle(SIGUSR1, on_signal, 0);
    fuzz_once(0);
    int fds = count_of("/proc/self/fd"), threads = status_of("Threads");
    for (int round = 1; round < 4; round++) fuzz_once(round);
    CHECK(count_of("/proc/self/fd") <= fds);
    CHECK(status_of("Threads") <= threads);
    CHECK(succeeded > 20000);
    new_guest_works();
}

CASES(CASE(wild_pointers), CASE(structures_that_end_too_early), CASE(read_only_memory), CASE(lists_that_are_too_short), CASE(arrays_are_read_last),
      CASE(requests_of_other_files), CASE(arguments_that_must_be_none), CASE(one_vcpu_in_many_threads), CASE(fuzzer))
