# SPDX-License-Identifier: Apache-2.0
"""Functions are patched while everything runs, and are as they were afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

from softkvm.trace import patch


def plain(a: int, b: int = 2, *, c: int = 3) -> tuple[int, int, int]:
    return a, b, c


class Base:
    def method(self, x: int) -> str:
        return f"base {x}"


class Derived(Base):
    def method(self, x: int) -> str:
        return "derived " + super().method(x)  # has a variable of an enclosing scope: __class__


def doubling(seen: list[tuple[Any, ...]]) -> patch.Wrapper:
    def wrapper(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        seen.append((*args, *named.values()))
        return call(*args, **named)

    return wrapper


def test_calls_by_any_name_go_to_what_is_attached_and_then_no_more() -> None:
    code = plain.__code__
    table = {"plain": plain}
    seen: list[tuple[Any, ...]] = []
    wrapper = doubling(seen)
    patch.attach(plain, wrapper)
    assert (plain(1), table["plain"](1, 5, c=6)) == ((1, 2, 3), (1, 5, 6))
    assert seen == [(1,), (1, 5, 6)]
    patch.detach(plain, wrapper)
    assert plain.__code__ is code
    assert plain(1) == (1, 2, 3) and len(seen) == 2


def test_methods_of_instances_that_are_there_already_are_patched() -> None:
    bound = Derived().method
    seen: list[tuple[Any, ...]] = []
    wrapper = doubling(seen)
    patch.attach(Derived.method, wrapper)
    assert bound(4) == "derived base 4" and len(seen) == 1
    patch.detach(Derived.method, wrapper)
    assert bound(4) == "derived base 4" and len(seen) == 1


def test_several_may_be_attached_and_go_in_any_order() -> None:
    order: list[str] = []

    def noting(name: str) -> patch.Wrapper:
        def wrapper(call: Callable[..., Any], *args: Any) -> Any:
            order.append(name)
            return call(*args)

        return wrapper

    first, second = noting("first"), noting("second")
    patch.attach(plain, first)
    patch.attach(plain, second)
    plain(1)
    patch.detach(plain, first)
    plain(1)
    patch.detach(plain, second)
    plain(1)
    assert order == ["first", "second", "second"]


def test_a_decorated_function_is_patched_inside_of_its_decorator() -> None:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def whole(*args: Any) -> Any:
            return ("whole", function(*args))

        return whole

    @decorate
    def inner(x: int) -> int:
        return x

    seen: list[tuple[Any, ...]] = []
    wrapper = doubling(seen)
    patch.attach(inner, wrapper)
    assert inner(3) == ("whole", 3) and seen == [(3,)]
    patch.detach(inner, wrapper)


def test_what_is_not_written_in_python_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a function written in Python"):
        patch.attach(len, lambda call, *args: call(*args))


def test_patching_while_other_threads_call_loses_no_call() -> None:
    stop = threading.Event()
    wrong: list[object] = []

    def call() -> None:
        while not stop.is_set():
            result = plain(7)
            if result != (7, 2, 3):
                wrong.append(result)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    seen: list[tuple[Any, ...]] = []
    for _ in range(200):
        wrapper = doubling(seen)
        patch.attach(plain, wrapper)
        patch.detach(plain, wrapper)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
