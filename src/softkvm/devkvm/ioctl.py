# SPDX-License-Identifier: Apache-2.0
"""ioctl() through libc: the result or an OSError, EINTR included, with the GIL released meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from softkvm import abi

T = TypeVar("T", bound=ctypes.Structure)

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


def get(fd: int, request: int, cls: type[T]) -> T:
    """Return the structure that *request* fills."""
    structure = cls()
    ioctl_pointer(fd, request, structure)
    return structure


def get_counted(make: Callable[[int], T], fd: int, request: int, count: str, first: int = 64) -> T:
    """Return a structure with a flexible array, grown until *request* no longer says E2BIG."""
    capacity = first
    while True:
        structure = make(capacity)
        setattr(structure, count, capacity)
        try:
            ioctl_pointer(fd, request, structure)
        except OSError as error:
            if error.errno != errno.E2BIG or capacity > 1 << 16:
                raise
            capacity = max(capacity * 2, getattr(structure, count))
        else:
            return structure


def get_cpuid(fd: int, request: int) -> list[abi.kvm_cpuid_entry2]:
    """Return the entries of a request that fills ``struct kvm_cpuid2``."""
    table: Any = get_counted(
        lambda n: abi.flexible(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, n)(), fd, request, "nent", 128
    )
    return [abi.kvm_cpuid_entry2.from_buffer_copy(entry) for entry in table.entries[: table.nent]]


def get_msrs(fd: int, indices: Sequence[int]) -> list[int]:
    """KVM_GET_MSRS on a system or vCPU descriptor."""
    table: Any = abi.flexible(abi.kvm_msrs, abi.kvm_msr_entry, len(indices))(nmsrs=len(indices))
    for entry, index in zip(table.entries, indices, strict=True):
        entry.index = index
    done = ioctl_pointer(fd, abi.KVM_GET_MSRS, table)
    return [entry.data for entry in table.entries[:done]]


def enable_cap(fd: int, cap: int, args: Sequence[int]) -> None:
    """KVM_ENABLE_CAP on a VM or vCPU descriptor."""
    if len(args) > 4:
        raise OSError(errno.EINVAL, f"KVM_ENABLE_CAP takes at most 4 arguments, not {len(args)}")
    structure = abi.kvm_enable_cap(cap=cap)
    structure.args[: len(args)] = list(args)
    ioctl_pointer(fd, abi.KVM_ENABLE_CAP, structure)


class Descriptor:
    """A file descriptor that is closed once, by ``close()``, ``with`` or the collector."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        """Return the descriptor, for ``select`` and the like."""
        return self.fd

    def close(self) -> None:
        """Close the descriptor; a second time is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()
