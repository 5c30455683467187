# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's interfaces (TLFS; KVM API 4.112, 4.118, 5 KVM_EXIT_HYPERV, 6.8, 7: KVM_CAP_HYPERV_*)."""

import errno
import os
import time
from collections.abc import Callable

import pytest
from tests.support.conformance import Guest, refused
from tests.support.hyperv import (
    ASSIST,
    EVENTS,
    HANDLERS,
    HYPERCALL_PAGE,
    INPUT,
    LINUX,
    MESSAGES,
    TSC_PAGE,
    GeneralProtection,
    HypervGuest,
    InvalidOpcode,
    Left,
)

from softkvm import abi

Make = Callable[..., Guest]
OK = abi.HV_STATUS_SUCCESS
INVALID_INPUT = abi.HV_STATUS_INVALID_HYPERCALL_INPUT


@pytest.fixture
def hv(make: Make) -> HypervGuest:
    """One vCPU with all that there is."""
    return HypervGuest(make)


# --- CPUID -------------------------------------------------------------------------------------------------


def test_the_offered_leaves_are_the_specifications(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_CPUID)
    leaves = {entry.function: entry for entry in hv.guest.cpu.get_supported_hv_cpuid()}
    assert sorted(leaves) == [*range(0x40000000, 0x40000006), 0x4000000A, *range(0x40000080, 0x40000083)]
    assert leaves[0x40000000].eax == 0x40000082, "the highest leaf"
    assert leaves[0x40000001].eax.to_bytes(4, "little") == b"Hv#1"
    assert leaves[0x40000003].eax & 0x2FF & ~abi.HV_MSR_STAT_PAGES_AVAILABLE == 0x2FF & ~0x100
    assert leaves[0x40000004].ebx == 0xFFF
    assert all(entry.index == entry.flags == 0 for entry in leaves.values())


def test_the_system_offers_what_a_vcpu_with_a_local_apic_has(hv: HypervGuest) -> None:
    if not hv.guest.kvm.check_extension(abi.KVM_CAP_SYS_HYPERV_CPUID):
        pytest.skip("this KVM asks on vCPUs only")
    system = [bytes(entry) for entry in hv.guest.kvm.get_supported_hv_cpuid()]
    assert system == [bytes(entry) for entry in hv.guest.cpu.get_supported_hv_cpuid()]


def test_what_needs_a_local_apic_is_not_offered_without_one(make: Make) -> None:
    hv = HypervGuest(make, irqchip=False, synic=False)
    leaves = {entry.function: entry for entry in hv.guest.cpu.get_supported_hv_cpuid()}
    assert not leaves[abi.HYPERV_CPUID_FEATURES].edx & abi.HV_STIMER_DIRECT_MODE_AVAILABLE
    assert not leaves[abi.HYPERV_CPUID_ENLIGHTMENT_INFO].eax & abi.HV_X64_CLUSTER_IPI_RECOMMENDED
    refused(errno.EINVAL, lambda: hv.guest.cpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC))
    with pytest.raises(GeneralProtection):
        hv.rdmsr(abi.HV_X64_MSR_TPR)


def test_without_the_interfaces_signature_the_registers_are_not_there(make: Make) -> None:
    hv = HypervGuest(make, leaves={abi.HYPERV_CPUID_INTERFACE: {"eax": 0}})
    with pytest.raises(GeneralProtection):
        hv.rdmsr(abi.HV_X64_MSR_GUEST_OS_ID)
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_GUEST_OS_ID, LINUX)
    assert hv.guest.cpu.set_msrs({abi.HV_X64_MSR_GUEST_OS_ID: LINUX}) == 1, "the host's to restore"


# --- MSRs --------------------------------------------------------------------------------------------------


def test_the_list_of_registers_has_the_partitions(hv: HypervGuest) -> None:
    listed = {msr for msr in hv.guest.kvm.get_msr_index_list() if 0x40000000 <= msr < 0x40001000}
    assert listed >= {
        0x40000000, 0x40000001, 0x40000002, 0x40000003, 0x40000010, 0x40000020, 0x40000021, 0x40000022, 0x40000023,
        0x40000073, 0x40000080, 0x400000B0, *range(0x40000100, 0x40000109),
    }  # fmt: skip
    listed -= {abi.HV_X64_MSR_VP_RUNTIME, abi.HV_X64_MSR_TIME_REF_COUNT}
    values = hv.guest.cpu.get_msrs(sorted(listed))
    assert len(values) == len(listed)
    assert hv.guest.cpu.set_msrs(list(zip(sorted(listed), values, strict=True))) == len(listed)
    assert hv.guest.cpu.get_msrs(sorted(listed)) == values


def test_the_hypercall_page_waits_for_the_guests_identity(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV)
    hv.wrmsr(abi.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | 1)
    assert hv.rdmsr(abi.HV_X64_MSR_HYPERCALL) == 0
    hv.enable_hypercalls()
    assert hv.rdmsr(abi.HV_X64_MSR_HYPERCALL) == HYPERCALL_PAGE | 1
    page = bytes(hv.guest.memory[HYPERCALL_PAGE : HYPERCALL_PAGE + 4])
    assert page in (b"\x0f\x01\xd9\xc3", b"\x0f\x01\xc1\xc3"), "VMMCALL or VMCALL, and RET"
    assert hv.hypercall(0xBEEF) == abi.HV_STATUS_INVALID_HYPERCALL_CODE
    hv.wrmsr(abi.HV_X64_MSR_GUEST_OS_ID, 0)
    assert hv.rdmsr(abi.HV_X64_MSR_HYPERCALL) == HYPERCALL_PAGE, "no longer enabled"


def test_a_hypercall_page_without_memory_is_refused(hv: HypervGuest) -> None:
    hv.wrmsr(abi.HV_X64_MSR_GUEST_OS_ID, LINUX)
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_HYPERCALL, 1 << 40 | 1)


