# SPDX-License-Identifier: Apache-2.0
"""userfaultfd(2): memory whose pages its owner provides when they are touched.

Unprivileged processes have it for what they touch themselves (UFFD_USER_MODE_ONLY), which is all that softkvm's guests
do, unlike KVM's. Containers may not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
from collections.abc import Iterator
from typing import Final

_NR_USERFAULTFD: Final = 323
_UFFD_USER_MODE_ONLY: Final = 1
_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_COPY: Final = 0xC028AA03
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_CONTINUE: Final = 0xC020AA07
_FEATURE_MINOR_SHMEM: Final = 1 << 10
_EVENT_PAGEFAULT: Final = 0x12
_MESSAGE_BYTES: Final = 32

#: Modes: pages that are missing; pages that are in a file, and only not mapped (of memfds, from Linux 5.14 on).
MISSING: Final = 1
MINOR: Final = 4

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Userfaultfd:
    """A userfaultfd, for pages that are missing. Used as a context, it is closed, and who waits goes on."""

    def __init__(self, mode: int = MISSING, *, user_mode_only: bool = True) -> None:
        """OSError where the host lets nobody have one, or knows no such mode."""
        self.mode = mode
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (_UFFD_USER_MODE_ONLY if user_mode_only else 0)
        self.fd = _libc.syscall(_NR_USERFAULTFD, flags)
        if self.fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"userfaultfd: {os.strerror(number)}")
        features = _FEATURE_MINOR_SHMEM if mode & MINOR else 0
        try:
            fcntl.ioctl(self.fd, _UFFDIO_API, bytearray(struct.pack("<QQQ", _UFFD_API, features, 0)))
        except OSError:
            self.close()
            raise

    def register(self, address: int, size: int) -> None:
        """Provide what is missing, or not mapped, in a range of whole pages from now on."""
        argument = struct.pack("<QQQQ", address, size, self.mode, 0)
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, bytearray(argument))

    def wait(self) -> int:
        """Return the address of the next access to a missing page; waits for it without the interpreter's lock."""
        ready = select.poll()
        ready.register(self.fd, select.POLLIN)
        while True:
            ready.poll()
            address = self.next_fault()
            if address is not None:
                return address

    def next_fault(self) -> int | None:
        """Return the address of an access to a missing page; None if there is none by now. It doesn't wait."""
        while True:
            try:
                message = os.read(self.fd, _MESSAGE_BYTES)
            except BlockingIOError:  # who had touched it may have gone
                return None
            if message[0] == _EVENT_PAGEFAULT:
                return int(struct.unpack_from("<Q", message, 16)[0])

    def copy(self, address: int, source: int, size: int) -> None:
        """Provide pages, whose contents are at ``source``; whoever waits for them goes on. EEXIST: they are there."""
        argument = struct.pack("<QQQQq", address, source, size, 0, 0)
        fcntl.ioctl(self.fd, _UFFDIO_COPY, bytearray(argument))

    def go_on(self, address: int, size: int) -> None:
        """Map pages that the file has (UFFDIO_CONTINUE); EEXIST: they are mapped."""
        fcntl.ioctl(self.fd, _UFFDIO_CONTINUE, bytearray(struct.pack("<QQQQ", address, size, 0, 0)))

    @contextlib.contextmanager
    def provided(self, address: int, size: int) -> Iterator[None]:
        """Provide pages that several threads may wait for: they go on where the pages have been there already."""
        try:
            yield
        except FileExistsError:
            fcntl.ioctl(self.fd, _UFFDIO_WAKE, bytearray(struct.pack("<QQ", address, size)))

    def close(self) -> None:
        """Let go of the memory: what is missing is zeros now."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
