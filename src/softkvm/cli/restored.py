# SPDX-License-Identifier: Apache-2.0
"""Running a machine that comes from somewhere: a snapshot, another process. With the user's console, under control.

What is imported here is what that takes: from a process's start to the guest's next output there is but a blink.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softkvm.cli import CommandError
from softkvm.cli.accel import SOFT
from softkvm.cli.ends import EXIT_STATUS, signals_end
from softkvm.cli.output import warn
from softkvm.cli.terminal import STDIO, ConsoleEnd, console_choice, open_console
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.cli.run_image import GuestImage
    from softkvm.vmm.devices.spec import DeviceSpec
    from softkvm.vmm.machine import Machine

_FIRST_OUTPUT_S = 0.1
"""So long what comes next waits: it would only be in the guest's way to its next output."""

Output = Callable[[bytes], None]


def extra_of(args: Namespace, accel: str, image: GuestImage) -> dict[str, Any]:
    """Return what :func:`run` needs again of a run's arguments: it goes with the machine."""
    from softkvm.cli.devices import option_texts

    return {
        "accel": accel,
        "cwd": os.getcwd(),
        "devices": option_texts(args),
        "console": args.console.partition(",")[0] if args.console[:6] == "virtio" else "",
        "kernel": str(image.kernel),
    }


def accel_of(extra: Mapping[str, Any], chosen: str | None) -> str:
    """Return which KVM to use: the *chosen* one, or that which the machine had."""
    return chosen or str(extra.get("accel", SOFT))


@contextlib.contextmanager
def device_specs(extra: Mapping[str, Any]) -> Iterator[tuple[DeviceSpec, ...]]:
    """Return the devices that the machine was started with, and be where it was, as they may name files.

    ConfigError if there are no such any more.
    """
    options = extra.get("devices") or []
    if not options:
        yield ()
        return
    from softkvm.cli.devices import specs_of

    with contextlib.ExitStack() as stack:
        where = extra.get("cwd")
        if isinstance(where, str):
            with contextlib.suppress(OSError):  # it is gone: the files are found by their whole paths, or not
                stack.enter_context(contextlib.chdir(where))
        yield specs_of(options)


class Ends:
    """The user's ends of a machine: its console, and what has gone wrong there."""

    def __init__(self, console: ConsoleEnd) -> None:
        self.console = console
        self.machine: Machine | None = None
        self.hear: Output = lambda data: None
        """Gets the output first."""
        self.heard = threading.Event()
        """Set when the guest has sent something."""
        self.caught: list[int] = []
        self.failed: list[Outcome] = []

    def output(self, data: bytes) -> None:
        """Show output of the guest."""
        self.heard.set()
        self.hear(data)
        try:
            self.console.output(data)
        except BrokenPipeError:
            self.caught.append(signal.SIGPIPE)
            self._end(Outcome(End.STOPPED, "nobody reads the console"))
            raise
        except OSError as error:
            self.failed.append(Outcome(End.ERROR, f"{self.console.name}: {error.strerror}"))
            self._end(self.failed[0])
            raise

    def _end(self, outcome: Outcome) -> None:
        if self.machine is not None:
            self.machine.end(outcome)


def console_of(choice: str | None) -> str:
    """Return what ``--console`` says; CommandError if that is nothing that a restored machine can have."""
    choice = choice or STDIO
    if choice.startswith("virtio") or console_choice(choice) != choice:
        raise CommandError(f"--console {choice}: expected stdio, pty, file:PATH or none")
    return choice


@dataclass(frozen=True, slots=True)
class How:
    """How a machine is run."""

    extra: Mapping[str, Any]
    name: str | None = None
    timeout_s: float | None = None
    number: int = 0
    """Of a clone; 0: it is none."""
    runs: Callable[[], object] = lambda: None
    """Called when it runs."""


def run(machine: Machine, ends: Ends, how: How) -> int:
    """Run *machine* to its end; return the exit status."""
    ends.machine = machine
    caught, failed = ends.caught, ends.failed
    with (
        contextlib.ExitStack() as stack,
        signals_end(machine, caught),
        ends.console.attach(
            machine.board.serial, lambda: machine.end(Outcome(End.STOPPED, "from the console")), machine.ended
        ),
    ):
        machine.start()
        how.runs()
        gc.freeze()  # what there is stays, and is not written to: clones share it
        gc.enable()
        ends.heard.wait(_FIRST_OUTPUT_S)
        _control(machine, ends, how, stack)
        outcome = machine.wait(how.timeout_s)
    if outcome.end is End.POWER_OFF and failed:
        outcome = failed[0]
    if outcome.end is not End.POWER_OFF and not (how.number and caught):
        warn(outcome.detail if outcome in failed else f"{f'clone {how.number}: ' * bool(how.number)}{outcome}")
    return 128 + caught[0] if caught else EXIT_STATUS[outcome.end]


def open_end(choice: str) -> ConsoleEnd:
    """Open the user's end of the console; CommandError if it cannot be had."""
    return open_console(choice)


def _control(machine: Machine, ends: Ends, how: How, stack: contextlib.ExitStack) -> None:
    """Let other processes of the user's ask and tell the machine, until *stack* ends."""
    from softkvm.control.console import ConsoleHub
    from softkvm.control.machine import MachineControl, NotControlled

    name = f"{how.name}-{how.number}" if how.name and how.number else how.name
    hub = stack.enter_context(ConsoleHub())
    ends.hear = hub.output
    try:
        stack.enter_context(MachineControl(machine, name, hub, how.extra))
    except NotControlled as error:
        machine.end(Outcome(End.ERROR, f"--name {error}"))
