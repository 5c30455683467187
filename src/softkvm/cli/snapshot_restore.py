# SPDX-License-Identifier: Apache-2.0
"""``softkvm snapshot restore``: machines that go on from a snapshot, with the user's console.

What it imports is what it takes: from the process's start to the guest's next output there is less than a blink.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softkvm.cli import EXIT_ERROR, EXIT_OK, CommandError
from softkvm.cli.accel import SOFT, open_kvm
from softkvm.cli.ends import EXIT_STATUS, signals_end
from softkvm.cli.output import warn
from softkvm.cli.terminal import STDIO, ConsoleEnd, console_choice, open_console
from softkvm.vmm.errors import MachineError
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.snapshot.directory import Snapshot

if TYPE_CHECKING:
    from softkvm.vmm.devices.spec import DeviceSpec

_READY_S = 600.0


@dataclass(frozen=True, slots=True)
class Restoring:
    """What the command's arguments say."""

    directory: str
    clones: int | None = None
    console: str | None = None
    accel: str | None = None
    step_time: bool = True
    timeout_s: float | None = None
    watch: bool = False


def restore(args: Restoring) -> int:
    """Do it; return the exit status."""
    choice = args.console or STDIO
    if choice.startswith("virtio") or console_choice(choice) != choice:
        raise CommandError(f"--console {choice}: expected stdio, pty, file:PATH or none")
    gc.disable()
    try:
        with Snapshot(args.directory) as snapshot:
            if args.clones is None:
                return _run(args, snapshot, open_console(choice), 0, _nothing)
            return _clones(args, snapshot, choice, args.clones)
    except MachineError as error:
        raise CommandError(str(error)) from None


def _nothing() -> None:
    """There is nobody to tell."""


def _run(args: Restoring, snapshot: Snapshot, console: ConsoleEnd, number: int, runs: Callable[[], None]) -> int:
    """Run one machine to its end, clone *number* if that isn't 0; return the exit status."""
    extra = snapshot.manifest.extra
    caught: list[int] = []
    failed: list[Outcome] = []

    def output(data: bytes) -> None:
        try:
            console.output(data)
        except BrokenPipeError:
            caught.append(signal.SIGPIPE)
            machine.end(Outcome(End.STOPPED, "nobody reads the console"))
            raise
        except OSError as error:
            failed.append(Outcome(End.ERROR, f"{console.name}: {error.strerror}"))
            machine.end(failed[0])
            raise

    with contextlib.ExitStack() as stack:
        kvm, accel = open_kvm(args.accel or str(extra.get("accel", SOFT)))
        stack.enter_context(kvm)
        machine = stack.enter_context(
            snapshot.restore(
                kvm,
                output,
                step_time=args.step_time,
                identity=number,
                watch=args.watch,
                device_specs=_device_specs(extra),
            )
        )
        _let_look(accel, stack)
        with (
            signals_end(machine, caught),
            console.attach(
                machine.board.serial, lambda: machine.end(Outcome(End.STOPPED, "from the console")), machine.ended
            ),
        ):
            machine.start()
            runs()
            gc.freeze()  # what there is stays, and is not written to: clones share it
            gc.enable()
            outcome = machine.wait(args.timeout_s)
        if outcome.end is End.POWER_OFF and failed:
            outcome = failed[0]
        if outcome.end is not End.POWER_OFF and not (number and caught):
            warn(outcome.detail if outcome in failed else f"{f'clone {number}: ' * bool(number)}{outcome}")
        return 128 + caught[0] if caught else EXIT_STATUS[outcome.end]


def _device_specs(extra: dict[str, Any]) -> tuple[DeviceSpec, ...]:
    """Return the devices that the machine was started with; ConfigError if there are no such any more."""
    options = extra.get("devices") or []
    if not options:
        return ()
    from softkvm.cli.devices import specs_of

    return specs_of(options)


def _let_look(accel: str, stack: contextlib.ExitStack) -> None:
    """Have other processes of the user's ask how the machine is, until *stack* ends."""
    if accel == SOFT:
        from softkvm.live.server import serve

        server = serve()
        if server is not None:
            stack.enter_context(contextlib.closing(server))


# -- clones


def _clones(args: Restoring, snapshot: Snapshot, choice: str, number: int) -> int:
    """Run clones to their ends; return 0, or the first other status of one."""
    from softkvm.vmm.snapshot.clones import Clones

    _import_all(args, snapshot)
    started = time.monotonic()

    def body(number: int, runs: Callable[[], None]) -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent ends the clones
        try:
            return _run(args, snapshot, _clone_console(choice, number), number, runs)
        except (MachineError, CommandError) as error:
            warn(f"clone {number}: {error}")
            return EXIT_ERROR

    with Clones(number, body) as clones:
        ready = clones.wait_ready(_READY_S)
        warn(f"{ready} clones of {args.directory} run, after {time.monotonic() - started:.2f} s")
        statuses = clones.wait()
    return next((status if status > 0 else 128 - status for status in statuses if status), EXIT_OK)


def _import_all(args: Restoring, snapshot: Snapshot) -> None:
    """Import what a clone's process will: it is there once, then, for all."""
    import softkvm.live.server
    import softkvm.vmm.machine

    kvm, _ = open_kvm(args.accel or str(snapshot.manifest.extra.get("accel", SOFT)))
    with kvm:
        softkvm.vmm.machine.Machine(kvm, softkvm.vmm.machine.Config(32 << 20)).close()
    _device_specs(snapshot.manifest.extra)


def _clone_console(choice: str, number: int) -> ConsoleEnd:
    if choice == STDIO:
        return LinesConsole(number)
    return open_console(f"{choice}.{number}" if choice.startswith("file:") else choice)


class LinesConsole:
    """Standard output of clone *number*: whole lines, each behind the number. There is no input."""

    name = "standard output"

    def __init__(self, number: int) -> None:
        self._prefix = f"{number}| ".encode()
        self._line = b""

    def output(self, data: bytes) -> None:
        """Write the lines that *data* ends."""
        *lines, self._line = (self._line + data).split(b"\n")
        text = b"".join(self._prefix + line.rstrip(b"\r") + b"\n" for line in lines)
        while text:
            text = text[os.write(1, text) :]

    @contextlib.contextmanager
    def attach(self, line: Any, end: Callable[[], Any], ended: threading.Event) -> Any:
        """No input; what is left of a line comes at the end."""
        try:
            yield
        finally:
            if self._line:
                self.output(b"\n")
