# SPDX-License-Identifier: Apache-2.0
"""userfaultfd(2): memory whose pages its owner provides when they are touched.

Unprivileged processes have it for what they touch themselves (UFFD_USER_MODE_ONLY), which is all that softkvm's guests
do, unlike KVM's. Containers may not.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Final

_NR_USERFAULTFD: Final = 323
_UFFD_USER_MODE_ONLY: Final = 1
_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_COPY: Final = 0xC028AA03
_REGISTER_MODE_MISSING: Final = 1
_EVENT_PAGEFAULT: Final = 0x12
_MESSAGE_BYTES: Final = 32

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Userfaultfd:
    """A userfaultfd, for pages that are missing. Used as a context, it is closed, and who waits goes on."""

    def __init__(self, *, user_mode_only: bool = True) -> None:
        """OSError where the host lets nobody have one."""
        flags = os.O_CLOEXEC | (_UFFD_USER_MODE_ONLY if user_mode_only else 0)
        self.fd = _libc.syscall(_NR_USERFAULTFD, flags)
        if self.fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"userfaultfd: {os.strerror(number)}")
        fcntl.ioctl(self.fd, _UFFDIO_API, bytearray(struct.pack("<QQQ", _UFFD_API, 0, 0)))

    def register(self, address: int, size: int) -> None:
        """Provide what is missing in a range of whole pages from now on."""
        argument = struct.pack("<QQQQ", address, size, _REGISTER_MODE_MISSING, 0)
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, bytearray(argument))

    def wait(self) -> int:
        """Return the address of the next access to a missing page; waits for it without the interpreter's lock."""
        while True:
            message = os.read(self.fd, _MESSAGE_BYTES)
            if message[0] == _EVENT_PAGEFAULT:
                return int(struct.unpack_from("<Q", message, 16)[0])

    def copy(self, address: int, source: int, size: int) -> None:
        """Provide pages, whose contents are at ``source``; whoever waits for them goes on. EEXIST: they are there."""
        argument = struct.pack("<QQQQq", address, source, size, 0, 0)
        fcntl.ioctl(self.fd, _UFFDIO_COPY, bytearray(argument))

    def close(self) -> None:
        """Let go of the memory: what is missing is zeros now."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
