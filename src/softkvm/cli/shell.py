# SPDX-License-Identifier: Apache-2.0
"""``softkvm shell``: a shell, or another program, in the guest of a machine that runs."""

from __future__ import annotations

import socket
import threading
from argparse import ArgumentParser, Namespace

from softkvm.cli import EXIT_ERROR, Command, CommandError
from softkvm.cli.arguments import count
from softkvm.cli.interaction import NOT_EXECUTABLE, NOT_FOUND, Interaction, add_program_arguments
from softkvm.cli.live import Running, connected
from softkvm.cli.output import warn
from softkvm.vmm.guest.agent import PORT, Agent, AgentError, GuestOSError

EPILOG = """\
softkvm shell [OPTIONS] [NAME|PID] [-- COMMAND [ARGUMENTS]]

The machine needs a vsock device (softkvm run --vsock), and its guest an agent: the default guest has it, others can run
the same static program. Any number of shells may be there at once; each is ended when the command is.

exit status: that of the shell or COMMAND, 128 + n if signal n ended it, 127 if there is no such program, 126 if it is
none; 1 if there is no such machine, or its guest does not answer; 2 usage: bad arguments
"""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machine", metavar="NAME|PID", nargs="?", help="which machine (default: the only one)")
    add_program_arguments(add)
    add("--port", metavar="N", default=str(PORT), help=f"the agent's vsock port (default: {PORT})")


def agent_of(running: Running, port: int) -> Agent:
    """Return the agent of a running machine, to whose port its process leads."""

    def connect(port: int, *, timeout_s: float, retry: bool = False) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                running.ask("vsock", theirs.fileno(), port=port)
            except BaseException:
                ours.close()
                raise
        return ours

    return Agent(connect, port)


def _run(args: Namespace) -> int:
    port = count("--port", args.port, 0, 0xFFFFFFFE)
    arguments = args.command or ["sh", "-l"]
    interaction = Interaction(arguments, args)

    def insisted(number: int) -> None:
        raise CommandError("", 128 + number)

    with connected(args.machine) as running, interaction.signals(insisted):
        try:
            return interaction.serve(agent_of(running, port), threading.Event())
        except GuestOSError as error:
            warn(f"{error.filename or arguments[0]}: {error.strerror}")
            return NOT_FOUND if error.errno == 2 else NOT_EXECUTABLE
        except AgentError as error:
            raise CommandError(f"{running.name}: {error}", EXIT_ERROR) from None
        finally:
            interaction.close()


command = Command(
    _add_arguments,
    _run,
    "A shell, or another program, in the guest of a machine that runs.",
    EPILOG,
    takes_command=True,
)
