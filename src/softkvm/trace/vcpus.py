# SPDX-License-Identifier: Apache-2.0
"""What a trace says of a vCPU's time: when it was in the guest, what it left it for, and how long that took.

From ``kvm_exit`` to the next ``kvm_entry`` of the same thread is the handling of one exit, as ``perf kvm stat`` has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from softkvm.trace.dat import Record
from softkvm.trace.event import Event


class Span(NamedTuple):
    """A vCPU's time in the guest, or in the handling of one exit."""

    pid: int
    vcpu: int
    start_ns: int
    end_ns: int
    #: The exit; None: in the guest.
    exit: Record | None


def values_of(event: Event, values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the values of an event by name."""
    return dict(zip(event.names, values, strict=True))


@dataclass(slots=True)
class _Thread:
    entry: Record | None = None
    exit: Record | None = None


def _vcpu(record: Record) -> int:
    assert record.event is not None
    value: int = record.values[record.event.names.index("vcpu_id")]
    return value


def spans(records: Iterable[Record]) -> Iterator[Span]:
    """Yield the spans of a trace as they end."""
    threads: dict[int, _Thread] = {}
    for record in records:
        name = record.event.name if record.event is not None else ""
        if name == "kvm_entry" or name == "kvm_exit":
            thread = threads.setdefault(record.pid, _Thread())
            if name == "kvm_entry":
                if thread.exit is not None:
                    yield Span(record.pid, _vcpu(record), thread.exit.time_ns, record.time_ns, thread.exit)
                thread.entry, thread.exit = record, None
            else:
                if thread.entry is not None:
                    yield Span(record.pid, _vcpu(record), thread.entry.time_ns, record.time_ns, None)
                thread.entry, thread.exit = None, record
        elif record.event is None:
            threads.clear()  # what is lost may have been an entry or an exit


def reason(record: Record, names: dict[tuple[int, int], str]) -> str:
    """Return the reason of a ``kvm_exit`` as its print format names it; *names* remembers what was found."""
    assert record.event is not None
    fields = record.event.names
    key = (record.event.id, record.values[fields.index("exit_reason")])
    found = names.get(key)
    if found is None:
        text = record.event.printer(record.values)
        start = text.find("reason ")
        end = text.find(" rip ", start)
        found = names[key] = text[start + len("reason ") : end] if 0 <= start < end else hex(key[1])
    return found
