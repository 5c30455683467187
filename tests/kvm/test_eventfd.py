# SPDX-License-Identifier: Apache-2.0
"""irqfd and ioeventfd (KVM API 4.75, 4.59)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest
from tests.support.tiny import Tiny

from softkvm import abi

MMIO = 0x1000_0000


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True)
    yield machine
    machine.close()


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def _counter(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def _wait_for(condition: object) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if callable(condition) and condition():
            return True
        time.sleep(0.002)
    return False


def _irr(tiny: Tiny) -> int:
    pic = tiny.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    return int(pic.chip.pic.irr)


def _unmasked_ioapic_pin(tiny: Tiny, pin: int, entry: int) -> None:
    state = tiny.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    state.chip.ioapic.redirtbl[pin].bits = entry
    tiny.vm.set_irqchip(state)
    assert tiny.vcpu.apic is not None
    tiny.vcpu.apic.set_spiv(0x1FF)


def test_a_write_to_the_eventfd_raises_the_line(tiny: Tiny, fd: int) -> None:
    _unmasked_ioapic_pin(tiny, 20, 0x45)
    tiny.vm.irqfd(fd, 20)
    os.eventfd_write(fd, 1)
    apic = tiny.vcpu.apic
    assert apic is not None
    assert _wait_for(lambda: apic.irr == 1 << 0x45)
    assert _counter(fd) == 0  # consumed


def test_a_deassigned_eventfd_raises_nothing(tiny: Tiny, fd: int) -> None:
    _unmasked_ioapic_pin(tiny, 20, 0x45)
    tiny.vm.irqfd(fd, 20)
    tiny.vm.irqfd(fd, 20, abi.KVM_IRQFD_FLAG_DEASSIGN)
    os.eventfd_write(fd, 3)
    time.sleep(0.05)
    assert tiny.vcpu.apic is not None and tiny.vcpu.apic.irr == 0
    assert _counter(fd) == 3


def test_an_eventfd_is_an_irqfd_once(tiny: Tiny, fd: int) -> None:
    tiny.vm.irqfd(fd, 5)
    with pytest.raises(OSError) as info:
        tiny.vm.irqfd(fd, 6)
    assert info.value.errno == errno.EBUSY


def test_what_is_no_eventfd_is_refused(tiny: Tiny) -> None:
    for descriptor, code in ((0x7FFF, errno.EBADF), (os.open("/dev/null", os.O_RDONLY), errno.EINVAL)):
        with pytest.raises(OSError) as info:
            tiny.vm.irqfd(descriptor, 5)
        assert info.value.errno == code


def test_a_resampled_line_stays_up_until_the_guest_ends_the_interrupt(tiny: Tiny, fd: int) -> None:
    _unmasked_ioapic_pin(tiny, 20, 0x8045)  # level triggered
    resample = os.eventfd(0, os.EFD_NONBLOCK)
    tiny.vm.irqfd(fd, 20, abi.KVM_IRQFD_FLAG_RESAMPLE, resample)
    os.eventfd_write(fd, 1)
    apic = tiny.vcpu.apic
    assert apic is not None
    assert _wait_for(lambda: apic.irr)
    assert _counter(resample) == 0
    assert apic.get_interrupt() == 0x45
    apic.eoi()
    assert _counter(resample) == 1
    assert apic.irr == 0  # the line is down
    os.close(resample)


def test_a_matching_write_signals_and_does_not_exit(tiny: Tiny, fd: int) -> None:
    tiny.vm.ioeventfd(fd, MMIO, 4)
    # mov dword [MMIO], 1; mov word [MMIO], 1 (another length); out
    tiny.protected_mode().load(bytes.fromhex("c7050000001001000000 66c705000000100100"))
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert tiny.vcpu.kvm_run.mmio.len == 2
    assert _counter(fd) == 1


def test_port_writes_match_by_data(tiny: Tiny, fd: int) -> None:
    tiny.vm.ioeventfd(fd, 0x500, 1, datamatch=7, flags=abi.KVM_IOEVENTFD_FLAG_PIO)
    tiny.protected_mode().load(bytes.fromhex("b007ee b008ee"), rdx=0x500)  # out 7; out 8
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.shared[tiny.vcpu.kvm_run.io.data_offset] == 8
    assert _counter(fd) == 1


def test_length_zero_matches_any_length(tiny: Tiny, fd: int) -> None:
    tiny.vm.ioeventfd(fd, MMIO, 0)
    tiny.protected_mode().load(bytes.fromhex("c7050000001001000000 66c705000000100100 e610"))
    assert tiny.run() == abi.KVM_EXIT_IO
    assert _counter(fd) == 2


def test_ioeventfds_do_not_collide(tiny: Tiny, fd: int) -> None:
    tiny.vm.ioeventfd(fd, MMIO, 4, datamatch=1)
    tiny.vm.ioeventfd(fd, MMIO, 4, datamatch=2)
    with pytest.raises(OSError) as info:
        tiny.vm.ioeventfd(fd, MMIO, 4)
    assert info.value.errno == errno.EEXIST
    with pytest.raises(OSError) as info:
        tiny.vm.ioeventfd(fd, MMIO, 4, datamatch=3, flags=abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
    assert info.value.errno == errno.ENOENT
    tiny.vm.ioeventfd(fd, MMIO, 4, datamatch=1, flags=abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
    tiny.vm.ioeventfd(fd, MMIO, 4, datamatch=1)


@pytest.mark.parametrize(("length", "flags", "match"), [(3, 0, None), (4, 1 << 9, None), (0, 0, 5)])
def test_ioeventfds_that_cannot_be_are_refused(tiny: Tiny, fd: int, length: int, flags: int, match: int | None) -> None:
    with pytest.raises(OSError) as info:
        tiny.vm.ioeventfd(fd, MMIO, length, match, flags)
    assert info.value.errno == errno.EINVAL
