# SPDX-License-Identifier: Apache-2.0
"""What KVM's tracepoints tell while a test does something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from softkvm.kvm import TRACEPOINTS


@contextmanager
def traced(*names: str) -> Iterator[list[tuple[str, str, tuple[Any, ...]]]]:
    """Collect what tracepoints tell: name, text, values."""
    seen: list[tuple[str, str, tuple[Any, ...]]] = []
    consumers = []
    for tracepoint in TRACEPOINTS.match(*names):

        def consume(values: tuple[Any, ...], event: Any = tracepoint.event) -> None:
            seen.append((event.name, event.printer(values), values))

        tracepoint.register(consume)
        consumers.append((tracepoint, consume))
    try:
        yield seen
    finally:
        for tracepoint, consume in consumers:
            tracepoint.unregister(consume)


def texts(seen: list[tuple[str, str, tuple[Any, ...]]], name: str) -> list[str]:
    return [text for event, text, _ in seen if event == name]
