# SPDX-License-Identifier: Apache-2.0
"""How a command that runs a machine ends: exit statuses, and the signals that end the machine."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from softkvm.cli import EXIT_ERROR, EXIT_OK
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

EXIT_STATUS = {
    End.POWER_OFF: EXIT_OK,
    End.MIGRATED: EXIT_OK,
    End.ERROR: EXIT_ERROR,
    End.PANIC: 3,
    End.TRIPLE_FAULT: 4,
    End.TIMEOUT: 5,
    End.RESET: 6,
    End.STOPPED: 7,
    End.DEBUG_EXIT: 8,
    End.HALTED: 9,
    End.CPU_TIME: 10,
}
"""Exit status of ``softkvm run`` for every end of a machine. 2 is a usage error, 128 + n an end by signal n."""


@contextlib.contextmanager
def signals_end(machine: Machine, caught: list[int]) -> Iterator[None]:
    """Let signals end the machine instead of the process, and note them in *caught*; ignored ones stay so (nohup)."""

    def handler(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        machine.end(Outcome(End.STOPPED, signal.Signals(number).name))

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    changed = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
