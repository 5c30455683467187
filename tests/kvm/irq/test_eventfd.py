# SPDX-License-Identifier: Apache-2.0
"""irqfd and ioeventfd (KVM API 4.75, 4.59)."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time

import pytest
from tests.support.descriptors import open_descriptors
from tests.support.eventfds import machine_with_chips, new_eventfd
from tests.support.tiny import Tiny

import softkvm
from softkvm import abi
from softkvm.kvm.irq.eventfile import EventFile

MMIO = 0x1000_0000


tiny = pytest.fixture(machine_with_chips)
fd = pytest.fixture(new_eventfd)


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


def test_resampling_needs_the_kernels_ioapic(fd: int) -> None:
    with softkvm.open() as kvm, kvm.create_vm() as vm:
        vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
        vm.irqfd(fd, 5)
        with pytest.raises(OSError) as info:
            vm.irqfd(fd, 6, abi.KVM_IRQFD_FLAG_RESAMPLE, fd)
        assert info.value.errno == errno.EINVAL


def test_a_shared_line_is_lowered_once_before_any_device_is_looked_at_again(
    tiny: Tiny, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unmasked_ioapic_pin(tiny, 20, 0x8045)  # level triggered
    other, first, second = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    tiny.vm.irqfd(fd, 20, abi.KVM_IRQFD_FLAG_RESAMPLE, first)
    tiny.vm.irqfd(other, 20, abi.KVM_IRQFD_FLAG_RESAMPLE, second)
    levels: list[tuple[int, int, int]] = []
    chips = tiny.vm.chips
    assert chips is not None and chips.ioapic is not None
    drive = chips.ioapic.set_pin

    def watch(pin: int, level: int, source: int = 0) -> int:
        levels.append((level, _counter(first), _counter(second)))
        return drive(pin, level, source)

    os.eventfd_write(fd, 1)
    apic = tiny.vcpu.apic
    assert apic is not None
    assert _wait_for(lambda: apic.irr)
    assert apic.get_interrupt() == 0x45
    with monkeypatch.context() as patch:
        patch.setattr(chips.ioapic, "set_pin", watch)
        apic.eoi()
    assert levels == [(0, 0, 0)]  # one of the two may have raised it again before a second one
    assert _counter(first) == _counter(second) == 1
    for descriptor in (other, first, second):
        os.close(descriptor)


def test_the_last_resampled_irqfd_takes_its_level_with_it(tiny: Tiny, fd: int) -> None:
    resample = os.eventfd(0, os.EFD_NONBLOCK)
    tiny.vm.irqfd(fd, 20, abi.KVM_IRQFD_FLAG_RESAMPLE, resample)
    os.eventfd_write(fd, 1)

    def pins() -> int:
        return int(tiny.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC).chip.ioapic.irr)

    state = tiny.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    state.chip.ioapic.redirtbl[20].bits = 0x1_8045  # level triggered, masked
    tiny.vm.set_irqchip(state)
    os.eventfd_write(fd, 1)
    assert _wait_for(lambda: pins() >> 20 & 1)
    tiny.vm.irqfd(fd, 20, abi.KVM_IRQFD_FLAG_DEASSIGN)
    assert pins() >> 20 & 1 == 0
    os.close(resample)


@pytest.mark.parametrize("path", ["irqfd", "ioeventfd"])
def test_what_is_taken_away_must_be_an_eventfd(tiny: Tiny, path: str) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    for descriptor, code in ((0x7FFF, errno.EBADF), (null, errno.EINVAL)):
        with pytest.raises(OSError) as info:
            if path == "irqfd":
                tiny.vm.irqfd(descriptor, 5, abi.KVM_IRQFD_FLAG_DEASSIGN)
            else:
                tiny.vm.ioeventfd(descriptor, MMIO, 4, flags=abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
        assert info.value.errno == code
    os.close(null)


def test_there_may_be_more_ioeventfds_than_devices_on_a_bus(tiny: Tiny, fd: int) -> None:
    for n in range(1100):  # NR_IOBUS_DEVS is 1000, ioeventfds excluded
        tiny.vm.ioeventfd(fd, MMIO + 8 * n, 4)
    tiny.protected_mode().load(bytes.fromhex("c7055822001001000000 e610"))  # mov dword [MMIO + 8 * 1099], 1
    assert tiny.run() == abi.KVM_EXIT_IO
    assert _counter(fd) == 1


def test_an_eventfd_taken_away_while_it_is_signalled_stays_open_until_that_is_done(tiny: Tiny, fd: int) -> None:
    tiny.vm.ioeventfd(fd, MMIO, 4)
    before = len(open_descriptors())
    (device,) = tiny.vm.mmio_bus.devices(MMIO, 4)  # a vCPU is on its way to it
    tiny.vm.ioeventfd(fd, MMIO, 4, flags=abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
    assert device.io_write(MMIO, 4, 1)
    assert _counter(fd) == 1
    assert len(open_descriptors()) == before
    del device
    assert len(open_descriptors()) == before - 1


@pytest.mark.parametrize("blocking", [True, False])
def test_the_clients_eventfds_stay_as_they_are(tiny: Tiny, blocking: bool) -> None:
    # O_NONBLOCK belongs to the open file (open(2)), which KVM shares with the client.
    flags = 0 if blocking else os.EFD_NONBLOCK
    raised, resample, notified = (os.eventfd(0, flags) for _ in range(3))
    tiny.vm.irqfd(raised, 20, abi.KVM_IRQFD_FLAG_RESAMPLE, resample)
    tiny.vm.ioeventfd(notified, MMIO, 4)
    with pytest.raises(OSError, match="irqfd already"):
        tiny.vm.irqfd(raised, 20, abi.KVM_IRQFD_FLAG_RESAMPLE, resample)
    with pytest.raises(OSError, match="has an eventfd already"):
        tiny.vm.ioeventfd(notified, MMIO, 4)
    with pytest.raises(OSError, match="no such ioeventfd"):
        tiny.vm.ioeventfd(raised, MMIO, 4, flags=abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
    assert [os.get_blocking(fd) for fd in (raised, resample, notified)] == [blocking] * 3
    for descriptor in (raised, resample, notified):
        os.close(descriptor)


def test_neither_a_full_nor_an_empty_counter_stops_kvm(tiny: Tiny) -> None:
    full = os.eventfd(0)  # blocking
    os.eventfd_write(full, 2**64 - 2)
    tiny.vm.ioeventfd(full, MMIO, 4)
    tiny.protected_mode().load(bytes.fromhex("c7050000001001000000 e610"))
    assert tiny.run() == abi.KVM_EXIT_IO
    assert os.eventfd_read(full) == 2**64 - 2
    assert not EventFile(full).consume()  # as if the client had been quicker
    assert not EventFile(full)._consume_if_readable()
    os.eventfd_write(full, 3)
    assert EventFile(full)._consume_if_readable()
    os.close(full)


def test_an_irqfd_that_could_not_be_made_leaves_nothing_behind(
    tiny: Tiny, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # what tests before left to the collector would go meanwhile
    before = len(open_descriptors()), threading.active_count()
    for where, what in ((os, "eventfd"), (threading.Thread, "start")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, _no_more)
            with pytest.raises(OSError, match="no more"):
                tiny.vm.irqfd(fd, 20)
        assert (len(open_descriptors()), threading.active_count()) == before
    _unmasked_ioapic_pin(tiny, 20, 0x45)
    tiny.vm.irqfd(fd, 20)
    os.eventfd_write(fd, 1)
    assert _wait_for(lambda: tiny.vcpu.apic is not None and tiny.vcpu.apic.irr == 1 << 0x45)


def _no_more(*_: object) -> None:
    raise OSError(errno.EMFILE, "no more")


def test_a_closed_vm_has_given_back_its_eventfds_and_its_thread() -> None:
    gc.collect()  # what tests before left to the collector would go meanwhile
    before = len(open_descriptors()), threading.active_count()
    machine = Tiny(irqchip=True)
    raised, resample, notified = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    machine.vm.irqfd(raised, 20, abi.KVM_IRQFD_FLAG_RESAMPLE, resample)
    machine.vm.ioeventfd(notified, MMIO, 4)
    machine.close()
    for descriptor in (raised, resample, notified):
        os.close(descriptor)
    del machine  # the pages that a vCPU shares stay as long as somebody may look into them
    gc.collect()
    assert (len(open_descriptors()), threading.active_count()) == before
