# SPDX-License-Identifier: Apache-2.0
"""``--config FILE``: options in a TOML file, by the names that they have on the command line."""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from argparse import Action, ArgumentParser
from collections.abc import Sequence
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.cli import CommandError

OPTION: Final = "--config"
COMMAND: Final = "command"
"""The key for what stands behind ``--``."""

_FILE: Final = Size("bytes of a configuration file", 1 << 20, None, giver="file", effect="status 2", where=__name__)


def add_config(parser: ArgumentParser) -> None:
    """Add ``--config``."""
    parser.add_argument(
        OPTION,
        metavar="FILE",
        action="append",
        default=[],
        help="options in a TOML file, by the same names (kernel = …, mem = …, disk = [ … ]); those of the command line "
        "come after them; may be repeated",
    )


def expand(
    parser: ArgumentParser, arguments: Sequence[str], command: list[str] | None
) -> tuple[list[str], list[str] | None]:
    """Return the arguments with those of all ``--config`` before them, and the command; CommandError."""
    rest: list[str] = []
    found: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name != OPTION or (equals and not value) or (not equals and not waiting):
            rest.append(argument)
            continue
        path = value if equals else waiting.pop(0)
        options, wanted = _read(parser, path)
        found += options
        command = wanted if command is None else command
    return found + rest, command


def _read(parser: ArgumentParser, path: str) -> tuple[list[str], list[str] | None]:
    try:
        with open(path, "rb") as file:
            data = file.read(_FILE.most + 1)
        if not _FILE.allows(len(data)):
            raise CommandError(f"{OPTION} {path}: has more than {_FILE.most} bytes")
        text = data.decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise CommandError(f"{OPTION} {path}: {error.strerror}") from None
    except ValueError as error:  # no TOML, no UTF-8
        raise CommandError(f"{path}: {error}") from None
    except RecursionError:
        raise CommandError(f"{path}: is nested too deeply") from None
    actions = _actions(parser)
    options: list[str] = []
    command = None
    for key, value in values.items():
        where = f"{path}:{_line(text, key)}"
        if key == COMMAND:
            if not (isinstance(value, list) and value and all(isinstance(part, str) for part in value) and value[0]):
                raise CommandError(f"{where}: {key}: expected a list of texts")
            command = value
            continue
        name = key.replace("_", "-")
        action = actions.get(name)
        if action is None:
            close = difflib.get_close_matches(name, actions, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise CommandError(f"{where}: {key}: there is no such option{hint}")
        options += _option(f"{where}: {key}", f"--{name}", action, value)
    return options, command


def _actions(parser: ArgumentParser) -> dict[str, Action]:
    """Return what may be in a file: all options but those for this one command line."""
    found = {}
    for action in parser._actions:
        negated = isinstance(action, argparse.BooleanOptionalAction)
        for option in action.option_strings:
            if option.startswith("--") and option not in ("--help", OPTION) and not (negated and option[2:5] == "no-"):
                found[option[2:]] = action
    return found


def _option(where: str, flag: str, action: Action, value: Any) -> list[str]:
    """Return the arguments that *value* is."""
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise CommandError(f"{where}: expected true or false")
        return [flag if value else f"--no-{flag[2:]}"]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise CommandError(f"{where}: expected true or false")
        return [flag] if value else []
    several = isinstance(action, argparse._AppendAction)
    if isinstance(value, list):
        if not several:
            raise CommandError(f"{where}: expected one value, got a list")
        return [text for part in value for text in _option(where, flag, action, part)]
    if value is True and action.nargs == "?":
        return [flag]
    if value is False and action.nargs == "?":
        return []
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        expected = "a text, a number or a list of them" if several else "a text or a number"
        raise CommandError(f"{where}: expected {expected}")
    if action.nargs == "?" and value == "":
        return [flag]
    return [f"{flag}={value}"]


def _line(text: str, key: str) -> int:
    """Return the number of the line with *key*; the reader of TOML doesn't tell."""
    names = "|".join(re.escape(form) for form in (key, f'"{key}"', f"'{key}'"))
    found = re.search(rf"^[ \t]*(?:\[+[ \t]*)?(?:{names})[ \t]*[=.\]]", text, re.MULTILINE)
    return 1 if found is None else text.count("\n", 0, found.start()) + 1
