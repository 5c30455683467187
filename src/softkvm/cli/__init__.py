# SPDX-License-Identifier: Apache-2.0
"""The command line: one module per command, each with a :class:`Command` named ``command``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

EXIT_OK = 0
EXIT_ERROR = 1
"""The host, the KVM or softkvm itself failed."""
EXIT_USAGE = 2
"""Bad arguments or bad input files."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of ``softkvm``: its arguments and what it does.

    ``run`` returns the exit status. It raises :class:`CommandError` for what deserves one line on stderr.
    """

    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    description: str = ""
    epilog: str = ""
    intermixed: bool = False
    """Options may stand between positional arguments."""
    takes_command: bool = False
    """What stands behind ``--`` is another command's: ``args.command``, None without. Options may be in a file, too."""


class CommandError(Exception):
    """Ends the command with one line on stderr and *status*."""

    def __init__(self, message: str, status: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.status = status
