# SPDX-License-Identifier: Apache-2.0
"""As many vCPUs as KVM_CAP_MAX_VCPUS says."""

import errno
import os
import resource
from collections.abc import Iterator

import pytest
from tests.support.conformance import refused
from tests.support.descriptors import open_descriptors

from softkvm import abi, kvm

MOST = kvm.Kvm().check_extension(abi.KVM_CAP_MAX_VCPUS)
ALL_BUT_SELF = 3 << 18 | 0x4045  # asserted, fixed, vector 45h
ICR, SPIV, IRR = 0x300, 0xF0, 0x220


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Allow one descriptor for each vCPU; skips where that is impossible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + 200
    if soft < wanted:
        if hard < wanted:
            pytest.skip(f"the host allows {hard} descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.usefixtures("descriptors")
def test_a_vm_has_room_for_1024_vcpus_and_a_message_to_all_reaches_each() -> None:
    assert MOST == 1024
    with kvm.Kvm().create_vm() as vm:
        vm.create_irqchip()
        files = len(open_descriptors())
        before = resident_bytes()
        vcpus = [vm.create_vcpu(number) for number in range(MOST)]
        assert len(open_descriptors()) - files <= MOST, "one descriptor each"
        assert resident_bytes() - before < MOST * 448 * 1024  # a TLB alone has 528
        refused(errno.EINVAL, lambda: vm.create_vcpu(MOST))
        for vcpu in vcpus:
            assert vcpu.apic is not None
            vcpu.apic.mmio_write(SPIV, 4, 0x1FF)
        assert vcpus[0].apic is not None
        vcpus[0].apic.mmio_write(ICR, 4, ALL_BUT_SELF)
        got = [int.from_bytes(bytes(vcpu.get_lapic())[IRR : IRR + 4], "little") for vcpu in vcpus]
        assert got == [0] + [1 << 5] * (MOST - 1)


def test_the_limit_of_shadow_pages_is_a_fiftieth_of_the_slots_pages() -> None:
    """KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO; the memory need not be there."""
    with kvm.Kvm().create_vm() as vm:
        region = abi.kvm_userspace_memory_region(memory_size=1 << 30, userspace_addr=1 << 40)
        vm.set_user_memory_region(region)
        assert vm.get_nr_mmu_pages() == (1 << 18) // 50
