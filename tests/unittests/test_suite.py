# SPDX-License-Identifier: Apache-2.0
"""How entries share the processors, and what becomes of a process that dies."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from softkvm.reports.result import Result, Status
from softkvm.unittests import suite as suite_module
from softkvm.unittests.config import Entry, SuiteError
from softkvm.unittests.runner import Settings
from softkvm.unittests.suite import SuiteRun, select

ENTRIES = [Entry("a", "x", groups=("g",)), Entry("b", "x", groups=("g", "h")), Entry("c", "x")]


def test_selection_keeps_the_order_of_the_file() -> None:
    assert [e.name for e in select(ENTRIES, ["c", "a"], [])] == ["a", "c"]
    assert [e.name for e in select(ENTRIES, [], ["g"])] == ["a", "b"]
    assert [e.name for e in select(ENTRIES, ["c"], ["h"])] == ["b", "c"]
    assert select(ENTRIES, [], []) == ENTRIES


def test_unknown_names_and_groups_are_named() -> None:
    with pytest.raises(SuiteError, match="no test is named x"):
        select(ENTRIES, ["x"], [])
    with pytest.raises(SuiteError, match="no test is in group x"):
        select(ENTRIES, [], ["x"])


def test_entry_with_more_vcpus_than_places_runs_alone(suite: Path) -> None:
    entries = [Entry("one", "n", arch="i386"), Entry("four", "n", smp="4", arch="i386"), Entry("two", "n", smp="2")]
    running: set[str] = set()
    together: list[set[str]] = []

    def started(entry: Entry) -> None:
        running.add(entry.name)
        together.append(set(running))

    run = SuiteRun(suite, entries, Settings(), 2, started=started, finished=lambda result: running.discard(result.name))
    assert [result.name for result in run.run()] == ["one", "four", "two"]
    assert {"four"} in together
    assert not any({"four", "two"} <= names or {"one", "four"} <= names for names in together)


def test_process_that_dies_is_a_failure_with_its_end(suite: Path) -> None:
    (result,) = SuiteRun(suite, [Entry("dies", "probe.flat")], Settings(), run=die).run()
    assert result.status is Status.FAIL
    assert result.reason == "the process ended with signal SIGABRT"
    assert result.log == "PASS: before\n"
    assert [s.name for s in result.subtests] == ["before"]


def test_process_that_does_not_end_is_killed(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module, "GRACE_S", 0.5)
    (result,) = SuiteRun(suite, [Entry("stays", "probe.flat")], Settings(timeout_s=0.5), run=stay).run()
    assert result.reason == "timeout; the process did not end by itself and was killed"


def test_entry_ends_with_the_process_that_runs_the_suite(suite: Path, tmp_path: Path) -> None:
    source = f"""
from pathlib import Path
from softkvm.unittests import Entry, Settings
from softkvm.unittests.suite import SuiteRun
if __name__ == "__main__":
    entry = Entry("hang", "probe.flat", test_args="hang")
    SuiteRun(Path({str(suite)!r}), [entry], Settings(timeout_s=60), tick=lambda r: print(r[0][0], flush=True)).run()
"""
    script = tmp_path / "run.py"
    script.write_text(source)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert wait_for(lambda: not group(process.pid))


def group(leader: int) -> list[int]:
    """The processes of a session that are not waiting to be collected."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Wait until *condition* holds; False if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def die(directory: Path, entry: Entry, settings: Settings, console: Callable[[bytes], None]) -> Result:
    """Print something, then crash."""
    console(b"PASS: before\r\n")
    os.abort()


def stay(directory: Path, entry: Entry, settings: Settings, console: Callable[[bytes], None]) -> Result:
    """Never end."""
    time.sleep(60)
    raise AssertionError
