# SPDX-License-Identifier: Apache-2.0
"""Registers in the run page (KVM API section 5, KVM_CAP_SYNC_REGS)."""

import errno
from collections.abc import Callable

import pytest
from tests.support.conformance import CODE, Guest, refused, set_pio_data

from softkvm import abi, api

ALL = abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS | abi.KVM_SYNC_X86_EVENTS
#: mov dx, 0x80; 1: inc ebx; out dx, al; jmp 1b
LOOP = "ba8000 6643 ee ebfb"


@pytest.fixture(params=[False, True], ids=["without chips", "with chips"])
def looping(make: Callable[..., Guest], request: pytest.FixtureRequest) -> Guest:
    """A guest that counts in EBX and leaves each time."""
    guest = make(irqchip=request.param)
    guest.real(LOOP)
    return guest


def test_the_capability_names_the_sets(kvm: api.Kvm) -> None:
    assert kvm.check_extension(abi.KVM_CAP_SYNC_REGS) & ALL == ALL


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
@pytest.mark.parametrize("bit", [3, 31, 63])
def test_sets_that_there_are_not_are_einval(looping: Guest, field: str, bit: int) -> None:
    for bits in (1 << bit, 1 << bit | ALL):
        setattr(looping.kvm_run, field, bits)
        refused(errno.EINVAL, looping.cpu.run)
    setattr(looping.kvm_run, field, 0)
    looping.expect(abi.KVM_EXIT_IO)
    assert looping.cpu.get_regs().rbx == 1


def test_valid_sets_are_in_the_page_after_an_exit(looping: Guest) -> None:
    run = looping.kvm_run
    run.kvm_valid_regs = ALL
    looping.expect(abi.KVM_EXIT_IO)
    assert bytes(run.s.regs.regs) == bytes(looping.cpu.get_regs())
    assert run.s.regs.regs.rbx == 1
    assert bytes(run.s.regs.sregs) == bytes(looping.cpu.get_sregs())
    assert bytes(run.s.regs.events) == bytes(looping.cpu.get_vcpu_events())


@pytest.mark.parametrize("valid", [0, abi.KVM_SYNC_X86_REGS, abi.KVM_SYNC_X86_SREGS, abi.KVM_SYNC_X86_EVENTS])
def test_other_sets_are_left_alone(looping: Guest, valid: int) -> None:
    run = looping.kvm_run
    sets = {abi.KVM_SYNC_X86_REGS: "regs", abi.KVM_SYNC_X86_SREGS: "sregs", abi.KVM_SYNC_X86_EVENTS: "events"}
    size = type(run.s.regs).events.offset + type(run.s.regs).events.size
    run.s.padding = b"\x5a" * size
    run.kvm_valid_regs = valid
    looping.expect(abi.KVM_EXIT_IO)
    for bit, name in sets.items():
        content = bytes(getattr(run.s.regs, name))
        assert (content == b"\x5a" * len(content)) == (bit != valid), name


def test_dirty_registers_are_taken_before_entry_and_once(looping: Guest) -> None:
    run = looping.kvm_run
    looping.expect(abi.KVM_EXIT_IO)
    run.s.regs.regs = looping.cpu.get_regs()
    run.s.regs.regs.rbx = 0x1000
    run.kvm_dirty_regs = abi.KVM_SYNC_X86_REGS
    looping.expect(abi.KVM_EXIT_IO)
    assert run.kvm_dirty_regs == 0
    assert run.s.regs.regs.rbx == 0x1000, "what is not valid is not stored"
    assert looping.cpu.get_regs().rbx == 0x1001
    looping.expect(abi.KVM_EXIT_IO)
    assert looping.cpu.get_regs().rbx == 0x1002


def test_what_is_not_dirty_is_not_taken(looping: Guest) -> None:
    run = looping.kvm_run
    run.kvm_valid_regs = ALL
    looping.expect(abi.KVM_EXIT_IO)
    run.s.regs.regs.rbx = 0x1000
    looping.expect(abi.KVM_EXIT_IO)
    assert run.s.regs.regs.rbx == looping.cpu.get_regs().rbx == 2


def test_dirty_sregs_and_events(looping: Guest) -> None:
    run = looping.kvm_run
    run.kvm_valid_regs = ALL
    looping.expect(abi.KVM_EXIT_IO)
    run.s.regs.sregs.fs.base, run.s.regs.sregs.fs.selector = 0x12340, 0x1234
    run.s.regs.events.nmi.masked = 1
    run.kvm_dirty_regs = abi.KVM_SYNC_X86_SREGS | abi.KVM_SYNC_X86_EVENTS
    looping.expect(abi.KVM_EXIT_IO)
    assert looping.cpu.get_sregs().fs.base == run.s.regs.sregs.fs.base == 0x12340
    assert looping.cpu.get_vcpu_events().nmi.masked == run.s.regs.events.nmi.masked == 1


def test_a_bad_set_is_einval_and_stays_dirty(looping: Guest) -> None:
    run = looping.kvm_run
    run.kvm_valid_regs = ALL
    looping.expect(abi.KVM_EXIT_IO)
    run.s.regs.regs.rbx = 0x1000
    run.s.regs.sregs.cr0 = abi.X86_CR0_PG  # paging without protection
    run.kvm_dirty_regs = abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS
    refused(errno.EINVAL, looping.cpu.run)
    assert run.kvm_dirty_regs == abi.KVM_SYNC_X86_SREGS
    assert looping.cpu.get_regs().rbx == 0x1000


def test_registers_are_taken_before_an_exit_is_completed(guest: Guest, device_differs: Callable[[str], None]) -> None:
    device_differs("registers that are set before an emulated IN is completed (here all are) take its result's place")
    guest.real("ba8000 ec f4")  # mov dx, 0x80; in al, dx; hlt
    guest.write(CODE + 0x100, b"\xf4")
    run = guest.kvm_run
    run.kvm_valid_regs = abi.KVM_SYNC_X86_REGS
    guest.expect(abi.KVM_EXIT_IO)
    set_pio_data(guest.cpu, b"\x55")
    run.s.regs.regs.rbx = 0x77
    run.kvm_dirty_regs = abi.KVM_SYNC_X86_REGS
    guest.expect(abi.KVM_EXIT_HLT)
    assert (run.s.regs.regs.rbx, run.s.regs.regs.rax & 0xFF) == (0x77, 0x55)


def test_they_are_stored_and_taken_by_a_run_that_ends_at_once(looping: Guest) -> None:
    run = looping.kvm_run
    run.kvm_valid_regs = abi.KVM_SYNC_X86_REGS
    run.s.regs.regs = looping.cpu.get_regs()
    run.s.regs.regs.rbx = 0x500
    run.kvm_dirty_regs = abi.KVM_SYNC_X86_REGS
    run.immediate_exit = 1
    refused(errno.EINTR, looping.cpu.run)
    assert looping.cpu.get_regs().rbx == run.s.regs.regs.rbx == 0x500
    assert run.kvm_dirty_regs == 0


def test_vcpus_have_their_own(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=2)
    guest.real(LOOP)
    first, second = guest.vcpus
    second.set_sregs(first.get_sregs())
    second.set_regs(abi.kvm_regs(rip=CODE, rflags=2, rbx=100))
    first.kvm_run.kvm_valid_regs = second.kvm_run.kvm_valid_regs = abi.KVM_SYNC_X86_REGS
    guest.expect(abi.KVM_EXIT_IO, first)
    guest.expect(abi.KVM_EXIT_IO, second)
    assert (first.kvm_run.s.regs.regs.rbx, second.kvm_run.s.regs.regs.rbx) == (1, 101)
