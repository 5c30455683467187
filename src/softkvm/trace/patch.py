# SPDX-License-Identifier: Apache-2.0
"""Ways into functions that can be changed while everything runs, and that are not there otherwise.

The kernel patches its text: a tracepoint that is off is an instruction that does nothing. Python's text is a function's
code object. While something is attached to a function, its code is one that calls what is attached; all who hold the
function, by whatever name, in whatever table, as whatever bound method, come there. When nothing is, the function has
its own code again: the same bytecode as if there were no tracing. Calls that are under way go on in the code that they
have begun.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

#: Gets the function and its arguments; calls it, and returns what it returns.
Wrapper = Callable[..., Any]

_CALL = "the call"


def _way_in(*args, **named):  # type: ignore[no-untyped-def]  # the code that patched functions have
    call: Any = "the call"
    return call(*args, **named)


class Patch:
    """What is attached to one function."""

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        self._code = function.__code__
        # The function as it is, under its own name: what the patched one calls.
        self._original = FunctionType(
            self._code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        self._original.__kwdefaults__ = function.__kwdefaults__
        self._original.__qualname__ = function.__qualname__
        self._wrappers: tuple[Wrapper, ...] = ()

    def add(self, wrapper: Wrapper) -> None:
        """Have calls of the function go to *wrapper*, with the function before its arguments."""
        self._set((*self._wrappers, wrapper))

    def remove(self, wrapper: Wrapper) -> None:
        """Undo :meth:`add`."""
        self._set(tuple(other for other in self._wrappers if other is not wrapper))

    def _set(self, wrappers: tuple[Wrapper, ...]) -> None:
        self._wrappers = wrappers
        if not wrappers:
            self._function.__code__ = self._code
            return
        call: Callable[..., Any] = self._original
        for wrapper in reversed(wrappers):
            call = partial(wrapper, call)
        code = _way_in.__code__
        constants = tuple(call if constant == _CALL else constant for constant in code.co_consts)
        # A function's code has as many variables of enclosing scopes as its closure; here nobody looks at them.
        self._function.__code__ = code.replace(co_consts=constants, co_freevars=self._code.co_freevars)


_patches: dict[FunctionType, Patch] = {}
_lock = threading.Lock()


def _begin_anew() -> None:
    """A child may have been forked while somebody had the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


def _plain(function: Callable[..., Any]) -> FunctionType:
    """Return the function itself behind decorators that say what they wrap."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r}: expected a function written in Python")
    return function


def attach(function: Callable[..., Any], wrapper: Wrapper) -> None:
    """Have calls of *function* go to *wrapper*, from now on; what has been attached before is nearer to the caller."""
    function = _plain(function)
    with _lock:
        patch = _patches.get(function)
        if patch is None:
            patch = _patches[function] = Patch(function)
        patch.add(wrapper)


def detach(function: Callable[..., Any], wrapper: Wrapper) -> None:
    """Undo :func:`attach`."""
    with _lock:
        _patches[_plain(function)].remove(wrapper)
