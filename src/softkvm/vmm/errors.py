# SPDX-License-Identifier: Apache-2.0
"""What can go wrong before a guest runs. The message names the thing, its value and what was expected."""

from __future__ import annotations


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