def test_every_virtual_processor_has_its_index(make: Make) -> None:
    hv = HypervGuest(make, vcpus=2)
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_VP_INDEX)
    assert [hv.rdmsr(abi.HV_X64_MSR_VP_INDEX, vcpu=n) for n in (0, 1)] == [0, 1]
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_VP_INDEX, 5)
    assert hv.guest.vcpus[1].set_msrs({abi.HV_X64_MSR_VP_INDEX: 7}) == 1
    assert hv.rdmsr(abi.HV_X64_MSR_VP_INDEX, vcpu=1) == 7
    most = hv.guest.vm.check_extension(abi.KVM_CAP_MAX_VCPUS)
    assert hv.guest.vcpus[1].set_msrs({abi.HV_X64_MSR_VP_INDEX: most}) == 0


def test_registers_that_count_can_only_be_read(hv: HypervGuest) -> None:
    counters = (
        abi.HV_X64_MSR_VP_RUNTIME,
        abi.HV_X64_MSR_TIME_REF_COUNT,
        abi.HV_X64_MSR_TSC_FREQUENCY,
        abi.HV_X64_MSR_APIC_FREQUENCY,
    )
    for msr in counters:
        assert hv.rdmsr(msr) > 0
        with pytest.raises(GeneralProtection):
            hv.wrmsr(msr, 1)
    assert hv.guest.cpu.set_msrs(dict.fromkeys(counters[1:], 1)) == 3, "the host restores what it has saved"
    assert hv.rdmsr(abi.HV_X64_MSR_TSC_FREQUENCY) == hv.guest.cpu.get_tsc_khz() * 1000


def test_the_guest_may_ask_for_a_reset(hv: HypervGuest) -> None:
    hv.wrmsr(abi.HV_X64_MSR_RESET, 0)
    with pytest.raises(Left) as left:
        hv.wrmsr(abi.HV_X64_MSR_RESET, 1)
    assert left.value.reason == abi.KVM_EXIT_SYSTEM_EVENT
    event = hv.guest.kvm_run.system_event
    assert event.type == abi.KVM_SYSTEM_EVENT_RESET
    if hv.guest.vm.check_extension(abi.KVM_CAP_SYSTEM_EVENT_DATA):
        assert event.ndata == 0
    assert hv.rdmsr(abi.HV_X64_MSR_RESET) == 0


def test_a_crash_is_told_with_its_parameters(hv: HypervGuest) -> None:
    assert hv.guest.cpu.set_msrs({abi.HV_X64_MSR_CRASH_CTL: (1 << 64) - 1}) == 1
    assert hv.rdmsr(abi.HV_X64_MSR_CRASH_CTL) == abi.HV_CRASH_CTL_CRASH_NOTIFY
    parameters = {abi.HV_X64_MSR_CRASH_P0 + n: 0x1111 * n for n in range(5)}
    for msr, value in parameters.items():
        hv.wrmsr(msr, value)
    with pytest.raises(Left) as left:
        hv.wrmsr(abi.HV_X64_MSR_CRASH_CTL, abi.HV_CRASH_CTL_CRASH_NOTIFY)
    assert left.value.reason == abi.KVM_EXIT_SYSTEM_EVENT
    assert hv.guest.kvm_run.system_event.type == abi.KVM_SYSTEM_EVENT_CRASH
    assert hv.guest.cpu.get_msrs(list(parameters)) == list(parameters.values())


def test_reenlightenment_is_kept_and_does_nothing(hv: HypervGuest) -> None:
    hv.wrmsr(abi.HV_X64_MSR_REENLIGHTENMENT_CONTROL, 0x1_00FF)
    hv.wrmsr(abi.HV_X64_MSR_TSC_EMULATION_CONTROL, 1)
    assert hv.rdmsr(abi.HV_X64_MSR_REENLIGHTENMENT_CONTROL) == 0x1_00FF
    assert hv.rdmsr(abi.HV_X64_MSR_TSC_EMULATION_CONTROL) == 1
    hv.wrmsr(abi.HV_X64_MSR_TSC_EMULATION_STATUS, 0)
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_TSC_EMULATION_STATUS, 1)


def test_the_invariant_tsc_is_seen_once_the_guest_asks_for_it(hv: HypervGuest) -> None:
    if not any(e.function == 0x80000007 and e.edx & 0x100 for e in hv.guest.cpu.get_cpuid2()):
        pytest.skip("this KVM has no invariant TSC")

    def invariant() -> bool:
        return bool(hv.execute("0fa2", rax=0x80000007).rdx & 0x100)

    assert not invariant()
    for value in (2, 3):
        with pytest.raises(GeneralProtection):
            hv.wrmsr(abi.HV_X64_MSR_TSC_INVARIANT_CONTROL, value)
    hv.wrmsr(abi.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1)
    assert invariant()
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_TSC_INVARIANT_CONTROL, 0)
    assert hv.guest.cpu.set_msrs({abi.HV_X64_MSR_TSC_INVARIANT_CONTROL: 0}) == 1
    assert not invariant()


# --- the clock ---------------------------------------------------------------------------------------------


def tsc_page(hv: HypervGuest) -> abi.ms_hyperv_tsc_page:
    """The reference TSC page."""
    return abi.ms_hyperv_tsc_page.from_buffer_copy(hv.guest.memory, TSC_PAGE)


def page_time(hv: HypervGuest) -> int:
    """The time by the page, as the specification has the guest compute it."""
    regs = hv.execute("0f31")
    tsc = (regs.rdx & 0xFFFF_FFFF) << 32 | regs.rax & 0xFFFF_FFFF
    return (tsc * tsc_page(hv).tsc_scale >> 64) + tsc_page(hv).tsc_offset


def test_the_page_gives_the_time_of_the_counter(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_TIME)
    before_page = hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT)
    hv.wrmsr(abi.HV_X64_MSR_REFERENCE_TSC, TSC_PAGE | 1)
    assert tsc_page(hv).tsc_sequence not in (0, 0xFFFF_FFFF)
    times = [before_page]
    for _ in range(3):
        times += [hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT), page_time(hv)]
    assert times == sorted(times)


