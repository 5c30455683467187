# SPDX-License-Identifier: Apache-2.0
"""Commands in the default guest's shell on the serial console, with their output and exit status.

A command travels as base64 in pieces that a line of a terminal has room for, so any text goes. Its output stands
between two lines that the shell makes up and nobody types: the echo of what is typed does not look like them.
"""

from __future__ import annotations

import base64
import re
import secrets
from dataclasses import dataclass
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.console import Console, ConsoleTimeout

_PIECE: Final = 700  # characters; busybox's editor takes 1023 in a line
_COMMAND: Final = Size(
    "bytes of a command for a guest's shell", 1 << 20, ValueError, effect="ValueError", where=__name__
)


class CommandFailed(Exception):
    """A command ended with another status than 0; the message shows its output."""

    def __init__(self, completed: Completed) -> None:
        super().__init__(f"{completed.command!r} ended with status {completed.status}:\n{completed.output}")
        self.completed = completed


class CommandTimeout(Exception):
    """A command has taken too long; the message shows what it has written so far."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended: its output, what it wrote to standard output and error, and its exit status."""

    command: str
    status: int
    output: str


class Shell:
    """The shell at the prompt of *console*."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._quiet = False

    def run(self, command: str, timeout_s: float, input: bytes) -> Completed:
        """Run *command*; return how it ended.

        CommandTimeout after *timeout_s*: the command may run on, and the console is its. ValueError for a command with
        a NUL character, or of more than a MiB.
        """
        if not self._quiet:  # the kernel's messages would stand among the output
            self._quiet = True
            self._run("dmesg -n 1", b"", timeout_s)
        status, output = self._run(command, input, timeout_s)
        return Completed(command, status, output)

    def _run(self, command: str, input: bytes, timeout_s: float) -> tuple[int, str]:
        token = secrets.token_hex(8)
        self._give("softkvm_c", command.encode("utf-8", "surrogateescape"))
        given = "</dev/null"
        if input:
            self._give("softkvm_i", input)
            given = "< /tmp/.softkvm_i"
            self._console.send('echo "$softkvm_i" | base64 -d > /tmp/.softkvm_i\n')
        self._console.send(
            f'echo "@$((1))@{token}"; sh -c "$(echo "$softkvm_c" | base64 -d)" {given} 2>&1; '
            f'echo "@$?@{token}"; softkvm_c= softkvm_i=\n'
        )
        pattern = rf"(?s)@1@{token}\r?\n(.*?)@(\d+)@{token}\r?\n"
        try:
            found = self._console.expect(pattern, timeout_s)
        except ConsoleTimeout as error:
            raise CommandTimeout(f"{command!r} takes longer than {timeout_s:g} s: {error}") from None
        return int(found[2]), re.sub(r"\r+\n", "\n", found[1])

    def _give(self, name: str, data: bytes) -> None:
        """Set a variable of the shell's to *data*, in base64."""
        _COMMAND.check(len(data))
        text = base64.b64encode(data).decode()
        self._console.send(f"{name}=\n")
        for at in range(0, len(text), _PIECE):
            self._console.send(f"{name}=${{{name}}}{text[at : at + _PIECE]}\n")
