# SPDX-License-Identifier: Apache-2.0
"""ioctl() through libc: the result or an OSError, EINTR included, with the GIL released meanwhile.

The methods of the classes here are made of the table of requests (:mod:`softkvm.abi.requests`).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from typing import Any

from softkvm import abi
from softkvm.closing import Closing

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.restype = ctypes.c_int


def ioctl_value(fd: int, request: int, argument: int = 0) -> int:
    """Call ioctl() with a number as its argument; return its result."""
    result: int = _ioctl(ctypes.c_int(fd), ctypes.c_ulong(request), ctypes.c_ulong(argument))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def ioctl_pointer(fd: int, request: int, argument: Any) -> int:
    """Call ioctl() with a pointer to the ctypes object *argument*; return its result."""
    result: int = _ioctl(ctypes.c_int(fd), ctypes.c_ulong(request), ctypes.byref(argument))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def call(fd: int, request: abi.Request, *args: object) -> Any:
    """Do a request with its method's arguments; return the method's result."""
    argument = request.argument
    assert argument is not None
    packed = argument.pack(*args)
    while True:
        try:
            value = (ioctl_value if isinstance(packed, int) else ioctl_pointer)(fd, request, packed)
        except OSError as error:
            packed = argument.grown(packed) if error.errno == errno.E2BIG else None
            if packed is None:
                raise
        else:
            return argument.unpack(packed, value)


def method_of(name: str, request: abi.Request, protocol: type) -> Callable[..., Any]:
    """Return the method that does a request, with the signature and the text that ``protocol`` gives it."""

    def method(self: Descriptor, *args: object) -> Any:
        return call(self.fd, request, *args)

    return functools.wraps(getattr(protocol, abi.method_name(name)))(method)


def add_requests(cls: type, file: abi.File, protocol: type) -> None:
    """Give *cls* a method for each request of *file* that it doesn't have one for itself; all check their arguments."""
    requests = abi.requests_of(file)
    for name, request in requests.items():
        if request.argument is not None and abi.method_name(name) not in vars(cls):
            setattr(cls, abi.method_name(name), method_of(name, request, protocol))
    abi.check_requests(cls, requests)


class Descriptor(Closing):
    """A file descriptor that is closed once, by ``close()``, ``with`` or the collector."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __repr__(self) -> str:
        state = "closed" if self.fd < 0 else f"descriptor {self.fd}"
        return f"<{type(self).__module__.rpartition('.')[0]}.{type(self).__name__}: {state}>"

    def fileno(self) -> int:
        """Return the descriptor, for ``select`` and the like."""
        return self.fd

    def close(self) -> None:
        """Close the descriptor; a second time is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()
