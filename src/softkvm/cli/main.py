# SPDX-License-Identifier: Apache-2.0
"""``softkvm COMMAND``: finds the command's module, parses its arguments, turns errors into one line and a status."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import re
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

import softkvm
from softkvm.cli import EXIT_ERROR, EXIT_USAGE, Command, CommandError
from softkvm.cli.output import one_line, stdout_error, warn
from softkvm.vmm.errors import show_traceback, unexpected

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("softkvm.cli.run", "boot a virtual machine"),
    "snapshot": ("softkvm.cli.snapshot", "save a running machine, go on from there, once or many times"),
    "migrate": ("softkvm.cli.migrate", "move a running machine to another process"),
    "exec": ("softkvm.cli.exec", "run an unmodified KVM client: QEMU, kvmtool, Firecracker, your own"),
    "list": ("softkvm.cli.list", "the machines that run"),
    "stop": ("softkvm.cli.lifecycle:stop", "shut a machine down, or end it"),
    "pause": ("softkvm.cli.lifecycle:pause", "let a machine stand"),
    "resume": ("softkvm.cli.lifecycle:resume", "let a paused machine go on"),
    "reset": ("softkvm.cli.lifecycle:reset", "begin a machine anew, as its reset button does"),
    "console": ("softkvm.cli.console", "be at a running machine's console"),
    "shell": ("softkvm.cli.shell", "a shell, or another program, in a running machine's guest"),
    "debug": ("softkvm.cli.debug", "registers, code and stack of a machine's vCPUs; NMI and SysRq"),
    "balloon": ("softkvm.cli.balloon", "how much memory a machine has, and have it give some back"),
    "net": ("softkvm.cli.net", "a machine's networks: ports, connections, counters, cables"),
    "stat": ("softkvm.cli.stat", "live counters of a running machine, as kvm_stat has them"),
    "trace": ("softkvm.cli.trace", "record KVM's tracepoints, print them, open them in Perfetto"),
    "image": ("softkvm.cli.image", "make a small Debian system on a disk"),
    "setup": ("softkvm.cli.setup", "prepare the default guest, or a root directory for one"),
    "version": ("softkvm.cli.version", "versions of softkvm, of the KVMs and of the host"),
    "guest": ("softkvm.cli.guest", "prepare the default Linux guest"),
    "unittests": ("softkvm.cli.unittests", "run kvm-unit-tests from a build of them"),
    "selftests": ("softkvm.cli.selftests", "run the kernel's KVM selftests from a build of them"),
    "vsock-test": ("softkvm.cli.vsock_test", "test sockets between host and guest, as the kernel's suite does"),
    "bench": ("softkvm.cli.bench", "measure what exits, dirty logging, demand paging, task work and counters cost"),
    "completion": ("softkvm.cli.completion", "print a shell's completion of these commands"),
}
"""Every command: its module, imported only when it is called, and a line of help."""


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""End a command as an exception does: what it began is cleaned up."""


class _Signalled(BaseException):
    """One of SIGNALS came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Parser(ArgumentParser):
    """Says what is wrong in one line, as every other message: without the usage, with the option's long name first."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (?:-\w/)?(\S+): ", r"\1: ", message)
        required = "the following arguments are required: "
        if message.startswith(required):  # where options may stand between, argparse names those that may be left out
            optional = {str(action.metavar) for action in self._actions if action.nargs in ("*", "?")}
            names = [name for name in message.removeprefix(required).split(", ") if name not in optional]
            message = f"expected {' and '.join(names)}; `{self.prog} --help` explains"
        self.exit(EXIT_USAGE, f"softkvm: {one_line(message)}\n")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "commands:\n" + "\n".join(lines) + "\n\n`softkvm COMMAND --help` explains one."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    gc.disable()  # what is imported stays: nothing is gained by looking through it again and again
    _fill_standard_descriptors()
    with _signals_raise():
        try:
            status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        except _Signalled as signalled:
            if signalled.number == signal.SIGINT and os.isatty(2):
                os.write(2, b"\n")  # the terminal shows ^C
            status = _say_why(f"stopped: {signal.Signals(signalled.number).name}", 128 + signalled.number)
        except CommandError as error:
            status = _say_why(str(error), error.status)
        except SystemExit as exit:  # of argparse
            status = exit.code if isinstance(exit.code, int) else EXIT_USAGE
        except Exception as error:
            show_traceback(error)
            status = _say_why(f"internal error: {unexpected(error)}", EXIT_ERROR)
        return _flush(status)


def _dispatch(arguments: list[str]) -> int:
    overview = _Parser(
        prog="softkvm",
        description="The KVM virtualization stack, for Python.",
        epilog=_overview(),
        formatter_class=RawDescriptionHelpFormatter,
    )
    overview.add_argument("--version", action="version", version=f"softkvm {softkvm.__version__}")
    overview.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="what to do")
    if not arguments:
        overview.error(f"expected a command: {', '.join(COMMANDS)}; `softkvm --help` explains them")
    return run_command(overview.parse_args(arguments[:1]).command, arguments[1:])


def load_command(place: str) -> Command:
    """Return the command at *place*: a module that has one, or ``module:name``."""
    module, _, name = place.partition(":")
    command: Command = getattr(importlib.import_module(module), name or "command")
    return command


def run_command(name: str, arguments: list[str]) -> int:
    """Run the command *name*; return the exit status."""
    module, _summary = COMMANDS[name]
    command = load_command(module)
    parser = _Parser(
        prog=f"softkvm {name}",
        description=command.description,
        epilog=command.epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parse = parser.parse_intermixed_args if command.intermixed else parser.parse_args
    inner = None
    if command.takes_command and "--" in arguments:
        at = arguments.index("--")
        arguments, inner = arguments[:at], arguments[at + 1 :]
        if not inner or not inner[0]:
            parser.error("expected a command behind --")
    if command.takes_command:
        from softkvm.cli.configuration import expand

        arguments, inner = expand(parser, arguments, inner)
    parsed = parse(arguments)
    if command.takes_command:
        parsed.command = inner
    gc.enable()
    return command.run(parsed)


def _say_why(text: str, status: int) -> int:
    if text:
        warn(text)
    return status


def _flush(status: int) -> int:
    """Write what standard output still holds; return *status*, or another if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as null:  # Python flushes once more when it ends
            os.dup2(null.fileno(), 1)
        failure = stdout_error(error)
        return status or _say_why(str(failure), failure.status)
    return status


def _fill_standard_descriptors() -> None:
    """Open what was closed (``>&-``) on /dev/null, so that no file of ours becomes standard output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY
            os.open(os.devnull, mode)  # the lowest number that is free
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and logs of guests hold anything
        errors = "surrogateescape" if sys.stdout.encoding.lower() == "utf-8" else "backslashreplace"
        sys.stdout.reconfigure(errors=errors)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGNALS end what runs with an exception, except those that were ignored (``nohup``)."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


if __name__ == "__main__":
    sys.exit(main())
