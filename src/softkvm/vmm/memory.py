# SPDX-License-Identifier: Apache-2.0
"""Guest RAM: where it lies in guest physical space, and the host memory behind it.

A PC has a hole below 4 GiB, where the chips answer. RAM fills guest physical memory from 0 to the hole and continues
at 4 GiB::

    0 ............ RAM ............ HOLE_START     FEC0_0000 IOAPIC  FEE0_0000 LAPIC     4 GiB ...... RAM ......

The host address of every byte is congruent with its guest physical address modulo 2 MiB, so that a KVM can use large
pages for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import threading
from collections.abc import Iterable
from typing import NamedTuple

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.host_memory import Backing, give_back, lock, map_file, merged, wall

_WRITTEN_RANGES = 1 << 16
"""Ranges that :meth:`GuestMemory.mark_written` keeps before it merges them."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 * MIB

HOLE_START = 3 * GIB
HOLE_END = 4 * GIB

MIN_SIZE = 1 * MIB
MAX_SIZE = 1 << 40
_SIZE = Size("bytes of a machine's memory", MAX_SIZE, ConfigError, least=MIN_SIZE, effect="ConfigError", where=__name__)


class RamRange(NamedTuple):
    """RAM at guest physical ``start <= gpa < end``; the host has it at ``hva``, ``offset`` bytes into the memory."""

    start: int
    end: int
    hva: int
    offset: int


class FilePart(NamedTuple):
    """Memory that begins as a part of a file: *size* bytes, *offset* into the memory and into the file alike."""

    fd: int
    offset: int
    size: int


class _Alias(NamedTuple):
    """RAM, *offset* bytes into the memory, that a slot shows at another address as well."""

    slot: int
    gpa: int
    size: int
    offset: int