def test_the_page_follows_the_vms_clock_unless_the_guest_froze_it(hv: HypervGuest) -> None:
    hv.wrmsr(abi.HV_X64_MSR_REFERENCE_TSC, TSC_PAGE | 1)
    first = tsc_page(hv)
    hv.guest.vm.set_clock(abi.kvm_clock_data(clock=10**12))
    assert 10**10 <= hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT) < 2 * 10**10
    assert tsc_page(hv).tsc_sequence == first.tsc_sequence + 1
    hv.wrmsr(abi.HV_X64_MSR_REENLIGHTENMENT_CONTROL, 0x1_00FF)
    hv.wrmsr(abi.HV_X64_MSR_TSC_EMULATION_CONTROL, 1)
    frozen = bytes(tsc_page(hv))
    hv.guest.vm.set_clock(abi.kvm_clock_data(clock=0))
    hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT)
    assert bytes(tsc_page(hv)) == frozen


def test_a_page_without_memory_leaves_the_counter(hv: HypervGuest) -> None:
    hv.wrmsr(abi.HV_X64_MSR_REFERENCE_TSC, 1 << 40 | 1)
    first = hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT)
    assert hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT) >= first
    assert hv.rdmsr(abi.HV_X64_MSR_REFERENCE_TSC) == 1 << 40 | 1


# --- the virtual APIC --------------------------------------------------------------------------------------


def test_the_task_priority_and_eois_have_registers(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_VAPIC)
    hv.wrmsr(abi.HV_X64_MSR_TPR, 0x40)
    assert hv.rdmsr(abi.HV_X64_MSR_TPR) == 0x40
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_TPR, 1 << 32)
    hv.wrmsr(abi.HV_X64_MSR_EOI, 0)
    with pytest.raises(GeneralProtection):
        hv.rdmsr(abi.HV_X64_MSR_EOI)


def test_an_ipi_is_one_write(make: Make) -> None:
    hv = HypervGuest(make, vcpus=2)
    hv.enable_apic(1)
    hv.wrmsr(abi.HV_X64_MSR_ICR, 1 << 56 | 0x4000 | 0x51)  # to APIC id 1, fixed
    assert hv.vectors(1) == [0x51]
    assert hv.rdmsr(abi.HV_X64_MSR_ICR) == 1 << 56 | 0x4000 | 0x51


def test_the_assist_page_saves_an_eoi(hv: HypervGuest) -> None:
    hv.guest.write(ASSIST, b"\xff" * 8)
    hv.wrmsr(abi.HV_X64_MSR_VP_ASSIST_PAGE, ASSIST | 1)
    assert hv.guest.word(ASSIST, 8) == 0xFFFF_FFFF_0000_0000, "the first word alone is cleared"
    assert hv.rdmsr(abi.HV_X64_MSR_VP_ASSIST_PAGE) == ASSIST | 1
    hv.enable_apic()
    hv.guest.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x60))
    # handler: btr dword [ASSIST], 0; setc al; iretq
    hv.handler(0x60, bytes.fromhex("0fba3425 00300200 00 0f92c0 48cf"))
    regs = hv.execute("fb 90 fa", rax=0)  # sti; nop; cli
    assert regs.rax & 0xFF == 1, "no EOI required"
    hv.rdmsr(abi.HV_X64_MSR_TPR)
    assert not hv.vectors(in_service=True), "and it is one"
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_VP_ASSIST_PAGE, 1 << 40 | 1)
    hv.wrmsr(abi.HV_X64_MSR_VP_ASSIST_PAGE, 0)


# --- the SynIC ---------------------------------------------------------------------------------------------


def test_userspace_learns_of_a_synics_pages(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_SYNIC2)
    assert hv.rdmsr(abi.HV_X64_MSR_SVERSION) == 1
    assert hv.rdmsr(abi.HV_X64_MSR_SCONTROL) == 1, "SYNIC2 leaves it enabled"
    hv.guest.write(MESSAGES, b"\xaa")
    with pytest.raises(Left) as left:
        hv.execute("0f30", rcx=abi.HV_X64_MSR_SIMP, rax=MESSAGES | 1, rdx=0)
    assert left.value.reason == abi.KVM_EXIT_HYPERV
    exit = hv.guest.kvm_run.hyperv
    assert exit.type == abi.KVM_EXIT_HYPERV_SYNIC
    synic = exit.u.synic
    assert (synic.msr, synic.control, synic.evt_page, synic.msg_page) == (abi.HV_X64_MSR_SIMP, 1, 0, MESSAGES | 1)
    hv.finish()
    assert hv.guest.memory[MESSAGES] == 0xAA, "nor does it clear pages"
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_SVERSION, 2)


def test_the_first_kind_of_synic_clears_pages(make: Make) -> None:
    hv = HypervGuest(make, synic=False)
    with pytest.raises(GeneralProtection):
        hv.rdmsr(abi.HV_X64_MSR_SCONTROL)
    assert hv.guest.cpu.set_msrs({abi.HV_X64_MSR_SCONTROL: 1}) == 0, "the host neither, but for the zero it was"
    assert hv.guest.cpu.set_msrs({abi.HV_X64_MSR_SCONTROL: 0}) == 1
    refused(errno.EINVAL, lambda: hv.guest.cpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC2, 1))
    hv.guest.cpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC)
    for msr, page in ((abi.HV_X64_MSR_SIMP, MESSAGES), (abi.HV_X64_MSR_SIEFP, EVENTS)):
        hv.guest.write(page, b"\xaa" * 4096)
        hv.wrmsr(msr, page | 1)
        assert not any(hv.guest.memory[page : page + 4096])
        with pytest.raises(GeneralProtection):
            hv.wrmsr(msr, 1 << 40 | 1)


def test_a_source_needs_a_vector_that_can_be(hv: HypervGuest) -> None:
    sints = range(abi.HV_X64_MSR_SINT0, abi.HV_X64_MSR_SINT15 + 1)
    assert {hv.rdmsr(msr) for msr in sints} == {abi.HV_SYNIC_SINT_MASKED}
    for msr in sints:
        with pytest.raises(GeneralProtection):
            hv.wrmsr(msr, 15)
        hv.wrmsr(msr, 16)
        hv.wrmsr(msr, abi.HV_SYNIC_SINT_MASKED)
    assert hv.rdmsr(abi.HV_X64_MSR_EOM) == 0


