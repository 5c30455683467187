# SPDX-License-Identifier: Apache-2.0
"""KVM_RUN as on every architecture: the run loop's frame, requests, task work, and blocking (``virt/kvm/kvm_main.c``).

The thread that calls :meth:`Vcpu.run` is the vCPU's thread. What an architecture has to provide are the methods named
``arch_*``; the loop from one exit to the next is its own (:meth:`Vcpu.arch_enter_guest`), as nothing may stand between.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.abi.run_page import EXIT_REASON_D, IMMEDIATE_EXIT_B
from softkvm.closing import Closing
from softkvm.cputime import CpuClock
from softkvm.kvm import halt_poll, stats_file
from softkvm.kvm.errors import kvm_error, refuse_requests
from softkvm.kvm.ioctl import uninterrupted
from softkvm.kvm.requests import (
    KVM_REQ_DIRTY_RING_SOFT_FULL,
    KVM_REQ_SIGNAL,
    KVM_REQ_TASK_WORK,
    KVM_REQ_VM_DEAD,
)
from softkvm.kvm.state import BLOCKING, OUTSIDE_GUEST_MODE, VcpuState

if TYPE_CHECKING:
    from softkvm.kvm.stats import Statistic

_RUNNABLE: Final = abi.KVM_MP_STATE_RUNNABLE
_DEAD: Final = "the VM is dead"
#: The requests that :meth:`Vcpu.handle_general_requests` acts on.
GENERAL_REQUESTS: Final = KVM_REQ_TASK_WORK | KVM_REQ_SIGNAL | KVM_REQ_VM_DEAD
#: Work may queue work, some levels deep, and all is done before KVM_RUN ends. What goes on for longer a kick can end.
TASK_WORK_ROUNDS: Final = 8


def log_hist_update(histogram: list[int], ns: int) -> None:
    """Count a time in a logarithmic histogram."""
    histogram[min(ns.bit_length(), len(histogram) - 1)] += 1


class Vcpu(VcpuState, Closing):
    """A virtual processor that can run."""

    # --- what an architecture provides ---------------------------------------------------------------

    @abstractmethod
    def arch_run_begin(self) -> None:
        """Prepare KVM_RUN on the vCPU's thread; may raise what KVM_RUN raises.

        It is not called for a runnable vCPU whose ``run_begins`` and ``syncs_regs`` are false.
        """

    @abstractmethod
    def arch_run_end(self) -> None:
        """Tell in the run page what userspace may want to know, whatever KVM_RUN ended for."""

    @abstractmethod
    def arch_enter_guest(self) -> bool:
        """Run the guest, and handle its exits, until there is a request or no runnable vCPU; False for userspace."""

    @abstractmethod
    def arch_handle_requests(self, requests: int) -> bool:
        """Act on requests of the architecture, which are taken already; False for userspace."""

    @abstractmethod
    def arch_block(self) -> None:
        """Wait until there is a reason for a vCPU that is not runnable to go on, and bring ``mp_state`` up to date."""

    @abstractmethod
    def arch_check_block(self) -> bool:
        """Tell whether a blocked vCPU has a reason to go on: something to do, or an event that makes it runnable."""

    @property
    @abstractmethod
    def arch_stats(self) -> Sequence[Statistic]:
        """The statistics that the architecture's vCPUs have."""

    @abstractmethod
    def arch_slept(self) -> None:
        """The vCPU's thread has slept."""

    # --- KVM_RUN -------------------------------------------------------------------------------------

    def run(self) -> None:
        """KVM_RUN.

        No handler of a signal runs on this thread meanwhile, so no exception of one's comes in the middle of an exit.
        They run behind it, before EINTR is raised, for which they are the reason.
        """
        self.entrance.run()

    def bind_run(self) -> None:
        """Let ``run`` be :meth:`run` without its frame: a client that runs the vCPU in a loop has it at hand."""
        self.entrance = _softcpu.Run(self.cpu, type(self)._run, self)
        if type(self).run is Vcpu.run:
            self.__dict__["run"] = self.entrance.run

    def _run(self, told: int) -> None:
        try:
            if told:
                if told & _softcpu.RUN_INTERRUPTED:
                    self.make_request(KVM_REQ_SIGNAL)
                self.syncs_regs = bool(told & _softcpu.RUN_WATCHED)
                if told & _softcpu.RUN_MOVED:
                    self.cpu_clock.moved()
            self.running = True
            if self.run_begins or self.syncs_regs or self.mp_state != _RUNNABLE:
                self.arch_run_begin()
            complete = self.complete_userspace_io
            if complete is not None:
                self.complete_userspace_io = None
                if not complete(self):
                    return
            if self.run_b[IMMEDIATE_EXIT_B]:
                raise InterruptedError(errno.EINTR, "immediate_exit is set")
            while True:
                if self.mp_state != _RUNNABLE:
                    self.arch_block()
                    if self.mp_state != _RUNNABLE:
                        continue
                if self.requests and not self._handle_requests():
                    return
                if not self.arch_enter_guest():
                    return
        finally:
            self.mode = OUTSIDE_GUEST_MODE
            self.running = False
            self.arch_run_end()
            if self.requests & KVM_REQ_VM_DEAD:
                # What an exit found after the memory had gone, MMIO for one, is nothing for userspace.
                raise kvm_error(errno.EIO, _DEAD)

    # --- requests ------------------------------------------------------------------------------------

    def _handle_requests(self) -> bool:
        """Act on the requests (``vcpu_enter_guest``); False to leave for userspace."""
        if self.requests & GENERAL_REQUESTS:
            self.handle_general_requests()
        if self.requests & KVM_REQ_DIRTY_RING_SOFT_FULL and self._dirty_ring_full():
            return False
        with self.request_lock:
            requests = self.requests & ~GENERAL_REQUESTS
            self.requests &= GENERAL_REQUESTS
        return self.arch_handle_requests(requests)

    def _dirty_ring_full(self) -> bool:
        """Tell whether KVM_RUN ends because nobody has reset the ring of dirty pages; it is asked for again then."""
        self.take_request(KVM_REQ_DIRTY_RING_SOFT_FULL)
        if self.dirty_ring is None or not self.dirty_ring.soft_full():
            return False
        self.make_request(KVM_REQ_DIRTY_RING_SOFT_FULL)
        self.run_d[EXIT_REASON_D] = abi.KVM_EXIT_DIRTY_RING_FULL
        return True

    def handle_general_requests(self) -> None:
        """Act on those requests that end a wait, or KVM_RUN: task work, signals, the VM's end. All others stay."""
        if self.take_request(KVM_REQ_TASK_WORK):
            self._run_task_work()
        self.take_request(KVM_REQ_SIGNAL)
        if self.cpu.take_interrupt():
            self.run_d[EXIT_REASON_D] = abi.KVM_EXIT_INTR
            self.stat_signal_exits += 1
            raise InterruptedError(errno.EINTR, "kicked, or a signal came")
        if self.requests & KVM_REQ_VM_DEAD:
            raise kvm_error(errno.EIO, _DEAD)

    def _run_task_work(self) -> None:
        """Do what is queued, and what that queues; from some rounds on a kick, or the VM's end, leaves the rest."""
        rounds = 0
        try:
            while self.task_work:
                if rounds >= TASK_WORK_ROUNDS and (self.cpu.interrupted or self.requests & KVM_REQ_VM_DEAD):
                    self.make_request(KVM_REQ_TASK_WORK)
                    return
                rounds += 1
                for _ in range(len(self.task_work)):
                    with self.request_lock:
                        work = self.task_work.pop(0)
                    work()
        except BaseException:
            if self.task_work:  # the rest is for the next KVM_RUN
                self.make_request(KVM_REQ_TASK_WORK)
            raise

    # --- blocking ------------------------------------------------------------------------------------

    def block(self) -> None:
        """Sleep until there is a reason to go on (``kvm_vcpu_block``)."""
        self.mode = BLOCKING
        try:
            while not self._has_reason_to_go_on():
                self.cpu.wait()
                self.arch_slept()
        finally:
            self.mode = OUTSIDE_GUEST_MODE

    def _has_reason_to_go_on(self) -> bool:
        """Look at what a kick or the timer may have been for; a kick from here on is for something new."""
        self.cpu.clear_kick()
        self.check_interrupt()
        return self.arch_check_block()

    def _poll(self, end_ns: int) -> bool:
        """Wait awake until there is a reason to go on; False if there is none by ``end_ns``."""
        self.mode = BLOCKING
        self.halt_polling = True
        try:
            while not self._has_reason_to_go_on():
                left = end_ns - _softcpu.clock_ns()
                if left <= 0:
                    return False
                self.cpu.poll(left)
            return True
        finally:
            self.halt_polling = False
            self.mode = OUTSIDE_GUEST_MODE

    def halt_and_wait(self) -> None:
        """Wait in HLT: awake for a moment, then asleep (``kvm_vcpu_halt``)."""
        start = asleep = _softcpu.clock_ns()
        poll_ns = halt_poll.interval(self)
        woken = False
        if poll_ns:
            woken = self._poll(start + poll_ns)
            asleep = _softcpu.clock_ns()
            polled_ns = asleep - start
            self.stat_halt_attempted_poll += 1
            if woken:
                self.stat_halt_successful_poll += 1
                self.stat_halt_poll_success_ns += polled_ns
                log_hist_update(self.stat_halt_poll_success_hist, polled_ns)
            else:
                self.stat_halt_poll_fail_ns += polled_ns
                log_hist_update(self.stat_halt_poll_fail_hist, polled_ns)
        if not woken:
            self.block()
        end = _softcpu.clock_ns()
        if not woken:
            self.stat_halt_wait_ns += end - asleep
            log_hist_update(self.stat_halt_wait_hist, end - asleep)
        halt_poll.adapt(self, end - start)

    # --- CPU time ------------------------------------------------------------------------------------

    @property
    def cpu_clock(self) -> CpuClock:
        """The vCPU's CPU time, and timers on it. It is accounted from the first time on that somebody asks for it."""
        with self.vm.lock:
            if self.accounted is None:
                self.accounted = CpuClock(self.cpu, self.call_soon)
            return self.accounted

    # --- the file ------------------------------------------------------------------------------------

    @property
    def shared(self) -> memoryview:
        """The pages shared with userspace."""
        return self._shared

    def set_signal_mask(self, sigset: bytes | None) -> None:
        """KVM_SET_SIGNAL_MASK."""
        if sigset is not None and len(sigset) != 8:
            raise kvm_error(errno.EINVAL, f"sigset of {len(sigset)} bytes, expected 8")
        self.entrance.mask = None if sigset is None else int.from_bytes(sigset, "little")

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: the values are those of now; :meth:`refresh_stats_fd` brings them up to date."""
        return stats_file.create(f"{self.vm.stats_id}/vcpu-{self.vcpu_id}", self.arch_stats, self)

    @uninterrupted
    def refresh_stats_fd(self, fd: int) -> None:
        """Write the values of now into the file of a :meth:`get_stats_fd`, before somebody reads it.

        No ioctl: a read of the kernel's file has them by itself. It may be called beside KVM_RUN, as reads may.
        """
        stats_file.refresh(fd, self.arch_stats, self)

    @uninterrupted
    def close(self) -> None:
        """Give the vCPU back; the VM keeps its number taken, as KVM does. Requests are EBADF from now on."""
        if not self.closed:
            self.closed = True
            refuse_requests(self, abi.File.VCPU)
            self.close_shared_fd()
            if not self.vm.inherited:
                self.end_timers()
