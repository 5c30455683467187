# SPDX-License-Identifier: Apache-2.0
"""Capabilities that are turned on with KVM_ENABLE_CAP, and what they change (KVM API, sections 6 and 7)."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.support.conformance import CODE, Guest, pio_data, refused

from softkvm import abi

UNKNOWN_MSR = 0x1234_5678
CAP_SYS_BOOT = 22


def supported(guest: Guest, cap: int) -> int:
    """Return the capability's value; skips without it."""
    value = guest.vm.check_extension(cap)
    if not value:
        pytest.skip("this KVM does not have the capability")
    return value


def test_a_read_of_an_unknown_msr_is_an_exit(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_X86_USER_SPACE_MSR)
    guest.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, abi.KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.real("66b978563412 0f32 f4")  # mov ecx, 0x12345678; rdmsr; hlt
    run = guest.expect(abi.KVM_EXIT_X86_RDMSR)
    assert (run.msr.reason, run.msr.index, run.msr.error) == (abi.KVM_MSR_EXIT_REASON_UNKNOWN, UNKNOWN_MSR, 0)
    run.msr.data = 0x1111_2222_3333_4444
    guest.expect(abi.KVM_EXIT_HLT)
    regs = guest.cpu.get_regs()
    assert (regs.rdx, regs.rax) == (0x1111_2222, 0x3333_4444)


def test_a_write_of_an_unknown_msr_is_an_exit(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_X86_USER_SPACE_MSR)
    guest.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, abi.KVM_MSR_EXIT_REASON_UNKNOWN)
    # mov ecx, 0x12345678; mov eax, 5; mov edx, 6; wrmsr; hlt
    guest.real("66b978563412 66b805000000 66ba06000000 0f30 f4")
    run = guest.expect(abi.KVM_EXIT_X86_WRMSR)
    assert (run.msr.index, run.msr.data) == (UNKNOWN_MSR, 6 << 32 | 5)
    guest.expect(abi.KVM_EXIT_HLT)


def test_an_msr_exit_with_an_error_is_a_general_protection_fault(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    supported(guest, abi.KVM_CAP_X86_USER_SPACE_MSR)
    guest.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, abi.KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.ivt(abi.GP_VECTOR, CODE + 0x100)
    guest.write(CODE + 0x100, b"\xe6\xe9")  # out 0xe9, al
    guest.real("66b978563412 0f32 f4")
    guest.expect(abi.KVM_EXIT_X86_RDMSR).msr.error = 1
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert guest.word(guest.cpu.get_regs().rsp, 2) == CODE + 6


def test_msr_exit_reasons_are_checked(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_X86_USER_SPACE_MSR)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, 8))


def test_hlt_may_stay_in_the_guest(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    bits = supported(guest, abi.KVM_CAP_X86_DISABLE_EXITS)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_DISABLE_EXITS, 1 << 30))
    guest.vm.enable_cap(abi.KVM_CAP_X86_DISABLE_EXITS, bits & 2)
    guest.vm.create_vcpu(0).close()
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_DISABLE_EXITS, 2))


def test_pause_may_stay_in_the_guest(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    bits = supported(guest, abi.KVM_CAP_X86_DISABLE_EXITS)
    assert bits & abi.KVM_X86_DISABLE_EXITS_PAUSE
    guest.vm.enable_cap(abi.KVM_CAP_X86_DISABLE_EXITS, abi.KVM_X86_DISABLE_EXITS_PAUSE)
    guest.vm.create_vcpu(0).close()
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_DISABLE_EXITS, abi.KVM_X86_DISABLE_EXITS_PAUSE))


def test_bus_lock_detection_is_off_or_on(make: Callable[..., Guest]) -> None:
    guest = make()
    modes = guest.vm.check_extension(abi.KVM_CAP_X86_BUS_LOCK_EXIT)
    assert modes in (0, abi.KVM_BUS_LOCK_DETECTION_OFF | abi.KVM_BUS_LOCK_DETECTION_EXIT)
    for wrong in (abi.KVM_BUS_LOCK_DETECTION_OFF | abi.KVM_BUS_LOCK_DETECTION_EXIT, 1 << 2):
        refused(errno.EINVAL, partial(guest.vm.enable_cap, abi.KVM_CAP_X86_BUS_LOCK_EXIT, wrong))
    if modes:
        guest.vm.enable_cap(abi.KVM_CAP_X86_BUS_LOCK_EXIT, abi.KVM_BUS_LOCK_DETECTION_OFF)


