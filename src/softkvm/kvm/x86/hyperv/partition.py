# SPDX-License-Identifier: Apache-2.0
"""State of Hyper-V's interfaces that a whole VM has, a *partition* (``struct kvm_hv``): data, and what it follows from.

What happens to it is in the modules that take it: :mod:`.clock` (the reference TSC page), :mod:`.msrs`,
:mod:`.hypercalls`.
"""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING

from softkvm import abi

if TYPE_CHECKING:
    from softkvm.kvm.irq.eventfile import EventFile


class TscPageStatus(enum.Enum):
    """What the reference TSC page holds."""

    UNSET = enum.auto()
    #: The guest has moved it: its values have to be written.
    GUEST_CHANGED = enum.auto()
    #: The clock behind it is another: its values have to be written again.
    HOST_CHANGED = enum.auto()
    #: Its values are those of the clock.
    SET = enum.auto()
    #: It has no memory, or the TSC is too slow for it: the counter's MSR is the clock.
    BROKEN = enum.auto()


class Partition:
    """One VM's; ``lock`` serialises changes, as every vCPU's thread makes some."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.guest_os_id = 0
        self.hypercall = 0
        #: Eventfds of KVM_HYPERV_EVENTFD, by connection.
        self.connections: dict[int, EventFile] = {}

        # The reference clock: time = (TSC * tsc_scale >> 64) + tsc_offset, in 100 ns
        self.tsc_page = 0
        self.tsc_page_status = TscPageStatus.UNSET
        self.tsc_scale = 0
        self.tsc_offset = 0
        self.reenlightenment_control = 0
        self.tsc_emulation_control = 0
        self.tsc_emulation_status = 0
        self.invtsc_control = 0

        self.crash_params = [0] * abi.HV_X64_MSR_CRASH_PARAMS
        self.crash_ctl = 0

        #: The synthetic debugger's registers, by MSR.
        self.syndbg: dict[int, int] = {}

    @property
    def tsc_page_outdated(self) -> bool:
        """Whether the page's values have to be written, at the next update of the clocks."""
        return self.tsc_page_status in (TscPageStatus.GUEST_CHANGED, TscPageStatus.HOST_CHANGED)

    @property
    def tsc_page_frozen(self) -> bool:
        """Whether the guest wants the page as it is until it has had notice of another TSC (reenlightenment)."""
        return self.tsc_page_status is not TscPageStatus.GUEST_CHANGED and bool(self.tsc_emulation_control)

    def clock_changed(self) -> None:
        """The clock or the guest's TSC is another: the page is written anew at the next update of the clocks."""
        if self.tsc_page_status is TscPageStatus.SET:
            with self.lock:
                if self.tsc_page_status is TscPageStatus.SET and not self.tsc_page_frozen:
                    self.tsc_page_status = TscPageStatus.HOST_CHANGED
