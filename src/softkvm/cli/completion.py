# SPDX-License-Identifier: Apache-2.0
"""``softkvm completion``: prints what a shell needs to complete the command line, made from the parsers by shtab."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from typing import Any

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import file_name
from softkvm.cli.output import say

SHELLS = ("bash", "zsh", "fish")

EPILOG = """\
  bash  softkvm completion bash > ~/.local/share/bash-completion/completions/softkvm
  zsh   softkvm completion zsh > ~/.zfunc/_softkvm    (a directory of fpath, before compinit)
  fish  softkvm completion fish > ~/.config/fish/completions/softkvm.fish

exit status: 0; 1 if the package shtab is not installed; 2 usage: bad arguments
"""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def _parser(files: Any) -> ArgumentParser:
    """Return one parser that has all commands' arguments; *files* is how shtab knows those that name a file."""
    from softkvm.cli.main import COMMANDS, load_command

    parser = ArgumentParser(prog="softkvm")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers()
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        load_command(module).add_arguments(command)
        for action in command._actions:
            if action.type is file_name:
                vars(action)["complete"] = files
    return parser


def _run(args: Namespace) -> int:
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        raise CommandError("completion needs the package shtab: pip install shtab", EXIT_ERROR) from None
    say(shtab.complete(_parser(shtab.FILE), args.shell))
    return EXIT_OK


command = Command(_add_arguments, _run, "Print what a shell needs to complete softkvm's command line.", EPILOG)
