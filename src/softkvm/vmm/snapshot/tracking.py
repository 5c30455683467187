# SPDX-License-Identifier: Apache-2.0
"""Machines whose changes are watched since a snapshot, so that the next one may have only those."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

from softkvm.vmm.errors import SnapshotError
from softkvm.vmm.host_memory import merged
from softkvm.vmm.snapshot.dirty import DirtyPages, Ranges

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine


class Tracking:
    """What has changed in a machine since snapshot *base*. Its methods are for when it stands."""

    def __init__(self, pages: DirtyPages, base: str) -> None:
        self.pages = pages
        self.base = base
        self._seen: Ranges = []

    def take(self) -> Ranges:
        """Return what has changed since the base: again what was returned before, as nobody has taken a new base."""
        self._seen = merged(self._seen + self.pages.take())
        return self._seen

    def rebase(self, base: str) -> None:
        """Count from here on."""
        self.pages.take()
        self._seen = []
        self.base = base


_tracked: Final[weakref.WeakKeyDictionary[Machine, Tracking]] = weakref.WeakKeyDictionary()


def tracked(machine: Machine) -> Tracking | None:
    """Return what watches over *machine*, if that is asked for."""
    return _tracked.get(machine)


def track(machine: Machine, base: str) -> None:
    """Watch the changes of *machine*, which stands, from now on; SnapshotError if KVM does not tell."""
    watching = tracked(machine)
    if watching is not None:
        watching.rebase(base)
        return
    pages = DirtyPages(machine.vm, machine.memory)
    try:
        pages.start()
    except OSError as error:
        raise SnapshotError(f"this KVM does not watch what the guest writes: {error.strerror}") from None
    _tracked[machine] = Tracking(pages, base)


def untrack(machine: Machine) -> None:
    """Watch no more; the guest gets its large pages back."""
    watching = _tracked.pop(machine, None)
    if watching is not None:
        watching.pages.stop()
