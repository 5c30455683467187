# SPDX-License-Identifier: Apache-2.0
"""Tracepoints: an event, the places in the code where it happens, and who wants to know (``struct tracepoint``).

While nobody does, the places are not there (:mod:`softkvm.trace.patch`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from softkvm.trace import patch
from softkvm.trace.event import Event
from softkvm.trace.patch import Wrapper

#: Gets the values of an event's fields, in their order.
Consumer = Callable[[tuple[Any, ...]], object]
Emit = Callable[..., None]


class Probe(NamedTuple):
    """One place: a function, and what makes the wrapper for it that emits the event."""

    function: Callable[..., Any]
    make: Callable[[Emit], Wrapper]


def before(function: Callable[..., Any], values: Callable[..., tuple[Any, ...] | None]) -> Probe:
    """Return the place at the beginning of a function: ``values`` of its arguments are the event's, None for none."""

    def make(emit: Emit) -> Wrapper:
        def wrapper(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
            found = values(*args, **named)
            if found is not None:
                emit(*found)
            return call(*args, **named)

        return wrapper

    return Probe(function, make)


def after(function: Callable[..., Any], values: Callable[..., tuple[Any, ...] | None]) -> Probe:
    """Return the place at the end of a function: ``values`` get its result before its arguments."""

    def make(emit: Emit) -> Wrapper:
        def wrapper(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
            result = call(*args, **named)
            found = values(result, *args, **named)
            if found is not None:
                emit(*found)
            return result

        return wrapper

    return Probe(function, make)


class Tracepoint:
    """An event that others may register for, with the places where it happens."""

    def __init__(self, event: Event, probes: Iterable[Probe] = ()) -> None:
        self.event = event
        self._probes = tuple(probes)
        self._consumers: tuple[Consumer, ...] = ()
        self._attached: list[tuple[Callable[..., Any], Wrapper]] = []
        self._lock = threading.Lock()
        #: Called when the places have been put in, or taken out.
        self.on_change: Callable[[], object] = lambda: None

    @property
    def enabled(self) -> bool:
        """Whether somebody wants to know."""
        return bool(self._consumers)

    def emit(self, *values: Any) -> None:
        """Tell of the event."""
        for consumer in self._consumers:
            consumer(values)

    def register(self, consumer: Consumer) -> None:
        """Tell *consumer* from now on, on the thread where it happens: it should be quick, and not raise."""
        with self._lock:
            first = not self._consumers
            self._consumers = (*self._consumers, consumer)
            if first:
                self._attached = [(probe.function, probe.make(self.emit)) for probe in self._probes]
                for function, wrapper in self._attached:
                    patch.attach(function, wrapper)
        if first:
            self.on_change()

    def unregister(self, consumer: Consumer) -> None:
        """Undo :meth:`register`; with the last consumer the places are gone."""
        with self._lock:
            last = self._remove(consumer)
        if last:
            self.on_change()

    def forget(self, consumer: Consumer) -> None:
        """Undo :meth:`register` in a forked child: whoever held the lock is not there, and nothing runs."""
        self._lock = threading.Lock()
        self._remove(consumer)

    def _remove(self, consumer: Consumer) -> bool:
        """Take a consumer away, and the places with the last one; tell whether it was that."""
        self._consumers = tuple(other for other in self._consumers if other != consumer)
        if self._consumers or not self._attached:
            return False
        for function, wrapper in self._attached:
            patch.detach(function, wrapper)
        self._attached = []
        return True

    def __repr__(self) -> str:
        return f"<Tracepoint {self.event.system}:{self.event.name}: {'on' if self.enabled else 'off'}>"


class Tracepoints:
    """All that there are, by name."""

    def __init__(self, tracepoints: Iterable[Tracepoint]) -> None:
        self._by_name = {tracepoint.event.name: tracepoint for tracepoint in tracepoints}

    def __iter__(self) -> Iterator[Tracepoint]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Tracepoint:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self._by_name)

    def match(self, *patterns: str) -> list[Tracepoint]:
        """Return those whose name a glob matches, with or without the system's before (``kvm:kvm_e*``).

        KeyError with the pattern that matches none.
        """
        found: dict[str, Tracepoint] = {}
        for pattern in patterns:
            matching = {
                name: tracepoint
                for name, tracepoint in self._by_name.items()
                if fnmatchcase(name, pattern) or fnmatchcase(f"{tracepoint.event.system}:{name}", pattern)
            }
            if not matching:
                raise KeyError(pattern)
            found |= matching
        return list(found.values())
