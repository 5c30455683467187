# SPDX-License-Identifier: Apache-2.0
"""``softkvm console``: be at the console of a machine that runs."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

from softkvm.cli import EXIT_OK, Command
from softkvm.cli.live import Running, connected
from softkvm.cli.output import begin_line, left_partial_line, warn
from softkvm.cli.streams import Writer, reading
from softkvm.cli.terminal import EscapeParser, raw_terminal

HELP = """\
Ctrl-A d        leave the console; the machine goes on
Ctrl-A x        end the machine
Ctrl-A h        this help
Ctrl-A Ctrl-A   send Ctrl-A to the guest
"""

EPILOG = f"""\
What the guest has said last is shown first. Any number of terminals may be there, and that of `softkvm run`; what is
typed at one the guest gets, and all see what it says. Without a terminal, standard input goes to the guest and its
end ends nothing: the command ends with the machine.

keys:
{HELP}
exit status: 0; 1 if there is no such machine; 2 usage: bad arguments; 128 + n ended by signal n
"""

_PIECE = 65536


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machine", metavar="NAME|PID", nargs="?", help="which machine (default: the only one)")
    add("--no-past", action="store_true", help="show only what comes from now on")


def _run(args: Namespace) -> int:
    with connected(args.machine) as running:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            running.ask("console", theirs.fileno(), past=not args.no_past)
            theirs.close()
            _serve(running, ours)
    return EXIT_OK


def _serve(running: Running, channel: socket.socket) -> None:
    """Show what comes, until the machine hangs up or the user leaves."""
    gone = threading.Event()
    last = b"\n"
    writer = Writer(1)

    def leave() -> None:
        gone.set()
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)

    try:
        with _keys(running, channel, leave), contextlib.suppress(ConnectionError):
            while data := channel.recv(_PIECE):
                writer.write(data)
                last = data[-1:]
    finally:
        if last != b"\n":
            left_partial_line(1)
            if os.isatty(1):
                begin_line(1)
    if os.isatty(0):
        warn(f"{running.name}: " + ("it goes on" if gone.is_set() else "its console is closed"))


@contextlib.contextmanager
def _keys(running: Running, channel: socket.socket, leave: Callable[[], None]) -> Iterator[None]:
    """Send what is typed."""

    def send(data: bytes) -> None:
        with contextlib.suppress(OSError):
            channel.sendall(data)

    if not os.isatty(0):
        with reading(0, send, lambda timeout_s: True):
            yield
        return
    warn(f"{running.name}: Ctrl-A d leaves the console, Ctrl-A h helps")
    errors = Writer(2)
    escapes = EscapeParser(
        lambda: running.ask("end"),
        lambda: errors.write(HELP.replace("\n", "\r\n").encode()),
        {"d": leave},
    )
    with raw_terminal(0), reading(0, lambda data: send(escapes.feed(data)), lambda timeout_s: True):
        yield


command = Command(_add_arguments, _run, "Be at the console of a machine that runs.", EPILOG)