def route(hv: HypervGuest, gsi: int, vp_index: int, sint: int) -> None:
    """KVM_SET_GSI_ROUTING with one route to a source."""
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_HV_SINT)
    entry.u.hv_sint.vcpu, entry.u.hv_sint.sint = vp_index, sint
    hv.guest.vm.set_gsi_routing([entry])


def test_a_gsi_raises_a_source(hv: HypervGuest) -> None:
    hv.enable_apic()
    route(hv, 30, 0, 2)
    assert hv.guest.vm.irq_line_status(30, 1) < 0, "masked"
    hv.wrmsr(abi.HV_X64_MSR_SINT0 + 2, 0x70)
    assert hv.guest.vm.irq_line_status(30, 0) < 0, "it has no level"
    assert hv.guest.vm.irq_line_status(30, 1) == 1
    assert hv.vectors() == [0x70]
    for vp_index, sint in ((1, 2), (0, 16)):
        route(hv, 30, vp_index, sint)
        assert hv.guest.vm.irq_line_status(30, 1) < 0


@pytest.mark.parametrize("auto_eoi", [False, True])
def test_an_interrupt_with_auto_eoi_is_never_in_service(hv: HypervGuest, auto_eoi: bool) -> None:
    hv.enable_apic()
    route(hv, 30, 0, 2)
    hv.wrmsr(abi.HV_X64_MSR_SINT0 + 2, 0x70 | (abi.HV_SYNIC_SINT_AUTO_EOI if auto_eoi else 0))
    hv.handler(0x70, bytes.fromhex("48ffc0 48cf"))  # inc rax; iretq
    hv.guest.vm.irq_line(30, 1)
    assert hv.execute("fb 90 fa", rax=0).rax == 1
    assert hv.vectors(in_service=True) == ([] if auto_eoi else [0x70])
    hv.guest.vm.irq_line(30, 1)
    assert hv.execute("fb 90 fa", rax=0).rax == (1 if auto_eoi else 0)


@pytest.mark.parametrize("by_message", [False, True], ids=["EOI", "EOM"])
def test_a_routed_source_tells_of_its_acknowledgement(hv: HypervGuest, by_message: bool) -> None:
    hv.enable_apic()
    route(hv, 30, 0, 2)
    hv.wrmsr(abi.HV_X64_MSR_SINT0 + 2, 0x70)
    line, resample = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    try:
        hv.guest.vm.irqfd(line, 30, abi.KVM_IRQFD_FLAG_RESAMPLE, resample)
        hv.handler(0x70, bytes.fromhex("48cf"))
        hv.guest.vm.irq_line(30, 1)
        hv.execute("fb 90 fa")
        with pytest.raises(BlockingIOError):
            os.eventfd_read(resample)
        hv.wrmsr(abi.HV_X64_MSR_EOM if by_message else abi.HV_X64_MSR_EOI, 0)
        assert os.eventfd_read(resample) == 1
    finally:
        os.close(line)
        os.close(resample)


# --- timers ------------------------------------------------------------------------------------------------


def message(hv: HypervGuest, sint: int) -> abi.hv_message:
    """What is in a message slot."""
    return abi.hv_message_page.from_buffer_copy(hv.guest.memory, MESSAGES).sint_message[sint]


def with_messages(hv: HypervGuest) -> None:
    """Enable the APIC, the page of messages, and source 3 with vector 0x71."""
    hv.enable_apic()
    hv.wrmsr(abi.HV_X64_MSR_SIMP, MESSAGES | 1)
    hv.wrmsr(abi.HV_X64_MSR_SINT0 + 3, 0x71)


SINT3 = 3 << abi.HV_STIMER_SINT_SHIFT


def test_a_time_that_has_passed_is_a_message_at_once(hv: HypervGuest) -> None:
    with_messages(hv)
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT + 2, 1)
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG + 2, SINT3 | abi.HV_STIMER_ENABLE)
    got = message(hv, 3)
    assert (got.message_type, got.payload_size) == (abi.HVMSG_TIMER_EXPIRED, 24)
    assert (got.payload[0], got.payload[1]) == (1, 1), "timer 1, which expired at 1"
    assert 1 < got.payload[2] <= hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT)
    assert hv.vectors() == [0x71]
    assert hv.rdmsr(abi.HV_X64_MSR_STIMER0_CONFIG + 2) == SINT3, "a one-shot timer is disabled then"


def test_a_message_waits_for_its_slot(hv: HypervGuest) -> None:
    with_messages(hv)
    hv.guest.write(MESSAGES + 3 * 256, b"\x01")
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT, 1)
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, SINT3 | abi.HV_STIMER_ENABLE)
    assert message(hv, 3).message_flags == abi.HV_MESSAGE_FLAG_PENDING
    assert not hv.vectors()
    hv.guest.write(MESSAGES + 3 * 256, bytes(256))
    hv.wrmsr(abi.HV_X64_MSR_EOM, 0)
    assert message(hv, 3).message_type == abi.HVMSG_TIMER_EXPIRED
    assert hv.vectors() == [0x71]


def test_a_halted_processor_is_woken_by_its_timer(hv: HypervGuest) -> None:
    with_messages(hv)
    hv.handler(0x71, bytes.fromhex("e6ea"))  # out 0xea, al
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, SINT3 | abi.HV_STIMER_AUTOENABLE)
    when = hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT) + 100_000
    hv.start("0f30 fb f4 ebfd", rcx=abi.HV_X64_MSR_STIMER0_COUNT, rax=when & 0xFFFF_FFFF, rdx=when >> 32)
    hv.finish()
    assert message(hv, 3).payload[1] == when
    assert message(hv, 3).payload[2] >= when
    assert hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT) >= when


