# SPDX-License-Identifier: Apache-2.0
"""Limits of a VM that userspace sets: vCPU ids, pages of shadow page tables; and vCPUs with large ids."""

import errno
from collections.abc import Callable

import pytest
from tests.support.conformance import Guest, refused

from softkvm import abi, api

MSR_IA32_APICBASE = 0x1B
X2APIC_ENABLED = 0xFEE0_0C00


def test_the_highest_vcpu_id_is_set_once_and_before_the_first_vcpu(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    vm = guest.vm
    most = vm.check_extension(abi.KVM_CAP_MAX_VCPU_ID)
    refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, most + 1))
    vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, 4)
    vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, 4)
    refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, 5))
    refused(errno.EINVAL, lambda: vm.create_vcpu(4))
    vm.create_vcpu(3).close()


def test_a_vcpu_makes_every_id_possible(make: Callable[..., Guest]) -> None:
    vm = make().vm
    refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, 4))
    vm.enable_cap(abi.KVM_CAP_MAX_VCPU_ID, vm.check_extension(abi.KVM_CAP_MAX_VCPU_ID))


def test_shadow_pages_have_a_limit_of_at_least_64(make: Callable[..., Guest]) -> None:
    vm = make().vm
    assert vm.check_extension(abi.KVM_CAP_MMU_SHADOW_CACHE_CONTROL) > 0
    refused(errno.EINVAL, lambda: vm.set_nr_mmu_pages(63))
    vm.set_nr_mmu_pages(64)
    vm.set_nr_mmu_pages(1 << 20)


def test_the_limit_of_shadow_pages_follows_the_slots_until_it_is_set(
    kvm: api.Kvm, device_differs: Callable[[str], None]
) -> None:
    device_differs("KVM_GET_NR_MMU_PAGES is gone since Linux 6.3")
    with kvm.create_vm() as vm:
        assert vm.get_nr_mmu_pages() == 0
    with Guest(kvm) as guest:
        assert guest.vm.get_nr_mmu_pages() == 64, "256 pages, and the minimum"
        guest.vm.set_nr_mmu_pages(1000)
        guest.region(0, 0, 0)
        assert guest.vm.get_nr_mmu_pages() == 1000


@pytest.mark.parametrize("vcpu_id", [255, 256, 300, 1000])
def test_a_message_finds_an_apic_with_an_id_of_more_than_8_bits(make: Callable[..., Guest], vcpu_id: int) -> None:
    guest = make(irqchip=True)
    guest.vm.enable_cap(
        abi.KVM_CAP_X2APIC_API, abi.KVM_X2APIC_API_USE_32BIT_IDS | abi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
    )
    with guest.vm.create_vcpu(vcpu_id) as vcpu:
        vcpu.set_cpuid2(guest.kvm.get_supported_cpuid())
        assert vcpu.set_msrs({MSR_IA32_APICBASE: X2APIC_ENABLED}) == 1
        state = vcpu.get_lapic()
        assert int.from_bytes(bytes(state)[0x20:0x24], "little") == vcpu_id
        state.regs[0xF1] = 1  # software enable in the spurious-interrupt vector register
        vcpu.set_lapic(state)
        low, high = 0xFEE0_0000 | (vcpu_id & 0xFF) << 12, vcpu_id & ~0xFF
        assert guest.vm.signal_msi(abi.kvm_msi(address_lo=low, address_hi=high, data=0x45)) > 0
        assert int.from_bytes(bytes(vcpu.get_lapic())[0x220:0x224], "little") == 1 << 5, "vector 45h is requested"
        others = bytes(guest.cpu.get_lapic())[0x220:0x224]
        assert others == bytes(4), "and of nobody else"
