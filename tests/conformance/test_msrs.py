# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers that KVM has on every processor of x86 (``kvm_get_msr_common``, ``kvm_set_msr_common``)."""

import errno
from collections.abc import Callable

import pytest
from tests.support.conformance import CODE, Guest, refused

from softkvm import abi, api

ARCH_CAPABILITIES, PERF_CAPABILITIES, MISC_ENABLE = 0x10A, 0x345, 0x1A0
HSAVE_PA, TSC_ADJUST, MC0_CTL2 = 0xC001_0117, 0x3B, 0x280

#: What registers without anything behind them read as.
CONSTANTS = {
    0x0: 0, 0x1: 0, 0x17: 0, 0x2A: 0, 0x2C: 1 << 24, 0xCD: 3, 0x11E: 0xBE70_2111, 0x199: 0,
    0x606: 0, 0x611: 0, 0x619: 0, 0x639: 0, 0x641: 0,
    0xC001_0010: 0, 0xC001_001B: 0x2000_0000, 0xC001_001F: 0, 0xC001_0055: 0, 0xC001_0058: 0, 0xC001_0112: 0,
    0xC001_0113: 0, 0xC001_1022: 0, 0xC001_1023: 0, 0xC001_102A: 0, 0xC001_102C: 0,
}  # fmt: skip
#: Which of them take writes, and drop them.
DROPS = {0x11E, 0xC001_001B, 0xC001_001F, 0xC001_1022, 0xC001_1023, 0xC001_102A, 0xC001_102C}
#: What can be written and not read.
WRITE_ONLY = [0x79, 0xC001_0020]

RDMSR, WRMSR = "0f32", "0f30"


def access(guest: Guest, msr: int, instruction: str, value: int = 0) -> bool:
    """Let the guest access a register; False for #GP."""
    guest.ivt(abi.GP_VECTOR, CODE + 0x100)
    guest.write(CODE + 0x100, b"\xe6\xe9")  # out 0xe9, al
    loads = (("66b9", msr), ("66b8", value & 0xFFFF_FFFF), ("66ba", value >> 32))  # ecx, eax, edx
    code = b"".join(bytes.fromhex(opcode) + number.to_bytes(4, "little") for opcode, number in loads)
    guest.real(code + bytes.fromhex(instruction + "f4"))
    return guest.run() == abi.KVM_EXIT_HLT


@pytest.mark.parametrize("msr", CONSTANTS, ids=hex)
def test_registers_without_anything_behind_them_are_constant(guest: Guest, msr: int) -> None:
    assert guest.cpu.get_msrs([msr]) == [CONSTANTS[msr]]
    assert guest.cpu.set_msrs({msr: 1}) == (msr in DROPS)
    assert guest.cpu.get_msrs([msr]) == [CONSTANTS[msr]]


@pytest.mark.parametrize("msr", WRITE_ONLY, ids=hex)
def test_registers_that_load_microcode_can_only_be_written(guest: Guest, msr: int) -> None:
    assert guest.cpu.get_msrs([msr]) == []
    assert guest.cpu.set_msrs({msr: 1}) == 1


@pytest.mark.parametrize("msr", [0x17, 0x2A, 0x199, 0x606, 0xC001_0055], ids=hex)
def test_a_guest_cannot_write_what_is_only_read(guest: Guest, needs: Callable[[str], None], msr: int) -> None:
    needs("interrupts in real mode")
    assert access(guest, msr, RDMSR)
    assert not access(guest, msr, WRMSR)


@pytest.mark.parametrize("msr", [ARCH_CAPABILITIES, PERF_CAPABILITIES], ids=hex)
def test_capability_registers_follow_cpuid_for_the_guest_alone(
    guest: Guest, needs: Callable[[str], None], msr: int, device_differs: Callable[[str], None]
) -> None:
    device_differs("guests have no feature that the host lacks (Linux 6.13)")
    needs("interrupts in real mode")
    assert msr in guest.kvm.get_msr_feature_index_list()
    assert msr in guest.kvm.get_msr_index_list()
    entries = guest.kvm.get_supported_cpuid()
    for there in (True, False):
        for entry in entries:
            if (entry.function, entry.index) == (7, 0):
                entry.edx = entry.edx & ~(1 << 29) | there << 29
            elif entry.function == 1:
                entry.ecx = entry.ecx & ~(1 << 15) | there << 15
        with guest.vm.create_vcpu(1 + there) as vcpu:
            vcpu.set_cpuid2(entries)
            assert len(vcpu.get_msrs([msr])) == 1
            guest.vcpu = vcpu
            assert access(guest, msr, RDMSR) == there
            assert not access(guest, msr, WRMSR)