def test_a_periodic_timer_goes_on_in_direct_mode(hv: HypervGuest) -> None:
    hv.enable_apic()
    # inc rbx; wrmsr(EOI, 0); iretq
    hv.handler(0x72, bytes.fromhex("48ffc3 b970000040 31c0 31d2 0f30 48cf"))
    config = abi.HV_STIMER_ENABLE | abi.HV_STIMER_PERIODIC | abi.HV_STIMER_DIRECT_MODE | 0x72 << 4
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT, 10_000)
    start = hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT)
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, config)
    assert hv.execute("fb f4 4883fb03 75f9 fa", rbx=0).rbx == 3  # sti; hlt; until three have come
    assert hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT) >= start + 30_000
    assert hv.rdmsr(abi.HV_X64_MSR_STIMER0_CONFIG) == config
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT, 0)
    assert hv.rdmsr(abi.HV_X64_MSR_STIMER0_CONFIG) == config & ~abi.HV_STIMER_ENABLE


def test_timers_need_a_synic(make: Make) -> None:
    hv = HypervGuest(make, synic=False)
    assert hv.rdmsr(abi.HV_X64_MSR_STIMER0_CONFIG) == 0
    for msr in (abi.HV_X64_MSR_STIMER0_CONFIG, abi.HV_X64_MSR_STIMER0_COUNT):
        with pytest.raises(GeneralProtection):
            hv.wrmsr(msr, 0)
        assert hv.guest.cpu.set_msrs({msr: 0}) == 1
        assert hv.guest.cpu.set_msrs({msr: 1}) == 0


# --- hypercalls --------------------------------------------------------------------------------------------


def test_hypercalls_are_for_ring_0(hv: HypervGuest) -> None:
    hv.enable_hypercalls()
    hv.start("ffd0", rax=HYPERCALL_PAGE, rcx=abi.HVCALL_NOTIFY_LONG_SPIN_WAIT)
    hv.enter_ring_3()
    with pytest.raises(InvalidOpcode):
        hv.finish()


def test_hypercalls_are_for_protected_mode(hv: HypervGuest) -> None:
    hv.enable_hypercalls()
    sregs = hv.guest.cpu.get_sregs()
    sregs.cr0 &= ~(abi.X86_CR0_PE | abi.X86_CR0_PG)
    sregs.efer &= ~(abi.EFER_LME | abi.EFER_LMA)
    sregs.cs = abi.kvm_segment(limit=0xFFFF, type=11, present=1, s=1)
    sregs.ss = sregs.ds = abi.kvm_segment(limit=0xFFFF, type=3, present=1, s=1)
    sregs.idt.base, sregs.idt.limit = 0, 0x3FF
    hv.guest.cpu.set_sregs(sregs)
    hv.guest.ivt(abi.UD_VECTOR, HANDLERS + 16 * abi.UD_VECTOR)
    hv.guest.cpu.set_regs(abi.kvm_regs(rip=HYPERCALL_PAGE, rflags=2, rsp=0x7000, rcx=8))
    with pytest.raises(InvalidOpcode):
        hv.finish()


def test_in_32_bit_code_registers_are_pairs(hv: HypervGuest) -> None:
    hv.enable_hypercalls()
    hv.enable_apic()
    sregs = hv.guest.cpu.get_sregs()
    sregs.cr0 &= ~abi.X86_CR0_PG
    sregs.efer &= ~(abi.EFER_LME | abi.EFER_LMA)
    sregs.cs.l, sregs.cs.db = 0, 1
    hv.guest.cpu.set_sregs(sregs)
    hv.guest.write(0x5000, bytes.fromhex("ffd5 e6ea f4"))  # call ebp; out 0xea, al
    fast_flush = abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST | abi.HV_HYPERCALL_FAST_BIT
    calls = {
        (abi.HVCALL_SEND_IPI | abi.HV_HYPERCALL_FAST_BIT, 0x55, 1): OK,
        (abi.HVCALL_SEND_IPI | abi.HV_HYPERCALL_FAST_BIT, 1 << 32 | 0x55, 1): INVALID_INPUT,
        (fast_flush | 3 << 32, 0, 1): OK | 3 << 32,
    }
    for (control, ingpa, outgpa), result in calls.items():
        registers = {"rdx": control >> 32, "rax": control, "rbx": ingpa >> 32, "rcx": ingpa, "rdi": 0, "rsi": outgpa}
        low = {name: value & 0xFFFF_FFFF for name, value in registers.items()}
        hv.guest.cpu.set_regs(abi.kvm_regs(rip=0x5000, rflags=2, rsp=0x7000, rbp=HYPERCALL_PAGE, **low))
        regs = hv.finish()
        assert regs.rdx << 32 | regs.rax == result
    assert hv.vectors() == [0x55]


