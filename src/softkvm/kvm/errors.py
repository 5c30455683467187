# SPDX-License-Identifier: Apache-2.0
"""Errors of the KVM API: ``OSError`` with the errno that the API document gives."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Never

from softkvm import abi
from softkvm.abi.checks import kvm_error as kvm_error
from softkvm.threads import inherited_error


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


def inherited(*args: object, **kwargs: object) -> Never:
    """Raise EIO: any request in a child to a VM of the process that it was forked from."""
    raise inherited_error()


def refuse_requests(object: object, file: abi.File, refuse: Callable[..., Never] = bad_file) -> None:
    """Make the methods of an object that are requests raise an error: EBADF, as a closed descriptor's ioctls do."""
    for request in abi.requests_of(file):
        name = abi.method_name(request)
        if hasattr(object, name):
            setattr(object, name, refuse)
