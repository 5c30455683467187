# SPDX-License-Identifier: Apache-2.0
"""The loop that runs a virtual processor: ``vcpu_run``, ``vcpu_enter_guest``, requests, and blocking in HLT.

The thread that calls :meth:`Vcpu.run` is the vCPU's thread.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm import halt_poll, run_page
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.requests import (
    KVM_REQ_CLOCK_UPDATE,
    KVM_REQ_EVENT,
    KVM_REQ_IOAPIC_EOI_EXIT,
    KVM_REQ_NMI,
    KVM_REQ_SIGNAL,
    KVM_REQ_STEAL_UPDATE,
    KVM_REQ_TASK_WORK,
    KVM_REQ_TLB_FLUSH,
    KVM_REQ_TLB_FLUSH_GUEST,
    KVM_REQ_TRIPLE_FAULT,
    KVM_REQ_UNBLOCK,
    KVM_REQ_VM_DEAD,
)
from softkvm.kvm.vcpu_state import BLOCKING, IN_GUEST_MODE, OUTSIDE_GUEST_MODE, VcpuState
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import events
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.exits import EXIT_HANDLERS
from softkvm.kvm.x86.svm.vmcb import EVTINJ_VALID, EXIT_INT_INFO, RFLAGS, V_TPR

if TYPE_CHECKING:
    from softkvm.kvm.vm import Vm

_RUNNABLE: Final = abi.KVM_MP_STATE_RUNNABLE
_HALTED: Final = abi.KVM_MP_STATE_HALTED
_UNINITIALIZED: Final = abi.KVM_MP_STATE_UNINITIALIZED
#: Steal time is looked at again when this much time has passed.
_STEAL_INTERVAL_NS: Final = 10_000_000


class Vcpu(VcpuState):
    """A virtual processor that can run; its other ioctls are in :mod:`softkvm.kvm.vcpu_ioctls`."""

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        super().__init__(vm, vcpu_id)
        #: What the loop uses at every exit, in one tuple: KVM_RUN is called often, too.
        self._loop = (
            self.cpu.vmrun,
            self.vmcb.address,
            self.q,
            self.b,
            self.exit_counts,
            EXIT_HANDLERS,
            self.apic,
            self.pv_eoi,
            self.pic_in_userspace,
        )

    # --- the run loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """KVM_RUN."""
        if self.running:
            raise kvm_error(errno.EBUSY, "another thread runs the vCPU")
        self.running = True
        apic = self.apic
        try:
            if self.mp_state == _UNINITIALIZED:
                self._wait_for_sipi()
            elif apic is None:
                self._take_cr8()
            if self.pic_in_userspace and self.run_b[run_page.REQUEST_INTERRUPT_WINDOW_B]:
                self.make_request(KVM_REQ_EVENT)
            complete = self.complete_userspace_io
            if complete is not None:
                self.complete_userspace_io = None
                if not complete(self):
                    return
            if self.run_b[run_page.IMMEDIATE_EXIT_B]:
                raise InterruptedError(errno.EINTR, "immediate_exit is set")
            self.vcpu_run()
        finally:
            # What KVM_RUN reports whatever the exit reason (post_kvm_run_save)
            self.running = False
            if self.holds_kicks:
                self.holds_kicks = False
                self.cpu.send_held_kicks()
            run_q = self.run_q
            self.run_b[run_page.IF_FLAG_B] = self.q[RFLAGS] >> 9 & 1
            if apic is not None:
                run_q[run_page.CR8_Q] = apic.regs[0x20] >> 4
                run_q[run_page.APIC_BASE_Q] = apic.apic_base
            else:
                run_q[run_page.CR8_Q] = self.shadow_cr8
                run_q[run_page.APIC_BASE_Q] = self.get_apic_base()
            self.run_b[run_page.READY_FOR_INTERRUPT_INJECTION_B] = (
                not self.pic_in_userspace or self._ready_for_interrupt_injection()
            )

    def _wait_for_sipi(self) -> None:
        """A processor that waits for its start-up IPI: blocked until something comes, then EAGAIN at the latest."""
        if self.run_b[run_page.IMMEDIATE_EXIT_B]:
            raise InterruptedError(errno.EINTR, "immediate_exit is set")
        self._block()
        assert self.apic is not None
        self.apic.accept_events()
        self._take_signal()
        if self.requests & KVM_REQ_VM_DEAD:
            raise kvm_error(errno.EIO, "the VM is dead")
        if self.mp_state == _UNINITIALIZED:
            raise BlockingIOError(errno.EAGAIN, "the vCPU waits for INIT and a start-up IPI")

    def _take_cr8(self) -> None:
        """With chips in userspace the task priority is userspace's too."""
        if self.run_q[run_page.CR8_Q] != self.shadow_cr8:
            if not cr.kvm_set_cr8(self, self.run_q[run_page.CR8_Q]):
                raise kvm_error(errno.EINVAL, f"cr8={self.run_q[run_page.CR8_Q]:#x}, expected 4 bits")

    def _signal_exit(self) -> None:
        self.take_request(KVM_REQ_SIGNAL)
        self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_INTR
        raise InterruptedError(errno.EINTR, "kicked")

    def _take_signal(self) -> None:
        if self.requests & KVM_REQ_SIGNAL:
            self._signal_exit()

    def _accepts_external_interrupt(self) -> bool:
        """Tell whether userspace's PIC is connected and none of its interrupts waits (``kvm_cpu_accept_dm_intr``)."""
        return self.pending_external_vector < 0 and (self.apic is None or self.apic.accept_pic_intr())

    def _ready_for_interrupt_injection(self) -> bool:
        """Tell whether userspace's next KVM_INTERRUPT would be taken at once."""
        return (
            self._accepts_external_interrupt()
            and not self.interrupt_injected
            and not self.nmi_injected
            and not self.exception.injected
            and not self.exception.pending
            and not svm.interrupt_blocked(self)
        )

    def vcpu_run(self) -> None:
        """Run until there is an exit for userspace."""
        vmrun, address, q, b, counts, handlers, apic, pv_eoi, pic_in_userspace = self._loop
        while True:
            if self.mp_state != _RUNNABLE:
                self._vcpu_block()
                if self.mp_state != _RUNNABLE:
                    continue
            if self.requests and not self._handle_requests():
                return
            self.mode = IN_GUEST_MODE
            if self.requests:
                self.mode = OUTSIDE_GUEST_MODE
                continue
            code = vmrun(address)
            self.mode = OUTSIDE_GUEST_MODE
            if apic is not None and apic.regs[0x20] >> 4 != b[V_TPR] & 0xF:
                apic.set_cr8(b[V_TPR] & 0xF)
            if pv_eoi is not None and pv_eoi.pending:
                pv_eoi.sync_from_guest()
            if self.injecting or q[EXIT_INT_INFO] & EVTINJ_VALID:
                svm.complete_interrupts(self)
            if self.awaiting_iret_completion:
                self._check_iret_completion()
            try:
                counts[code] += 1
            except KeyError:
                counts[code] = 1
            try:
                handler = handlers[code]
            except KeyError:
                self._unexpected_exit(code)
                return
            if not handler(self):
                return
            if pic_in_userspace and self._userspace_irqchip_exit():
                return

    def _check_iret_completion(self) -> None:
        """After an exit behind an intercepted IRET: NMIs are unmasked once it is done."""
        if self.q[V.EXIT_CODE] == V.EXIT_IRET:
            return
        if self.q[V.RIP] != self.nmi_iret_rip or self.nmi_singlestep:
            self.awaiting_iret_completion = False
            self.nmi_masked = False
            self.make_request(KVM_REQ_EVENT)

    def _unexpected_exit(self, code: int) -> None:
        """VMEXIT_INVALID is KVM_EXIT_FAIL_ENTRY; anything else KVM doesn't intercept is an internal error."""
        if code == V.EXIT_ERR:
            self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_FAIL_ENTRY
            self.run_q[run_page.FAIL_ENTRY_REASON_Q] = code
            self.run_d[run_page.FAIL_ENTRY_CPU_D] = self.vcpu_id
            self.vm.log_invalid_vmcb(self)
            return
        self.internal_error(abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, (code, self.vcpu_id))

    def _userspace_irqchip_exit(self) -> bool:
        """With the PIC in userspace: leave as soon as an interrupt window that it asked for is open."""
        if self.run_b[run_page.REQUEST_INTERRUPT_WINDOW_B] and self._ready_for_interrupt_injection():
            self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_IRQ_WINDOW_OPEN
            return True
        return False

    def _handle_requests(self) -> bool:
        """Act on the requests (``vcpu_enter_guest``); False to leave for userspace."""
        with self.request_lock:
            requests, self.requests = self.requests, 0
        if requests & KVM_REQ_EVENT and requests == KVM_REQ_EVENT:
            return self._handle_event()
        if requests & KVM_REQ_TASK_WORK:
            self._run_task_work()
        if requests & KVM_REQ_SIGNAL:
            # Leave everything else for the next run.
            self.make_request(requests & ~(KVM_REQ_SIGNAL | KVM_REQ_TASK_WORK))
            self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_INTR
            raise InterruptedError(errno.EINTR, "kicked")
        if requests & KVM_REQ_VM_DEAD:
            self.make_request(requests & ~KVM_REQ_TASK_WORK)  # for good
            raise kvm_error(errno.EIO, "the VM is dead")
        if requests & (KVM_REQ_TLB_FLUSH | KVM_REQ_TLB_FLUSH_GUEST):
            self.stat_tlb_flush += 1
            self.b[V.TLB_CTL] = V.TLB_CONTROL_FLUSH_ASID
        if requests & KVM_REQ_CLOCK_UPDATE:
            kvmclock.update_guest_time(self)
        if requests & KVM_REQ_STEAL_UPDATE:
            kvmclock.record_steal_time(self)
        if requests & KVM_REQ_TRIPLE_FAULT:
            self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_SHUTDOWN
            self.make_request(requests & (KVM_REQ_EVENT | KVM_REQ_NMI | KVM_REQ_IOAPIC_EOI_EXIT))
            return False
        if requests & KVM_REQ_IOAPIC_EOI_EXIT:
            self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_IOAPIC_EOI
            self.run_b[run_page.EOI_VECTOR_B] = self.pending_ioapic_eoi
            self.make_request(requests & (KVM_REQ_EVENT | KVM_REQ_NMI))
            return False
        if requests & KVM_REQ_NMI:
            events.process_nmi(self)
            requests |= KVM_REQ_EVENT
        if requests & KVM_REQ_EVENT:
            return self._handle_event()
        return True

    def _handle_event(self) -> bool:
        self.stat_req_event += 1
        apic = self.apic
        if apic is not None and apic.pending_events:
            apic.accept_events()
            if self.mp_state != _RUNNABLE:
                self.make_request(KVM_REQ_EVENT)
                return True
        if self.injecting:
            # An entry was prepared and given up: what had been handed over is handed over again.
            self.q[V.EVENT_INJ] = 0
            self.injecting = False
        events.inject_events(self)
        if apic is not None:
            self._update_cr8_intercept(apic)
            if self.pv_eoi is not None and self.pv_eoi.msr:
                self.pv_eoi.sync_to_guest()
        if self.pic_in_userspace and self.run_b[run_page.REQUEST_INTERRUPT_WINDOW_B]:
            if self._accepts_external_interrupt() and not self._ready_for_interrupt_injection():
                svm.enable_irq_window(self)
        return True

    def _update_cr8_intercept(self, apic: Lapic) -> None:
        """Intercept CR8 writes only while an interrupt waits for the priority to fall; load V_TPR."""
        cr8 = apic.cr8
        tpr = self.b[V_TPR]
        if tpr & 0xF != cr8:
            self.b[V_TPR] = tpr & 0xF0 | cr8
        waits = apic.irr != 0 and apic.highest_irr() >> 4 <= cr8
        if waits != self.cr8_intercepted:
            self.cr8_intercepted = waits
            self.d[V.INTERCEPT_CR] ^= V.CR8_WRITE

    # --- blocking ----------------------------------------------------------------------------------

    def is_runnable(self) -> bool:
        """Tell whether a halted vCPU has a reason to go on (``kvm_arch_vcpu_runnable``)."""
        if self.mp_state == _RUNNABLE or self.pv_unhalted:
            return True
        if self.mp_state == _HALTED:
            if self.exception.pending or self.exception.injected or self.nmi_queued or self.interrupt_injected:
                return True
            if self.nmi_pending and not svm.nmi_blocked(self):
                return True
            if not svm.interrupt_blocked(self) and events.cpu_has_interrupt(self):
                return True
        return self.apic is not None and bool(self.apic.pending_events)

    def _block(self) -> None:
        """Sleep until the vCPU is runnable or asked to do something (``kvm_vcpu_block``)."""
        self.mode = BLOCKING
        try:
            while not self._has_reason_to_go_on():
                self.cpu.wait()
                svm.shrink_ple_window(self)
        finally:
            self.mode = OUTSIDE_GUEST_MODE

    def _has_reason_to_go_on(self) -> bool:
        """Look at what a kick or the timer may have been for; a kick from here on is for something new."""
        self.cpu.clear_kick()
        apic = self.apic
        if apic is not None and apic.timer.deadline_ns:
            apic.inject_timer_irqs()
        return bool(self.requests & ~(KVM_REQ_EVENT | KVM_REQ_NMI)) or self.is_runnable()

    def _poll(self, end_ns: int) -> bool:
        """Wait awake until the vCPU is runnable or asked to do something; False if it is neither by ``end_ns``."""
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

    def _halt(self) -> None:
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
            else:
                self.stat_halt_poll_fail_ns += polled_ns
        if not woken:
            self._block()
        end = _softcpu.clock_ns()
        if not woken:
            self.stat_halt_wait_ns += end - asleep
        halt_poll.adapt(self, end - start)

    def _vcpu_block(self) -> None:
        """Wait until there is a reason to go on, then bring the multiprocessing state up to date."""
        runnable = self.is_runnable()
        if not runnable:
            if self.mp_state == _HALTED:
                self._halt()
            else:
                self._block()
            self.stat_halt_wakeup += 1
            self._check_steal_time()
        requests = self.requests
        if requests & (KVM_REQ_SIGNAL | KVM_REQ_TASK_WORK | KVM_REQ_VM_DEAD):
            self._handle_blocked_requests(requests)
        apic = self.apic
        if apic is not None and apic.pending_events:
            apic.accept_events()
        if self.mp_state == _HALTED and (runnable or self.is_runnable()):
            self.pv_unhalted = False
            self.mp_state = _RUNNABLE
            self.make_request(KVM_REQ_EVENT)  # what ended the halt is delivered now, not by an interrupt window's exit
        elif self.requests & ~KVM_REQ_EVENT and self.mp_state != _RUNNABLE:
            self._handle_other_requests_while_blocked()

    def _handle_blocked_requests(self, requests: int) -> None:
        if requests & KVM_REQ_TASK_WORK:
            self.take_request(KVM_REQ_TASK_WORK)
            self._run_task_work()
        self._take_signal()
        if requests & KVM_REQ_VM_DEAD:
            raise kvm_error(errno.EIO, "the VM is dead")

    def _handle_other_requests_while_blocked(self) -> None:
        """Flushes and clock updates that came while the vCPU stays halted."""
        with self.request_lock:
            requests = self.requests
            self.requests = requests & (KVM_REQ_EVENT | KVM_REQ_NMI | KVM_REQ_TRIPLE_FAULT)
        if requests & (KVM_REQ_TLB_FLUSH | KVM_REQ_TLB_FLUSH_GUEST):
            self.b[V.TLB_CTL] = V.TLB_CONTROL_FLUSH_ASID
        if requests & KVM_REQ_CLOCK_UPDATE:
            kvmclock.update_guest_time(self)
        if requests & KVM_REQ_STEAL_UPDATE:
            kvmclock.record_steal_time(self)
        if requests & KVM_REQ_UNBLOCK:
            self.pv_unhalted = True

    def _check_steal_time(self) -> None:
        if abi.MSR_KVM_STEAL_TIME in self.msr_values:
            now = _softcpu.clock_ns()
            if now - self._steal_checked_ns > _STEAL_INTERVAL_NS:
                self._steal_checked_ns = now
                self.make_request(KVM_REQ_STEAL_UPDATE)