def test_banks_of_indices_that_cannot_be_are_not_looked_at(hv: HypervGuest) -> None:
    """The highest index is KVM_CAP_MAX_VCPUS - 1: input may end behind its bank."""
    hv.enable_hypercalls()
    banks = -(-hv.guest.vm.check_extension(abi.KVM_CAP_MAX_VCPUS) // 64)
    if banks >= 64:
        pytest.skip("every bank can be")
    words = [0, 0, abi.HV_GENERIC_SET_SPARSE_4K, (1 << 64) - 1, *[0] * banks]
    call = abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX
    end = 1 << 20
    assert hv.slow(call, *words, var=64, at=end - 8 * len(words)) == OK
    assert hv.slow(call, *words[:-1], var=64, at=end - 8 * len(words[:-1])) == INVALID_INPUT


def test_reserved_bits_and_forms_are_checked(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_SPIN)
    hv.enable_hypercalls()
    spin = abi.HVCALL_NOTIFY_LONG_SPIN_WAIT
    assert hv.fast(spin) == OK
    for bit in (27, 44, 60):
        assert hv.hypercall(spin | 1 << bit) == INVALID_INPUT
    assert hv.fast(spin, var=1) == INVALID_INPUT
    assert hv.fast(spin, rep=1) == INVALID_INPUT
    assert hv.slow(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, 0, 1, 0) == INVALID_INPUT, "a list of nothing"
    assert hv.slow(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 1, 0, rep=1) == INVALID_INPUT
    assert hv.slow(abi.HVCALL_SEND_IPI, 0x50, 1, var=1) == INVALID_INPUT


def test_a_flush_reports_all_of_its_list_done(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_TLBFLUSH)
    hv.enable_hypercalls()
    for call in (hv.fast, hv.slow):
        assert call(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 0, 1) == OK
        assert call(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, 0, 1, 0, 0x5000, 0x6003, rep=2) == OK | 2 << 32
        sparse = (0, 0, abi.HV_GENERIC_SET_SPARSE_4K, 1, 1)
        assert call(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, *sparse, var=1) == OK
        assert call(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX, *sparse, 0x5000, var=1, rep=1) == OK | 1 << 32
        assert call(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, 0, 0, 0, 0) == OK, "nobody"
        assert call(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, *sparse, var=2) == INVALID_INPUT
    gone = 1 << 40
    assert hv.hypercall(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, gone) == INVALID_INPUT
    fast = abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST | abi.HV_HYPERCALL_FAST_BIT
    assert hv.hypercall(fast | 12 << 32, 0, 1) == INVALID_INPUT, "more than registers hold"


def test_input_may_lie_across_a_page(hv: HypervGuest) -> None:
    hv.enable_hypercalls()
    assert hv.slow(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 0, 1, at=INPUT + 0x1000 - 8) == OK
    end = 1 << 20
    hv.guest.write(end - 16, bytes(16))
    assert hv.hypercall(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, end - 16) == INVALID_INPUT


def test_a_flush_makes_others_see_a_changed_page_table(hv: HypervGuest) -> None:
    hv.enable_hypercalls()
    hv.guest.write(0x40_0000 - 0x38_0000, (0x1111).to_bytes(8, "little"))  # 0x80000
    read = bytes.fromhex("48a1") + (0x4008_0000).to_bytes(8, "little")  # mov rax, [there]
    directory = 0x10000 + 3 * 0x1000  # of the second GiB
    hv.guest.write(directory, (0x87).to_bytes(8, "little"))  # its first 2 MiB are physical 0
    assert hv.execute(read).rax == 0x1111
    hv.guest.write(directory, (0x20_0087).to_bytes(8, "little"))
    assert hv.fast(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, 0, 1, 0, 0x4000_0000, rep=1) == OK | 1 << 32
    hv.start(read + b"\xe6\xea")
    with pytest.raises(Left) as left:  # there is no memory
        hv.finish()
    assert left.value.reason == abi.KVM_EXIT_MMIO


def test_an_ipi_reaches_those_that_are_named(make: Make) -> None:
    hv = HypervGuest(make, vcpus=3)
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_SEND_IPI)
    hv.enable_hypercalls()
    for vcpu in range(3):
        hv.enable_apic(vcpu)
    assert hv.fast(abi.HVCALL_SEND_IPI, 0x50, 0b110) == OK
    assert hv.slow(abi.HVCALL_SEND_IPI, 0x51, 0b100) == OK
    assert hv.fast(abi.HVCALL_SEND_IPI_EX, 0x52, abi.HV_GENERIC_SET_SPARSE_4K, 1, 0b10, var=1) == OK
    assert hv.slow(abi.HVCALL_SEND_IPI_EX, 0x53, abi.HV_GENERIC_SET_ALL, 0) == OK
    assert hv.fast(abi.HVCALL_SEND_IPI_EX, 0x54, 0, 0) == OK, "nobody"
    assert [hv.vectors(vcpu) for vcpu in range(3)] == [[0x53], [0x50, 0x52, 0x53], [0x50, 0x51, 0x53]]
    assert hv.fast(abi.HVCALL_SEND_IPI, 0x0F, 1) == INVALID_INPUT
    assert hv.fast(abi.HVCALL_SEND_IPI, 0x100, 1) == INVALID_INPUT
    assert hv.fast(abi.HVCALL_SEND_IPI, 1 << 32 | 0x50, 1) == INVALID_INPUT


def test_processors_are_named_by_their_index(make: Make) -> None:
    hv = HypervGuest(make, vcpus=2)
    hv.enable_hypercalls()
    hv.enable_apic(1)
    assert hv.guest.vcpus[1].set_msrs({abi.HV_X64_MSR_VP_INDEX: 70}) == 1
    assert hv.fast(abi.HVCALL_SEND_IPI, 0x50, 0b10) == OK
    banks = (abi.HV_GENERIC_SET_SPARSE_4K, 0b10, 1 << 6)  # bank 1
    assert hv.fast(abi.HVCALL_SEND_IPI_EX, 0x51, *banks, var=1) == OK
    assert hv.vectors(1) == [0x51]


def test_messages_are_userspaces(hv: HypervGuest) -> None:
    hv.enable_hypercalls()
    with pytest.raises(Left) as left:
        hv.hypercall(abi.HVCALL_POST_MESSAGE, INPUT, 0x77)
    assert left.value.reason == abi.KVM_EXIT_HYPERV
    exit = hv.guest.kvm_run.hyperv
    assert exit.type == abi.KVM_EXIT_HYPERV_HCALL
    call = exit.u.hcall
    assert (call.input, *call.params) == (abi.HVCALL_POST_MESSAGE, INPUT, 0x77)
    call.result = abi.HV_STATUS_INVALID_CONNECTION_ID
    assert hv.finish().rax == abi.HV_STATUS_INVALID_CONNECTION_ID


def test_without_a_synic_there_are_no_messages(make: Make) -> None:
    hv = HypervGuest(make, synic=False)
    hv.enable_hypercalls()
    assert hv.hypercall(abi.HVCALL_POST_MESSAGE, INPUT) == INVALID_INPUT
    assert hv.fast(abi.HVCALL_SIGNAL_EVENT, 5) == INVALID_INPUT


def test_an_event_signals_its_eventfd(hv: HypervGuest) -> None:
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_EVENTFD)
    hv.enable_hypercalls()
    file = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        hv.guest.vm.hyperv_eventfd(0x123, file)
        assert hv.fast(abi.HVCALL_SIGNAL_EVENT, 0x123) == OK
        assert hv.slow(abi.HVCALL_SIGNAL_EVENT, 0x123) == OK
        assert os.eventfd_read(file) == 2
        assert hv.hypercall(abi.HVCALL_SIGNAL_EVENT, INPUT + 4) == abi.HV_STATUS_INVALID_ALIGNMENT
        assert hv.fast(abi.HVCALL_SIGNAL_EVENT, 1 << 24) == INVALID_INPUT
        hv.guest.vm.hyperv_eventfd(0x123, -1, abi.KVM_HYPERV_EVENTFD_DEASSIGN)
        with pytest.raises(Left) as left:
            hv.fast(abi.HVCALL_SIGNAL_EVENT, 0x123)
        assert left.value.reason == abi.KVM_EXIT_HYPERV, "perhaps userspace knows it"
    finally:
        os.close(file)


