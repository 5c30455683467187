# SPDX-License-Identifier: Apache-2.0
"""Errors of the KVM API: ``OSError`` with the errno that the API document gives."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

from softkvm import abi
from softkvm.abi.checks import kvm_error as kvm_error


@contextmanager
def enomem() -> Iterator[None]:
    """Make what runs in it raise ENOMEM where the host has no memory for it."""
    try:
        yield
    except MemoryError as problem:
        raise kvm_error(errno.ENOMEM, str(problem) or "the host has no memory for it") from None


def bad_file(*args: object, **kwargs: object) -> Never:
    """Raise EBADF: any request to something that has been closed."""
    raise kvm_error(errno.EBADF, "it has been closed")


def refuse_requests(closed: object, file: abi.File) -> None:
    """Make the methods of a closed object that are requests raise EBADF, as a closed descriptor's ioctls do."""
    for request in abi.requests_of(file):
        name = abi.method_name(request)
        if hasattr(closed, name):
            setattr(closed, name, bad_file)