def test_unknown_quirks_are_einval(guest: Guest) -> None:
    bits = supported(guest, abi.KVM_CAP_DISABLE_QUIRKS2)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, 1 << 40))
    guest.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, bits & 1)
    assert guest.vm.check_extension(abi.KVM_CAP_DISABLE_QUIRKS)


def test_without_the_quirk_a_slot_that_goes_cannot_be_reached(guest: Guest) -> None:
    """KVM_X86_QUIRK_SLOT_ZAP_ALL (Linux 6.12): without it, what is behind the slot itself has to go all the same."""
    if not supported(guest, abi.KVM_CAP_DISABLE_QUIRKS2) & abi.KVM_X86_QUIRK_SLOT_ZAP_ALL:
        pytest.skip("this KVM does not have the quirk")
    guest.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, abi.KVM_X86_QUIRK_SLOT_ZAP_ALL)
    guest.region(9, 0x8000_0000, 0x1000, offset=0x5_0000)
    guest.write(0x5_0000, b"\x5a")
    guest.protected("a000000080 e610 ebf7")  # 1: mov al, [0x80000000]; out 0x10, al; jmp 1b
    guest.expect(abi.KVM_EXIT_IO)
    assert pio_data(guest.cpu) == b"\x5a"
    guest.region(9, 0x8000_0000, 0, offset=0x5_0000)
    assert guest.expect(abi.KVM_EXIT_MMIO).mmio.phys_addr == 0x8000_0000


def test_lint0_is_masked_after_reset_without_the_quirk(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True, vcpus=0)
    supported(guest, abi.KVM_CAP_DISABLE_QUIRKS2)
    guest.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, 1)
    with guest.vm.create_vcpu(0) as vcpu:
        assert bytes(vcpu.get_lapic().regs[0x350:0x354]) == b"\0\0\1\0"


def test_a_triple_fault_is_part_of_the_events(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    events = guest.cpu.get_vcpu_events()
    assert not events.flags & abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    events.flags = abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    refused(errno.EINVAL, lambda: guest.cpu.set_vcpu_events(events))
    guest.vm.enable_cap(abi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    guest.real("f4")
    events = guest.cpu.get_vcpu_events()
    assert events.flags & abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    events.triple_fault.pending = 1
    guest.cpu.set_vcpu_events(events)
    assert guest.cpu.get_vcpu_events().triple_fault.pending == 1
    guest.expect(abi.KVM_EXIT_SHUTDOWN)


_PV_MSRS = sorted(name for name in vars(abi) if name.startswith("MSR_KVM_") and name != "MSR_KVM_MIGRATION_CONTROL")


@pytest.mark.parametrize("enforced_first", [True, False], ids=["enforced first", "CPUID first"])
@pytest.mark.parametrize("access", ["0f32", "0f30"], ids=["rdmsr", "wrmsr"])
@pytest.mark.parametrize("name", _PV_MSRS)
def test_paravirtual_msrs_follow_cpuid_when_enforced(
    guest: Guest, needs: Callable[[str], None], name: str, access: str, enforced_first: bool
) -> None:
    needs("interrupts in real mode")
    supported(guest, abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID)
    guest.ivt(abi.GP_VECTOR, CODE + 0x100)
    guest.write(CODE + 0x100, b"\xe6\xe9")  # out 0xe9, al
    # mov ecx, msr; mov eax, 0; mov edx, 0; rdmsr or wrmsr; hlt
    code = b"\x66\xb9" + getattr(abi, name).to_bytes(4, "little") + bytes.fromhex("66b800000000 66ba00000000")
    guest.real(code + bytes.fromhex(access + "f4"))
    entries = [entry for entry in guest.cpu.get_cpuid2() if entry.function != abi.KVM_CPUID_FEATURES]
    if enforced_first:
        guest.cpu.enable_cap(abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    guest.cpu.set_cpuid2([*entries, abi.kvm_cpuid_entry2(function=abi.KVM_CPUID_FEATURES)])
    if not enforced_first:
        guest.cpu.enable_cap(abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9


def test_a_vcpu_has_capabilities_to_enable(guest: Guest) -> None:
    assert guest.vm.check_extension(abi.KVM_CAP_ENABLE_CAP)
    refused(errno.EINVAL, lambda: guest.cpu.enable_cap(abi.KVM_CAP_HLT))


def test_paravirtual_msrs_do_not_follow_cpuid_unless_it_is_enforced(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID)
    entries = [entry for entry in guest.cpu.get_cpuid2() if entry.function != abi.KVM_CPUID_FEATURES]
    guest.cpu.set_cpuid2([*entries, abi.kvm_cpuid_entry2(function=abi.KVM_CPUID_FEATURES)])
    guest.real(b"\x66\xb9" + abi.MSR_KVM_ASYNC_PF_ACK.to_bytes(4, "little") + bytes.fromhex("0f32 f4"))
    guest.expect(abi.KVM_EXIT_HLT)


def test_platform_info_may_be_kept_from_the_guest(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    supported(guest, abi.KVM_CAP_MSR_PLATFORM_INFO)
    guest.ivt(abi.GP_VECTOR, CODE + 0x100)
    guest.write(CODE + 0x100, b"\xe6\xe9")  # out 0xe9, al
    read = "66b9ce000000 0f32 f4"  # mov ecx, MSR_PLATFORM_INFO; rdmsr; hlt
    guest.real(read)
    guest.expect(abi.KVM_EXIT_HLT)
    guest.vm.enable_cap(abi.KVM_CAP_MSR_PLATFORM_INFO, 0)
    guest.real(read)
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert len(guest.cpu.get_msrs([0xCE])) == 1, "userspace reads it as before"
    guest.vm.enable_cap(abi.KVM_CAP_MSR_PLATFORM_INFO, 1)
    guest.real(read)
    guest.expect(abi.KVM_EXIT_HLT)


def test_the_emulation_failure_option_is_checked(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2))
    guest.vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)


def test_the_apic_bus_period_is_set_before_the_first_vcpu(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True, vcpus=0)
    supported(guest, abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 0))
    guest.vm.enable_cap(abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 40)
    guest.vm.create_vcpu(0).close()
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 20))


