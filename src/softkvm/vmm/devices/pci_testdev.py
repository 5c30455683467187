# SPDX-License-Identifier: Apache-2.0
"""The PCI test device: accesses that leave KVM, that signal an eventfd, that signal it for one value.

A test is selected by writing its number to the first byte of either base address register's range; the header there
then says where, how wide and what to write. Source: the behaviour of QEMU's ``pci-testdev``.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from typing import Final, Protocol

from softkvm import abi
from softkvm.vmm.devices.pci import Bar, Function

VENDOR: Final = 0x1B36
DEVICE: Final = 0x0005
CLASS_OTHERS: Final = 0xFF0000
MEMORY_SIZE: Final = 4096
IO_SIZE: Final = 256
MEMORY_ADDRESS: Final = 0xFEBFF000
IO_ADDRESS: Final = 0xC000
MEMORY_TARGET: Final = 2048  # where in the range the first test writes
IO_TARGET: Final = 128

DATA: Final = 0xFA
WIDTH: Final = 1
TESTS: Final = ("no-eventfd", "wildcard-eventfd", "datamatch-eventfd")
_HEADER: Final = struct.Struct("<BBHIII")
_COUNT_OFFSET: Final = 12


class EventfdVm(Protocol):
    """What the device needs of a VM."""

    def ioeventfd(self, fd: int, addr: int, len: int, datamatch: int | None = None, flags: int = 0) -> None:
        """KVM_IOEVENTFD."""


@dataclass(slots=True)
class _Test:
    """A selected test, and how often it was hit."""

    header: bytes
    target: int
    datamatch: int | None
    uses_eventfd: bool
    fd: int = -1
    address: int = 0
    count: int = 0


class TestRange:
    """One of the device's ranges."""

    __test__ = False  # pytest: not a test class

    def __init__(self, vm: EventfdVm, *, is_io: bool) -> None:
        self._vm = vm
        self._is_io = is_io
        self._selected: _Test | None = None
        kind, base = ("portio", IO_TARGET) if is_io else ("mmio", MEMORY_TARGET)
        self.bar = Bar(IO_SIZE if is_io else MEMORY_SIZE, self, is_io, f"pci-testdev {kind}")
        self._kind = kind
        self._base = base

    def read(self, offset: int, size: int) -> int:
        """The header of the selected test; zeroes without one."""
        test = self._selected
        if test is None:
            return 0
        if offset == _COUNT_OFFSET:
            return self._count(test)
        return int.from_bytes(test.header[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a test (offset 0), or hit the selected one."""
        if offset == 0:
            self._deselect()
            self._select(value & 0xFF)
            return
        test = self._selected
        if test is not None and offset == test.target and (test.datamatch is None or value == test.datamatch):
            test.count += 1

    def _select(self, number: int) -> None:
        if number >= len(TESTS):
            return
        name = f"{self._kind}-{TESTS[number]}"
        target = self._base + number
        header = _HEADER.pack(number, WIDTH, 0, target, DATA, 0) + name.encode() + b"\0"
        test = _Test(header, target, DATA if number == 2 else None, uses_eventfd=number > 0)
        if test.uses_eventfd and self.bar.mapped_at is not None:
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            address = self.bar.mapped_at + target
            try:
                self._vm.ioeventfd(fd, address, WIDTH, test.datamatch, self._flags())
                test.fd, test.address = fd, address
            except OSError:  # a KVM without ioeventfd: the write comes to us
                os.close(fd)
        self._selected = test

    def _flags(self) -> int:
        return abi.KVM_IOEVENTFD_FLAG_PIO if self._is_io else 0

    def _deselect(self) -> None:
        test, self._selected = self._selected, None
        if test is not None and test.fd >= 0:
            with contextlib.suppress(OSError):
                self._vm.ioeventfd(
                    test.fd, test.address, WIDTH, test.datamatch, self._flags() | abi.KVM_IOEVENTFD_FLAG_DEASSIGN
                )
            os.close(test.fd)

    def _count(self, test: _Test) -> int:
        if test.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                test.count += os.eventfd_read(test.fd)
        return test.count & 0xFFFFFFFF

    def close(self) -> None:
        """Give back the eventfd."""
        self._deselect()


class PciTestDevice(Function):
    """The function with its two ranges."""

    def __init__(self, vm: EventfdVm) -> None:
        super().__init__(VENDOR, DEVICE, CLASS_OTHERS)
        self._ranges = (TestRange(vm, is_io=False), TestRange(vm, is_io=True))
        self.add_bar(0, self._ranges[0].bar, MEMORY_ADDRESS)
        self.add_bar(1, self._ranges[1].bar, IO_ADDRESS)

    def close(self) -> None:
        """Give back the eventfds."""
        for part in self._ranges:
            part.close()
