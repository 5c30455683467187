# SPDX-License-Identifier: Apache-2.0
"""A client's ioctl onto a method of :mod:`softkvm.api`: the table of requests says which, and what its argument is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from softkvm import _softcpu, abi
from softkvm.abi.checks import kvm_error


class ClientMemory:
    """The memory of this process, which is the client's; see :class:`softkvm.abi.arguments.Memory`."""

    read = staticmethod(_softcpu.read_memory)
    write = staticmethod(_softcpu.write_memory)


MEMORY = ClientMemory()


class Service(NamedTuple):
    """How a request is served."""

    name: str
    method: str
    request: abi.Request


@cache
def services(file: abi.File) -> dict[int, Service]:
    """Return the requests on a kind of file, by number; those without an argument are not served."""
    return {
        int(request): Service(name, abi.method_name(name), request)
        for name, request in abi.requests_of(file).items()
        if request.argument is not None
    }


def serve(object: Any, file: abi.File, number: int, value: int) -> tuple[Service, Any, int]:
    """Do the request ``number`` with the ioctl's third argument ``value``.

    Returns how it is served, the method's result, and what ioctl() returns. Raises OSError: ENOTTY for a request that
    the table, or the object, has not; EFAULT; the method's.
    """
    service = services(file).get(number)
    method: Callable[..., Any] | None = None if service is None else getattr(object, service.method, None)
    if service is None or method is None:
        raise kvm_error(errno.ENOTTY, f"{request_name(number)} on a {(file.name or '').lower()} file")
    argument = service.request.argument
    assert argument is not None
    result = method(*argument.take(MEMORY, value))
    return service, result, argument.give(MEMORY, value, result)


@cache
def request_name(number: int) -> str:
    """Return the name of a request, its number in hexadecimal if the table lacks it."""
    for file in abi.File:
        for name, request in abi.requests_of(file).items():
            if request == number:
                return name
    return f"{number:#x}"