def test_a_connection_has_one_eventfd(hv: HypervGuest) -> None:
    vm = hv.guest.vm
    file = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        vm.hyperv_eventfd(1, file)
        refused(errno.EEXIST, lambda: vm.hyperv_eventfd(1, file))
        vm.hyperv_eventfd(1, -1, abi.KVM_HYPERV_EVENTFD_DEASSIGN)
        refused(errno.ENOENT, lambda: vm.hyperv_eventfd(1, -1, abi.KVM_HYPERV_EVENTFD_DEASSIGN))
        refused(errno.EINVAL, lambda: vm.hyperv_eventfd(1 << 24, file))
        refused(errno.EINVAL, lambda: vm.hyperv_eventfd(1, file, 2))
        refused(errno.EBADF, lambda: vm.hyperv_eventfd(1, -1))
        with open(os.devnull, "rb") as other:
            refused(errno.EINVAL, lambda: vm.hyperv_eventfd(1, other.fileno()))
    finally:
        os.close(file)


def test_extended_hypercalls_are_userspaces(hv: HypervGuest) -> None:
    hv.enable_hypercalls()
    with pytest.raises(Left):
        hv.hypercall(abi.HV_EXT_CALL_QUERY_CAPABILITIES, 0, INPUT)
    hv.guest.kvm_run.hyperv.u.hcall.result = OK
    assert hv.finish().rax == OK
    assert hv.fast(abi.HV_EXT_CALL_QUERY_CAPABILITIES) == abi.HV_STATUS_INVALID_PARAMETER


def test_the_debugger_has_registers_and_userspace(hv: HypervGuest) -> None:
    hv.wrmsr(abi.HV_X64_MSR_SYNDBG_SEND_BUFFER, 0x5000)
    with pytest.raises(Left) as left:
        hv.execute("0f30", rcx=abi.HV_X64_MSR_SYNDBG_CONTROL, rax=7, rdx=0)
    assert left.value.reason == abi.KVM_EXIT_HYPERV
    exit = hv.guest.kvm_run.hyperv
    assert exit.type == abi.KVM_EXIT_HYPERV_SYNDBG
    assert (exit.u.syndbg.control, exit.u.syndbg.send_page) == (7, 0x5000)
    exit.u.syndbg.status = 0x99
    hv.finish()
    assert hv.rdmsr(abi.HV_X64_MSR_SYNDBG_STATUS) == 0x99
    hv.enable_hypercalls()
    assert hv.hypercall(abi.HVCALL_RESET_DEBUG_SESSION) == abi.HV_STATUS_OPERATION_DENIED
    hv.wrmsr(abi.HV_X64_MSR_SYNDBG_OPTIONS, abi.HV_X64_SYNDBG_OPTION_USE_HCALLS)
    with pytest.raises(Left):
        hv.hypercall(abi.HVCALL_RESET_DEBUG_SESSION)


# --- KVM_CAP_HYPERV_ENFORCE_CPUID --------------------------------------------------------------------------

FEATURES = abi.HYPERV_CPUID_FEATURES
HINTS = abi.HYPERV_CPUID_ENLIGHTMENT_INFO
HYPERCALL = abi.HV_MSR_HYPERCALL_AVAILABLE

#: Registers by the bit of EAX, or of EDX, of leaf 0x40000003 that gives them (TLFS, 2.4.4).
PRIVILEGES = [
    ("eax", 0, 0x40000010), ("eax", 1, 0x40000020), ("eax", 2, 0x40000080), ("eax", 2, 0x40000090),
    ("eax", 3, 0x400000B0), ("eax", 4, 0x40000072), ("eax", 4, 0x40000073), ("eax", 5, 0x40000000),
    ("eax", 5, 0x40000001), ("eax", 6, 0x40000002), ("eax", 7, 0x40000003), ("eax", 9, 0x40000021),
    ("eax", 11, 0x40000022), ("eax", 11, 0x40000023), ("eax", 13, 0x40000106), ("eax", 13, 0x40000107),
    ("eax", 15, 0x40000118), ("edx", 10, 0x40000100), ("edx", 10, 0x40000105), ("edx", 11, 0x400000F2),
]  # fmt: skip


@pytest.mark.parametrize(("register", "bit", "msr"), PRIVILEGES)
def test_a_register_needs_its_privilege_when_that_is_enforced(make: Make, register: str, bit: int, msr: int) -> None:
    all_bits = {"eax": 0xFFFF_FFFF, "edx": 0xFFFF_FFFF}
    HypervGuest(make, leaves={FEATURES: {"eax": 0, "edx": 0, register: 1 << bit}}, enforce=True).rdmsr(msr)
    lacking = HypervGuest(make, leaves={FEATURES: {**all_bits, register: 0xFFFF_FFFF & ~(1 << bit)}}, enforce=True)
    with pytest.raises(GeneralProtection):
        lacking.rdmsr(msr)
    lacking.guest.cpu.get_msrs([msr])
    HypervGuest(make, leaves={FEATURES: {"eax": 0, "edx": 0}}).rdmsr(msr)  # nobody enforces it


