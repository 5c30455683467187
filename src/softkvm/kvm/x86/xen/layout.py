# SPDX-License-Identifier: Apache-2.0
"""Where fields of a guest's structures are: they differ by the width of its ``unsigned long`` (Xen's public headers).

``struct shared_info``, one page: 32 ``vcpu_info``; a bit for each event channel that is pending, then one that is
masked; the wall clock; what the architecture has. ``struct vcpu_info``: an upcall is pending; which words of the
pending bits have any (``evtchn_pending_sel``); the time. ``struct vcpu_runstate_info``: the state, since when, and the
time in each of the four.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: In struct vcpu_info, whatever the width.
EVTCHN_UPCALL_PENDING: Final = 0
VCPU_INFO_TIME: Final = 32
VCPU_INFO_SIZE: Final = 64


class Layout(NamedTuple):
    """The offsets for one width."""

    word_bits: int
    #: Event channels: as many words as a word has bits.
    ports: int
    evtchn_pending: int
    evtchn_mask: int
    wall_clock: int
    wall_clock_sec_hi: int
    #: In struct vcpu_info.
    evtchn_pending_sel: int
    #: Of struct vcpu_runstate_info.
    runstate_size: int
    state_entry_time: int


LONG: Final = Layout(64, 4096, 0x800, 0xA00, 0xC00, 0xC0C, 8, 0x30, 8)
COMPAT: Final = Layout(32, 1024, 0x800, 0x880, 0x900, 0x924, 4, 0x2C, 4)
