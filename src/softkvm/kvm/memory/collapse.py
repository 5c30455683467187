# SPDX-License-Identifier: Apache-2.0
"""Large leaves come back where dirty logging has left small ones (``kvm_mmu_zap_collapsible_sptes``, beside the vCPUs).

That KVM_MEM_LOG_DIRTY_PAGES is cleared, a migration has failed for one, makes none of it urgent: the request only notes
the slot. One thread of the VM's gives up tables of small leaves in steps, between which whoever waits for ``mmu_lock``
gets it. It leaves a slot that is logged again, or is no more, and ends with its work.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from softkvm.threads import start_quiet

if TYPE_CHECKING:
    from softkvm.kvm.memory.memslots import MemorySlot
    from softkvm.kvm.vm import Vm

#: Tables that are given up at once: their guests fault once for each, and TLBs are flushed once for all.
STEP_TABLES: Final = 32
#: How long the lock is free between steps.
PAUSE_S: Final = 0.0005


class Collapser:
    """Gives up small leaves of a VM's slots, beside its vCPUs."""

    __slots__ = ("_lock", "_slots", "_thread", "_vm")

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        #: What there is to do, in this order.
        self._slots: list[MemorySlot] = []
        self._thread: threading.Thread | None = None

    def note(self, slot: MemorySlot) -> None:
        """A slot's logging has ended."""
        with self._lock:
            self._slots.append(slot)
            if self._thread is None:
                self._thread = start_quiet(self._work, "kvm-collapse")

    def idle(self) -> bool:
        """Tell whether there is nothing to do."""
        return self._thread is None

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._slots:
                    self._thread = None
                    return
                slot = self._slots.pop(0)
            start: int | None = slot.base_gfn
            while start is not None:
                start = self._step(slot, start)
                time.sleep(PAUSE_S)

    def _step(self, slot: MemorySlot, start: int) -> int | None:
        """Go on with a slot at a frame; returns where the next step begins, None if that is done with."""
        vm = self._vm
        with vm.mmu_lock:
            if vm.closed or slot.dirty_logging or vm.memslots.by_id(slot.id) is not slot:
                return None
            following, flush = vm.mmu.collapse(slot, start, STEP_TABLES)
            if flush:
                vm.finish_zap()
        return following if following < slot.end_gfn else None
