# SPDX-License-Identifier: Apache-2.0
"""A client's ioctl onto a method of :mod:`softkvm.api`: the table of requests says which, and what its argument is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from softkvm import _softcpu, abi
from softkvm.abi.arguments import Argument
from softkvm.abi.checks import kvm_error


class ClientMemory:
    """The memory of this process, which is the client's; see :class:`softkvm.abi.arguments.Memory`."""

    read = staticmethod(_softcpu.read_memory)
    write = staticmethod(_softcpu.write_memory)


MEMORY = ClientMemory()


class Service(NamedTuple):
    """How a request is served."""

    method: str
    argument: Argument


@cache
def services(file: abi.File) -> dict[int, Service]:
    """Return the requests on a kind of file, by number; those without an argument are not served."""
    return {
        int(request): Service(abi.method_name(name), request.argument)
        for name, request in abi.requests_of(file).items()
        if request.argument is not None
    }


def serve(object: Any, services: Mapping[int, Service], number: int, value: int, unknown: int) -> tuple[Any, int]:
    """Do the request ``number`` with the ioctl's third argument ``value``; ``services`` are those of the kind of file.

    Returns the method's result, and what ioctl() returns. Raises OSError: the errno ``unknown`` for a request that the
    table, or the object, has not; EFAULT; the method's.
    """
    service = services.get(number)
    method: Callable[..., Any] | None = None if service is None else getattr(object, service.method, None)
    if service is None or method is None:
        raise kvm_error(unknown, f"no such request of this kind of file: {number:#x}")
    return service.argument.serve(method, MEMORY, value)


def arguments(services: Mapping[int, Service], number: int, value: int) -> Sequence[Any]:
    """Return the arguments that the client has given; none if they cannot be read."""
    service = services.get(number)
    if service is None:
        return (value,) if value else ()
    try:
        return service.argument.take(MEMORY, value)
    except OSError:
        return (value,)


@cache
def request_name(number: int) -> str:
    """Return the name of a request, its number in hexadecimal if the table lacks it."""
    for file in abi.File:
        for name, request in abi.requests_of(file).items():
            if request == number:
                return name
    return f"{number:#x}"
