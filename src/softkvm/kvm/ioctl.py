# SPDX-License-Identifier: Apache-2.0
"""How a request is done: whole, and on a vCPU one at a time (``kvm_vcpu_ioctl``, ``kvm_vm_ioctl``).

The kernel's requests are system calls: the handler of a signal runs behind one, never in the middle. And every request
on a vCPU takes ``vcpu->mutex``, which KVM_RUN holds from its beginning to its end, so another thread's waits as long.
Here the crate's binding does both (``cpu/python/src/request.rs``); the methods it is done for are those of the table
of requests. On the thread that is in a request already, KVM_RUN for one, another request is just a call: exit handlers
of plugins, completions and task work make them.

What may be called beside KVM_RUN is no request: ``kick``, ``call_soon``, ``stats``, the shared page.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar

from softkvm import _softcpu, abi

P = ParamSpec("P")
R = TypeVar("R")


class HasCpu(Protocol):
    """A vCPU, as far as it matters here."""

    cpu: _softcpu.Cpu


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` so that signals' handlers, and with them exceptions of theirs, come before or behind it."""

    @functools.wraps(function)
    def whole(*args: P.args, **named: P.kwargs) -> R:
        return _softcpu.uninterrupted(function, *args, **named)

    return whole


def with_mutex(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a vCPU's ``method`` so that it is done :func:`uninterrupted` and with the vCPU's mutex.

    Handlers run while it waits for that, and what Python's raise ends the wait.
    """

    @functools.wraps(method)
    def request(self: HasCpu, *args: Any, **named: Any) -> Any:
        return self.cpu.request(method, self, *args, **named)

    return request


def serve(
    cls: type,
    requests: Mapping[str, abi.Request],
    way: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    but: Collection[str] = (),
) -> None:
    """Let the methods of *cls* that do *requests* do them in a *way*; those named in *but* do it themselves."""
    for request in requests:
        name = abi.method_name(request)
        method = getattr(cls, name, None)
        if method is not None and name not in but:
            setattr(cls, name, way(method))
