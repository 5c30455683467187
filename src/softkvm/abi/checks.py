# SPDX-License-Identifier: Apache-2.0
"""What an argument of a method may be. Each function returns the argument, or says in one line what is wrong with it.

Another type is a TypeError. A number that its field cannot hold is an ``OSError`` as for any other bad number: C's
conversions would make a different one of it.
"""

from __future__ import annotations

import ctypes
import errno
import operator
import os
import reprlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any


def kvm_error(code: int, message: str) -> OSError:
    """Return the ``OSError`` for errno ``code``; ``message`` names field, value and expectation."""
    return OSError(code, f"{os.strerror(code)}: {message}")


def limits(ctype: Any) -> tuple[int, int]:
    """Return the smallest and the largest number that an integer type of ctypes holds."""
    bits = 8 * ctypes.sizeof(ctype)
    signed = ctype(-1).value < 0
    return (-1 << bits - 1, (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def field_type(cls: Any, name: str) -> Any:
    """Return the type of a structure's field, which may be one of an anonymous union's."""
    types = {field[0]: field[1] for field in cls._fields_}
    if name in types:
        return types[name]
    return next(field_type(types[part], name) for part in cls._anonymous_ if hasattr(types[part], name))


def number(name: str, value: Any, low: int, high: int) -> int:
    """Return a number from ``low`` to ``high``; EINVAL for another one, EBADF if it is one of a file."""
    if type(value) is not int:
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}={reprlib.repr(value)}, expected a number") from None
    if low <= value <= high:
        return int(value)
    code = errno.EBADF if name.endswith("fd") else errno.EINVAL
    raise kvm_error(code, f"{name}={value}, expected {low} to {high}")


def numbers(name: Callable[[int], str], values: Sequence[Any], code: str) -> Sequence[int]:
    """Return numbers that an array of type ``code`` holds; ``name`` of a place is what an error calls the one there."""
    try:
        return array(code, list(values)).tolist()
    except (OverflowError, TypeError):
        limit = (1 << 8 * array(code).itemsize) - 1
        return [number(name(n), value, 0, limit) for n, value in enumerate(values)]


def structure(name: str, value: Any, cls: type) -> Any:
    """Return an instance of ``cls``."""
    if not isinstance(value, cls):
        raise TypeError(f"{name}={reprlib.repr(value)}, expected a {cls.__name__}")
    return value


def sequence(name: str, value: Any, of: str) -> Sequence[Any]:
    """Return a list or another sequence; ``of`` says of what."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name}={reprlib.repr(value)}, expected a sequence of {of}")
    return value


def data(name: str, value: Any) -> bytes:
    """Return bytes, a copy of another object that holds some."""
    try:
        return value if type(value) is bytes else bytes(memoryview(value))
    except (TypeError, BufferError):
        raise TypeError(f"{name}={reprlib.repr(value)}, expected bytes") from None


def memory(name: str, value: Any) -> memoryview:
    """Return a view of the memory that an object owns."""
    try:
        return memoryview(value)
    except (TypeError, BufferError, ValueError):
        raise TypeError(
            f"{name}={reprlib.repr(value)}, expected an object that owns memory, such as mmap.mmap"
        ) from None
