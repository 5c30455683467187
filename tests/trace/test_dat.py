# SPDX-License-Identifier: Apache-2.0
"""Files of trace-cmd's: what is written is read again, by us and by trace-cmd; damaged files are refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.guests import missing

from softkvm.trace import chrome, dat
from softkvm.trace.dat import Record, TraceFile, TraceFileError
from softkvm.trace.event import Event, fields_of, parse
from softkvm.trace.report import report
from softkvm.trace.ringbuffer import PageWriter

ENTRY = Event(
    "kvm",
    "kvm_entry",
    1,
    fields_of("unsigned int vcpu_id; unsigned long rip"),
    '"vcpu %u, rip 0x%lx", REC->vcpu_id, REC->rip',
)
ODD = Event(
    "test",
    "odd",
    2,
    fields_of("u8 a; u64 b; bool c; int d; u8 data[15]"),
    '"%u %llu %d %d %s", REC->a, REC->b, REC->c, REC->d, __print_hex(REC->data, 2)',
)
ODD_VALUES = (255, (1 << 64) - 1, True, -5, bytes(range(15)))
START = 1_000_000_000_000


def pages(writer: PageWriter, records: list[tuple[int, bytes]]) -> list[bytes]:
    made = [writer.add(time, record) for time, record in records]
    return [page for page in [*made, writer.flush()] if page]


def a_file(*streams: list[bytes]) -> bytes:
    file = io.BytesIO()
    dat.write(file, [ENTRY, ODD], {7: "vcpu 0", 8: "a name with spaces"}, streams)
    return file.getvalue()


def read(data: bytes) -> list[Record]:
    return list(TraceFile.parse(data).records())


def test_fields_lie_where_c_puts_them() -> None:
    # offsets of events/kvm/kvm_exit/format of a kernel of x86-64
    fields = fields_of(
        "unsigned int exit_reason; unsigned long guest_rip; u32 isa; u64 info1; u64 info2; u32 intr_info"
    )
    assert [field.offset for field in fields] == [8, 16, 24, 32, 40, 48]


def test_description_is_read_as_it_was_written() -> None:
    for event in (ENTRY, ODD):
        assert parse(event.system, event.description) == event


@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 40), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)), max_size=400
    )
)
@settings(deadline=None)
def test_records_are_read_as_they_were_written(steps: list[tuple[int, int, int]]) -> None:
    time, written = START, []
    for step, vcpu, rip in steps:
        time += step
        written.append((time, (vcpu, rip)))
    stream = pages(PageWriter(), [(time, ENTRY.pack(7, values)) for time, values in written])
    assert [(record.time_ns, record.values) for record in read(a_file(stream))] == written


def test_streams_come_together_by_time() -> None:
    one = pages(PageWriter(), [(START + 2 * n, ENTRY.pack(7, (0, n))) for n in range(500)])
    two = pages(PageWriter(), [(START + 2 * n + 1, ODD.pack(8, ODD_VALUES)) for n in range(500)])
    records = read(a_file(one, two))
    assert [record.time_ns for record in records] == list(range(START, START + 1000))
    assert {(record.cpu, record.pid) for record in records} == {(0, 7), (1, 8)}
    assert records[1].values == ODD_VALUES


def test_numbers_too_large_for_their_field_are_cut() -> None:
    assert ODD.unpack(ODD.pack(1, (256, -1, 2, 1 << 31, b"")))[1][:4] == (0, (1 << 64) - 1, 2, -(1 << 31))


def test_what_was_lost_is_told_where_it_was() -> None:
    writer = PageWriter()
    before = writer.add(START, ENTRY.pack(7, (0, 1)))
    ended = writer.lost(17)
    stream = [page for page in (before, ended, *pages(writer, [(START + 5, ENTRY.pack(7, (0, 2)))])) if page]
    trace = TraceFile.parse(a_file(stream))
    assert [(record.event and record.event.name, record.values[0]) for record in trace.records()] == [
        ("kvm_entry", 0),
        (None, 17),
        ("kvm_entry", 0),
    ]
    assert "CPU:0 [17 EVENTS DROPPED]" in list(report(trace, trace.records()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no file of trace-cmd's"),
        (b"\x7fELF" * 100, "no file of trace-cmd's"),
        (b"\x17\x08\x44tracing7\0" + bytes(100), "version '7'"),
        (a_file()[:60], "ends in the middle of its header"),
    ],
)
def test_what_is_no_trace_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(TraceFileError, match=words):
        TraceFile.parse(data)


SAMPLE = a_file(pages(PageWriter(), [(START + n, ODD.pack(8, ODD_VALUES)) for n in range(40)]))


@given(st.integers(0, len(SAMPLE)), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8))
@settings(deadline=None, max_examples=200)
def test_a_damaged_file_is_refused_or_read_as_far_as_it_goes(size: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE[:size])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    try:
        trace = TraceFile.parse(bytes(data))
        lines = list(report(trace, trace.records()))
    except TraceFileError:
        return
    assert len(lines) <= 4096


def test_trace_cmd_prints_the_same(tmp_path: Path) -> None:
    program = shutil.which("trace-cmd")
    if program is None:
        missing("no trace-cmd")
    one = pages(PageWriter(), [(START + 1_234_567 * n, ENTRY.pack(7, (n, n << 30))) for n in range(300)])
    two = pages(PageWriter(), [(START + 40_000_000_321 * n, ODD.pack(8, ODD_VALUES)) for n in range(20)])
    path = tmp_path / "trace.dat"
    path.write_bytes(a_file(one, two))
    trace = TraceFile.open(str(path))
    done = subprocess.run([str(program), "report", "-N", "-i", path], capture_output=True, text=True, check=True)
    theirs = [line.rstrip() for line in done.stdout.splitlines()]
    ours = [line.rstrip() for line in report(trace, trace.records())]
    assert len(ours) == 321
    # libtraceevent reads an int as if it had no sign
    assert [line.replace("-5", "4294967291") for line in ours] == [line.replace("-5", "4294967291") for line in theirs]


def test_chrome_trace_has_what_its_format_asks_for() -> None:
    stream = pages(PageWriter(), [(START + n * 1000, ENTRY.pack(7, (0, n))) for n in range(3)])
    trace = TraceFile.parse(a_file(stream))
    events: list[dict[str, Any]] = json.loads("".join(chrome.convert(trace, trace.records())))["traceEvents"]
    for event in events:
        assert event["ph"] in "XMiC" and {"name", "pid", "tid", "args"} <= event.keys()
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
        assert event["ph"] != "i" or event["s"] in "gpt"
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert "vCPU 0" in names
