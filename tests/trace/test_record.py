# SPDX-License-Identifier: Apache-2.0
"""The recorder: rings are bounded, what finds them full is counted, filters, threads, forks."""

from __future__ import annotations

import array
import fcntl
import io
import os
import termios
import threading

import pytest
from tests.support.forks import in_child
from tests.support.threads import beside, until
from typing_extensions import Buffer

from softkvm.trace.dat import TraceFile
from softkvm.trace.event import Event, fields_of
from softkvm.trace.record import Recorder
from softkvm.trace.tracepoint import Tracepoint, Tracepoints, after, before

EVENT = Event("test", "called", 1, fields_of("u64 x"), '"x %llu", REC->x')
RESULT = Event("test", "returned", 2, fields_of("u64 x"), '"x %llu", REC->x')


def work(x: int) -> int:
    return x + 1


def tracepoints() -> Tracepoints:
    return Tracepoints(
        [
            Tracepoint(EVENT, [before(work, lambda x: (x,) if x != 13 else None)]),
            Tracepoint(RESULT, [after(work, lambda result, x: (result,))]),
        ]
    )


def recorded(recorder: Recorder) -> list[tuple[str, int]]:
    file = io.BytesIO()
    recorder.stop()
    recorder.save(file)
    records = list(TraceFile.parse(file.getvalue()).records())
    return [(record.event.name if record.event else "lost", record.values[0]) for record in records]


def test_events_are_recorded_in_their_order() -> None:
    recorder = Recorder(list(tracepoints()))
    for x in (1, 13, 2):
        work(x)
    assert recorded(recorder) == [("called", 1), ("returned", 2), ("returned", 14), ("called", 2), ("returned", 3)]
    recorder.close()


def test_nothing_is_recorded_after_the_end_and_the_function_is_its_own_again() -> None:
    code = work.__code__
    recorder = Recorder(list(tracepoints()))
    assert work.__code__ is not code
    work(1)
    recorder.stop()
    assert work.__code__ is code
    work(2)
    assert len(recorded(recorder)) == 2
    recorder.close()


def test_filters_decide_by_event() -> None:
    recorder = Recorder(list(tracepoints()), filters={"called": lambda values: values[0] > 5})
    for x in (1, 6):
        work(x)
    assert recorded(recorder) == [("returned", 2), ("called", 6), ("returned", 7)]
    recorder.close()


def test_a_full_ring_drops_what_comes_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softkvm.trace.record._INTERVAL_S", 60)  # nobody empties it
    recorder = Recorder(tracepoints().match("called"), ring_size=10)
    for x in range(100, 125):
        work(x)
    assert recorder.lost == 15
    assert recorded(recorder) == [("called", x) for x in range(100, 110)]
    recorder.close()


def test_every_thread_has_a_stream_with_its_name() -> None:
    recorder = Recorder(tracepoints().match("test:called"))
    threads = [threading.Thread(target=work, args=(n,), name=f"worker {n}") for n in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    file = io.BytesIO()
    recorder.stop()
    recorder.save(file)
    trace = TraceFile.parse(file.getvalue())
    named = {trace.threads[record.pid]: record.values[0] for record in trace.records()}
    assert named == {"worker 0": 0, "worker 1": 1, "worker 2": 2} and trace.cpus == 3
    recorder.close()


def test_a_spool_that_takes_no_more_does_not_stop_the_work() -> None:
    recorder = Recorder(tracepoints().match("called"), open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    for x in range(5000):
        assert work(x) == x + 1
    recorder.stop()
    assert recorder.problem == os.strerror(28)
    recorder.close()


def test_a_forked_child_records_nothing_and_its_parent_goes_on() -> None:
    known = tracepoints()
    told: list[int] = []
    known["called"].on_change = lambda: told.append(os.getpid())  # in KVM it takes locks of vCPUs
    recorder = Recorder(known.match("called"))
    work(1)
    child = os.fork()
    if not child:
        work(2)
        recorder.stop()
        os._exit(0 if not recorder.owned and os.getpid() not in told else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    work(3)
    assert recorded(recorder) == [("called", 1), ("called", 3)]
    recorder.close()


def test_a_forked_child_closes_the_recorder_while_the_writing_thread_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda _, buffering=-1: os.fdopen(writer, "wb", buffering))
    recorder = Recorder(tracepoints().match("called"))
    for x in range(size // 2):
        work(x)
    left = array.array("i", [0])

    def full() -> bool:
        fcntl.ioctl(reader, termios.FIONREAD, left)
        return left[0] == size

    until(full)  # the writing thread waits within its write
    in_child(recorder.close)
    with beside(threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reader, size), b"")])):
        recorder.close()
    os.close(reader)


class _Reluctant(io.BytesIO):
    """A file that takes a few bytes at a time, as one without a buffer may."""

    def write(self, data: Buffer) -> int:
        return super().write(memoryview(data)[:1000])


def test_a_spool_that_takes_parts_has_all_at_the_end() -> None:
    recorder = Recorder(tracepoints().match("called"), spool=_Reluctant())
    for x in range(100, 2000):
        work(x)
    assert recorded(recorder) == [("called", x) for x in range(100, 2000)]
    recorder.close()