def test_the_limit_of_halt_polling_is_the_vms_own_and_has_32_bits(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_HALT_POLL)
    for limit in (0, 200_000, 0xFFFF_FFFF):
        guest.vm.enable_cap(abi.KVM_CAP_HALT_POLL, limit)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_HALT_POLL, 1 << 32))


def test_an_ioeventfd_of_length_0_takes_any_width(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_IOEVENTFD_ANY_LENGTH)
    assert guest.vm.check_extension(abi.KVM_CAP_IOEVENTFD_NO_LENGTH)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        guest.vm.ioeventfd(fd, 0x20_0000, 0)
        # mov [0x200000], al; mov [0x200000], eax; mov [0x200000], rax; hlt
        guest.long("880425 00002000 890425 00002000 48890425 00002000 f4")
        guest.expect(abi.KVM_EXIT_HLT)
        assert os.eventfd_read(fd) == 3
    finally:
        os.close(fd)


def test_an_eoi_for_userspaces_ioapic_is_an_exit(make: Callable[..., Guest], needs: Callable[[str], None]) -> None:
    needs("exceptions in long mode")
    guest = make(vcpus=0)
    guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
    vcpu = guest.vm.create_vcpu(0)
    vcpu.set_cpuid2(guest.kvm.get_supported_cpuid())
    guest.vcpu, guest.vcpus = vcpu, [vcpu]
    entry = abi.kvm_irq_routing_entry(gsi=3, type=abi.KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo, entry.u.msi.data = 0xFEE0_0000, 0xC051  # level, asserted, vector 0x51
    guest.vm.set_gsi_routing([entry])
    lapic = vcpu.get_lapic()
    lapic.regs[0xF0:0xF2] = [0xFF, 1]
    vcpu.set_lapic(lapic)
    guest.ivt(0x51, CODE + 0x100)
    # out 0xe9, al; mov dword [0xfee000b0], 0 by way of "unreal" DS; out 0xea, al
    guest.write(CODE + 0x100, bytes.fromhex("e6e9 6667c705b000e0fe00000000 e6ea"))
    guest.real("f4 ebfd", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    sregs = vcpu.get_sregs()
    sregs.ds.limit, sregs.ds.g = 0xFFFF_FFFF, 1
    vcpu.set_sregs(sregs)
    guest.vm.irq_line(3, 1)
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert guest.expect(abi.KVM_EXIT_IOAPIC_EOI).eoi.vector == 0x51
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xEA


def test_the_tss_address_is_checked(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    guest.vm.set_tss_addr(0xFFFB_D000)
    refused(errno.EINVAL, lambda: guest.vm.set_tss_addr(0xFFFF_F000))


def test_guest_debug_flags_are_reported(guest: Guest) -> None:
    flags = supported(guest, abi.KVM_CAP_SET_GUEST_DEBUG2)
    assert flags & abi.KVM_GUESTDBG_ENABLE and flags & abi.KVM_GUESTDBG_SINGLESTEP


def test_the_x2apic_format_may_be_chosen_before_the_irqchip(make: Callable[..., Guest]) -> None:
    both = abi.KVM_X2APIC_API_USE_32BIT_IDS | abi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
    guest = make(vcpus=0)
    if supported(guest, abi.KVM_CAP_X2APIC_API) & both != both:
        pytest.skip("this KVM has not both options")
    guest.vm.enable_cap(abi.KVM_CAP_X2APIC_API, both)
    guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
    refused(errno.EINVAL, lambda: guest.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, address_hi=1, data=0x41)))
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X2APIC_API, both + 1 << 2))


