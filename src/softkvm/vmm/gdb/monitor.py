# SPDX-License-Identifier: Apache-2.0
"""What gdb's ``monitor`` commands do: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from softkvm.vmm.debug.report import registers_text
from softkvm.vmm.errors import StateError
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.vmm.debug.debugger import Debugger
    from softkvm.vmm.machine import Machine


class Session(Protocol):
    """What the commands work on."""

    machine: Machine
    debugger: Debugger
    selected: int
    """The vCPU that registers and memory are of."""
    physical: bool
    """Whether addresses of memory are guest-physical ones."""

    def describe(self, vcpu: int) -> str:
        """Say what a vCPU does."""


@dataclass(frozen=True, slots=True)
class MonitorCommand:
    """A command: its words, what it does (and says), and what ``help`` says of it."""

    words: str
    run: Callable[[Session, str], str]
    help: str


def _help(session: Session, rest: str) -> str:
    width = max(len(command.words) for command in COMMANDS)
    return "".join(f"{command.words:{width}}  {command.help}\n" for command in COMMANDS)


def _registers(session: Session, rest: str) -> str:
    return registers_text(session.debugger.registers[session.selected])


def _vcpus(session: Session, rest: str) -> str:
    numbers = range(len(session.machine.vcpus))
    return "".join(f"{'*' if n == session.selected else ' '} {session.describe(n)}\n" for n in numbers)


def _phys(session: Session, rest: str) -> str:
    if rest not in ("on", "off", ""):
        return f"phys {rest}: expected on or off\n"
    if rest:
        session.physical = rest == "on"
    return f"addresses are {'guest-physical' if session.physical else 'virtual'}\n"


def _reset(session: Session, rest: str) -> str:
    try:
        session.debugger.reset("gdb")
    except StateError as error:
        return f"reset: {error}\n"
    return "the machine begins anew from its image; software breakpoints have gone\n"


def _quit(session: Session, rest: str) -> str:
    session.machine.end(Outcome(End.STOPPED, "gdb"))
    return "the machine has been ended\n"


COMMANDS: Final = (
    MonitorCommand("help", _help, "this list"),
    MonitorCommand("info registers", _registers, "all registers of the selected vCPU, with segments and tables"),
    MonitorCommand("info vcpus", _vcpus, "the vCPUs, and where they are"),
    MonitorCommand("phys", _phys, "on, off: whether addresses of memory are guest-physical ones"),
    MonitorCommand("reset", _reset, "begin anew from the image, and stand at its first instruction"),
    MonitorCommand("quit", _quit, "end the machine"),
)


def run(session: Session, line: str) -> str:
    """Carry out a command; return what it says."""
    text = " ".join(line.split())
    for command in COMMANDS:
        if text == command.words or text.startswith(f"{command.words} "):
            return command.run(session, text[len(command.words) :].strip())
    return f"{text[:60]!r} is no command of the monitor; `monitor help` has them\n"
