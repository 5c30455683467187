# SPDX-License-Identifier: Apache-2.0
"""``softkvm trace``: a machine and a client are recorded, the reports say what they did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.guests import demo_image, missing

from softkvm.cli.main import main

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")


def softkvm(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTKVM, *args], capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace of a machine that was ended after some seconds."""
    path = tmp_path_factory.mktemp("trace") / "trace.dat"
    done = softkvm("trace", "record", "-o", path, "--", "run", demo_image(), "--timeout", "4", "--console", "none")
    assert (done.returncode, done.stdout) == (5, "")
    return path


def test_report_has_a_line_for_each_event(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "report", str(recorded)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpus=") and len(lines) > 100
    assert any("kvm_exit:" in line and "reason npf" in line and "vcpu 0-" in line for line in lines)


def test_report_of_some_events(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "report", str(recorded), "-e", "kvm_cr", "-e", "kvm:kvm_msr"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines and all(" kvm_cr: " in line or " kvm_msr: " in line for line in lines)


def test_trace_cmd_prints_the_same(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = shutil.which("trace-cmd")
    if program is None:
        missing("no trace-cmd")
    main(["trace", "report", str(recorded)])
    ours = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    done = subprocess.run([str(program), "report", "-N", "-i", recorded], capture_output=True, text=True, check=True)
    theirs = [line.rstrip() for line in done.stdout.splitlines()]
    # libtraceevent takes -EINTR for a large number
    assert [line for line in ours if "reason restart" not in line] == [
        line for line in theirs if "reason KVM_EXIT_INTR" not in line
    ]


def test_summary_counts_exits_by_reason(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "summary", str(recorded), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    rows = {row["reason"]: row for row in summary["exits"]}
    assert summary["vcpus"] == 1 and {"io", "npf", "write_cr4"} <= rows.keys()
    for row in rows.values():
        assert 0 < row["min_ns"] <= row["mean_ns"] <= row["max_ns"] <= row["total_ns"]
        assert row["count"] * row["mean_ns"] == pytest.approx(row["total_ns"], rel=0.01)
    assert main(["trace", "summary", str(recorded)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("VM-EXIT") and " exits of 1 vCPU; " in out


def test_convert_makes_what_perfetto_opens(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["trace", "convert", str(recorded), str(out)]) == 0
    events = json.loads(out.read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert {"guest", "npf", "io"} <= {event["name"] for event in slices}
    assert any(event["name"].startswith("KVM_EXIT_IO") for event in slices)
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert "vCPU 0" in names
    # Slices of a track are one behind the other, or one within the other: what the viewer demands.
    tracks: dict[int, list[tuple[float, float]]] = {}
    for event in slices:
        tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        open_until: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6
            open_until.append(end)


def test_events_and_filters_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.dat"
    done = softkvm(
        *("trace", "record", "-e", "kvm_pio", "-e", "kvm_cr", "-f", "kvm_pio:port == 0x3f8", "-o", path),
        *("--", "run", demo_image(), "--timeout", "3", "--console", "none"),
    )
    assert done.returncode == 5, done.stderr
    main(["trace", "report", str(path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert any("kvm_cr:" in line for line in lines)
    assert {"at 0x3f8" in line for line in lines if "kvm_pio:" in line} == {True}


CLIENT = """
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)                     # KVM_CREATE_VM
vcpu = fcntl.ioctl(vm, 0xAE41, 0)                    # KVM_CREATE_VCPU
try:
    fcntl.ioctl(vcpu, 0xAE80, 0)                     # KVM_RUN without memory
except OSError:
    pass
"""


@pytest.mark.parametrize("name", ["client.dat", "client.json"])
def test_a_client_is_recorded(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    done = softkvm("trace", "record", "-o", path, "--", "exec", "--", sys.executable, "-c", CLIENT)
    assert done.returncode == 0
    assert done.stderr.startswith(f"softkvm: {path}: ") and " events, none lost; " in done.stderr
    assert ("https://ui.perfetto.dev opens it" in done.stderr) == name.endswith(".json")
    if name.endswith(".json"):
        assert any(event["name"] == "kvm_write_tsc_offset" for event in json.loads(path.read_text())["traceEvents"])
        return
    report = softkvm("trace", "report", path).stdout
    assert "kvm_entry: " in report and "kvm_exit: " in report and "kvm_userspace_exit: " in report


def test_the_end_says_what_there_is_and_what_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.dat"
    command = ("trace", "record", "-e", "kvm_cr", "-o", path, "--", "run", demo_image(), "--timeout", "1")
    done = softkvm(*command, "--console", "none")
    (line,) = [line for line in done.stderr.splitlines() if str(path) in line]
    printed = softkvm("trace", "report", path).stdout.splitlines()[1:]
    assert line == f"softkvm: {path}: {len(printed):,} events, none lost; `softkvm trace report {path}` prints it"
    done = softkvm(*command, "--console", "none")
    assert f" in place of an older file; `softkvm trace report {path}` prints it" in done.stderr


def test_a_file_for_viewers_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": []}')
    done = softkvm("trace", "report", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{path}: JSON is for viewers (https://ui.perfetto.dev)" in done.stderr


def test_each_process_of_a_client_has_a_file(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    path = tmp_path / "t.dat"
    command = f"{sys.executable} {script}; {sys.executable} {script}"
    done = softkvm("exec", "--trace-kvm", path, "--", "sh", "-c", command)
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("t*.dat"))
    assert len(files) == 2
    for file in files:
        assert "kvm_exit: " in softkvm("trace", "report", file).stdout


def test_list_has_names_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "list", "kvm_en*"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "kvm:kvm_entry",
        "    unsigned int vcpu_id",
        "    unsigned long rip",
        "    bool immediate_exit",
    ]
    assert main(["trace", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 50


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("trace",), "expected WHAT"),
        (("trace", "record"), "expected `-- run` or `-- exec`"),
        (("trace", "record", "--", "bench"), "expected `-- run` or `-- exec`"),
        (("trace", "report", "/nowhere"), "/nowhere: No such file or directory"),
        (("trace", "report", "/etc/passwd"), "/etc/passwd: it is no file of trace-cmd's"),
        (("trace", "report", "/dev/null"), "/dev/null: it is empty"),
        (
            ("trace", "record", "-o", "/nowhere/t", "--", "run"),
            "softkvm: --output /nowhere/t: No such file or directory",
        ),
        (("trace", "record", "-e", "x", "--", "run", "--timeout", "1"), "softkvm: --event: x: there is no such"),
        (("trace", "record", "-f", "a==1", "--", "run", "--timeout", "1"), "softkvm: --filter: a==1: "),
        (("trace", "record", "-e", "x", "--", "exec", "true"), "softkvm: --event: x: there is no such"),
        (("trace", "list", "x"), "x: there is no such tracepoint"),
        (("run", "--trace-event", "kvm_exit"), "--trace-event and --trace-filter need --trace FILE"),
        (("run", "--trace", "-"), "--trace -: expected a file"),
        (("run", "--trace", "/nowhere/t"), "--trace /nowhere/t: No such file or directory"),
        (("run", "--trace", "/dev/null", "--trace-event", "x", "--timeout", "1"), "--trace-event: x: there is no such"),
        (("exec", "--trace-filter", "a", "--", "true"), "need --trace-kvm FILE"),
        (("exec", "--trace-kvm", "/dev/null", "--trace-filter", "a==1", "--", "true"), "there is no field 'a'"),
    ],
)
def test_bad_usage_is_one_line(args: tuple[str, ...], words: str) -> None:
    if "--timeout" in args:
        at = args.index("run") + 1
        args = (*args[:at], str(demo_image()), *args[at:])
    done = softkvm(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("softkvm: ") and done.stderr.count("\n") == 1 and words in done.stderr