def test_a_split_irqchip_comes_once_and_before_the_first_vcpu(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 4097))
    guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 4097))
    refused(errno.EEXIST, lambda: guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24))
    refused(errno.EEXIST, guest.vm.create_irqchip)
    late = make(vcpus=1)
    refused(errno.EEXIST, lambda: late.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24))


def test_the_apic_bus_period_is_checked_before_the_irqchip(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    supported(guest, abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 0))
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 1 << 40))
    refused(errno.ENXIO, lambda: guest.vm.enable_cap(abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, 1))


def test_without_system_management_mode_an_smi_is_enotty(guest: Guest) -> None:
    if guest.vm.check_extension(abi.KVM_CAP_X86_SMM):
        pytest.skip("this KVM has system management mode")
    refused(errno.ENOTTY, guest.cpu.smi)


def test_there_are_no_devices_of_other_architectures(guest: Guest) -> None:
    """KVM API 4.79: ENODEV for a type that is not there, whether it is made or asked for."""
    supported(guest, abi.KVM_CAP_DEVICE_CTRL)
    for flags in (0, abi.KVM_CREATE_DEVICE_TEST):
        for kind in (abi.KVM_DEV_TYPE_ARM_VGIC_V3, abi.KVM_DEV_TYPE_XICS, 0, 0xFFFF, 0xFFFF_FFFF):
            refused(errno.ENODEV, partial(guest.vm.create_device, kind, flags))


def test_huge_pages_of_code_may_be_asked_for_before_the_first_vcpu(make: Callable[..., Guest]) -> None:
    """KVM API 7.32: EPERM without CAP_SYS_BOOT, EINVAL with an argument or for a VM with vCPUs."""
    guest, late = make(vcpus=0), make(vcpus=1)
    supported(guest, abi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES)
    status = Path("/proc/thread-self/status").read_text()
    capabilities = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    if not capabilities >> CAP_SYS_BOOT & 1:
        refused(errno.EPERM, lambda: guest.vm.enable_cap(abi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES))
        return
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES, 1))
    refused(errno.EINVAL, lambda: late.vm.enable_cap(abi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES))
    guest.vm.enable_cap(abi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES)


def test_an_exit_of_the_guest_itself_is_none_of_a_nested_one(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_X86_GUEST_MODE)
    guest.real("f4")
    assert not guest.expect(abi.KVM_EXIT_HLT).flags & abi.KVM_RUN_X86_GUEST_MODE


def test_an_event_that_cannot_be_delivered_names_the_processor(
    guest: Guest, device_differs: Callable[[str], None]
) -> None:
    """KVM API 5, KVM_EXIT_INTERNAL_ERROR: the last datum is the processor of the last entry into the guest."""
    supported(guest, abi.KVM_CAP_LAST_CPU)
    device_differs("an event that KVM delivers itself (here: all) is tried again and again where there is no memory")
    guest.real("cd20")  # int 0x20
    sregs = guest.cpu.get_sregs()
    sregs.idt.base = 0xF000_0000  # no memory there
    guest.cpu.set_sregs(sregs)
    internal = guest.expect(abi.KVM_EXIT_INTERNAL_ERROR).internal
    assert internal.suberror == abi.KVM_INTERNAL_ERROR_DELIVERY_EV
    assert internal.data[internal.ndata - 1] < (os.cpu_count() or 1)


def test_resampling_needs_the_kernels_ioapic(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
    event = os.eventfd(0)
    try:
        guest.vm.irqfd(event, 5)
        refused(errno.EINVAL, lambda: guest.vm.irqfd(event, 6, abi.KVM_IRQFD_FLAG_RESAMPLE, event))
    finally:
        os.close(event)


def test_a_guest_may_be_let_tell_of_unused_pages(guest: Guest) -> None:
    """Softkvm's own capability: a kernel has no such number."""
    bits = guest.vm.check_extension(abi.KVM_CAP_UNUSED_PAGE_HINT)
    assert bits in (0, 7)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, 1 << 3))
    if bits:
        guest.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, abi.KVM_UNUSED_PAGE_HINT_ENABLE)
