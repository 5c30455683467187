# SPDX-License-Identifier: Apache-2.0
"""Whose files are in a shared directory: the host's users and groups, as the guest sees them.

What a guest does in a share, it does as the user whose process the machine is. So that user's files are, to a guest,
those of its root (``owner=root``, the default): programs there ask whether files are their own. The host's root then is
65534 (nobody), as in a user namespace, and everybody else is who he is. With ``owner=host``, and where the process is
root's, all are who they are.
"""

from __future__ import annotations

import errno
import os
from typing import Final

NOBODY: Final = 65534
UNCHANGED: Final = 0xFFFFFFFF
"""The user or group -1: don't change it."""


class Owners:
    """Translates the ids of one kind, users or groups: *own* is the process's."""

    def __init__(self, own: int, *, translate: bool) -> None:
        self.own = own
        self._translate = translate and own != 0

    def to_guest(self, number: int) -> int:
        """Return whom the guest takes the host's user, or group, for."""
        if self._translate:
            if number == self.own:
                return 0
            if number == 0:
                return NOBODY
        return number

    def to_host(self, number: int) -> int:
        """Return who the guest's user, or group, is on the host; -1 for nobody in particular, EPERM if nobody is."""
        if number == UNCHANGED:
            return -1
        if self._translate:
            if number == 0:
                return self.own
            if number == self.own:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return number
