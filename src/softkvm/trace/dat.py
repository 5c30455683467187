# SPDX-License-Identifier: Apache-2.0
"""Trace files as ``trace-cmd`` has them (trace-cmd.dat.v6(5)): written by the recorder, read by the reports.

One "processor" of a file is a thread of ours: whoever reads it finds which in each record, and the threads' names in
the table of processes.
"""

from __future__ import annotations

import heapq
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final, NamedTuple

from softkvm.trace.cformat import FormatError
from softkvm.trace.event import COMMON, Event, parse
from softkvm.trace.ringbuffer import HEADER_EVENT, HEADER_PAGE, PAGE_SIZE, Lost, read_page

_MAGIC: Final = b"\x17\x08\x44tracing"
_VERSION: Final = b"6\0"
_OPTIONS, _FLYRECORD = b"options  \0", b"flyrecord\0"
_OPTION_DONE: Final = 0


class TraceFileError(Exception):
    """A file that is no trace file, or a damaged one; one line."""


class Record(NamedTuple):
    """One event that happened; *event* is None where *values* is how many were lost, -1 for some."""

    time_ns: int
    cpu: int
    pid: int
    event: Event | None
    values: tuple[Any, ...]


# --- writing -----------------------------------------------------------------------------------------------


def _sized(data: bytes, size: str = "<Q") -> bytes:
    return struct.pack(size, len(data)) + data


def write(
    file: IO[bytes], events: Iterable[Event], threads: Mapping[int, str], streams: Sequence[Iterable[bytes]]
) -> None:
    """Write a file: *threads* are names by number, *streams* the pages of each "processor"."""
    file.write(_MAGIC + _VERSION + bytes([0, 8]) + struct.pack("<I", PAGE_SIZE))
    file.write(b"header_page\0" + _sized(HEADER_PAGE.encode()))
    file.write(b"header_event\0" + _sized(HEADER_EVENT.encode()))
    file.write(struct.pack("<I", 0))  # events of ftrace itself
    systems: dict[str, list[Event]] = {}
    for event in events:
        systems.setdefault(event.system, []).append(event)
    file.write(struct.pack("<I", len(systems)))
    for system, members in systems.items():
        file.write(system.encode() + b"\0" + struct.pack("<I", len(members)))
        for event in members:
            file.write(_sized(event.description.encode()))
    file.write(_sized(b"", "<I") + _sized(b"", "<I"))  # kallsyms, printk formats
    names = "".join(f"{pid} {name}\n" for pid, name in threads.items())
    file.write(_sized(names.encode(errors="replace") or b"\0"))
    file.write(struct.pack("<I", len(streams)))
    file.write(_OPTIONS + struct.pack("<H", _OPTION_DONE) + _FLYRECORD)
    table = file.tell()
    file.write(bytes(16 * len(streams)))
    places = []
    for stream in streams:
        file.write(bytes(-file.tell() % PAGE_SIZE))
        start = file.tell()
        for page in stream:
            file.write(page)
        places.append((start, file.tell() - start))
    file.seek(table)
    for place in places:
        file.write(struct.pack("<QQ", *place))
    file.seek(0, os.SEEK_END)


# --- reading -----------------------------------------------------------------------------------------------


class _Cursor:
    """Takes a file apart from its beginning."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise TraceFileError("it ends in the middle of its header")
        taken = bytes(self._data[self._at : self._at + size])
        self._at += size
        return taken

    def number(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def sized(self, code: str = "Q") -> bytes:
        return self.take(self.number(code))

    def text(self) -> str:
        end = self._data.find(b"\0", self._at)
        if end < 0:
            raise TraceFileError("it ends in the middle of its header")
        return (self.take(end + 1 - self._at)[:-1]).decode(errors="replace")

    def expect(self, what: bytes) -> None:
        found = self.take(len(what))
        if found != what:
            raise TraceFileError(f"expected {what.rstrip(bytes(1)).decode()!r}, got {found!r}")


@dataclass
class TraceFile:
    """A trace file that was read: its events, its threads and its records."""

    events: dict[int, Event] = field(default_factory=dict)
    threads: dict[int, str] = field(default_factory=dict)
    cpus: int = 0
    _places: list[tuple[int, int]] = field(default_factory=list)
    _page_size: int = PAGE_SIZE
    _data: Any = b""

    @classmethod
    def open(cls, path: str) -> TraceFile:
        """Open a file; OSError, or TraceFileError if it is none."""
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise TraceFileError("it is empty")
            try:
                data: bytes | mmap.mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                data = file.read()
        return cls.parse(data)

    @classmethod
    def parse(cls, data: bytes | mmap.mmap) -> TraceFile:
        """Read a file's contents; TraceFileError if it is no trace file."""
        self = cls(_data=data)
        at = _Cursor(data)
        if len(data) < len(_MAGIC) or at.take(len(_MAGIC)) != _MAGIC:
            raise TraceFileError("it is no file of trace-cmd's (trace-cmd.dat(5))")
        version = at.text()
        if version != "6":
            raise TraceFileError(
                f"it is version {version[:8]!r} of trace-cmd's files, expected 6 (`trace-cmd convert`)"
            )
        if at.take(2)[0]:
            raise TraceFileError("it was recorded on a big-endian machine")
        self._page_size = at.number("I")
        if not 64 <= self._page_size <= 1 << 20:
            raise TraceFileError(f"its pages have {self._page_size} bytes, expected 64 to 1 MiB")
        for header in (b"header_page\0", b"header_event\0"):
            at.expect(header)
            at.sized()
        for _ in range(at.number("I")):
            at.sized()
        for _ in range(at.number("I")):
            system = at.text()
            for _ in range(at.number("I")):
                try:
                    event = parse(system, at.sized().decode(errors="replace"))
                except FormatError as error:
                    raise TraceFileError(str(error)) from None
                self.events[event.id] = event
        at.sized("I")
        at.sized("I")
        for entry in at.sized().decode(errors="replace").splitlines():
            pid, _, name = entry.partition(" ")
            if pid.isdecimal() and len(pid) < 12:
                self.threads[int(pid)] = name
        self.cpus = at.number("I")
        section = at.take(10)
        if section == _OPTIONS:
            while at.number("H") != _OPTION_DONE:
                at.sized("I")
            section = at.take(10)
        if section != _FLYRECORD:
            raise TraceFileError("it has no records of events (`flyrecord`)")
        for _ in range(self.cpus):
            start, size = at.number("Q"), at.number("Q")
            if start + size > len(data):
                raise TraceFileError("it ends before the records that it should have")
            self._places.append((start, size))
        return self

    def records(self) -> Iterator[Record]:
        """Yield all records in the order of their times."""
        return heapq.merge(*(self._stream(cpu) for cpu in range(self.cpus)), key=lambda record: record.time_ns)

    def _stream(self, cpu: int) -> Iterator[Record]:
        start, size = self._places[cpu]
        view = memoryview(self._data)
        for at in range(start, start + size, self._page_size):
            for time_ns, data in read_page(view[at : min(at + self._page_size, start + size)]):
                if isinstance(data, Lost):
                    yield Record(time_ns, cpu, 0, None, (int(data),))
                    continue
                if len(data) < COMMON.size:
                    continue
                event = self.events.get(COMMON.unpack_from(data)[0])
                if event is None or len(data) < event.layout.size:
                    continue
                pid, values = event.unpack(data)
                yield Record(time_ns, cpu, pid, event, values)
