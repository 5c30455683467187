# SPDX-License-Identifier: Apache-2.0
"""A trace as Chrome's trace events in JSON ("Trace Event Format"), which Perfetto's viewer opens, and others do.

Each vCPU is a track on which time in the guest and the handling of exits are slices, exits to userspace slices within
those; everything else that happened on its thread are instants there. Other threads are tracks with instants alone.
How many exits there were in 10 ms is a counter of each vCPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final

from softkvm.trace.dat import Record, TraceFile
from softkvm.trace.vcpus import reason, values_of

_COUNTED_NS: Final = 10_000_000
#: Tracks of vCPUs come first.
_OTHERS: Final = 1 << 16
_PID: Final = 1


def _hex(value: Any) -> str:
    return value if isinstance(value, str) else hex(value)


def _us(time_ns: int) -> float:
    return time_ns / 1000


class _Converter:
    """Goes through a trace once."""

    def __init__(self, trace: TraceFile) -> None:
        self._trace = trace
        self._names: dict[tuple[int, int], str] = {}
        self._start_ns = -1
        #: Where a thread is, since when, and with what to tell: a slice that has begun.
        self._open: dict[int, tuple[str, int, dict[str, Any]]] = {}
        self._userspace: dict[int, tuple[str, int, dict[str, Any]]] = {}
        self._vcpu_of: dict[int, int] = {}
        self._known: set[int] = set()
        self._exits: Counter[int] = Counter()
        self._counted_ns = 0

    def events(self, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """Yield the events of the JSON file."""
        yield {"ph": "M", "name": "process_name", "pid": _PID, "tid": 0, "args": {"name": "KVM"}}
        last = 0
        for record in records:
            if self._start_ns < 0:
                self._start_ns = self._counted_ns = record.time_ns
            last = record.time_ns - self._start_ns
            if record.event is None:
                args = {"lost": record.values[0]}
                yield {"ph": "i", "s": "g", "name": "events lost", "pid": _PID, "tid": 0, "ts": _us(last), "args": args}
                continue
            if record.pid not in self._known:
                self._known.add(record.pid)
                yield from self._track(record.pid, self._trace.threads.get(record.pid, str(record.pid)), _OTHERS)
            yield from self._counters(record.time_ns)
            yield from self._record(record, last)
        for pid in list(self._open):
            yield from self._close(pid, last)

    def _record(self, record: Record, at: int) -> Iterator[dict[str, Any]]:
        event = record.event
        assert event is not None
        pid = record.pid
        args = values_of(event, record.values)
        for name, value in args.items():
            if isinstance(value, bytes):
                args[name] = value.hex()
            elif isinstance(value, int) and value >= 1 << 53:
                args[name] = hex(value)  # more than a number of JavaScript's holds
        if event.name == "kvm_entry":
            if self._vcpu_of.get(pid) != args["vcpu_id"]:
                self._vcpu_of[pid] = args["vcpu_id"]
                yield from self._track(pid, f"vCPU {args['vcpu_id']}", args["vcpu_id"])
            yield from self._close(pid, at)
            self._open[pid] = ("guest", at, {"rip": _hex(args["rip"])})
        elif event.name == "kvm_exit":
            yield from self._close(pid, at)
            self._exits[args["vcpu_id"]] += 1
            for name in ("guest_rip", "info1", "info2"):
                args[name] = _hex(args[name])
            self._open[pid] = (reason(record, self._names), at, args)
        elif event.name == "kvm_userspace_exit" and pid in self._open:
            self._userspace[pid] = (event.printer(record.values).removeprefix("reason "), at, args)
        else:
            if event.name == "kvm_fpu":
                if args["load"] and pid in self._userspace:
                    yield self._slice(pid, self._userspace.pop(pid), at)
                return  # KVM_RUN's beginning and end
            args["text"] = event.printer(record.values)
            yield {
                "ph": "i",
                "s": "t",
                "name": event.name,
                "cat": event.system,
                "pid": _PID,
                "tid": pid,
                "ts": _us(at),
                "args": args,
            }

    def _track(self, pid: int, name: str, order: int) -> Iterator[dict[str, Any]]:
        yield {"ph": "M", "name": "thread_name", "pid": _PID, "tid": pid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": _PID, "tid": pid, "args": {"sort_index": order}}

    def _close(self, pid: int, at: int) -> Iterator[dict[str, Any]]:
        """End what a thread has been in."""
        if pid in self._userspace:
            yield self._slice(pid, self._userspace.pop(pid), at)
        if pid in self._open:
            yield self._slice(pid, self._open.pop(pid), at)

    def _slice(self, pid: int, what: tuple[str, int, dict[str, Any]], end: int) -> dict[str, Any]:
        name, start, args = what
        return {
            "ph": "X",
            "name": name,
            "cat": "guest" if name == "guest" else "exit",
            "pid": _PID,
            "tid": pid,
            "ts": _us(start),
            "dur": _us(end - start),
            "args": args,
        }

    def _counters(self, time_ns: int) -> Iterator[dict[str, Any]]:
        """The exits of each vCPU since the last time, when 10 ms have passed."""
        if time_ns - self._counted_ns < _COUNTED_NS:
            return
        at = _us(self._counted_ns - self._start_ns)
        for vcpu in sorted(set(self._vcpu_of.values())):
            args = {"exits": self._exits[vcpu]}
            yield {"ph": "C", "name": f"exits in 10 ms, vCPU {vcpu}", "pid": _PID, "tid": 0, "ts": at, "args": args}
        self._exits.clear()
        self._counted_ns += (time_ns - self._counted_ns) // _COUNTED_NS * _COUNTED_NS


def convert(trace: TraceFile, records: Iterable[Record]) -> Iterator[str]:
    """Yield the pieces of the JSON file."""
    yield '{"displayTimeUnit":"ns","traceEvents":[\n'
    between = ""
    for event in _Converter(trace).events(records):
        yield between + json.dumps(event, separators=(",", ":"))
        between = ",\n"
    yield "\n]}\n"
