# SPDX-License-Identifier: Apache-2.0
"""Errors of the KVM API: ``OSError`` with the errno that the API document gives."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Never


def kvm_error(code: int, message: str) -> OSError:
    """Return the ``OSError`` for errno ``code``; ``message`` names field, value and expectation."""
    return OSError(code, f"{os.strerror(code)}: {message}")


def bad_file(*args: object, **kwargs: object) -> Never:
    """Raise EBADF: any request to something that has been closed."""
    raise kvm_error(errno.EBADF, "it has been closed")


def refuse_requests(closed: object, requests: Iterable[str]) -> None:
    """Make the methods of a closed object that are requests raise EBADF, as a closed descriptor's ioctls do."""
    for name in requests:
        setattr(closed, name, bad_file)
