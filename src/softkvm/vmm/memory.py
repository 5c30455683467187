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
from collections.abc import Iterable
from typing import NamedTuple

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.host_memory import Backing, give_back, lock, merged

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


class GuestMemory:
    """The RAM of one machine, *size* bytes.

    With *shared* it lies in a memfd (attribute ``fd``) that other processes can map. Raises ConfigError for a size
    that is no multiple of a page or out of range, OSError if the host has not got it.
    """

    def __init__(self, size: int, *, shared: bool = False) -> None:
        if size % PAGE_SIZE or not _SIZE.allows(size):
            raise ConfigError(
                f"memory size {size} bytes: expected a multiple of {PAGE_SIZE} from {MIN_SIZE} to {MAX_SIZE}"
            )
        self.size = size
        self.logging = False
        """Whether :meth:`mark_written` has to be told of what devices write."""
        self.fd = -1
        self.backing = Backing.SHARED if shared else Backing.ANONYMOUS
        self.kept_for = ""
        """Why no page may go back to the host (:meth:`keep`); empty: it may."""
        self._vms: list[api.Vm] = []
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
        self.view = memoryview(self._map)[self.skip : self.skip + size]
        self.ranges = [RamRange(0, min(size, HOLE_START), address + self.skip, 0)]
        if size > HOLE_START:
            self.ranges.append(
                RamRange(HOLE_END, HOLE_END + size - HOLE_START, address + self.skip + HOLE_START, HOLE_START)
            )

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
        for slot, ram in enumerate(self.ranges):
            vm.set_user_memory_region(
                abi.kvm_userspace_memory_region(
                    slot=slot,
                    flags=flags,
                    guest_phys_addr=ram.start,
                    memory_size=ram.end - ram.start,
                    userspace_addr=ram.hva,
                ),
                self._map,
            )

    def alias(self, vm: api.Vm, slot: int, gpa: int, size: int, of: int) -> None:
        """Let the *size* bytes of RAM at *of* be seen at *gpa* as well, by memory slot *slot*."""
        ram = next(ram for ram in self.ranges if ram.start <= of and of + size <= ram.end)
        vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=slot, guest_phys_addr=gpa, memory_size=size, userspace_addr=ram.hva + of - ram.start
            ),
            self._map,
        )

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

    def mark_written(self, gpa: int, size: int) -> None:
        """A device has written *size* bytes at *gpa*. Called while :attr:`logging` is on; nobody asks for it yet."""

    def clear(self, gpa: int, size: int) -> None:
        """Fill the *size* bytes at *gpa* with zeroes; IndexError if they are not RAM."""
        target = self.slice(gpa, size)
        zeroes = bytes(min(size, MIB))
        for at in range(0, size, MIB):
            target[at : at + MIB] = zeroes[: min(MIB, size - at)]

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
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
