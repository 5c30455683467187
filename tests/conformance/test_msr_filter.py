# SPDX-License-Identifier: Apache-2.0
"""The MSR filter and MSR exits (KVM API 4.97 KVM_X86_SET_MSR_FILTER, 7.21 KVM_CAP_X86_USER_SPACE_MSR)."""

import errno
from collections.abc import Callable, Sequence

import pytest
from tests.support.conformance import CODE, Guest, refused

from softkvm import abi

SYSENTER_CS, KERNEL_GS_BASE, X2APIC_TPR, UNKNOWN = 0x174, 0xC000_0102, 0x808, 0x1234_5678
READ, WRITE = abi.KVM_MSR_FILTER_READ, abi.KVM_MSR_FILTER_WRITE
RDMSR, WRMSR = "0f32", "0f30"
INVAL, UNKNOWN_REASON = abi.KVM_MSR_EXIT_REASON_INVAL, abi.KVM_MSR_EXIT_REASON_UNKNOWN
FILTERED = abi.KVM_MSR_EXIT_REASON_FILTER


@pytest.fixture
def filtered(guest: Guest) -> Guest:
    """A guest on a KVM with MSR filters."""
    if not guest.vm.check_extension(abi.KVM_CAP_X86_MSR_FILTER):
        pytest.skip("this KVM does not filter MSRs")
    return guest


def part(*msrs: int, flags: int = READ | WRITE, allow: Sequence[int] = (), nmsrs: int = 0) -> abi.MsrFilterRange:
    """Return the range from the first of *msrs* to the last, or of *nmsrs*, in which *allow* are allowed."""
    count = nmsrs or msrs[-1] - msrs[0] + 1
    bits = sum(1 << msr - msrs[0] for msr in allow)
    return abi.MsrFilterRange(flags, msrs[0], count, bits.to_bytes(abi.msr_bitmap_bytes(count), "little"))


def access(guest: Guest, msr: int, instruction: str, data: int = 0) -> int:
    """Let the guest access *msr* in real mode; returns the exit's reason. A #GP is port 0xe9, all else 0xea or HLT."""
    guest.ivt(abi.GP_VECTOR, CODE + 0x100)
    guest.write(CODE + 0x100, bytes.fromhex("e6e9 f4"))  # out 0xe9, al; hlt
    registers = (b"\xb9", msr), (b"\xb8", data & 0xFFFF_FFFF), (b"\xba", data >> 32)
    moves = b"".join(b"\x66" + opcode + value.to_bytes(4, "little") for opcode, value in registers)
    guest.real(moves + bytes.fromhex(instruction + "f4"))
    return guest.run()


def faults(guest: Guest, msr: int, instruction: str, data: int = 0) -> bool:
    """Tell whether the access is a general protection fault; it is done otherwise."""
    reason = access(guest, msr, instruction, data)
    assert reason in (abi.KVM_EXIT_IO, abi.KVM_EXIT_HLT)
    return reason == abi.KVM_EXIT_IO


# --- what is filtered ------------------------------------------------------------------------------


