# SPDX-License-Identifier: Apache-2.0
"""A machine's console for programs: send text, expect a pattern.

::

    console = Console()
    with Machine(softkvm.open(), Config(), console.output) as machine:
        console.attach(machine)
        machine.load(kernel, initrd, "console=ttyS0")
        machine.start()
        console.expect(r"# ", timeout_s=60)
        console.send("uname -a\\n")
        release = console.expect(r"Linux \\S+ (\\S+)")[1]
"""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from softkvm.vmm.machine import Machine

TAIL = 2000
"""Characters of output that an error shows."""


class ConsoleError(Exception):
    """The awaited text did not come; the message shows the end of what came instead."""


class ConsoleTimeout(ConsoleError):
    """It did not come in time."""


class ConsoleEnded(ConsoleError):
    """It did not come before the machine ended."""


class Console:
    """The text of a machine's console, complete in :attr:`text`, and its input.

    ``expect`` searches what came since the last match. Give :meth:`output` to the machine as its console.
    """

    def __init__(self, mirror: Callable[[bytes], object] | None = None) -> None:
        """*mirror* gets the output as well."""
        self._mirror = mirror
        self._changed = threading.Condition()
        self._data = bytearray()
        self._position = 0
        self._machine: Machine | None = None
        self.look: Callable[[], object] | None = None
        """Called now and then while somebody waits; what it raises ends the waiting."""

    @property
    def text(self) -> str:
        """Everything that came, decoded as UTF-8."""
        with self._changed:
            return self._data.decode("utf-8", "replace")

    def attach(self, machine: Machine) -> None:
        """Send to *machine*, and give up waiting when it ends."""
        self._machine = machine

    def output(self, data: bytes) -> None:
        """Take output of the machine."""
        if self._mirror is not None:
            self._mirror(data)
        with self._changed:
            self._data += data
            self._changed.notify_all()

    def carry_on(self, other: Console) -> None:
        """Have what came to *other*, whose machine has ended, come before what comes here; it counts as found."""
        with other._changed, self._changed:
            self._data[:0] = other._data
            self._position += len(other._data)

    def send(self, text: str) -> None:
        """Type *text* at the console."""
        if self._machine is None:
            raise ConsoleError("no machine is attached to the console")
        self._machine.board.serial.feed(text.encode())

    def expect(self, pattern: str, timeout_s: float = 30.0) -> re.Match[str]:
        """Wait for *pattern* (a regular expression) in the output after the last match; return the match.

        Raises ConsoleTimeout after *timeout_s*, ConsoleEnded if the machine ends first.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                ended = self._machine is not None and self._machine.ended.is_set()
                if ended and self._machine is not None:
                    self._changed.release()  # output() needs it while the last bytes are flushed
                    try:
                        self._machine.board.serial.flush()
                    finally:
                        self._changed.acquire()
                # surrogateescape: one character per undecodable byte, so positions can be counted back in bytes
                fresh = self._data[self._position :].decode("utf-8", "surrogateescape")
                found = compiled.search(fresh)
                if found:
                    self._position += len(fresh[: found.end()].encode("utf-8", "surrogateescape"))
                    return found
                if ended and self._machine is not None:
                    raise ConsoleEnded(self._message(f"machine ended ({self._machine.outcome})", pattern))
                if self.look is not None:
                    self.look()
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise ConsoleTimeout(self._message(f"timeout after {timeout_s:g} s", pattern))
                self._changed.wait(min(remaining_s, 0.1))

    def _message(self, what: str, pattern: str) -> str:
        tail = self._data[-TAIL:].decode("utf-8", "replace")
        return f"{what} while expecting {pattern!r}; the output ends with:\n{tail}"
