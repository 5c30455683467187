# SPDX-License-Identifier: Apache-2.0
"""The requests that KVM has on every architecture: number, structure, the files they are for, their argument.

This table and its part for each architecture (:mod:`softkvm.abi.x86.requests`) are all that is written about requests:
:mod:`softkvm.devkvm` makes its methods from it, documents and tests ask it. The method of a request is its name in
lower case without ``KVM_``. A row without an argument is a request that :mod:`softkvm.api` has no method for.

A request number holds direction, argument size, type ``0xAE`` and a number (``<asm-generic/ioctl.h>``)::

    31 30 | 29 .. 16      | 15 .. 8 | 7 .. 0
    dir   | argument size | 0xAE    | number
"""

from __future__ import annotations

import ctypes
import enum
import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from softkvm.abi import checks
from softkvm.abi.arguments import (
    Argument,
    Capability,
    Gives,
    Memory,
    Nothing,
    NumberValue,
    SignalMask,
    Takes,
    TakesValue,
    Unread,
    Updates,
    Value,
    ValueAlone,
    bitmap,
    fields,
    keep,
    read_structure,
    takes_table,
)
from softkvm.abi.capabilities import kvm_enable_cap
from softkvm.abi.device import kvm_create_device, kvm_device_attr
from softkvm.abi.irq import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqfd,
    kvm_msi,
)
from softkvm.abi.memory import (
    dirty_bitmap_bytes,
    kvm_clear_dirty_log,
    kvm_coalesced_mmio_zone,
    kvm_create_guest_memfd,
    kvm_dirty_log,
    kvm_memory_alias,
    kvm_memory_attributes,
    kvm_memory_region,
    kvm_pre_fault_memory,
    kvm_translation,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)
from softkvm.abi.one_reg import kvm_one_reg, kvm_reg_list
from softkvm.abi.vcpu import kvm_mp_state, kvm_signal_mask

KVMIO = 0xAE
KVM_API_VERSION = 12


class File(enum.Flag):
    """The files of the KVM API."""

    SYSTEM = enum.auto()
    VM = enum.auto()
    VCPU = enum.auto()
    DEVICE = enum.auto()


SYSTEM, VM, VCPU, DEVICE = File.SYSTEM, File.VM, File.VCPU, File.DEVICE


class Request(int):
    """A request number, with what is known of it."""

    files: File
    argument: Argument | None

    def __new__(
        cls, direction: int, number: int, structure: Any, files: File, argument: Callable[[Any], Argument] | None
    ) -> Self:
        """Compose the number from its parts."""
        size = 0 if structure is None else ctypes.sizeof(structure)
        request = super().__new__(cls, direction << 30 | size << 16 | KVMIO << 8 | number)
        request.files = files
        request.argument = None if argument is None else argument(structure)
        return request


def IO(number: int, files: File, argument: Callable[[Any], Argument] | None = None) -> Request:
    """Request without a structure."""
    return Request(0, number, None, files, argument)


def IOW(number: int, structure: Any, files: File, argument: Callable[[Any], Argument] | None = None) -> Request:
    """Request that the kernel reads *structure* for."""
    return Request(1, number, structure, files, argument)


def IOR(number: int, structure: Any, files: File, argument: Callable[[Any], Argument] | None = None) -> Request:
    """Request that the kernel writes *structure* for."""
    return Request(2, number, structure, files, argument)


def IOWR(number: int, structure: Any, files: File, argument: Callable[[Any], Argument] | None = None) -> Request:
    """Request that the kernel reads and writes *structure* for."""
    return Request(3, number, structure, files, argument)


def requests_in(names: Mapping[str, Any]) -> dict[str, Request]:
    """Return the requests of a module's names, by name, in the order of the module."""
    return {name: value for name, value in names.items() if isinstance(value, Request)}


def method_name(request: str) -> str:
    """Return the name of the method that a request is in :mod:`softkvm.api`: KVM_GET_REGS is ``get_regs``."""
    return request.removeprefix("KVM_").lower()


