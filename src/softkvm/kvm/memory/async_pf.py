# SPDX-License-Identifier: Apache-2.0
"""Asynchronous page faults as on every architecture (``virt/kvm/async_pf.c``): threads that wait in a vCPU's place.

For a page that isn't there (:mod:`.slow_memory`) a thread of its own touches it. Meanwhile the vCPU is told that the
page is not present, if the guest has asked for that, and runs on; when the page has come the work is in the vCPU's
list, from which it tells the guest. How is the architecture's (:mod:`softkvm.kvm.x86.paravirt.async_pf`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.kvm.state import BLOCKING, OUTSIDE_GUEST_MODE
from softkvm.threads import start_quiet

if TYPE_CHECKING:
    from softkvm._softcpu import Machine
    from softkvm.kvm.state import VcpuState

#: So many pages may a vCPU wait for at the same time without waiting.
ASYNC_PF_PER_VCPU: Final = 64
_PAGES: Final = Size(
    "pages that a vCPU waits for", ASYNC_PF_PER_VCPU, None, giver="guest", effect="the vCPU waits", where=__name__
)


class Work:
    """One page that a vCPU waits for (``struct kvm_async_pf``)."""

    __slots__ = ("gfn", "hva", "notpresent_injected", "present", "token", "wakeup_all")

    def __init__(self, gfn: int, hva: int, token: int, *, wakeup_all: bool = False) -> None:
        self.gfn = gfn
        self.hva = hva
        #: What the guest knows it by.
        self.token = token
        self.notpresent_injected = False
        #: No page: the guest is to wake all that waits (it has come from another host).
        self.wakeup_all = wakeup_all
        self.present = False

    def wait(self, machine: Machine) -> None:
        """Touch the page. What cannot be touched is the vCPU's to find out."""
        try:
            machine.populate(self.hva)
        except (OSError, ValueError):
            pass
        self.present = True


class AsyncPf:
    """The pages that a vCPU waits for: those on their way, and those that have come."""

    __slots__ = ("_lock", "_outstanding", "_sync", "done")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outstanding: set[Work] = set()
        #: What the vCPU itself waits for.
        self._sync: Work | None = None
        #: Oldest first; taken on the vCPU's thread, by :meth:`finish`.
        self.done: deque[Work] = deque()

    @property
    def queued(self) -> int:
        """How many there are, on their way or not yet told of."""
        return len(self._outstanding)

    def awaits(self, gfn: int) -> bool:
        """Tell whether a frame is among them."""
        with self._lock:
            return any(work.gfn == gfn for work in self._outstanding)

    def setup(self, machine: Machine, work: Work, ready: Callable[[], None]) -> bool:
        """Have a page waited for; False if there are too many. ``ready`` is called when the list of pages begins."""
        with self._lock:
            if not _PAGES.allows(len(self._outstanding) + 1):
                return False
            self._outstanding.add(work)
        start_quiet(self._work, "kvm-async-pf", machine, work, ready)
        return True

    def _work(self, machine: Machine, work: Work, ready: Callable[[], None]) -> None:
        work.wait(machine)
        self._complete(work, ready)

    def _complete(self, work: Work, ready: Callable[[], None]) -> None:
        with self._lock:
            if work not in self._outstanding:
                return
            self.done.append(work)
        ready()

    def wake_all(self, ready: Callable[[], None]) -> None:
        """Have the guest told that everything it waits for has come (``kvm_async_pf_wakeup_all``)."""
        work = Work(-1, 0, 0xFFFF_FFFF, wakeup_all=True)
        with self._lock:
            if self.done:
                return
            self._outstanding.add(work)
        self._complete(work, ready)

    def finish(self) -> Work:
        """Take the oldest page that has come; there is one."""
        work = self.done.popleft()
        with self._lock:
            self._outstanding.discard(work)
        return work

    def clear(self) -> None:
        """Forget all of them: what comes later is for nobody (``kvm_clear_async_pf_completion_queue``)."""
        with self._lock:
            self._outstanding.clear()
            self.done.clear()

    def wait(self, vcpu: VcpuState, hva: int, requests: int) -> None:
        """Have the vCPU wait for a page: until it has come, or one of some requests; a kick is one.

        The caller looks again. The kernel waits in get_user_pages() until a fatal signal.
        """
        work = self._sync
        if work is None or work.hva != hva or work.present:
            work = self._sync = Work(-1, hva, 0)
            start_quiet(self._wait_sync, "kvm-page", vcpu, work)
        vcpu.mode = BLOCKING
        try:
            while not work.present:
                vcpu.cpu.clear_kick()
                vcpu.check_interrupt()
                if vcpu.requests & requests or work.present:
                    break
                vcpu.cpu.wait()
        finally:
            vcpu.mode = OUTSIDE_GUEST_MODE

    @staticmethod
    def _wait_sync(vcpu: VcpuState, work: Work) -> None:
        work.wait(vcpu.vm.machine)
        vcpu.vcpu_kick()
