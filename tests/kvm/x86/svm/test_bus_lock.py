# SPDX-License-Identifier: Apache-2.0
"""KVM_CAP_X86_BUS_LOCK_EXIT: userspace is told before a guest holds up every processor (KVM API, 7.22 and 5)."""

from __future__ import annotations

import errno

import pytest
from tests.support.tiny import CODE, DATA, Tiny

from softkvm import abi

OFF, EXIT = abi.KVM_BUS_LOCK_DETECTION_OFF, abi.KVM_BUS_LOCK_DETECTION_EXIT
SPLIT = DATA + 62
#: lock inc dword [SPLIT]; the same in one line; the first again; hlt
PROGRAM = b"".join(b"\xf0\xff\x05" + at.to_bytes(4, "little") for at in (SPLIT, DATA, SPLIT)) + b"\xf4"


def guest(detect: int) -> Tiny:
    tiny = Tiny(caps={abi.KVM_CAP_X86_BUS_LOCK_EXIT: detect}).protected_mode()
    tiny.load(PROGRAM)
    return tiny


def count(tiny: Tiny) -> int:
    return int.from_bytes(tiny.memory.read(SPLIT, 4), "little")


def test_each_bus_lock_is_an_exit_before_it_happens() -> None:
    tiny = guest(EXIT)
    for n, at in enumerate((CODE, CODE + 14)):
        assert tiny.run() == abi.KVM_EXIT_X86_BUS_LOCK
        assert tiny.vcpu.kvm_run.flags & abi.KVM_RUN_X86_BUS_LOCK
        assert (tiny.vcpu.get_regs().rip, count(tiny)) == (at, n)
    assert tiny.run() == abi.KVM_EXIT_HLT
    assert not tiny.vcpu.kvm_run.flags
    assert count(tiny) == 2
    tiny.close()


def test_a_guest_that_is_sent_elsewhere_has_taken_no_bus_lock() -> None:
    tiny = guest(EXIT)
    assert tiny.run() == abi.KVM_EXIT_X86_BUS_LOCK
    tiny.registers(rip=CODE + 7)
    # The other one is counted by itself.
    assert tiny.run() == abi.KVM_EXIT_X86_BUS_LOCK
    assert count(tiny) == 0
    tiny.close()


def test_without_detection_there_are_no_exits() -> None:
    for detect in (OFF, 0):
        tiny = guest(detect)
        assert tiny.run() == abi.KVM_EXIT_HLT
        assert count(tiny) == 2
        tiny.close()


def test_modes_are_checked() -> None:
    tiny = Tiny()
    assert tiny.vm.check_extension(abi.KVM_CAP_X86_BUS_LOCK_EXIT) == OFF | EXIT
    for value in (OFF | EXIT, 4, 1 << 63):
        with pytest.raises(OSError) as info:
            tiny.vm.enable_cap(abi.KVM_CAP_X86_BUS_LOCK_EXIT, value)
        assert info.value.errno == errno.EINVAL
    tiny.close()
