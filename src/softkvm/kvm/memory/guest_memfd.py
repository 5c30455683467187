# SPDX-License-Identifier: Apache-2.0
"""Files of guest memory: memory that a VM's guest has and userspace does not map (KVM API, KVM_CREATE_GUEST_MEMFD).

Such a file is one in memory, which a slot maps for the guest alone. ``fallocate()`` punches holes into it, as into any.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memfd import map_file, mapping_address, sealed_memfd
from softkvm.kvm.memory.pages import PAGE_SIZE

if TYPE_CHECKING:
    from softkvm.abi import kvm_create_guest_memfd, kvm_userspace_memory_region2

_LARGEST: Final = (1 << 63) - 1
_FILE_BYTES: Final = Size("bytes of a guest_memfd", _LARGEST, errno.EINVAL, least=1, where=__name__)


class Binding:
    """The part of a file that a slot has, mapped for the guest."""

    __slots__ = ("_mapping", "address", "end", "file", "offset")

    def __init__(self, fd: int, file: tuple[int, int], offset: int, size: int) -> None:
        self.file = file
        self.offset = offset
        self.end = offset + size
        self._mapping = map_file(fd, size, offset)
        #: Where the processors find it.
        self.address = mapping_address(self._mapping)

    def overlaps(self, file: tuple[int, int], offset: int, size: int) -> bool:
        """Tell whether it has a byte of that part of a file."""
        return self.file == file and self.offset < offset + size and offset < self.end


class GuestMemfds:
    """The files that a VM has made, and what its slots have of them."""

    __slots__ = ("_bindings", "_sizes")

    def __init__(self) -> None:
        #: By device and inode. Files in memory have numbers that do not come again.
        self._sizes: dict[tuple[int, int], int] = {}
        self._bindings: set[Binding] = set()

    def create(self, wanted: kvm_create_guest_memfd) -> int:
        """Return the descriptor of a new file, which is the caller's; EINVAL for flags, or a size of no whole pages."""
        if wanted.flags:
            raise kvm_error(errno.EINVAL, f"flags={wanted.flags:#x}, expected 0")
        if wanted.size % PAGE_SIZE:
            raise kvm_error(errno.EINVAL, f"size={wanted.size:#x}, expected a multiple of {PAGE_SIZE}")
        _FILE_BYTES.check(wanted.size, called="size")
        fd = sealed_memfd("kvm-gmem", wanted.size)
        os.set_inheritable(fd, True)  # as the kernel's
        status = os.fstat(fd)
        self._sizes[status.st_dev, status.st_ino] = wanted.size
        return fd

    def bind(self, region: kvm_userspace_memory_region2) -> Binding:
        """Map the part of a file that *region* names.

        EBADF for what is no descriptor; EINVAL for another VM's file or none of a VM, a part that reaches beyond its
        end, or of which a slot has some already.
        """
        fd, offset, size = region.guest_memfd, region.guest_memfd_offset, region.memory_size
        status = os.fstat(fd if fd < 1 << 31 else -1)
        file = status.st_dev, status.st_ino
        if file not in self._sizes:
            raise kvm_error(errno.EINVAL, f"guest_memfd={fd}, expected a file of this VM's KVM_CREATE_GUEST_MEMFD")
        end = self._sizes[file]
        if offset + size > end:
            raise kvm_error(errno.EINVAL, f"guest_memfd_offset={offset:#x}: the file ends at {end:#x}, within the slot")
        if any(other.overlaps(file, offset, size) for other in self._bindings):
            raise kvm_error(errno.EINVAL, f"guest_memfd_offset={offset:#x}: a slot has this part of the file already")
        binding = Binding(fd, file, offset, size)
        self._bindings.add(binding)
        return binding

    def unbind(self, binding: Binding) -> None:
        """A slot is gone, and no processor reaches its part any more."""
        self._bindings.discard(binding)