@pytest.mark.parametrize(
    ("code", "leaf", "register", "bits"),
    [
        (abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, HINTS, "eax", 1 << 2),
        (abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, HINTS, "eax", 1 << 2 | 1 << 11),
        (abi.HVCALL_SEND_IPI, HINTS, "eax", 1 << 10),
        (abi.HVCALL_SEND_IPI_EX, HINTS, "eax", 1 << 10 | 1 << 11),
        (abi.HVCALL_NOTIFY_LONG_SPIN_WAIT, HINTS, "ebx", 0xFFF),
        (abi.HVCALL_POST_MESSAGE, FEATURES, "ebx", 1 << 4),
        (abi.HVCALL_SIGNAL_EVENT, FEATURES, "ebx", 1 << 5),
        (abi.HV_EXT_CALL_QUERY_CAPABILITIES, FEATURES, "ebx", 1 << 20),
    ],
)
def test_a_hypercall_needs_its_privilege_when_that_is_enforced(
    make: Make, code: int, leaf: int, register: str, bits: int
) -> None:
    denied = abi.HV_STATUS_ACCESS_DENIED
    leaves = {FEATURES: {"eax": HYPERCALL, "ebx": 0, "edx": 0}, HINTS: {"eax": 0, "ebx": 0}}
    nothing = HypervGuest(make, leaves=leaves, enforce=True, synic=False)
    nothing.enable_hypercalls()
    assert nothing.hypercall(code, INPUT) == denied
    assert nothing.hypercall(code | 1 << 27, INPUT) == denied, "before the input is looked at"
    leaves[leaf][register] = bits
    given = HypervGuest(make, leaves=leaves, enforce=True, synic=False)
    given.enable_hypercalls()
    if code == abi.HV_EXT_CALL_QUERY_CAPABILITIES:
        with pytest.raises(Left):  # for userspace
            given.hypercall(code, INPUT)
    else:
        assert given.hypercall(code, INPUT) != denied


def test_xmm_registers_need_their_privilege(make: Make) -> None:
    leaves = {FEATURES: {"edx": 0}}
    hv = HypervGuest(make, leaves=leaves, enforce=True)
    assert hv.guest.vm.check_extension(abi.KVM_CAP_HYPERV_ENFORCE_CPUID)
    hv.enable_hypercalls()
    with pytest.raises(InvalidOpcode):
        hv.fast(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 1, 0)
    assert hv.slow(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 1, 0) == OK
    assert hv.fast(abi.HVCALL_NOTIFY_LONG_SPIN_WAIT) == OK, "has no input there"


def test_direct_mode_needs_its_privilege(make: Make) -> None:
    hv = HypervGuest(make, leaves={FEATURES: {"edx": 0}}, enforce=True)
    with pytest.raises(GeneralProtection):
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, abi.HV_STIMER_DIRECT_MODE)
    assert hv.guest.cpu.set_msrs({abi.HV_X64_MSR_STIMER0_CONFIG: abi.HV_STIMER_DIRECT_MODE}) == 1


def test_a_new_table_has_new_privileges(make: Make) -> None:
    hv = HypervGuest(make, leaves={FEATURES: {"eax": 0}}, enforce=True)
    hv.set_cpuid(hv.guest.cpu, {})
    assert hv.rdmsr(abi.HV_X64_MSR_VP_INDEX) == 0


# --- saved and restored ------------------------------------------------------------------------------------


def test_a_partition_goes_on_in_another_vm(make: Make) -> None:
    hv = HypervGuest(make)
    hv.enable_hypercalls()
    with_messages(hv)
    hv.wrmsr(abi.HV_X64_MSR_REFERENCE_TSC, TSC_PAGE | 1)
    later = hv.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT) + 10**9
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT, later)
    hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, SINT3 | abi.HV_STIMER_ENABLE)
    kept = [
        abi.HV_X64_MSR_GUEST_OS_ID, abi.HV_X64_MSR_HYPERCALL, abi.HV_X64_MSR_REFERENCE_TSC, abi.HV_X64_MSR_SCONTROL,
        abi.HV_X64_MSR_SIMP, abi.HV_X64_MSR_SIEFP, *range(abi.HV_X64_MSR_SINT0, abi.HV_X64_MSR_SINT15 + 1),
        abi.HV_X64_MSR_STIMER0_COUNT, abi.HV_X64_MSR_STIMER0_CONFIG,
    ]  # fmt: skip
    saved = hv.guest.cpu.get_msrs(kept)
    clock = hv.guest.vm.get_clock().clock
    other = HypervGuest(make)
    other.guest.memory[:] = hv.guest.memory[:]
    other.guest.vm.set_clock(abi.kvm_clock_data(clock=clock))
    assert other.guest.cpu.set_msrs(list(zip(kept, saved, strict=True))) == len(kept)
    assert other.guest.cpu.get_msrs(kept) == saved
    assert other.hypercall(abi.HVCALL_NOTIFY_LONG_SPIN_WAIT) == OK
    assert other.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT) >= clock // 100
    assert message(other, 3).message_type == abi.HVMSG_NONE
    other.enable_apic()
    other.guest.vm.set_clock(abi.kvm_clock_data(clock=later * 100))
    other.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, SINT3 | abi.HV_STIMER_ENABLE)
    deadline = time.monotonic() + 5
    while message(other, 3).message_type != abi.HVMSG_TIMER_EXPIRED and time.monotonic() < deadline:
        other.rdmsr(abi.HV_X64_MSR_TIME_REF_COUNT)
    assert message(other, 3).payload[1] == later


# --- all of them ---------------------------------------------------------------------------------------------

CAPABILITIES = (
    abi.KVM_CAP_HYPERV,
    abi.KVM_CAP_HYPERV_VAPIC,
    abi.KVM_CAP_HYPERV_SPIN,
    abi.KVM_CAP_HYPERV_TIME,
    abi.KVM_CAP_HYPERV_SYNIC,
    abi.KVM_CAP_HYPERV_SYNIC2,
    abi.KVM_CAP_HYPERV_VP_INDEX,
    abi.KVM_CAP_HYPERV_EVENTFD,
    abi.KVM_CAP_HYPERV_TLBFLUSH,
    abi.KVM_CAP_HYPERV_SEND_IPI,
    abi.KVM_CAP_HYPERV_CPUID,
    abi.KVM_CAP_SYS_HYPERV_CPUID,
    abi.KVM_CAP_HYPERV_ENFORCE_CPUID,
)


def test_the_interfaces_come_together(guest: Guest) -> None:
    there = {bool(guest.vm.check_extension(cap)) for cap in CAPABILITIES}
    assert len(there) == 1
