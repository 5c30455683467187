# SPDX-License-Identifier: Apache-2.0
"""Attributes of the system and of vCPUs (KVM API 4.79, 4.80; devices/vcpu.rst, 4)."""

import errno
from collections.abc import Callable

import pytest
from tests.support.conformance import Guest, refused

from softkvm import abi, api

MSR_IA32_TSC = 0x10
MASK = (1 << 64) - 1
OFFSET = (abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET)


def test_the_system_tells_which_xsave_components_guests_may_have(kvm: api.Kvm) -> None:
    assert kvm.check_extension(abi.KVM_CAP_SYS_ATTRIBUTES)
    kvm.has_device_attr(0, abi.KVM_X86_XCOMP_GUEST_SUPP)
    components = kvm.get_device_attr(0, abi.KVM_X86_XCOMP_GUEST_SUPP)
    assert components & 3 == 3, "x87 and SSE"
    leaf = next(e for e in kvm.get_supported_cpuid() if (e.function, e.index) == (0xD, 0))
    assert not (leaf.eax | leaf.edx << 32) & ~components


@pytest.mark.parametrize(("group", "attr"), [(0x55, 0), (0, 0x55)])
def test_unknown_attributes_are_enxio(guest: Guest, group: int, attr: int) -> None:
    refused(errno.ENXIO, lambda: guest.kvm.has_device_attr(group, attr))
    refused(errno.ENXIO, lambda: guest.kvm.get_device_attr(group, attr))
    refused(errno.ENXIO, lambda: guest.cpu.has_device_attr(group, attr))
    refused(errno.ENXIO, lambda: guest.cpu.get_device_attr(group, attr))
    refused(errno.ENXIO, lambda: guest.cpu.set_device_attr(group, attr, 0))


def test_attributes_are_numbers_of_their_fields_sizes(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: guest.cpu.get_device_attr(1 << 32, 0))
    refused(errno.EINVAL, lambda: guest.cpu.set_device_attr(*OFFSET, 1 << 64))
    refused(errno.EINVAL, lambda: guest.cpu.has_device_attr(0, -1))


def test_the_tsc_offset_round_trips_and_moves_the_counter(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("TSC offsets")
    assert guest.vm.check_extension(abi.KVM_CAP_VCPU_ATTRIBUTES)
    guest.cpu.has_device_attr(*OFFSET)
    before = guest.cpu.get_device_attr(*OFFSET)
    hour = 3600 * 1000 * guest.cpu.get_tsc_khz()
    (first,) = guest.cpu.get_msrs([MSR_IA32_TSC])
    guest.cpu.set_device_attr(*OFFSET, before + hour & MASK)
    (second,) = guest.cpu.get_msrs([MSR_IA32_TSC])
    assert guest.cpu.get_device_attr(*OFFSET) == before + hour & MASK
    assert hour <= second - first & MASK < 2 * hour


def test_new_vcpus_have_the_offset_that_was_set_last(make: Callable[..., Guest], needs: Callable[[str], None]) -> None:
    needs("TSC offsets")
    guest = make()
    guest.cpu.set_device_attr(*OFFSET, 12345)
    with guest.vm.create_vcpu(1) as vcpu:
        assert vcpu.get_device_attr(*OFFSET) == 12345


def test_a_write_of_the_counter_shows_in_the_offset(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("TSC offsets")
    before = guest.cpu.get_device_attr(*OFFSET)
    (now,) = guest.cpu.get_msrs([MSR_IA32_TSC])
    guest.cpu.set_msrs({MSR_IA32_TSC: now + (1 << 50)})
    moved = guest.cpu.get_device_attr(*OFFSET) - before & MASK
    assert moved >> 49 == 1 or moved >> 50 == 1
