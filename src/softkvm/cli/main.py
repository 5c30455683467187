# SPDX-License-Identifier: Apache-2.0
"""``softkvm COMMAND``: finds the command's module, parses its arguments, turns errors into one line and a status."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import NoReturn

import softkvm
from softkvm.cli import EXIT_USAGE, Command, CommandError

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("softkvm.cli.run", "boot a virtual machine"),
    "guest": ("softkvm.cli.guest", "prepare the default Linux guest"),
    "unittests": ("softkvm.cli.unittests", "run kvm-unit-tests from a build of them"),
    "bench": ("softkvm.cli.bench", "measure what exits cost, QEMU beside it"),
}
"""Every command: its module, imported only when it is called, and a line of help."""


class _Parser(ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "commands:\n" + "\n".join(lines) + "\n\n`softkvm COMMAND --help` explains one."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    overview = _Parser(
        prog="softkvm",
        description="The KVM virtualization stack, for Python.",
        epilog=_overview(),
        formatter_class=RawDescriptionHelpFormatter,
    )
    overview.add_argument("--version", action="version", version=f"softkvm {softkvm.__version__}")
    overview.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="what to do")
    try:
        name = overview.parse_args(arguments[:1]).command
        module, _summary = COMMANDS[name]
        command: Command = importlib.import_module(module).command
        parser = _Parser(
            prog=f"softkvm {name}",
            description=command.description,
            epilog=command.epilog,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parser)
        return command.run(parser.parse_args(arguments[1:]))
    except CommandError as error:
        print(f"softkvm: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:  # of argparse
        return exit.code if isinstance(exit.code, int) else EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