def test_denied_registers_are_a_general_protection_fault(filtered: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    filtered.cpu.set_msrs({SYSENTER_CS: 0x28})
    assert not faults(filtered, SYSENTER_CS, RDMSR)
    filtered.vm.x86_set_msr_filter(0, [part(SYSENTER_CS)])
    assert faults(filtered, SYSENTER_CS, RDMSR)
    assert faults(filtered, SYSENTER_CS, WRMSR, 0x30)
    assert not faults(filtered, SYSENTER_CS + 1, RDMSR), "not in the range"
    assert filtered.cpu.get_msrs([SYSENTER_CS]) == [0x28], "userspace's accesses are not filtered"
    filtered.vm.x86_set_msr_filter(0, [])
    assert not faults(filtered, SYSENTER_CS, WRMSR, 0x30)
    assert filtered.cpu.get_msrs([SYSENTER_CS]) == [0x30]


@pytest.mark.parametrize(("flags", "denied"), [(READ, (True, False)), (WRITE, (False, True))], ids=["read", "write"])
def test_a_range_may_be_of_reads_or_of_writes(
    filtered: Guest, needs: Callable[[str], None], flags: int, denied: tuple[bool, bool]
) -> None:
    needs("interrupts in real mode")
    filtered.vm.x86_set_msr_filter(0, [part(SYSENTER_CS, flags=flags)])
    assert (faults(filtered, SYSENTER_CS, RDMSR), faults(filtered, SYSENTER_CS, WRMSR, 0x30)) == denied


def test_the_bits_of_a_range_are_the_registers_allowed(filtered: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    filtered.vm.x86_set_msr_filter(
        abi.KVM_MSR_FILTER_DEFAULT_DENY,
        [part(0x170, nmsrs=70, allow=(SYSENTER_CS, 0x176)), part(0x277, allow=(0x277,))],
    )
    assert [faults(filtered, msr, RDMSR) for msr in (0x174, 0x175, 0x176, 0x277, 0x10)] == [0, 1, 0, 0, 1]


def test_the_first_range_that_has_the_register_counts(filtered: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    filtered.vm.x86_set_msr_filter(
        0, [part(SYSENTER_CS, flags=WRITE), part(SYSENTER_CS, allow=(SYSENTER_CS,)), part(SYSENTER_CS)]
    )
    assert not faults(filtered, SYSENTER_CS, RDMSR)
    assert faults(filtered, SYSENTER_CS, WRMSR)


def test_x2apic_registers_are_not_filtered(make: Callable[..., Guest], needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    guest = make(irqchip=True)
    if not guest.vm.check_extension(abi.KVM_CAP_X86_MSR_FILTER):
        pytest.skip("this KVM does not filter MSRs")
    sregs = guest.cpu.get_sregs()
    sregs.apic_base |= 1 << 10
    guest.cpu.set_sregs(sregs)
    guest.vm.x86_set_msr_filter(0, [part(0x800, 0x8FF)])
    access(guest, X2APIC_TPR, WRMSR + "e6ea", 0x40)  # out 0xea, al
    assert guest.kvm_run.io.port == 0xEA
    assert guest.cpu.get_sregs().cr8 == 4


@pytest.mark.parametrize(
    ("flags", "ranges"),
    [
        (2, []),
        (abi.KVM_MSR_FILTER_DEFAULT_DENY, []),
        (abi.KVM_MSR_FILTER_DEFAULT_DENY, [abi.MsrFilterRange(READ, SYSENTER_CS, 0, b"")]),
        (0, [part(SYSENTER_CS, flags=0)]),
        (0, [part(SYSENTER_CS, flags=4)]),
        (0, [part(0, nmsrs=abi.KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8 + 1)]),
        (0, [part(SYSENTER_CS)] * 17),
    ],
    ids=["flags", "deny all", "deny all but an empty range", "no access", "range flags", "too long", "too many"],
)
def test_impossible_filters_are_einval(
    filtered: Guest, needs: Callable[[str], None], flags: int, ranges: list[abi.MsrFilterRange]
) -> None:
    needs("interrupts in real mode")
    filtered.vm.x86_set_msr_filter(0, [part(SYSENTER_CS)])
    refused(errno.EINVAL, lambda: filtered.vm.x86_set_msr_filter(flags, ranges))
    assert faults(filtered, SYSENTER_CS, RDMSR), "the filter from before is in force"


def test_the_longest_and_the_most_ranges_are_taken(filtered: Guest) -> None:
    filtered.vm.x86_set_msr_filter(0, [part(0, nmsrs=abi.KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8)] * 16)


def test_a_bitmap_shorter_than_its_range_is_efault(filtered: Guest) -> None:
    short = abi.MsrFilterRange(READ, SYSENTER_CS, 65, bytes(8))
    refused(errno.EFAULT, lambda: filtered.vm.x86_set_msr_filter(0, [short]))


# --- exits -----------------------------------------------------------------------------------------


def ask_for(guest: Guest, reasons: int) -> None:
    """Enable KVM_CAP_X86_USER_SPACE_MSR."""
    if not guest.vm.check_extension(abi.KVM_CAP_X86_USER_SPACE_MSR):
        pytest.skip("this KVM does not leave MSRs to userspace")
    guest.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, reasons)


def test_a_filtered_read_may_be_userspaces(filtered: Guest) -> None:
    ask_for(filtered, FILTERED)
    filtered.vm.x86_set_msr_filter(0, [part(SYSENTER_CS)])
    assert access(filtered, SYSENTER_CS, RDMSR) == abi.KVM_EXIT_X86_RDMSR
    msr = filtered.kvm_run.msr
    assert (msr.reason, msr.index, msr.error) == (FILTERED, SYSENTER_CS, 0)
    msr.data = 0x1111_2222_3333_4444
    filtered.expect(abi.KVM_EXIT_HLT)
    regs = filtered.cpu.get_regs()
    assert (regs.rdx, regs.rax) == (0x1111_2222, 0x3333_4444)


def test_a_filtered_write_may_be_userspaces(filtered: Guest) -> None:
    ask_for(filtered, FILTERED)
    filtered.vm.x86_set_msr_filter(0, [part(SYSENTER_CS)])
    assert access(filtered, SYSENTER_CS, WRMSR, 5 << 32 | 0x30) == abi.KVM_EXIT_X86_WRMSR
    msr = filtered.kvm_run.msr
    assert (msr.reason, msr.index, msr.data, msr.error) == (FILTERED, SYSENTER_CS, 5 << 32 | 0x30, 0)
    filtered.expect(abi.KVM_EXIT_HLT)
    assert filtered.cpu.get_msrs([SYSENTER_CS]) == [0], "KVM has not written it"


@pytest.mark.parametrize(("instruction", "reason"), [(RDMSR, abi.KVM_EXIT_X86_RDMSR), (WRMSR, abi.KVM_EXIT_X86_WRMSR)])
def test_userspace_may_answer_with_a_fault(
    filtered: Guest, needs: Callable[[str], None], instruction: str, reason: int
) -> None:
    needs("interrupts in real mode")
    ask_for(filtered, FILTERED)
    filtered.vm.x86_set_msr_filter(0, [part(SYSENTER_CS)])
    assert access(filtered, SYSENTER_CS, instruction) == reason
    filtered.kvm_run.msr.error = 1
    assert filtered.expect(abi.KVM_EXIT_IO).io.port == 0xE9


def test_only_the_reasons_asked_for_are_exits(filtered: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    filtered.vm.x86_set_msr_filter(0, [part(SYSENTER_CS)])
    poll_control = abi.MSR_KVM_POLL_CONTROL, WRMSR, 1 << 5  # a reserved bit
    cases = [((SYSENTER_CS, RDMSR, 0), FILTERED), ((UNKNOWN, RDMSR, 0), UNKNOWN_REASON), (poll_control, INVAL)]
    for asked in (FILTERED, UNKNOWN_REASON, INVAL):
        ask_for(filtered, asked)
        for (msr, instruction, data), reason in cases:
            got = access(filtered, msr, instruction, data)
            if reason == asked:
                assert got in (abi.KVM_EXIT_X86_RDMSR, abi.KVM_EXIT_X86_WRMSR)
                assert (filtered.kvm_run.msr.reason, filtered.kvm_run.msr.index) == (reason, msr)
                filtered.expect(abi.KVM_EXIT_HLT)
            else:
                assert got == abi.KVM_EXIT_IO, "a general protection fault"


@pytest.mark.parametrize("msr", [KERNEL_GS_BASE, 0xC000_0082, 0x175], ids=["kernel_gs_base", "lstar", "sysenter_esp"])
def test_registers_that_the_processor_answers_itself_are_filtered_too(filtered: Guest, msr: int) -> None:
    ask_for(filtered, FILTERED)
    filtered.cpu.set_msrs({msr: 0x1000})
    # mov ecx, msr; 1: rdmsr; hlt; jmp 1b
    code = b"\xb9" + msr.to_bytes(4, "little") + bytes.fromhex("0f32 f4 ebfb")
    filtered.long(code)
    filtered.expect(abi.KVM_EXIT_HLT)
    assert filtered.cpu.get_regs().rax == 0x1000
    filtered.vm.x86_set_msr_filter(0, [part(msr)])
    run = filtered.expect(abi.KVM_EXIT_X86_RDMSR)
    assert (run.msr.reason, run.msr.index) == (FILTERED, msr)
    run.msr.data = 0x2000
    filtered.expect(abi.KVM_EXIT_HLT)
    assert filtered.cpu.get_regs().rax == 0x2000
    filtered.vm.x86_set_msr_filter(0, [])
    filtered.expect(abi.KVM_EXIT_HLT)
    assert filtered.cpu.get_regs().rax == 0x1000
    filtered.vm.x86_set_msr_filter(0, [part(msr, flags=WRITE)])
    filtered.expect(abi.KVM_EXIT_HLT)
    assert filtered.cpu.get_regs().rax == 0x1000, "reads are allowed"


def test_a_vcpu_made_after_the_filter_has_it(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    if not guest.vm.check_extension(abi.KVM_CAP_X86_MSR_FILTER):
        pytest.skip("this KVM does not filter MSRs")
    ask_for(guest, FILTERED)
    guest.vm.x86_set_msr_filter(0, [part(KERNEL_GS_BASE)])
    vcpu = guest.vm.create_vcpu(0)
    vcpu.set_cpuid2(guest.kvm.get_supported_cpuid())
    guest.vcpu, guest.vcpus = vcpu, [vcpu]
    assert access(guest, KERNEL_GS_BASE, RDMSR) == abi.KVM_EXIT_X86_RDMSR