def test_arch_capabilities_are_userspaces_to_set(guest: Guest, device_differs: Callable[[str], None]) -> None:
    device_differs("the module kvm_pvm leaves IA32_ARCH_CAPABILITIES 0")
    (value,) = guest.kvm.get_msrs([ARCH_CAPABILITIES])
    assert guest.cpu.get_msrs([ARCH_CAPABILITIES]) == [value]
    assert guest.cpu.set_msrs({ARCH_CAPABILITIES: value & 1}) == 1
    assert guest.cpu.get_msrs([ARCH_CAPABILITIES]) == [value & 1]


def test_misc_enable_tells_that_there_is_no_tracing(
    guest: Guest, needs: Callable[[str], None], device_differs: Callable[[str], None]
) -> None:
    """Bits 11 and 12, which a guest cannot change; bit 7 it cannot set."""
    device_differs("the module kvm_pvm has its own IA32_MISC_ENABLE")
    needs("interrupts in real mode")
    (value,) = guest.cpu.get_msrs([MISC_ENABLE])
    assert value & 3 << 11 == 3 << 11
    assert not access(guest, MISC_ENABLE, WRMSR, value & ~(1 << 11))
    assert access(guest, MISC_ENABLE, WRMSR, value | 1 << 7 | 1)
    assert guest.cpu.get_msrs([MISC_ENABLE]) == [value | 1]


def test_mwait_in_misc_enable_needs_sse3(guest: Guest, device_differs: Callable[[str], None]) -> None:
    device_differs("the module kvm_pvm has its own IA32_MISC_ENABLE")
    entries = guest.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == 1:
            entry.ecx &= ~1
    guest.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, abi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
    guest.cpu.set_cpuid2(entries)
    assert guest.cpu.set_msrs({MISC_ENABLE: 3 << 11 | 1 << 18}) == 0
    guest.cpu.set_cpuid2(guest.kvm.get_supported_cpuid())
    assert guest.cpu.set_msrs({MISC_ENABLE: 3 << 11 | 1 << 18}) == 1


def test_the_tsc_adjustment_needs_its_feature(guest: Guest, device_differs: Callable[[str], None]) -> None:
    device_differs("the module kvm_pvm keeps IA32_TSC_ADJUST without its feature")
    entries = guest.kvm.get_supported_cpuid()
    guest.cpu.set_msrs({TSC_ADJUST: 0})
    for entry in entries:
        if (entry.function, entry.index) == (7, 0):
            entry.ebx &= ~2
    guest.cpu.set_cpuid2(entries)
    assert guest.cpu.set_msrs({TSC_ADJUST: 100}) == 1
    assert guest.cpu.get_msrs([TSC_ADJUST]) == [0]


def test_corrected_machine_checks_have_no_interrupt(kvm: api.Kvm, guest: Guest) -> None:
    if kvm.x86_get_mce_cap_supported() >> 10 & 1:
        pytest.skip("this host has corrected machine-check interrupts")
    assert guest.cpu.get_msrs([MC0_CTL2]) == [0]
    assert guest.cpu.set_msrs({MC0_CTL2: 0}) == 1
    assert guest.cpu.set_msrs({MC0_CTL2: 1}) == 0
    guest.cpu.x86_setup_mce(4)
    assert len(guest.cpu.get_msrs([MC0_CTL2 + 3, MC0_CTL2 + 4])) == 1


def test_too_many_registers_are_e2big_on_the_system_too(kvm: api.Kvm) -> None:
    refused(errno.E2BIG, lambda: kvm.get_msrs([0x8B] * 256))
