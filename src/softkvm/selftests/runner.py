# SPDX-License-Identifier: Apache-2.0
"""Runs programs, each a client of a KVM of its own, and judges them by the table."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import IO

from softkvm.client import launch
from softkvm.client.settings import Settings as ClientSettings
from softkvm.client.world import World
from softkvm.reports.result import Result, Status
from softkvm.reports.suite import Suite
from softkvm.selftests.build import Program
from softkvm.selftests.table import Table, expected, key

KSFT_SKIP = 4
"""Exit status of a program whose requirements are not met (tools/testing/selftests/kselftest.h)."""

DEFAULT_TIMEOUT_S = 120.0

SUITE = Suite(
    "kvm-selftests",
    "KVM selftests of the kernel",
    "selftests",
    "soft",
    "KVM in Python on the software CPU",
    "`softkvm exec`",
)

_LOG_LIMIT = 4 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How programs are run."""

    timeout_s: float | None = None
    """Overrides every program's own; 0 is none."""
    client: ClientSettings = field(default_factory=ClientSettings)
    table: Table = field(default_factory=expected)


def timeout_of(name: str, settings: Settings) -> float:
    """Return the limit that a program runs under, in seconds; 0 is none."""
    if settings.timeout_s is not None:
        return settings.timeout_s
    return settings.table.slow.get(key(name), DEFAULT_TIMEOUT_S)


def missing(name: str, settings: Settings) -> str:
    """Return what the KVM lacks of what the program takes for granted; empty if nothing."""
    need = settings.table.needs.get(key(name))
    if need is None:
        return ""
    with contextlib.closing(World(settings.client).open_kvm()) as kvm:
        return "" if kvm.check_extension(need.number) else f"{need.capability} is 0: {need.reason}"


def run_program(
    program: Program, settings: Settings, started: Callable[[subprocess.Popen[bytes]], None] = lambda process: None
) -> Result:
    """Run a program as ``softkvm exec`` does; LaunchError if no client can be started. *started* gets its process."""
    result = Result(program.name, Status.SKIP, file=program.name, accel=SUITE.accel)
    if not program.built:
        result.reason = "not built"
        return result
    result.reason = missing(program.name, settings)
    if result.reason:
        return result
    result.timeout_s = result.suite_timeout_s = timeout_of(program.name, settings)
    client = launch.prepare([str(program.path)], settings.client)
    began_s = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                client.arguments,
                executable=client.executable,
                env=client.environment,
                cwd=program.path.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            result.status, result.reason = Status.FAIL, f"{program.name}: {error.strerror}"
            return result
        started(process)
        timed_out = _wait(process, result.timeout_s)
        result.time_s = time.monotonic() - began_s
        result.log = _text(output)
    if timed_out:
        result.status, result.reason = Status.FAIL, f"timeout; duration={result.timeout_s:g}s"
    else:
        judge(result, process.returncode, settings.table)
    return result


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for the end of the program, and end what it has left behind; whether the time was over first."""
    try:
        process.wait(timeout_s or None)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        _kill(process)
        process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _text(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(size - _LOG_LIMIT, 0))
    return output.read().decode("utf-8", "replace").replace("\r", "\n")


def judge(result: Result, status: int, table: Table) -> None:
    """Fill in what an exit status means (that of ``Popen``, negative for a signal).

    A skip that the table has not, or has for another reason, is a failure: something is not offered that should be.
    """
    result.exit_status = status
    skip = table.skips.get(key(result.name))
    if status == 0:
        result.status = Status.PASS
        if skip is not None:
            result.notes.append(f"the table expects it to skip: {skip.reason}")
    elif status == KSFT_SKIP:
        if skip is not None and skip.says in result.log:
            result.status, result.reason = Status.SKIP, skip.reason
        else:
            result.status = Status.FAIL
            result.reason = f"skipped, which is not expected: {result.why()}" if result.log else "skipped unexpectedly"
    else:
        result.status = Status.FAIL
        if status < 0:
            with contextlib.suppress(ValueError):
                result.reason = f"ended by {signal.Signals(-status).name}"
        result.reason = result.reason or result.why() or f"exit status {status}"


def run_all(
    programs: Sequence[Program],
    settings: Settings,
    jobs: int = 1,
    *,
    finished: Callable[[Result], None] = lambda result: None,
    tick: Callable[[list[tuple[str, float]]], None] = lambda running: None,
) -> list[Result]:
    """Run programs, *jobs* at the same time; the results have the programs' order.

    On an exception, KeyboardInterrupt among them, those that run are ended.
    """
    began: dict[str, float] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}

    def run(program: Program) -> Result:
        began[program.name] = time.monotonic()
        try:
            return run_program(program, settings, lambda process: running.update({program.name: process}))
        finally:
            del began[program.name]
            running.pop(program.name, None)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, program) for program in programs]
        waiting: set[Future[Result]] = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, 0.25, FIRST_COMPLETED)
                for future in done:
                    finished(future.result())
                now_s = time.monotonic()
                tick([(name, now_s - time_s) for name, time_s in list(began.items())])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running.values()):
                _kill(process)
            raise
    return [future.result() for future in futures]
