# SPDX-License-Identifier: Apache-2.0
"""``softkvm run -- COMMAND``: one command in the default guest, whose exit status is ours."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.interaction import NOT_EXECUTABLE, NOT_FOUND, Interaction, add_program_arguments
from softkvm.cli.output import warn
from softkvm.cli.terminal import NONE, STDERR, STDIO
from softkvm.vmm.errors import show_traceback, unexpected
from softkvm.vmm.guest.agent import Agent, AgentError, GuestOSError
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

BOOT_S: Final = 300.0
"""How long a guest may take until its agent answers; --timeout may be less."""
AGENT_WORD: Final = "softkvm.agent"
"""Has the default guest's init wait for the agent's host, in place of a shell."""

_POWER_OFF_S: Final = 10.0
_GONE_S: Final = 5.0


def add_command_arguments(parser: ArgumentParser) -> None:
    """Add what belongs to a command in the guest."""
    group = parser.add_argument_group(
        "a command in the guest",
        "softkvm run [OPTIONS] -- COMMAND [ARGUMENTS]: run it in the default guest, or on a kernel of yours with the "
        "default guest's programs, and end with its exit status. Directories of --share are at /mnt/TAG",
    )
    add = group.add_argument
    add("-q", "--quiet", action="store_true", help="show the command's output alone, not the console on standard error")
    add_program_arguments(add)
    add(
        "--file",
        metavar="FILE[:PATH]",
        action="append",
        default=[],
        help="copy a file into the guest before (default: into /root)",
    )


@dataclass(frozen=True, slots=True)
class _File:
    """A file for the guest."""

    data: bytes
    mode: int
    path: str


class GuestCommand:
    """The command that *args* name, checked: CommandError."""

    def __init__(self, args: Namespace) -> None:
        self._arguments: list[str] = args.command
        if args.initrd:
            raise CommandError("a command runs in the default guest's file system: --initrd is there, too")
        if args.kernel is not None and args.kernel.startswith("flat:"):
            raise CommandError("a command needs a Linux kernel: flat:FILE is none")
        self._files = [_file(text) for text in args.file]
        self._interaction = Interaction(self._arguments, args)
        self.booted: Callable[[Machine], object] = lambda machine: None
        """Called with a machine that has booted, before it runs anything."""
        self.status: int | None = None
        """The command's exit status, once it has ended."""

    @staticmethod
    def console(args: Namespace) -> str:
        """Return where the console goes."""
        if args.console != STDIO:
            return str(args.console)
        return NONE if args.quiet or (os.isatty(0) and os.isatty(1)) else STDERR

    def run(self, machine: Machine, timeout_s: float | None) -> Outcome:
        """Start the machine, run the command, switch the machine off; return how the machine has ended."""
        worker = threading.Thread(target=self._work, args=(machine,), name="guest command", daemon=True)
        try:
            with self._interaction.signals(lambda number: self._insisted(machine, number)):
                machine.start()
                worker.start()
                outcome = machine.wait(timeout_s)
            worker.join(1)
        finally:
            self._interaction.close()
        if outcome.end is End.POWER_OFF and self.status is None:
            warn("the guest switched itself off before the command had ended")
        return outcome

    def _insisted(self, machine: Machine, number: int) -> None:
        """A signal came before the command, or twice: it is the machine's."""
        machine.end(Outcome(End.STOPPED, signal.Signals(number).name))
        self.status = 128 + number

    def _work(self, machine: Machine) -> None:
        """On a thread of its own: the main thread waits for the machine, which may end by itself."""
        name = self._arguments[0]
        agent = Agent(machine.vsock.connect)
        try:
            agent.wait(BOOT_S)
            self.booted(machine)
            for file in self._files:
                name = file.path
                agent.put(file.path, file.data, file.mode)
            name = self._arguments[0]
            self.status = self._interaction.serve(agent, machine.ended)
        except GuestOSError as error:
            warn(f"{error.filename or name}: {error.strerror}")
            self.status = NOT_FOUND if isinstance(error, FileNotFoundError) or error.errno == 2 else NOT_EXECUTABLE
        except BrokenPipeError:
            self.status = 128 + signal.SIGPIPE
        except AgentError as error:
            if not machine.ended.wait(_GONE_S):  # a guest that goes takes its agent with it first
                machine.end(Outcome(End.ERROR, str(error)))
            return
        except Exception as error:
            show_traceback(error)
            machine.end(Outcome(End.ERROR, unexpected(error)))
            return
        with contextlib.suppress(AgentError):
            agent.power_off(_POWER_OFF_S)
        if not machine.ended.wait(_POWER_OFF_S):
            machine.end(Outcome(End.POWER_OFF))


def check_no_command(args: Namespace) -> None:
    """Complain of options that belong to a command, where there is none."""
    for option in ("quiet", "env", "cwd", "file"):
        if getattr(args, option):
            raise CommandError(f"--{option} needs a command: softkvm run … -- COMMAND")


def _file(text: str) -> _File:
    name, _, path = text.partition(":")
    try:
        with open(name, "rb") as file:
            data, mode = file.read(), os.fstat(file.fileno()).st_mode & 0o777
    except OSError as error:
        raise CommandError(f"--file {name}: {error.strerror}") from None
    if path and not path.startswith("/"):
        path = f"/root/{path}"
    return _File(data, mode, path or f"/root/{os.path.basename(name)}")


def command_status(command: GuestCommand | None, outcome: Outcome, status: int) -> int:
    """Return the exit status: the command's, if the machine ended because it had."""
    if command is None or command.status is None or outcome.end not in (End.POWER_OFF, End.STOPPED):
        return status if command is None or outcome.end is not End.POWER_OFF else EXIT_ERROR
    return command.status
