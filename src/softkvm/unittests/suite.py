# SPDX-License-Identifier: Apache-2.0
"""Runs many entries, each in a process of its own, so that none can take the others with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from softkvm.reports.result import Result, Status
from softkvm.unittests.config import Entry, SuiteError
from softkvm.unittests.result import read_log
from softkvm.unittests.runner import DEFAULT_TIMEOUT_S, Settings, run_entry, timeout_of
from softkvm.vmm.errors import show_traceback, unexpected

GRACE_S = 20.0
"""How long after its time limit a process may take to report before it is killed."""

RunEntry = Callable[[Path, Entry, Settings, Callable[[bytes], None]], Result]
"""What runs an entry: :func:`~softkvm.unittests.runner.run_entry`, or QEMU's. It must be picklable."""

_PRELOAD = ["softkvm.unittests.runner", "softkvm.kvm"]


def select(entries: Sequence[Entry], names: Sequence[str], groups: Sequence[str]) -> list[Entry]:
    """Return the entries with these names, or in these groups; all without either. SuiteError for what is not there."""
    known = {entry.name for entry in entries}
    for name in names:
        if name not in known:
            raise SuiteError(f"no test is named {name}")
    present = {group for entry in entries for group in entry.groups}
    for group in groups:
        if group not in present:
            raise SuiteError(f"no test is in group {group}")
    if not names and not groups:
        return list(entries)
    return [entry for entry in entries if entry.name in names or any(group in entry.groups for group in groups)]


@dataclass(slots=True)
class _Job:
    """An entry that runs in a process."""

    index: int
    entry: Entry
    process: ForkServerProcess
    pipe: Connection
    started: float
    deadline: float | None
    output: bytearray = field(default_factory=bytearray)
    result: Result | None = None

    def read(self) -> bool:
        """Take what the process sent; False once it has closed its end."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, Result):
                    self.result = message
                else:
                    self.output += message
        except (EOFError, OSError):
            return False
        return True


def _end_with_parent() -> None:
    """Wait until the process that runs the suite has ended, however it did, and end at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _main(pipe: Connection, run: RunEntry, directory: Path, entry: Entry, settings: Settings) -> None:
    """The process: run the entry, send its output as it comes, then the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        result = run(directory, entry, settings, pipe.send)
    except SuiteError as error:
        result = Result(entry.name, Status.FAIL, str(error), file=entry.file)
    except Exception as error:
        show_traceback(error)
        result = Result(entry.name, Status.FAIL, f"internal error: {unexpected(error)}", file=entry.file)
    pipe.send(result)
    pipe.close()


class SuiteRun:
    """Runs *entries* on *jobs* processors' worth of processes. ``run`` returns the results in the entries' order.

    An entry takes as many places as it has vCPUs (all places, if it has more), so that those that wait for each other
    run at the same time. One that does not fit yet lets later ones go first.

    *started* and *finished* are called as entries start and end. *run* is what runs one.
    """

    def __init__(
        self,
        directory: Path,
        entries: Sequence[Entry],
        settings: Settings,
        jobs: int = 1,
        *,
        run: RunEntry = run_entry,
        started: Callable[[Entry], None] = lambda entry: None,
        finished: Callable[[Result], None] = lambda result: None,
        tick: Callable[[list[tuple[str, float]]], None] = lambda running: None,
    ) -> None:
        self._directory = directory
        self._entries = list(entries)
        self._settings = settings
        self._jobs = jobs
        self._run = run
        self._started = started
        self._finished = finished
        self._tick = tick
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._running: list[_Job] = []
        self._results: dict[int, Result] = {}

    def run(self) -> list[Result]:
        """Run all; on an exception, KeyboardInterrupt among them, processes are ended first."""
        waiting = list(enumerate(self._entries))
        try:
            while waiting or self._running:
                free = self._jobs - sum(self._places(job.entry) for job in self._running)
                for index, entry in list(waiting):
                    if self._places(entry) <= free:
                        free -= self._places(entry)
                        waiting.remove((index, entry))
                        self._start(index, entry)
                self._wait()
        finally:
            for job in self._running:
                job.process.kill()
                job.process.join()
        return [self._results[index] for index in range(len(self._entries))]

    def _places(self, entry: Entry) -> int:
        words = entry.smp.split()
        return min(int(words[0]) if words and words[0].isdecimal() else 1, self._jobs) or 1

    def _start(self, index: int, entry: Entry) -> None:
        try:
            timeout_s = timeout_of(entry, self._settings)
        except SuiteError:
            timeout_s = DEFAULT_TIMEOUT_S  # the run itself says what is wrong
        mine, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_main,
            args=(theirs, self._run, self._directory, entry, self._settings),
            name=entry.name,
            daemon=True,
        )
        process.start()
        theirs.close()
        now = time.monotonic()
        deadline = now + timeout_s + GRACE_S if timeout_s else None
        self._running.append(_Job(index, entry, process, mine, now, deadline))
        self._started(entry)

    def _wait(self) -> None:
        """Wait a moment for something to happen, and take note of it."""
        sources: list[Connection | int] = [job.pipe for job in self._running]
        sources += [job.process.sentinel for job in self._running]
        wait(sources, 0.25)
        now = time.monotonic()
        for job in list(self._running):
            open_ = job.read()
            if job.result is not None or not open_ or not job.process.is_alive():
                self._end(job)
            elif job.deadline is not None and now > job.deadline:
                job.process.kill()
                job.result = _lost(job, "timeout; the process did not end by itself and was killed")
                self._end(job)
        self._tick([(job.entry.name, now - job.started) for job in self._running])

    def _end(self, job: _Job) -> None:
        job.process.join()
        job.read()
        job.pipe.close()
        self._running.remove(job)
        code = job.process.exitcode or 0
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        result = job.result or _lost(job, f"the process ended with {what}")
        job.process.close()
        self._results[job.index] = result
        self._finished(result)


def _lost(job: _Job, reason: str) -> Result:
    """Return the result of a process that could not report one."""
    log = job.output.decode("utf-8", "replace").replace("\r", "")
    subtests, summary = read_log(log)
    return Result(
        job.entry.name,
        Status.FAIL,
        reason,
        summary,
        job.entry.file,
        time_s=time.monotonic() - job.started,
        subtests=subtests,
        log=log,
    )
