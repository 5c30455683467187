# SPDX-License-Identifier: Apache-2.0
"""What can go wrong before a guest runs. The message names the thing, its value and what was expected."""

from __future__ import annotations

import os
import traceback


def unexpected(error: BaseException) -> str:
    """Return what an exception that nobody expected says of itself, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"


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
