// SPDX-License-Identifier: Apache-2.0
// The time-stamp counter that a client reads by itself is the processor's that its guests run on.
#include "client.h"

// rdtsc; mov [0x2000], eax; mov [0x2004], edx; out 0x10, al
static const uint8_t READS[] = {0x0F, 0x31, 0x66, 0xA3, 0x00, 0x20, 0x66, 0x89, 0x16, 0x04, 0x20, 0xE6, 0x10};

static uint64_t rdtsc(void) {
    uint32_t low, high;
    __asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static uint64_t clock_ns(void) {
    struct timespec t;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &t) == 0);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void the_guests_counter_is_the_clients_with_its_offset(void) {
    struct guest g = guest_open(READS, sizeof READS);
    uint64_t offsets[] = {0, 1ull << 40, -(1ull << 33)};
    for (int n = 0; n < 3; n++) {
        struct kvm_device_attr attribute = {
            .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&offsets[n]};
        CHECK(ioctl(g.vcpu, KVM_SET_DEVICE_ATTR, &attribute) == 0);
        vcpu_at(g.vcpu, CODE);
        uint64_t before = rdtsc();
        CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0);
        uint64_t after = rdtsc();
        uint64_t guests = *(volatile uint64_t *)(g.ram + 0x2000) - offsets[n];
        CHECK(before <= guests && guests <= after);
    }
    guest_close(&g);
}

// The least of some: a pause between the two readings makes it longer.
static uint64_t both(uint64_t *ns) {
    uint64_t best = UINT64_MAX, tsc = 0;
    for (int n = 0; n < 16; n++) {
        uint64_t before = rdtsc(), now = clock_ns(), width = rdtsc() - before;
        if (width < best) best = width, tsc = before + width / 2, *ns = now;
    }
    return tsc;
}

static void its_frequency_is_what_kvm_says(void) {
    struct guest g = guest_open(READS, sizeof READS);
    uint64_t ns[2], tsc[2];
    tsc[0] = both(&ns[0]);
    sleep_ms(50);
    tsc[1] = both(&ns[1]);
    double measured_khz = (double)(tsc[1] - tsc[0]) * 1e6 / (double)(ns[1] - ns[0]);
    int khz = ioctl(g.vcpu, KVM_GET_TSC_KHZ, 0);
    CHECK(khz > 0.99 * measured_khz && khz < 1.01 * measured_khz);
    guest_close(&g);
}

static void the_clock_names_the_hosts_counter(void) {
    struct guest g = guest_open(READS, sizeof READS);
    struct kvm_clock_data data[2];
    uint64_t before = rdtsc();
    CHECK(ioctl(g.vm, KVM_GET_CLOCK, &data[0]) == 0);
    sleep_ms(20);
    CHECK(ioctl(g.vm, KVM_GET_CLOCK, &data[1]) == 0);
    uint64_t after = rdtsc();
    CHECK(data[0].flags & data[1].flags & KVM_CLOCK_HOST_TSC);
    CHECK(before <= data[0].host_tsc && data[0].host_tsc < data[1].host_tsc && data[1].host_tsc <= after);
    double khz = (data[1].host_tsc - data[0].host_tsc) * 1e6 / (double)(data[1].clock - data[0].clock);
    int told_khz = ioctl(g.vcpu, KVM_GET_TSC_KHZ, 0);
    CHECK(khz > 0.99 * told_khz && khz < 1.01 * told_khz);
    guest_close(&g);
}

CASES(CASE(the_guests_counter_is_the_clients_with_its_offset), CASE(its_frequency_is_what_kvm_says),
      CASE(the_clock_names_the_hosts_counter))
