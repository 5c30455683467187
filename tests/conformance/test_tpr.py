# SPDX-License-Identifier: Apache-2.0
"""The task priority of guests without CR8: reported accesses, and a copy in the guest's memory (KVM API 4.51, 4.52)."""

import errno
from collections.abc import Callable

import pytest
from tests.support.conformance import CODE, Guest, refused

from softkvm import abi

PAGE = 0x6000
SPIV_B, TPR, ISR, IRR = 0xF1, 0x80, 0x100, 0x200
PROBE = "e6e9"  # out 0xe9, al
WRITE_50 = "c604250060000050"  # mov byte [0x6000], 0x50


@pytest.fixture
def apic(make: Callable[..., Guest]) -> Guest:
    """A vCPU with an in-kernel APIC that software has enabled."""
    guest = make(irqchip=True)
    assert guest.vm.check_extension(abi.KVM_CAP_VAPIC)
    state = guest.cpu.get_lapic()
    state.regs[SPIV_B] = 1
    guest.cpu.set_lapic(state)
    return guest


def start(guest: Guest, code: str) -> None:
    """Start *code* in 64-bit mode with the address of the TPR in RDI."""
    guest.long("bf8000e0fe" + code)  # mov edi, 0xfee00080


def register(guest: Guest, offset: int) -> int:
    return int.from_bytes(bytes(guest.cpu.get_lapic())[offset : offset + 4], "little")


def test_accesses_of_the_tpr_are_reported_behind_the_instruction(apic: Guest, needs: Callable[[str], None]) -> None:
    needs("requests between emulated instructions")
    apic.cpu.tpr_access_reporting(1)
    # mov eax, [rdi]; mov al, 0x40; mov [rdi], eax; mov eax, [rdi-0x60]; out 0xe9, al
    start(apic, "8b07 b040 8907 8b47a0" + PROBE)
    run = apic.expect(abi.KVM_EXIT_TPR_ACCESS)
    assert (run.tpr_access.rip, run.tpr_access.is_write) == (CODE + 5, 0)
    assert apic.cpu.get_regs().rip == CODE + 7
    run = apic.expect(abi.KVM_EXIT_TPR_ACCESS)
    assert (run.tpr_access.rip, run.tpr_access.is_write) == (CODE + 9, 1)
    assert apic.cpu.get_regs().rip == CODE + 11
    assert register(apic, TPR) == 0x40
    assert apic.expect(abi.KVM_EXIT_IO).io.port == 0xE9


def test_reports_can_be_turned_off(apic: Guest) -> None:
    apic.cpu.tpr_access_reporting(1)
    apic.cpu.tpr_access_reporting(0)
    start(apic, "8b07" + PROBE)  # mov eax, [rdi]; out 0xe9, al
    apic.expect(abi.KVM_EXIT_IO)


def test_reporting_has_no_flags(apic: Guest) -> None:
    refused(errno.EINVAL, lambda: apic.cpu.tpr_access_reporting(1, 1))


def test_the_tpr_in_memory_is_the_apics_after_an_exit(apic: Guest, needs: Callable[[str], None]) -> None:
    needs("requests between emulated instructions")
    apic.cpu.set_vapic_addr(PAGE)
    start(apic, WRITE_50 + PROBE)
    apic.expect(abi.KVM_EXIT_IO)
    assert register(apic, TPR) == 0x50


def test_memory_has_the_tpr_that_was_written_to_the_apic(apic: Guest, needs: Callable[[str], None]) -> None:
    needs("requests between emulated instructions")
    apic.cpu.set_vapic_addr(PAGE)
    # mov eax, 0x31; mov [rdi], eax; mov al, [0x6000]; out 0xe9, al
    start(apic, "b831000000 8907 8a042500600000" + PROBE)
    apic.expect(abi.KVM_EXIT_IO)
    assert apic.cpu.get_regs().rax & 0xFF == 0x31
    assert register(apic, TPR) == 0x31


def test_memory_tells_of_an_interrupt_that_waits(apic: Guest, needs: Callable[[str], None]) -> None:
    needs("requests between emulated instructions")
    apic.cpu.set_vapic_addr(PAGE)
    start(apic, WRITE_50 + PROBE + PROBE)
    apic.expect(abi.KVM_EXIT_IO)
    apic.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x41))
    apic.expect(abi.KVM_EXIT_IO)
    assert apic.word(PAGE) == 0x41 << 24 | 0x50


def test_address_0_ends_the_use_of_the_page(apic: Guest) -> None:
    apic.cpu.set_vapic_addr(PAGE)
    apic.cpu.set_vapic_addr(0)
    apic.write(PAGE, b"\x50")
    start(apic, PROBE)
    apic.expect(abi.KVM_EXIT_IO)
    assert register(apic, TPR) == 0


def test_the_page_needs_an_apic_and_memory(apic: Guest, make: Callable[..., Guest]) -> None:
    refused(errno.EINVAL, lambda: apic.cpu.set_vapic_addr(1 << 30))
    refused(errno.EINVAL, lambda: make().cpu.set_vapic_addr(PAGE))
