# SPDX-License-Identifier: Apache-2.0
"""What can go wrong before a guest runs. The message names the thing, its value and what was expected."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), " ")


def unexpected(error: BaseException) -> str:
    """Return what an exception that nobody expected says of itself, and where it was raised."""
    if isinstance(error, SyntaxError):  # its text has the place
        return f"{type(error).__name__}: {error}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"


def show_traceback(error: BaseException) -> None:
    """Write how *error* came about to standard error, in Python's development mode (``-X dev``) only."""
    if not sys.flags.dev_mode:
        return
    text = "".join(traceback.format_exception(error))
    if sys.stderr.isatty():  # which may be raw, a machine's console
        text = text.replace("\n", "\r\n")
    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """Write one line about a machine that goes on to standard error, if anybody takes it."""
    end = "\r\n" if sys.stderr is not None and sys.stderr.isatty() else "\n"  # a terminal may be raw
    with contextlib.suppress(OSError, ValueError):
        print(f"softkvm: {text.translate(_CONTROL)}", end=end, file=sys.stderr, flush=True)


class MachineError(Exception):
    """A machine cannot be built or started as asked."""


class ConfigError(MachineError):
    """A size or a count that no machine of ours can have."""


class ImageError(MachineError):
    """A kernel, an initrd or a command line that cannot be loaded."""


class LoadTimeout(MachineError):
    """The time for loading is over."""


class StateError(MachineError):
    """A machine is asked for what it cannot do any more, or not yet."""


class SnapshotError(MachineError):
    """A machine's state cannot be taken, or is none that this machine can have."""


class MigrationError(MachineError):
    """A machine cannot move to another process, or not come from one."""
