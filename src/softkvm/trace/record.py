# SPDX-License-Identifier: Apache-2.0
"""Records events: bounded rings in memory, one for each thread, and a thread of its own that empties them to a file.

Where an event happens, a tuple is appended to the thread's ring, with the time of the monotonic clock; no lock is taken
and nothing waits. A full ring drops what comes, and counts it. The writing thread makes pages of what it finds
(:mod:`.ringbuffer`) and writes them, each with its thread's number before it, to a spool: a file without a name, or one
that another process has given. :func:`assemble` makes a trace file of it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, BinaryIO, Final

from softkvm.threads import start_quiet, tell_after_fork
from softkvm.trace import dat
from softkvm.trace.event import Event
from softkvm.trace.ringbuffer import PAGE_SIZE, PageWriter
from softkvm.trace.tracepoint import Consumer, Tracepoint

#: Events that a thread's ring holds.
RING_SIZE: Final = 1 << 15
_INTERVAL_S: Final = 0.02
#: Events that are made pages of at a time: in between, others may have the interpreter.
_BATCH: Final = 128
#: Before each page in a spool: the thread's number.
_STREAM: Final = struct.Struct("<Q")

Predicate = Callable[[Sequence[Any]], bool]


def thread_name(tid: int) -> str:
    """Return what the system calls a thread of this process, at most 15 characters."""
    try:
        with open(f"/proc/self/task/{tid}/comm") as file:
            return file.read().strip()
    except OSError:
        return "?"


class _Ring:
    """What one thread has recorded and nobody has written yet."""

    __slots__ = ("events", "lost", "name", "pages", "taken_lost", "tid")

    def __init__(self) -> None:
        self.tid = threading.get_native_id()
        thread = threading.current_thread()
        # A thread that Python has started has a name of its own; one of a client's has the system's.
        known = not isinstance(thread, threading._DummyThread)
        self.name = thread.name if known and thread.name != "MainThread" else thread_name(self.tid)
        self.events: deque[tuple[int, Event, tuple[Any, ...]]] = deque()
        self.lost = self.taken_lost = 0
        self.pages = PageWriter()


class Recorder:
    """Records what *tracepoints* tell, to the file *spool*, until it is stopped."""

    def __init__(
        self,
        tracepoints: Sequence[Tracepoint],
        spool: BinaryIO | None = None,
        filters: Mapping[str, Predicate] | None = None,
        ring_size: int = RING_SIZE,
    ) -> None:
        #: The pages, each with its thread's number before it. A buffer's lock would stay with the writing thread in a
        #: forked child, which closes its files at the end.
        self.spool = spool if spool is not None else tempfile.TemporaryFile("w+b", 0)  # noqa: SIM115 (closed by close)
        self._rings: list[_Ring] = []
        self._local = threading.local()
        self._ring_size = ring_size
        self._stop = threading.Event()
        self._problem = ""
        #: Events that were recorded and are on their way to the spool, or there.
        self.count = 0
        self._owner = os.getpid()
        self._tracepoints = [
            (tracepoint, self._consumer(tracepoint.event, (filters or {}).get(tracepoint.event.name)))
            for tracepoint in tracepoints
        ]
        tell_after_fork(self)
        for tracepoint, consumer in self._tracepoints:
            tracepoint.register(consumer)
        self._thread = start_quiet(self._write, "trace-writer")

    def _consumer(self, event: Event, predicate: Predicate | None) -> Consumer:
        rings, local, size = self._rings, self._local, self._ring_size
        clock = time.monotonic_ns

        def consume(values: tuple[Any, ...]) -> None:
            if predicate is not None and not predicate(values):
                return
            try:
                ring = local.ring
            except AttributeError:  # the thread's first
                ring = local.ring = _Ring()
                rings.append(ring)
            if len(ring.events) < size:
                ring.events.append((clock(), event, values))
            else:
                ring.lost += 1

        return consume

    # --- the writing thread ----------------------------------------------------------------------------

    def _write(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._drain()

    def _drain(self) -> None:
        for ring in list(self._rings):
            for _ in range(0, len(ring.events), _BATCH):
                pages = [self._take(ring) for _ in range(min(_BATCH, len(ring.events)))]
                self._put(ring, b"".join(_STREAM.pack(ring.tid) + page for page in pages if page))
                time.sleep(0)

    def _take(self, ring: _Ring) -> bytes:
        """Make a page's part of the oldest event of a ring; returns the page that is full, if one is."""
        time_ns, event, values = ring.events.popleft()
        self.count += 1
        page = ring.pages.add(time_ns, event.pack(ring.tid, values))
        lost = ring.lost - ring.taken_lost
        if lost and not ring.events:  # what was lost came behind what the ring held
            ring.taken_lost += lost
            page = page or b""
            ended = ring.pages.lost(lost)
            if ended and page:
                self._put(ring, _STREAM.pack(ring.tid) + page)
            page = ended or page
        return page

    def _put(self, ring: _Ring, data: bytes) -> None:
        if not data or self._problem:
            return
        try:
            rest = memoryview(data)
            while rest:  # it may take a part, a file without a buffer
                rest = rest[self.spool.write(rest) :]
        except OSError as error:  # the machine goes on, whatever becomes of its trace
            self._problem = error.strerror or str(error)

    # --- the end ---------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop recording, and write what there is; stopping twice is harmless."""
        if self._stop.is_set() or not self.owned:
            return
        for tracepoint, consumer in self._tracepoints:
            tracepoint.unregister(consumer)
        self._stop.set()
        self._thread.join()
        self._drain()
        for ring in self._rings:
            if page := ring.pages.flush():
                self._put(ring, _STREAM.pack(ring.tid) + page)
        with contextlib.suppress(OSError):
            self.spool.flush()

    def after_fork(self) -> None:
        """In a child nothing is recorded: the rings, and the thread that empties them, are its parent's."""
        for tracepoint, consumer in self._tracepoints:
            tracepoint.forget(consumer)

    @property
    def owned(self) -> bool:
        """Whether this is the process that began, no child of its."""
        return os.getpid() == self._owner

    @property
    def problem(self) -> str:
        """Why the trace is not complete, if the spool took no more."""
        return self._problem

    @property
    def lost(self) -> int:
        """How many events found a full ring."""
        return sum(ring.lost for ring in self._rings)

    @property
    def threads(self) -> dict[int, str]:
        """The names of the threads that have recorded something, by number."""
        return {ring.tid: ring.name for ring in list(self._rings)}

    @property
    def events(self) -> list[Event]:
        """The events that are recorded."""
        return [tracepoint.event for tracepoint, _ in self._tracepoints]

    def save(self, file: BinaryIO) -> None:
        """Write the trace file; recording has been stopped."""
        assemble(file, self.spool, self.events, self.threads)

    def close(self) -> None:
        """Stop, and let the spool go."""
        self.stop()
        self.spool.close()


def assemble(file: IO[bytes], spool: IO[bytes], events: Sequence[Event], threads: Mapping[int, str]) -> None:
    """Make a trace file of a spool."""
    places: dict[int, list[int]] = {tid: [] for tid in threads}
    spool.seek(0)
    at = 0
    while len(header := spool.read(_STREAM.size)) == _STREAM.size:
        at += _STREAM.size
        places.setdefault(_STREAM.unpack(header)[0], []).append(at)
        at = spool.seek(PAGE_SIZE, os.SEEK_CUR)
    order = sorted(places, key=lambda tid: (threads.get(tid, ""), tid))
    dat.write(file, events, threads, [_pages(spool, places[tid]) for tid in order])


def _pages(spool: IO[bytes], places: Sequence[int]) -> Iterator[bytes]:
    for place in places:
        spool.seek(place)
        page = spool.read(PAGE_SIZE)
        if len(page) == PAGE_SIZE:
            yield page