class ClearDirtyLog(Argument):
    """KVM_CLEAR_DIRTY_LOG: ``(slot, first_page, num_pages, bitmap)``."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Three numbers of their fields' sizes, and bytes."""
        types = (ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32)
        numbers = [checks.number(n, arg, *checks.limits(t)) for n, arg, t in zip(names, args, types, strict=False)]
        given = args[3]
        return *numbers, given if isinstance(given, Unread) else checks.data(names[3], given)

    def pack(self, slot: int, first_page: int, num_pages: int, given: bytes) -> Any:
        """The structure with the bitmap's address."""
        bits = bitmap(given, dirty_bitmap_bytes(num_pages))
        log = self.structure(slot=slot, num_pages=num_pages, first_page=first_page, dirty_bitmap=ctypes.addressof(bits))
        keep(log, bits)
        return log

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The three numbers, and the bitmap that the structure points to."""
        log = read_structure(memory, self.structure, value)
        bits = Unread(memory, log.dirty_bitmap, dirty_bitmap_bytes(log.num_pages))
        return log.slot, log.first_page, log.num_pages, bits


class GetDirtyLog(Takes):
    """KVM_GET_DIRTY_LOG: the method takes the slot, and knows how much memory its bitmap needs."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """A number of 32 bits."""
        return (checks.number(names[0], args[0], *checks.limits(ctypes.c_uint32)),)

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The slot."""
        return (read_structure(memory, self.structure, value).slot,)

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """The bitmap, to where the structure points."""
        memory.write(read_structure(memory, self.structure, value).dirty_bitmap, result)
        return 0


class IoEventfd(Argument):
    """KVM_IOEVENTFD: ``(fd, addr, len, datamatch, flags)``; a ``datamatch`` sets its flag."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Numbers of their fields' sizes; ``datamatch`` may be None."""
        types = (ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32)
        return [
            None if name == "datamatch" and value is None else checks.number(name, value, *checks.limits(ctype))
            for name, value, ctype in zip(names, args, types, strict=True)
        ]

    def pack(self, fd: int, addr: int, length: int, datamatch: int | None, flags: int) -> Any:
        """The structure."""
        if datamatch is not None:
            flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
        return self.structure(datamatch=datamatch or 0, addr=addr, len=length, fd=fd, flags=flags)

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """The fields; no ``datamatch`` without its flag."""
        given = read_structure(memory, self.structure, value)
        datamatch = given.datamatch if given.flags & KVM_IOEVENTFD_FLAG_DATAMATCH else None
        return given.fd, given.addr, given.len, datamatch, given.flags


