# SPDX-License-Identifier: Apache-2.0
"""Runs QEMU, to compare with. Nothing here needs it; it is used where it is installed."""

from __future__ import annotations

import ctypes
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PROGRAM = "qemu-system-x86_64"
TCG = ("-accel", "tcg")
"""QEMU's translator. By ``-accel``, so that an ``-enable-kvm`` among a test's options is an error, not KVM."""

_READ_SIZE = 65536
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a QEMU process ended."""

    status: int | None
    """Exit status, negative for a signal; None: it was killed at its time limit."""
    time_s: float
    output: str
    """Standard output, as far as it came."""
    errors: str
    """Standard error."""


def find(path: str | None = None) -> str | None:
    """Return QEMU's executable: *path* if it is one, or the one on PATH; None if there is none."""
    return shutil.which(path or PROGRAM)


def version(qemu: str) -> str:
    """Return the first line of ``qemu --version``, an empty string if it says none."""
    try:
        text = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return text.splitlines()[0] if text else ""


def run(
    command: Sequence[str], timeout_s: float | None = None, console: Callable[[bytes], None] = lambda data: None
) -> Ended:
    """Run *command* to its end or for *timeout_s*; *console* gets its standard output as it comes.

    The process does not outlive this one. OSError if it cannot be started.
    """
    output = bytearray()
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        deadline = started + timeout_s if timeout_s else None
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, preexec_fn=_end_with_parent
        )
        assert process.stdout is not None
        try:
            complete = _read(process.stdout.fileno(), deadline, output, console)
            status = process.wait() if complete else None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        time_s = time.monotonic() - started
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
    return Ended(status, time_s, output.decode("utf-8", "replace").replace("\r", ""), text)


def _read(fd: int, deadline: float | None, output: bytearray, console: Callable[[bytes], None]) -> bool:
    """Read *fd* to its end; False if the deadline came first."""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            if not selector.select(left_s):
                continue
            data = os.read(fd, _READ_SIZE)
            if not data:
                return True
            output += data
            console(data)


def _end_with_parent() -> None:
    """In the new process: be killed when the one that started it ends, however it does."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
