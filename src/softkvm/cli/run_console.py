# SPDX-License-Identifier: Apache-2.0
"""``softkvm run --console``: what the user's end of the console leads to in the machine.

With ``virtio``, that is ``/dev/hvc0`` as soon as the guest has a driver for it, and COM1 before and besides: kernels
write there first, and what they print is to be seen in any case.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from softkvm.cli import CommandError
from softkvm.cli.streams import InputLine
from softkvm.cli.terminal import STDIO, VIRTIO, ConsoleEnd, open_console
from softkvm.vmm.devices.ports import ConsoleLine, ConsoleSpec, PortSpec
from softkvm.vmm.devices.spec import DeviceSpec
from softkvm.vmm.machine import Machine


def where(choice: str) -> str:
    """Return the user's end that ``--console`` names."""
    kind, _, end = choice.partition(",")
    return (end or STDIO) if kind == VIRTIO else choice


def is_virtio(choice: str) -> bool:
    """Whether ``--console`` asks for the device."""
    return choice.partition(",")[0] == VIRTIO


def terminal_size() -> tuple[int, int]:
    """Return columns and rows of the terminal that standard output is; zeroes if it is none."""
    try:
        return tuple(os.get_terminal_size(1))  # type: ignore[return-value]
    except OSError:
        return 0, 0


class _Lines:
    """The console device if its guest takes input, or else COM1."""

    def __init__(self, serial: InputLine, console: ConsoleLine) -> None:
        self._serial = serial
        self._console = console

    @property
    def _line(self) -> InputLine:
        return self._console.outlet if self._console.outlet.ready else self._serial

    @property
    def pending_input(self) -> int:
        """Bytes that wait to be taken."""
        return self._line.pending_input

    def feed(self, data: bytes) -> None:
        """Take *data*."""
        self._line.feed(data)

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until not much is waiting."""
        return self._line.wait_for_room(timeout_s)


class RunConsole:
    """The console of one run: *choice* is what ``--console`` says, *specs* are the machine's devices.

    CommandError if it cannot be had.
    """

    def __init__(self, choice: str, specs: Sequence[DeviceSpec] = ()) -> None:
        if where(choice) == STDIO and any(isinstance(spec, PortSpec) and spec.end == STDIO for spec in specs):
            raise CommandError("--port NAME=stdio needs the console elsewhere: --console none, pty or file:PATH")
        self._virtio = is_virtio(choice)
        self._follows = self._virtio and where(choice) == STDIO
        self._end: ConsoleEnd = open_console(where(choice))
        self._lock = threading.Lock()
        self._line: ConsoleLine | None = None
        self.through: Callable[[InputLine], InputLine] = lambda line: line
        """Gives what stands before the line that input goes to."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._end.name

    def output(self, data: bytes) -> None:
        """Show output of the guest, of whichever of its consoles."""
        with self._lock:
            self._end.output(data)

    def specs(self, output: Callable[[bytes], object]) -> tuple[DeviceSpec, ...]:
        """Return the devices that the machine needs for it; *output* gets what they print."""
        if not self._virtio:
            return ()
        return (ConsoleSpec(output, terminal_size() if self._follows else (0, 0)),)

    @contextlib.contextmanager
    def attach(self, machine: Machine, end: Callable[[], Any]) -> Iterator[None]:
        """Send typed bytes to *machine*, and the terminal's size when it changes; *end* is for the key that ends it."""
        with self._end.attach(self.line(machine), end, machine.ended), self._sizes():
            yield

    def line(self, machine: Machine) -> InputLine:
        """Return where what is typed goes."""
        self._line = next((part for part in machine.devices if isinstance(part, ConsoleLine)), None)
        line: InputLine = machine.board.serial
        return self.through(line if self._line is None else _Lines(line, self._line))

    @contextlib.contextmanager
    def _sizes(self) -> Iterator[None]:
        line = self._line
        if line is None or not self._follows or terminal_size() == (0, 0):
            yield
            return

        def changed(number: int, frame: FrameType | None) -> None:
            line.resize(*terminal_size())

        before = signal.signal(signal.SIGWINCH, changed)
        try:
            yield
        finally:
            signal.signal(signal.SIGWINCH, before)

    def flush(self) -> None:
        """The machine stands: write out what the device holds back."""
        if self._line is not None:
            self._line.outlet.flush()
