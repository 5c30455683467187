# SPDX-License-Identifier: Apache-2.0
"""The VMware backdoor (``enable_vmware_backdoor``): two ports and three pseudo-counters for user mode."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.segments import enter_ring_3
from tests.support.tiny import DATA, Tiny

from softkvm import _softcpu, abi
from softkvm.kvm import Params

_TSS = 0x5000
_HANDLER = 0x2000
_KERNEL_STACK = 0x7000


def _machine(*, enabled: bool) -> Tiny:
    tiny = Tiny(params=Params(enable_vmware_backdoor=enabled)).long_mode()
    tiny.gate64(abi.GP_VECTOR, _HANDLER)
    tiny.memory.write(_HANDLER, b"\x5d\x6a\x0d\x58\xf4")  # pop rbp: the error code; push 13; pop rax; hlt
    # A TSS whose permission map closes every port, and the stack of CPL 0
    tiny.memory.write(_TSS, bytes(4) + struct.pack("<Q", _KERNEL_STACK) + bytes(90) + struct.pack("<H", 104))
    tiny.memory.write(_TSS + 104, b"\xff" * 0x100)
    return tiny


@pytest.fixture
def backdoor() -> Iterator[Tiny]:
    machine = _machine(enabled=True)
    yield machine
    machine.close()


@pytest.fixture
def closed() -> Iterator[Tiny]:
    machine = _machine(enabled=False)
    yield machine
    machine.close()


def _user(tiny: Tiny, code: str, **registers: int) -> int:
    """Run code at CPL 3 with no ports of its own; returns the exit reason."""
    sregs = tiny.vcpu.get_sregs()
    enter_ring_3(sregs, ("cs", "ss", "ds", "es"))
    sregs.tr.base, sregs.tr.limit, sregs.tr.selector, sregs.tr.type = _TSS, 104 + 0xFF, 0x18, 11
    sregs.tr.present, sregs.tr.s, sregs.tr.unusable = 1, 0, 0
    tiny.vcpu.set_sregs(sregs)
    tiny.load(bytes.fromhex(code), rbp=0x55, **registers)
    return tiny.run()


@pytest.mark.parametrize("port", [0x5658, 0x5659])
def test_user_mode_reaches_the_ports_past_the_permission_map(backdoor: Tiny, port: int) -> None:
    assert _user(backdoor, "ed 90", rdx=port, rax=0x564D_5868) == abi.KVM_EXIT_IO  # in eax, dx
    run = backdoor.vcpu.kvm_run
    assert (run.io.direction, run.io.port, run.io.size, run.io.count) == (abi.KVM_EXIT_IO_IN, port, 4, 1)
    offset = run.io.data_offset
    backdoor.vcpu.shared[offset : offset + 4] = b"\x06\x00\x00\x00"
    backdoor.memory.write(0x1001, b"\x0f\x0b")
    backdoor.gate64(abi.UD_VECTOR, 0x2100)
    backdoor.memory.write(0x2100, b"\xf4")
    regs = backdoor.run_to_halt()
    assert regs.rax == 6


def test_out_and_string_output_are_let_through_too(backdoor: Tiny) -> None:
    assert _user(backdoor, "ef", rdx=0x5658, rax=0x1234) == abi.KVM_EXIT_IO  # out dx, eax
    assert backdoor.vcpu.kvm_run.io.direction == abi.KVM_EXIT_IO_OUT
    backdoor.vcpu.run_b[1] = 0


def test_string_output_reads_the_users_memory(backdoor: Tiny) -> None:
    backdoor.memory.write(DATA, b"\xaa\xbb\xcc\xdd")
    assert _user(backdoor, "6f", rdx=0x5659, rsi=DATA) == abi.KVM_EXIT_IO  # outsd
    run = backdoor.vcpu.kvm_run
    offset = run.io.data_offset
    assert bytes(backdoor.vcpu.shared[offset : offset + 4]) == b"\xaa\xbb\xcc\xdd"


@pytest.mark.parametrize("port", [0x1234, 0x5657, 0x565A])
def test_other_ports_still_fault(backdoor: Tiny, port: int) -> None:
    assert _user(backdoor, "ed", rdx=port) == abi.KVM_EXIT_HLT
    regs = backdoor.vcpu.get_regs()
    assert (regs.rax, regs.rbp) == (abi.GP_VECTOR, 0)


def test_the_ports_are_closed_without_the_parameter(closed: Tiny) -> None:
    assert _user(closed, "ed", rdx=0x5658) == abi.KVM_EXIT_HLT
    assert closed.vcpu.get_regs().rax == abi.GP_VECTOR


def test_another_general_protection_fault_stays_the_guests(backdoor: Tiny) -> None:
    assert _user(backdoor, "f4") == abi.KVM_EXIT_HLT  # hlt at CPL 3: the handler's HLT ends the test
    regs = backdoor.vcpu.get_regs()
    assert (regs.rax, regs.rbp) == (abi.GP_VECTOR, 0)
    backdoor.gate64(3, _HANDLER)  # a gate of DPL 0: INT3 from CPL 3 has an error code
    assert _user(backdoor, "cc") == abi.KVM_EXIT_HLT
    assert backdoor.vcpu.get_regs().rbp == 3 * 8 + 2


@pytest.mark.parametrize("user", [False, True])
def test_the_pseudo_counters_are_clocks(backdoor: Tiny, user: bool) -> None:
    """RDPMC 0x10000 to 0x10002: host TSC, nanoseconds since boot, the guest's nanoseconds."""
    code = "0f33 48c1e220 4809d0 0f0b"  # rdpmc; shl rdx, 32; or rax, rdx; ud2
    backdoor.gate64(abi.UD_VECTOR, 0x2100)
    backdoor.memory.write(0x2100, b"\xf4")
    clocks: tuple[Callable[[], int], ...] = (
        _softcpu.rdtsc,
        lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        lambda: backdoor.vm.get_clock().clock,
    )
    for n, clock in enumerate(clocks):
        before = clock()
        if user:
            _user(backdoor, code, rcx=0x10000 + n)
        else:
            backdoor.load(bytes.fromhex(code), rcx=0x10000 + n)
            backdoor.run_to_halt()
        assert before <= backdoor.vcpu.get_regs().rax <= clock(), n


@pytest.mark.parametrize("index", [0, 0x10003, 0xFFF])
def test_there_are_no_other_counters(backdoor: Tiny, index: int) -> None:
    backdoor.load(b"\x0f\x33", rcx=index)
    assert backdoor.run_to_halt().rax == abi.GP_VECTOR


def test_the_counters_need_the_parameter(closed: Tiny) -> None:
    closed.load(b"\x0f\x33", rcx=0x10000)
    assert closed.run_to_halt().rax == abi.GP_VECTOR
