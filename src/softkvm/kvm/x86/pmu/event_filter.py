# SPDX-License-Identifier: Apache-2.0
"""Which events guests may count (KVM_SET_PMU_EVENT_FILTER, KVM API 4.120)."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from softkvm import abi
from softkvm.abi.x86.requests import check_pmu_event_filter
from softkvm.kvm.errors import kvm_error

#: Event and unit mask of an event select register; AMD's events have 12 bits, Intel's 8.
EVENTSEL_EVENT: Final = 0xF_0000_00FF
EVENTSEL_UMASK: Final = 0xFF00

_MASKED_ENTRY: Final = (
    EVENTSEL_EVENT
    | abi.KVM_PMU_MASKED_ENTRY_UMASK_MASK
    | abi.KVM_PMU_MASKED_ENTRY_UMASK_MATCH
    | abi.KVM_PMU_MASKED_ENTRY_EXCLUDE
)
_UMASK_MASK_SHIFT: Final = abi.KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT

#: By event: masks and values of the unit mask.
Entries = dict[int, list[tuple[int, int]]]


class PmuEventFilter:
    """A filter: EINVAL for an unknown action, unknown flags or bits of masked events, E2BIG for too many events."""

    __slots__ = ("_excludes", "_fixed", "_includes", "allows_others")

    def __init__(self, action: int, events: Sequence[int], fixed_counter_bitmap: int = 0, flags: int = 0) -> None:
        check_pmu_event_filter(action, len(events), flags)
        masked = bool(flags & abi.KVM_PMU_EVENT_FLAG_MASKED_EVENTS)
        self.allows_others = action == abi.KVM_PMU_EVENT_DENY
        self._fixed = fixed_counter_bitmap
        self._includes: Entries = defaultdict(list)
        self._excludes: Entries = defaultdict(list)
        for n, event in enumerate(events):
            if masked:
                if event & ~_MASKED_ENTRY:
                    raise kvm_error(errno.EINVAL, f"events[{n}]={event:#x}, expected a masked event")
                entry = event >> _UMASK_MASK_SHIFT, event >> 8 & 0xFF
                entries = self._excludes if event & abi.KVM_PMU_MASKED_ENTRY_EXCLUDE else self._includes
            elif event & ~(EVENTSEL_EVENT | EVENTSEL_UMASK):
                continue  # no guest's event can be that one
            else:
                entry = 0xFF, event >> 8 & 0xFF
                entries = self._includes
            entries[event & EVENTSEL_EVENT].append(entry)

    def allows(self, eventsel: int) -> bool:
        """Tell whether a general counter may count what its event select register says."""
        listed = _matches(self._includes, eventsel) and not _matches(self._excludes, eventsel)
        return listed != self.allows_others

    def allows_fixed(self, index: int) -> bool:
        """Tell whether a fixed counter may count."""
        return bool(self._fixed >> index & 1) != self.allows_others


def _matches(entries: Entries, eventsel: int) -> bool:
    umask = eventsel >> 8 & 0xFF
    return any(umask & mask == match for mask, match in entries.get(eventsel & EVENTSEL_EVENT, ()))
