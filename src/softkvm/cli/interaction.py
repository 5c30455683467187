# SPDX-License-Identifier: Apache-2.0
"""A program in a guest and its user: streams, signals, a terminal's mode and size."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import shutil
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from softkvm.cli import CommandError
from softkvm.cli.streams import Writer
from softkvm.cli.terminal import raw_terminal
from softkvm.vmm.guest.agent import Agent, AgentError, Session

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's

_PIECE: Final = 1 << 16
_LOOK_MS: Final = 100
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def add_program_arguments(add: Callable[..., object]) -> None:
    """Add what a program in a guest gets."""
    add("--env", metavar="NAME[=VALUE]", action="append", default=[], help="a variable; without a value it is as here")
    add("--cwd", metavar="DIR", default="", help="the command's directory in the guest (default: /root)")


def variable(text: str) -> tuple[str, str]:
    """Return name and value of ``NAME[=VALUE]``; CommandError."""
    name, equals, value = text.partition("=")
    if not name or "\0" in text:
        raise CommandError(f"--env {text}: expected NAME or NAME=VALUE")
    return name, value if equals else os.environ.get(name, "")


class Interaction:
    """One program, *arguments*, with the variables and the directory of *args*; on a terminal it has one of its own."""

    def __init__(self, arguments: list[str], args: Namespace) -> None:
        self._arguments = arguments
        self._environment = dict(variable(text) for text in args.env)
        self._directory: str = args.cwd
        self.terminal = os.isatty(0) and os.isatty(1)
        """Whether the user is at a terminal."""
        if self.terminal:
            self._environment.setdefault("TERM", os.environ.get("TERM", "vt100"))
        self.begun = False
        """Whether the program has started."""
        self._told: queue.SimpleQueue[Callable[[Session], object] | None] = queue.SimpleQueue()
        self._signalled = 0
        self._raw = contextlib.ExitStack()

    def serve(self, agent: Agent, ended: threading.Event) -> int:
        """Run it to its end, and return its status; output is not waited with once *ended* is set.

        AgentError, GuestOSError; BrokenPipeError if nobody reads the output.
        """
        size = shutil.get_terminal_size()
        terminal = (size.lines, size.columns) if self.terminal else None
        output, errors = Writer(1), Writer(2)
        done = threading.Event()
        with agent.start(self._arguments, self._environment, self._directory, terminal) as session:
            self.begun = True
            if self.terminal:
                self._raw.enter_context(raw_terminal(0))
            for target in (self._tell, self._feed):
                threading.Thread(target=target, args=(session, done), name="guest program", daemon=True).start()
            try:
                return session.serve(
                    lambda data: output.write(data, ended), lambda data: errors.write(data, ended)
                ).status
            finally:
                self.close()
                done.set()
                self._told.put(None)

    def close(self) -> None:
        """Give the terminal its mode back."""
        self._raw.close()

    def _tell(self, session: Session, done: threading.Event) -> None:
        """Send signals and sizes, which come in signals' handlers, from a thread."""
        with contextlib.suppress(AgentError):
            while (act := self._told.get()) is not None:
                act(session)

    def _feed(self, session: Session, done: threading.Event) -> None:
        """Send standard input until its end."""
        poll = select.poll()
        poll.register(0, select.POLLIN)
        with contextlib.suppress(AgentError, OSError):
            while not done.is_set():
                if not poll.poll(_LOOK_MS):
                    continue
                data = os.read(0, _PIECE)
                if not data:
                    session.end_input()
                    return
                session.write(data)

    @contextlib.contextmanager
    def signals(self, insisted: Callable[[int], object]) -> Iterator[None]:
        """Hand signals on to the program. *insisted* is called for a second one, and for one before the start."""

        def signalled(number: int, frame: FrameType | None) -> None:
            again, self._signalled = self._signalled == number, number
            if again or not self.begun:
                insisted(number)
            else:
                self._told.put(lambda session: session.send_signal(number))

        def resized(number: int, frame: FrameType | None) -> None:
            size = shutil.get_terminal_size()
            self._told.put(lambda session: session.resize(size.lines, size.columns))

        handlers = dict.fromkeys(_SIGNALS, signalled)
        if self.terminal:
            handlers[signal.SIGWINCH] = resized
        before = {number: signal.getsignal(number) for number in handlers}
        changed = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
        for number in changed:
            signal.signal(number, handlers[number])
        try:
            yield
        finally:
            for number in changed:
                signal.signal(number, before[number])