class GetDeviceAttr(Argument):
    """KVM_GET_DEVICE_ATTR: ``(group, attr)``; the value, a number of 64 bits, goes to an address in the structure."""

    def accept(self, names: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Numbers of their fields' sizes."""
        types = (ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64)
        return [checks.number(n, arg, *checks.limits(t)) for n, arg, t in zip(names, args, types, strict=False)]

    def pack(self, group: int, attr: int, value: int = 0) -> Any:
        """The structure with the value's address."""
        number = ctypes.c_uint64(value)
        packed = self.structure(group=group, attr=attr, addr=ctypes.addressof(number))
        keep(packed, number)
        return packed

    def unpack(self, packed: Any, value: int) -> Any:
        """The value."""
        return packed.kept[0].value

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """Which attribute."""
        given = read_structure(memory, self.structure, value)
        return given.group, given.attr

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """The value to its address."""
        memory.write(read_structure(memory, self.structure, value).addr, ctypes.c_uint64(result))
        return 0


class SetDeviceAttr(GetDeviceAttr):
    """KVM_SET_DEVICE_ATTR: ``(group, attr, value)``; the value, a number of 64 bits, is at an address."""

    def unpack(self, packed: Any, value: int) -> Any:
        """Nothing."""
        return None

    def take(self, memory: Memory, value: int) -> Sequence[Any]:
        """Which attribute, and the value."""
        given = read_structure(memory, self.structure, value)
        return given.group, given.attr, read_structure(memory, ctypes.c_uint64, given.addr).value

    def give(self, memory: Memory, value: int, result: Any) -> int:
        """Nothing."""
        return 0


# --- the system ------------------------------------------------------------------------------------------

KVM_GET_API_VERSION = IO(0x00, SYSTEM, ValueAlone)
KVM_CREATE_VM = IO(0x01, SYSTEM, NumberValue)
KVM_CHECK_EXTENSION = IO(0x03, SYSTEM | VM, NumberValue)
KVM_GET_VCPU_MMAP_SIZE = IO(0x04, SYSTEM, ValueAlone)

# --- a VM ------------------------------------------------------------------------------------------------

KVM_SET_MEMORY_REGION = IOW(0x40, kvm_memory_region, VM)
KVM_CREATE_VCPU = IO(0x41, VM, NumberValue)
KVM_GET_DIRTY_LOG = IOW(0x42, kvm_dirty_log, VM, GetDirtyLog)
KVM_SET_MEMORY_ALIAS = IOW(0x43, kvm_memory_alias, VM)
KVM_SET_USER_MEMORY_REGION = IOW(0x46, kvm_userspace_memory_region, VM, Takes)
KVM_SET_USER_MEMORY_REGION2 = IOW(0x49, kvm_userspace_memory_region2, VM, Takes)
KVM_CREATE_IRQCHIP = IO(0x60, VM, Nothing)
KVM_IRQ_LINE = IOW(0x61, kvm_irq_level, VM, fields("irq", "level"))
KVM_REGISTER_COALESCED_MMIO = IOW(0x67, kvm_coalesced_mmio_zone, VM, fields("addr", "size", "pio"))
KVM_UNREGISTER_COALESCED_MMIO = IOW(0x68, kvm_coalesced_mmio_zone, VM, fields("addr", "size", "pio"))
KVM_SET_GSI_ROUTING = IOW(
    0x6A, kvm_irq_routing, VM, takes_table(kvm_irq_routing_entry, "nr", most=(4096, errno.EINVAL))
)
KVM_IRQFD = IOW(0x76, kvm_irqfd, VM, fields("fd", "gsi", "flags", "resamplefd"))
KVM_IOEVENTFD = IOW(0x79, kvm_ioeventfd, VM, IoEventfd)
KVM_SIGNAL_MSI = IOW(0xA5, kvm_msi, VM, TakesValue)
KVM_CREATE_DEVICE = IOWR(0xE0, kvm_create_device, VM, fields("type", "flags", gives="fd"))
KVM_CLEAR_DIRTY_LOG = IOWR(0xC0, kvm_clear_dirty_log, VM, ClearDirtyLog)
KVM_RESET_DIRTY_RINGS = IO(0xC7, VM, Value)
KVM_SET_MEMORY_ATTRIBUTES = IOW(0xD2, kvm_memory_attributes, VM, Takes)
KVM_CREATE_GUEST_MEMFD = IOWR(0xD4, kvm_create_guest_memfd, VM, TakesValue)
KVM_ENABLE_CAP = IOW(0xA3, kvm_enable_cap, VM | VCPU, Capability)
KVM_GET_STATS_FD = IO(0xCE, VM | VCPU, Value)

# --- a vCPU ----------------------------------------------------------------------------------------------

KVM_RUN = IO(0x80, VCPU, Nothing)
KVM_PRE_FAULT_MEMORY = IOWR(0xD5, kvm_pre_fault_memory, VCPU, Updates)
KVM_TRANSLATE = IOWR(0x85, kvm_translation, VCPU, fields("linear_address", gives="*"))
KVM_INTERRUPT = IOW(0x86, kvm_interrupt, VCPU, fields("irq"))
KVM_SET_SIGNAL_MASK = IOW(0x8B, kvm_signal_mask, VCPU, SignalMask)
KVM_GET_MP_STATE = IOR(0x98, kvm_mp_state, VCPU, Gives)
KVM_SET_MP_STATE = IOW(0x99, kvm_mp_state, VCPU, Takes)
KVM_GET_ONE_REG = IOW(0xAB, kvm_one_reg, VCPU)
KVM_SET_ONE_REG = IOW(0xAC, kvm_one_reg, VCPU)
KVM_GET_REG_LIST = IOWR(0xB0, kvm_reg_list, VCPU)

# --- attributes ----------------------------------------------------------------------

# The system has nothing to set, and x86's VMs have no attributes.
KVM_SET_DEVICE_ATTR = IOW(0xE1, kvm_device_attr, VCPU | DEVICE, SetDeviceAttr)
KVM_GET_DEVICE_ATTR = IOW(0xE2, kvm_device_attr, SYSTEM | VCPU | DEVICE, GetDeviceAttr)
KVM_HAS_DEVICE_ATTR = IOW(0xE3, kvm_device_attr, SYSTEM | VCPU | DEVICE, fields("group", "attr"))

#: The requests of every architecture, by name.
REQUESTS = requests_in(globals())