class GuestMemory:
    """The RAM of one machine, *size* bytes.

    With *shared* it lies in a memfd (attribute ``fd``) that other processes can map. *files* is what it begins with,
    mapped copy-on-write in that order, the last over the others; the descriptors may be closed afterwards. Raises
    ConfigError for a size that is no multiple of a page or out of range, OSError if the host has not got it.
    """

    def __init__(self, size: int, *, shared: bool = False, files: Iterable[FilePart] = ()) -> None:
        if size % PAGE_SIZE or not _SIZE.allows(size):
            raise ConfigError(
                f"memory size {size} bytes: expected a multiple of {PAGE_SIZE} from {MIN_SIZE} to {MAX_SIZE}"
            )
        self.size = size
        self.fd = -1
        self.backing = Backing.SHARED if shared else Backing.ANONYMOUS
        self.kept_for = ""
        """Why no page may go back to the host (:meth:`keep`); empty: it may."""
        self._vms: list[api.Vm] = []
        self._aliases: list[_Alias] = []
        self.logging = False
        """Whether who writes to memory, other than the guest and KVM, has to say so (:meth:`mark_written`)."""
        self._written: list[tuple[int, int]] = []
        self._written_lock = threading.Lock()
        length = size + HUGE_PAGE_SIZE  # room to align the first byte
        noreserve: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
        if shared:
            self.fd = os.memfd_create("softkvm-ram", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, length)
            self._map = mmap.mmap(self.fd, length, mmap.MAP_SHARED | noreserve)
        else:
            self._map = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
        with contextlib.suppress(OSError):  # a host without transparent huge pages has EINVAL
            self._map.madvise(mmap.MADV_HUGEPAGE)
        anchor = ctypes.c_char.from_buffer(self._map)
        address = ctypes.addressof(anchor)
        del anchor
        self.skip = -address % HUGE_PAGE_SIZE
        """Bytes of the mapping (and of the memfd) before the RAM."""
        wall(address, self.skip)
        wall(address + self.skip + size, length - self.skip - size)
        self.view = memoryview(self._map)[self.skip : self.skip + size]
        self.ranges = [RamRange(0, min(size, HOLE_START), address + self.skip, 0)]
        if size > HOLE_START:
            self.ranges.append(
                RamRange(HOLE_END, HOLE_END + size - HOLE_START, address + self.skip + HOLE_START, HOLE_START)
            )

        self.files: list[FilePart] = []
        """The files that are mapped, by descriptors of our own."""
        for part in files:
            self.backing = Backing.PRIVATE_FILE
            map_file(address + self.skip + part.offset, part.size, part.fd, part.offset)
            self.files.append(part._replace(fd=os.dup(part.fd)))

    @property
    def end_below_4g(self) -> int:
        """The first guest physical address after the RAM below the hole."""
        return self.ranges[0].end

    @property
    def end(self) -> int:
        """The first guest physical address after all RAM."""
        return self.ranges[-1].end

    def attach(self, vm: api.Vm, *, flags: int = 0) -> None:
        """Register every range with *vm*: memory slots 0, 1."""
        self._vms.append(vm)
        self.set_flags(vm, flags)

    def set_flags(self, vm: api.Vm, flags: int) -> None:
        """Give all slots of *vm* these flags (KVM_MEM_LOG_DIRTY_PAGES)."""
        for slot, ram in enumerate(self.ranges):
            self._set_slot(vm, slot, ram.start, ram.end - ram.start, ram.hva, flags)
        for alias in self._aliases:
            self._set_slot(vm, alias.slot, alias.gpa, alias.size, self.ranges[0].hva + alias.offset, flags)

    def _set_slot(self, vm: api.Vm, slot: int, gpa: int, size: int, hva: int, flags: int) -> None:
        vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva
            ),
            self._map,
        )

    def alias(self, vm: api.Vm, slot: int, gpa: int, size: int, of: int) -> None:
        """Let the *size* bytes of RAM at *of* be seen at *gpa* as well, by memory slot *slot*."""
        ram = next(ram for ram in self.ranges if ram.start <= of and of + size <= ram.end)
        self._aliases.append(_Alias(slot, gpa, size, ram.offset + of - ram.start))
        self._set_slot(vm, slot, gpa, size, ram.hva + of - ram.start, 0)

    def slots(self) -> list[tuple[int, int, int]]:
        """Return number, size and offset into the memory of every slot: those of the ranges, and aliases."""
        ranges = [(slot, ram.end - ram.start, ram.offset) for slot, ram in enumerate(self.ranges)]
        return ranges + [(alias.slot, alias.size, alias.offset) for alias in self._aliases]

    def slice(self, gpa: int, size: int) -> memoryview:
        """Return the *size* bytes at *gpa* as a writable view; IndexError if they are not all RAM of one range."""
        if size >= 0:
            for ram in self.ranges:
                if ram.start <= gpa and gpa + size <= ram.end:
                    start = ram.offset + gpa - ram.start
                    return self.view[start : start + size]
        raise IndexError(f"guest physical {gpa:#x}+{size:#x} is not RAM")

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of the *size* bytes at *gpa*; IndexError if they are not RAM."""
        return bytes(self.slice(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store *data* at *gpa*; IndexError if that is not RAM."""
        self.slice(gpa, len(data))[:] = data
        if self.logging:
            self.mark_written(gpa, len(data))

    def mark_written(self, gpa: int, size: int) -> None:
        """Say that *size* bytes at *gpa* have been written, after that; to be called while :attr:`logging` is on.

        The guest's own writes, and KVM's, are in KVM's dirty log.
        """
        offset = self.address_of(gpa, size) - self.ranges[0].hva
        with self._written_lock:
            self._written.append((offset, size))
            if len(self._written) > _WRITTEN_RANGES:
                self._written = merged(self._written)

    def take_written(self) -> list[tuple[int, int]]:
        """Return (offset into the memory, size) of what has been written since the last call."""
        with self._written_lock:
            written, self._written = self._written, []
        return merged(written)

    def clear(self, gpa: int, size: int) -> None:
        """Fill the *size* bytes at *gpa* with zeroes; IndexError if they are not RAM."""
        target = self.slice(gpa, size)
        zeroes = bytes(min(size, MIB))
        for at in range(0, size, MIB):
            target[at : at + MIB] = zeroes[: min(MIB, size - at)]
        if self.logging:
            self.mark_written(gpa, size)

    def zero(self, offset: int, size: int) -> None:
        """Make whole pages, *offset* bytes into the memory, zeroes; the machine has never run."""
        if give_back(self.ranges[0].hva + offset, size, self.backing):
            return
        ctypes.memset(self.ranges[0].hva + offset, 0, size)

    def discard(self, gpa: int, size: int) -> int:
        """Give the *size* bytes at *gpa*, whole pages, back to the host: see :meth:`discard_ranges`."""
        return self.discard_ranges(((gpa, size),))

    def discard_ranges(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Give (address, size) of guest memory, whole pages, back to the host; return how many bytes it has taken.

        They read as zeroes from now on, whatever backs them, and get memory again when they are touched. KVM forgets
        its mappings of all ranges with one flush. While the memory is kept (``kept_for``), nothing happens and the
        result is 0. IndexError, before anything is given back, for what is not RAM of one range; ValueError for parts
        of pages.
        """
        wanted = merged(ranges)
        for gpa, size in wanted:
            if gpa % PAGE_SIZE or size % PAGE_SIZE:
                raise ValueError(f"guest physical {gpa:#x}+{size:#x}: expected whole pages")
        places = [(self.address_of(gpa, size), size) for gpa, size in wanted]
        if self.kept_for or not places:
            return 0
        given = sum(size for address, size in places if give_back(address, size, self.backing))
        for vm in self._vms:
            vm.host_unmapped_ranges(places)
        if self.logging:
            for gpa, size in wanted:
                self.mark_written(gpa, size)
        return given

    def address_of(self, gpa: int, size: int) -> int:
        """Return the host address of the *size* bytes at *gpa*; IndexError if they are not all RAM of one range."""
        for ram in self.ranges:
            if ram.start <= gpa and gpa + size <= ram.end and size >= 0:
                return ram.hva + gpa - ram.start
        raise IndexError(f"guest physical {gpa:#x}+{size:#x} is not RAM")

    def keep(self, reason: str) -> None:
        """Never give memory back from now on, for somebody has it by its physical addresses: an assigned device."""
        self.kept_for = self.kept_for or reason

    def pin(self) -> None:
        """Populate all of the memory, lock it, and keep it; ConfigError if the host does not let us."""
        try:
            for ram in self.ranges:
                lock(ram.hva, ram.end - ram.start)
        except OSError as error:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            allowed = "" if limit == resource.RLIM_INFINITY else f" (ulimit -l is {limit // KIB} KiB)"
            raise ConfigError(
                f"the host does not lock {self.size // MIB} MiB of memory: {error.strerror}{allowed}"
            ) from None
        self.keep("its memory is pinned")

    def close(self) -> None:
        """Unmap the memory, or let the last that holds a view of it do so: a slice, a memory slot."""
        self._vms.clear()
        self.view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        for part in self.files:
            os.close(part.fd)
        self.files.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
