# SPDX-License-Identifier: Apache-2.0
"""How a machine's life ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class End(enum.Enum):
    """The kinds of ends."""

    POWER_OFF = "power-off"
    RESET = "reset"
    PANIC = "panic"
    TRIPLE_FAULT = "triple fault"
    HALTED = "halted"
    TIMEOUT = "timeout"
    CPU_TIME = "CPU time limit"
    STOPPED = "stopped"
    DEBUG_EXIT = "debug exit"
    MIGRATED = "migrated"
    ERROR = "internal error"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a machine: its kind, an explanation, and the status that a debug-exit port was given."""

    end: End
    detail: str = ""
    status: int = 0

    def __str__(self) -> str:
        return f"{self.end.value}: {self.detail}" if self.detail else self.end.value
