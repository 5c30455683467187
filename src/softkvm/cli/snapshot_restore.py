# SPDX-License-Identifier: Apache-2.0
"""``softkvm snapshot restore``: machines that go on from a snapshot, with the user's console."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from softkvm.cli import EXIT_ERROR, EXIT_OK, CommandError
from softkvm.cli.accel import open_kvm
from softkvm.cli.output import warn
from softkvm.cli.restored import Ends, How, accel_of, console_of, device_specs, open_end, run
from softkvm.cli.terminal import STDIO, ConsoleEnd
from softkvm.vmm.errors import MachineError
from softkvm.vmm.snapshot.directory import Snapshot

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
    name: str | None = None


def restore(args: Restoring) -> int:
    """Do it; return the exit status."""
    choice = console_of(args.console)
    if args.name is not None:
        _check_name(args.name)
    gc.disable()
    try:
        with Snapshot(args.directory) as snapshot:
            if args.clones is None:
                return _run(args, snapshot, open_end(choice), 0, lambda: None)
            return _clones(args, snapshot, choice, args.clones)
    except MachineError as error:
        raise CommandError(str(error)) from None


def _check_name(name: str) -> None:
    from softkvm.live import names

    try:
        names.check_name(name)
    except names.NameRefused as error:
        raise CommandError(f"--name {error}") from None


def _run(args: Restoring, snapshot: Snapshot, console: ConsoleEnd, number: int, runs: Callable[[], object]) -> int:
    """Run one machine to its end, clone *number* if that isn't 0; return the exit status."""
    extra = snapshot.manifest.extra
    ends = Ends(console)
    with contextlib.ExitStack() as stack:
        kvm = stack.enter_context(open_kvm(accel_of(extra, args.accel))[0])
        with device_specs(extra) as specs:
            machine = stack.enter_context(
                snapshot.restore(
                    kvm,
                    ends.output,
                    step_time=args.step_time,
                    identity=number,
                    watch=args.watch,
                    device_specs=specs,
                )
            )
        return run(machine, ends, How(extra, args.name, args.timeout_s, number, runs))


# -- clones


def _clones(args: Restoring, snapshot: Snapshot, choice: str, count: int) -> int:
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

    with Clones(count, body) as clones:
        ready = clones.wait_ready(_READY_S)
        warn(f"{ready} clones of {args.directory} run, after {time.monotonic() - started:.2f} s")
        statuses = clones.wait()
    return next((status if status > 0 else 128 - status for status in statuses if status), EXIT_OK)


def _import_all(args: Restoring, snapshot: Snapshot) -> None:
    """Import what a clone's process will: it is there once, then, for all."""
    import softkvm.control.machine
    import softkvm.live.questions  # noqa: F401
    from softkvm.vmm.machine import Config, Machine

    extra = snapshot.manifest.extra
    kvm, _ = open_kvm(accel_of(extra, args.accel))
    with kvm:
        Machine(kvm, Config(32 << 20)).close()
    with device_specs(extra):
        pass


def _clone_console(choice: str, number: int) -> ConsoleEnd:
    if choice == STDIO:
        return LinesConsole(number)
    return open_end(f"{choice}.{number}" if choice.startswith("file:") else choice)


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
