# SPDX-License-Identifier: Apache-2.0
"""Machines that move: saved at a moment of their life, gone, and restored into a new one that goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from softkvm import api
from softkvm.vmm.console import Console
from softkvm.vmm.machine import Machine
from softkvm.vmm.snapshot import encoding, memory_file, state

#: What passes by itself: clocks, counters, timers' due times and what they have come to.
_TIMED: Final = {
    "clock",
    "tsc_offset",
    "elapsed_ns",
    "seen_ns",
    "counter",
    "pit",
    "wait_left_ns",
}
_TIMED_MSRS: Final = {0x10, 0x6E0, 0x4000_0010, 0x4000_0020}


def hop(machine: Machine, kvm: api.Kvm, console: Console | None = None) -> Machine:
    """Save *machine*, close it, and return one that goes on from there, on *kvm*; it has been started."""
    with machine.pausing.still():
        data = encoding.encode(state.save(machine))
        memory = [
            (start, bytes(machine.memory.view[start : start + size]))
            for start, size in memory_file.used_ranges(machine.memory)
        ]
    # what the guest has sent meanwhile is in the console
    machine.board.flush()
    config = replace(machine.config, memory_files=())
    machine.close()
    other = Machine(kvm, config, None if console is None else console.output)
    try:
        for start, contents in memory:
            other.memory.view[start : start + len(contents)] = contents
        state.restore(other, encoding.decode(data))
    except BaseException:
        other.close()
        raise
    if console is not None:
        console.attach(other)
    other.start()
    return other


def timeless(saved: Any) -> Any:
    """Return a state without what passes by itself."""
    if isinstance(saved, dict):
        result = {key: timeless(value) for key, value in saved.items() if key not in _TIMED}
        if "msrs" in result:
            result["msrs"] = [pair for pair in result["msrs"] if pair[0] not in _TIMED_MSRS]
        if "memory" in result and isinstance(result["memory"], bytes):  # the clock's registers: seconds, and its flags
            result["memory"] = result["memory"][10:12] + result["memory"][13:0x32]
        return result
    if isinstance(saved, list):
        return [timeless(value) for value in saved]
    return saved
