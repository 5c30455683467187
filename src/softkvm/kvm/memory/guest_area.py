# SPDX-License-Identifier: Apache-2.0
"""A structure in memory that KVM shares with a guest, by its address (``struct gfn_to_pfn_cache``).

It may be named by a guest-physical address, or by the host's of memory that the guest has somewhere. Either is looked
up at each access, so slots and mappings may change at any time: what isn't there is not accessed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from softkvm import _softcpu
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.guest_memory import HasMemory, gpa_to_hva, read_guest, test_and_set_bit_guest, write_guest
from softkvm.kvm.memory.host_mappings import READ_WRITE
from softkvm.kvm.memory.memslots import TASK_SIZE_MAX
from softkvm.kvm.memory.pages import PAGE_SIZE

_U64: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class GuestArea:
    """Memory from ``address`` on, guest-physical unless ``by_hva``."""

    vm: HasMemory
    address: int
    by_hva: bool = False

    def check(self, size: int) -> None:
        """Raise EINVAL where *size* bytes don't lie in one page, or not in userspace's half; EFAULT without memory."""
        name = "hva" if self.by_hva else "gpa"
        if (self.address & PAGE_SIZE - 1) + size > PAGE_SIZE:
            raise kvm_error(errno.EINVAL, f"{name}={self.address:#x}: {size} bytes cross a page")
        if self.by_hva and self.address > TASK_SIZE_MAX - size:
            raise kvm_error(errno.EINVAL, f"hva={self.address:#x}, expected an address of userspace's")
        if not self._is_there(size):
            raise kvm_error(errno.EFAULT, f"{name}={self.address:#x}: there is no memory to be written")

    def _is_there(self, size: int) -> bool:
        if self.by_hva:
            return self.vm.host_mappings.access(self.address, size, READ_WRITE) == READ_WRITE
        return gpa_to_hva(self.vm, self.address, write=True) is not None

    def read(self, offset: int, size: int) -> bytes | None:
        """Return *size* bytes from *offset* on; None without memory."""
        if not self.by_hva:
            return read_guest(self.vm, self.address + offset & _U64, size)
        try:
            return _softcpu.read_memory(self.address + offset, size)
        except OSError:
            return None

    def write(self, offset: int, data: bytes) -> bool:
        """Write *data* at *offset*, marking pages dirty; False without memory."""
        if not self.by_hva:
            return write_guest(self.vm, self.address + offset & _U64, data)
        try:
            _softcpu.write_memory(self.address + offset, data)
        except OSError:
            return False
        return True

    def test_bit(self, offset: int, bit: int) -> bool | None:
        """Tell whether a bit of the bitmap at *offset* is set; None without memory."""
        data = self.read(offset + bit // 8, 1)
        return None if data is None else bool(data[0] >> bit % 8 & 1)

    def test_and_set_bit(self, offset: int, bit: int) -> bool | None:
        """Set a bit of the bitmap at *offset* atomically; return whether it was set, None without memory.

        Named by an address of memory that no slot has, it is atomic for KVM alone.
        """
        if not self.by_hva:
            return test_and_set_bit_guest(self.vm, self.address + offset + bit // 8 & _U64, bit % 8)
        hva = self.address + offset + bit // 8
        try:
            word, mask = hva & ~7, 1 << (hva & 7) * 8 + bit % 8
            was = self.vm.machine.pte_or(word, mask)
            self.vm.machine.notify_write(hva, 1)
            return bool(was & mask)
        except (ValueError, OSError):
            pass
        data = self.read(hva - self.address, 1)
        if data is None or not self.write(hva - self.address, bytes([data[0] | 1 << bit % 8])):
            return None
        return bool(data[0] >> bit % 8 & 1)
