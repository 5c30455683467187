# SPDX-License-Identifier: Apache-2.0
"""An x86 vCPU: how it enters the guest, what it does about requests, when it is runnable (``arch/x86/kvm/x86.c``)."""

from __future__ import annotations

import errno
import logging
from functools import partial
from typing import Final

from softkvm import abi
from softkvm.abi import X86_EFLAGS_IF
from softkvm.abi.run_page import (
    APIC_BASE_Q,
    CR8_Q,
    EOI_VECTOR_B,
    EXIT_REASON_D,
    FAIL_ENTRY_CPU_D,
    FAIL_ENTRY_REASON_Q,
    IMMEDIATE_EXIT_B,
    READY_FOR_INTERRUPT_INJECTION_W,
    REQUEST_INTERRUPT_WINDOW_B,
)
from softkvm.abi.x86.run_page import TPR_IS_WRITE_D, TPR_RIP_Q
from softkvm.kvm import vcpu
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.guest_memory import read_guest, write_guest
from softkvm.kvm.requests import KVM_REQ_TLB_FLUSH
from softkvm.kvm.state import IN_GUEST_MODE, OUTSIDE_GUEST_MODE
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import events, guest_time, reset, sync_regs, tsc
from softkvm.kvm.x86.cpuid import CpuidTable
from softkvm.kvm.x86.emulate.table import Emulator
from softkvm.kvm.x86.exceptions import QueuedException
from softkvm.kvm.x86.hyperv import requests as hyperv_requests
from softkvm.kvm.x86.hyperv import stimer
from softkvm.kvm.x86.irqchip.apic_map import ApicMap
from softkvm.kvm.x86.irqchip.apicdef import KVM_APIC_CHECK_VAPIC, KVM_APIC_PV_EOI_PENDING
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.mmu.root_tdp import load_root_tdp
from softkvm.kvm.x86.msr_index import MCG_CAP
from softkvm.kvm.x86.paravirt import async_pf, steal_time
from softkvm.kvm.x86.paravirt.pv_eoi import PvEoi
from softkvm.kvm.x86.paravirt.vapic import Vapic
from softkvm.kvm.x86.pmu import pmu
from softkvm.kvm.x86.pmu.pmu import Pmu
from softkvm.kvm.x86.requests import (
    KVM_REQ_APF_HALT,
    KVM_REQ_APF_READY,
    KVM_REQ_CLOCK_UPDATE,
    KVM_REQ_EVENT,
    KVM_REQ_HV_STIMER,
    KVM_REQ_IOAPIC_EOI_EXIT,
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_NMI,
    KVM_REQ_PMU,
    KVM_REQ_REPORT_TPR_ACCESS,
    KVM_REQ_STEAL_UPDATE,
    KVM_REQ_TRIPLE_FAULT,
)
from softkvm.kvm.x86.state import VcpuState, VmState
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.counting import CountingEmulator, counting_exit_handlers
from softkvm.kvm.x86.svm.exits import EXIT_HANDLERS, Handler
from softkvm.kvm.x86.svm.vmcb import EVTINJ_VALID, EXIT_INT_INFO, RFLAGS, V_TPR
from softkvm.kvm.x86.xen import upcall
from softkvm.kvm.x86.xen.exits import xen_exit_handlers

log = logging.getLogger(__name__)

_RUNNABLE: Final = abi.KVM_MP_STATE_RUNNABLE
_HALTED: Final = abi.KVM_MP_STATE_HALTED
_UNINITIALIZED: Final = abi.KVM_MP_STATE_UNINITIALIZED
#: What is done although the vCPU stays halted, beside GENERAL_REQUESTS. All others wait until it is runnable.
_SERVED_WHILE_BLOCKED: Final = KVM_REQ_TLB_FLUSH | KVM_REQ_CLOCK_UPDATE | KVM_REQ_STEAL_UPDATE | KVM_REQ_HV_STIMER
_HYPERV: Final = hyperv_requests.REQUESTS
#: What is still to be done after KVM_EXIT_IOAPIC_EOI.
_BEHIND_EOI_EXIT: Final = KVM_REQ_EVENT | KVM_REQ_NMI | _HYPERV
#: What is still to be done after KVM_EXIT_TPR_ACCESS.
_BEHIND_TPR_ACCESS: Final = ~(
    KVM_REQ_TLB_FLUSH | KVM_REQ_CLOCK_UPDATE | KVM_REQ_APF_READY | KVM_REQ_LOAD_MMU_PGD | KVM_REQ_REPORT_TPR_ACCESS
)


class Vcpu(VcpuState, vcpu.Vcpu):
    """A virtual processor that can run; its ioctls are in :mod:`softkvm.kvm.x86.vcpu_ioctls`."""

    __slots__ = ("_loop",)

    def __init__(self, vm: VmState, vcpu_id: int) -> None:
        super().__init__(vm, vcpu_id)
        self.mcg_cap = MCG_CAP
        self.xen.vcpu_id = len(vm.vcpus)
        self.exception = QueuedException()
        self.cpuid = CpuidTable()
        self.emulator = Emulator(self)
        self.pmu = Pmu(self)
        self.apic = None
        self.pv_eoi = None
        self.vapic = None
        svm.set_msr_filter(self, vm.msr_filter)
        if self.chips is not None:
            self.apic = self.create_apic(self.chips.apic_map)
            self.pv_eoi = PvEoi(self.apic, partial(read_guest, vm), partial(write_guest, vm))
            self.vapic = Vapic(self.apic, partial(read_guest, vm), partial(write_guest, vm))
        self.vcpu_reset(False)
        if self.apic is not None and not self.is_bsp():
            self.mp_state = _UNINITIALIZED
        tsc.start(self)
        self.make_request(KVM_REQ_LOAD_MMU_PGD)
        self.choose_exit_handlers()
        steal_time.account(self)
        pmu.refresh(self)
        self.bind_run()

    def choose_exit_handlers(self) -> None:
        """The plain table, unless the guest has Xen's interfaces or counts instructions.

        What is not a request of its own by then has to be one: the loop has the table from before.
        """
        handlers = EXIT_HANDLERS
        if self.vm.xen.config.msr:
            handlers = xen_exit_handlers(upcalls=upcall.may_come(self))
        if isinstance(self.emulator, CountingEmulator):
            handlers = counting_exit_handlers(handlers)
        self._set_loop(handlers)

    def _set_loop(self, handlers: dict[int, Handler]) -> None:
        #: What the loop uses at every exit, in one tuple: KVM_RUN is called often, too.
        self._loop = (
            self.cpu.vmrun,
            self.vmcb.address,
            self.q,
            self.b,
            self.exit_counts,
            handlers,
            self.apic,
            self.pic_in_userspace,
        )

    def create_apic(self, apic_map: ApicMap) -> Lapic:
        """Return the local APIC of a vCPU that has it in KVM."""
        return Lapic(self, apic_map)

    def counts_instructions(self, on: bool) -> None:
        """Have exits handled, and instructions emulated, by what counts them for the guest's performance counters."""
        emulator = CountingEmulator if on else Emulator
        if self.emulator.__class__ is not emulator:
            self.emulator.__class__ = emulator
            self.choose_exit_handlers()
            self.make_request(KVM_REQ_PMU)  # leaves the loop, which has the other table

    # --- KVM_RUN -----------------------------------------------------------------------------------

    def arch_run_begin(self) -> None:
        """Wait for a start-up IPI; take what userspace says of the task priority and of interrupt windows."""
        if self.mp_state == _UNINITIALIZED:
            self._wait_for_sipi()
        if self.syncs_regs:
            sync_regs.take(self)
        if self.apic is None:
            self._take_cr8()
        if self.pic_in_userspace and self.run_b[REQUEST_INTERRUPT_WINDOW_B]:
            self.make_request(KVM_REQ_EVENT)
        if self.steal_enabled:
            guest_time.check_waiting(self)

    def arch_run_end(self) -> None:
        """RFLAGS.IF, CR8, IA32_APIC_BASE, and whether an interrupt would be taken (``post_kvm_run_save``)."""
        if self.syncs_regs:
            self.syncs_regs = False
            sync_regs.store(self)
        apic = self.apic
        if apic is not None:
            # Userspace only reads these then, and a store costs four times as much as to see that it isn't needed.
            if (cr8 := apic.regs[0x20] >> 4) != self.told_cr8:
                self.run_q[CR8_Q] = self.told_cr8 = cr8
            if apic.apic_base is not self.told_apic_base:
                self.run_q[APIC_BASE_Q] = self.told_apic_base = apic.apic_base
        else:
            self.run_q[CR8_Q] = self.shadow_cr8
            self.run_q[APIC_BASE_Q] = self.get_apic_base()
        ready = (self.q[RFLAGS] & X86_EFLAGS_IF) >> 1  # IF is bit 9
        if not self.pic_in_userspace or self.ready_for_interrupt_injection():
            ready |= 1
        if ready != self.told_ready:
            self.run_w[READY_FOR_INTERRUPT_INJECTION_W] = self.told_ready = ready

    def _wait_for_sipi(self) -> None:
        """A processor that waits for its start-up IPI: blocked until something comes, then EAGAIN at the latest."""
        if self.run_b[IMMEDIATE_EXIT_B]:
            raise InterruptedError(errno.EINTR, "immediate_exit is set")
        self.block()
        assert self.apic is not None
        self.apic.accept_events()
        self.handle_general_requests()
        if self.mp_state == _UNINITIALIZED:
            raise BlockingIOError(errno.EAGAIN, "the vCPU waits for INIT and a start-up IPI")

    def _take_cr8(self) -> None:
        """With chips in userspace the task priority is userspace's too."""
        if self.run_q[CR8_Q] != self.shadow_cr8:
            if not cr.kvm_set_cr8(self, self.run_q[CR8_Q]):
                raise kvm_error(errno.EINVAL, f"cr8={self.run_q[CR8_Q]:#x}, expected 4 bits")

    def _accepts_external_interrupt(self) -> bool:
        """Tell whether userspace's PIC is connected and none of its interrupts waits (``kvm_cpu_accept_dm_intr``)."""
        return self.pending_external_vector < 0 and (self.apic is None or self.apic.accept_pic_intr())

    def ready_for_interrupt_injection(self) -> bool:
        """Tell whether userspace's next KVM_INTERRUPT would be taken at once."""
        return (
            self._accepts_external_interrupt()
            and not self.interrupt_injected
            and not self.nmi_injected
            and not self.exception.injected
            and not self.exception.pending
            and not svm.interrupt_blocked(self)
        )

    def arch_enter_guest(self) -> bool:
        """Run the guest and handle its exits; the loop that everything else waits for."""
        vmrun, address, q, b, counts, handlers, apic, pic_in_userspace = self._loop
        while True:  # not "while runnable": the interpreter (3.11) speeds up loops by their unconditional jump only
            if self.mp_state != _RUNNABLE:
                return True
            if self.requests:
                if self.requests != KVM_REQ_EVENT:
                    return True
                self.take_request(KVM_REQ_EVENT)
                self._handle_event()
                continue
            self.mode = IN_GUEST_MODE
            if self.requests:
                self.mode = OUTSIDE_GUEST_MODE
                continue
            code = vmrun(address)
            self.mode = OUTSIDE_GUEST_MODE
            if apic is not None:
                if apic.regs[0x20] >> 4 != b[V_TPR] & 0xF:
                    apic.set_cr8(b[V_TPR] & 0xF)
                if apic.attention:
                    self._sync_from_guest(apic)
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
                return False
            if not handler(self):
                return False
            if pic_in_userspace and self._userspace_irqchip_exit():
                return False

    def _sync_from_guest(self, apic: Lapic) -> None:
        """After an exit: the EOI and the TPR that the guest may have left in its memory."""
        if apic.attention & KVM_APIC_PV_EOI_PENDING:
            assert self.pv_eoi is not None
            self.pv_eoi.sync_from_guest()
        if apic.attention & KVM_APIC_CHECK_VAPIC:
            assert self.vapic is not None
            self.vapic.sync_from_guest()

    def _check_iret_completion(self) -> None:
        """After an exit behind an intercepted IRET: NMIs are unmasked once it is done."""
        code = self.q[V.EXIT_CODE]
        if code == V.EXIT_IRET:
            return
        # One that returns to itself is done when its step is; any other exit there, as for its stack, comes before.
        if self.q[V.RIP] != self.nmi_iret_rip or (self.nmi_singlestep and code == V.EXIT_EXCP_BASE + abi.DB_VECTOR):
            self.awaiting_iret_completion = False
            self.nmi_masked = False
            self.make_request(KVM_REQ_EVENT)

    def _unexpected_exit(self, code: int) -> None:
        """VMEXIT_INVALID is KVM_EXIT_FAIL_ENTRY; anything else KVM doesn't intercept is an internal error."""
        if code == V.EXIT_ERR:
            self.run_d[EXIT_REASON_D] = abi.KVM_EXIT_FAIL_ENTRY
            self.run_q[FAIL_ENTRY_REASON_Q] = code
            self.run_d[FAIL_ENTRY_CPU_D] = self.vcpu_id
            self._log_invalid_vmcb()
            return
        self.internal_error(abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, (code, self.vcpu_id))

    def _log_invalid_vmcb(self) -> None:
        """Log the fields that make VMRUN refuse a VMCB."""
        q = self.q
        self.vm.log_limited(
            log,
            "vcpu%d: VMRUN failed: cr0=%#x cr3=%#x cr4=%#x efer=%#x rip=%#x event_inj=%#x",
            self.vcpu_id,
            q[V.CR0],
            q[V.CR3],
            q[V.CR4],
            q[V.EFER],
            q[V.RIP],
            q[V.EVENT_INJ],
        )

    def _userspace_irqchip_exit(self) -> bool:
        """With the PIC in userspace: leave as soon as an interrupt window that it asked for is open."""
        if self.run_b[REQUEST_INTERRUPT_WINDOW_B] and self.ready_for_interrupt_injection():
            self.run_d[EXIT_REASON_D] = abi.KVM_EXIT_IRQ_WINDOW_OPEN
            return True
        return False

    # --- requests and events -------------------------------------------------------------------------

    def arch_handle_requests(self, requests: int) -> bool:
        """Act on x86's requests and on flushes (``vcpu_enter_guest``); False to leave for userspace."""
        if requests & KVM_REQ_LOAD_MMU_PGD:
            load_root_tdp(self)
            self.vm.find_awaited_memory()
        if requests & KVM_REQ_TLB_FLUSH:
            self.stat_tlb_flush += 1
            self.flush_tlb_guest()
        if requests & KVM_REQ_CLOCK_UPDATE:
            guest_time.update_clocks(self)
        if requests & KVM_REQ_APF_READY:
            if requests & KVM_REQ_APF_HALT:
                self.make_request(KVM_REQ_APF_READY)  # it ends the halt, which would not begin without it in the list
            else:
                async_pf.check_completion(self)
        if requests & KVM_REQ_PMU:
            pmu.handle_event(self)
        if requests & KVM_REQ_REPORT_TPR_ACCESS:
            self.run_d[EXIT_REASON_D] = abi.KVM_EXIT_TPR_ACCESS
            self.make_request(requests & _BEHIND_TPR_ACCESS)
            return False
        if requests & KVM_REQ_STEAL_UPDATE:
            guest_time.record_waiting(self)
        if requests & KVM_REQ_TRIPLE_FAULT:
            self.run_d[EXIT_REASON_D] = abi.KVM_EXIT_SHUTDOWN
            self.make_request(requests & (_BEHIND_EOI_EXIT | KVM_REQ_IOAPIC_EOI_EXIT))
            return False
        if requests & KVM_REQ_IOAPIC_EOI_EXIT:
            self.run_d[EXIT_REASON_D] = abi.KVM_EXIT_IOAPIC_EOI
            self.run_b[EOI_VECTOR_B] = self.pending_ioapic_eoi
            self.make_request(requests & _BEHIND_EOI_EXIT)
            return False
        if requests & _HYPERV and not hyperv_requests.handle(self, requests):
            return False
        if requests & KVM_REQ_NMI:
            events.process_nmi(self)
            requests |= KVM_REQ_EVENT
        if requests & KVM_REQ_EVENT:
            self._handle_event()
        if requests & KVM_REQ_APF_HALT:
            self._halt_for_page()
        return True

    def _halt_for_page(self) -> None:
        """Sleep in the middle of an instruction until a page has come or an event can be taken."""
        self.apf.halted = True
        try:
            self.block()
        finally:
            self.apf.halted = False

    def _handle_event(self) -> None:
        """Accept INIT and SIPI, inject what may be injected, ask for windows for the rest."""
        self.stat_req_event += 1
        apic = self.apic
        if apic is not None and apic.pending_events:
            apic.accept_events()
            if self.mp_state != _RUNNABLE:
                self.make_request(KVM_REQ_EVENT)
                return
        if self.injecting:
            # An entry was prepared and given up: what had been handed over is handed over again.
            self.q[V.EVENT_INJ] = 0
            self.injecting = False
        events.inject_events(self)
        if apic is not None:
            self._update_cr8_intercept(apic)
            if self.pv_eoi is not None and self.pv_eoi.msr:
                self.pv_eoi.sync_to_guest()
            if self.vapic is not None and apic.attention & KVM_APIC_CHECK_VAPIC:
                self.vapic.sync_to_guest()
        if self.pic_in_userspace and self.run_b[REQUEST_INTERRUPT_WINDOW_B]:
            if self._accepts_external_interrupt() and not self.ready_for_interrupt_injection():
                svm.enable_irq_window(self)

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

    # --- blocking ------------------------------------------------------------------------------------

    def is_runnable(self) -> bool:
        """Tell whether a halted vCPU has a reason to go on (``kvm_arch_vcpu_runnable``)."""
        if (self.mp_state == _RUNNABLE and not self.apf.halted) or self.pv_unhalted or async_pf.ends_halt(self):
            return True
        if self.mp_state == _HALTED or self.apf.halted:
            if self.exception.pending or self.exception.injected or self.nmi_queued or self.interrupt_injected:
                return True
            if self.nmi_pending and not svm.nmi_blocked(self):
                return True
            if not svm.interrupt_blocked(self) and events.cpu_has_interrupt(self):
                return True
        return self.apic is not None and bool(self.apic.pending_events)

    def arch_check_block(self) -> bool:
        """Inject what the APIC's timer is due for, then look: an event alone is no reason unless it can be taken."""
        apic = self.apic
        if apic is not None and apic.timer.deadline_ns:
            apic.inject_timer_irqs()
        return bool(self.requests & (vcpu.GENERAL_REQUESTS | _SERVED_WHILE_BLOCKED)) or self.is_runnable()

    def arch_slept(self) -> None:
        """Let PAUSE exits come sooner again."""
        svm.shrink_ple_window(self)

    def arch_block(self) -> None:
        """Wait until there is a reason to go on, then bring the multiprocessing state up to date."""
        runnable = self.is_runnable()
        if not runnable:
            if self.mp_state == _HALTED:
                self.halt_and_wait()
            else:
                self.block()
            self.stat_halt_wakeup += 1
            if self.steal_enabled:
                guest_time.check_waiting(self)
        if self.requests & vcpu.GENERAL_REQUESTS:
            self.handle_general_requests()
        apic = self.apic
        if apic is not None and apic.pending_events:
            apic.accept_events()
        if self.mp_state == _HALTED and (runnable or self.is_runnable()):
            self.pv_unhalted = False
            self.mp_state = _RUNNABLE
            self.make_request(KVM_REQ_EVENT)  # what ended the halt is delivered now, not by an interrupt window's exit
        elif self.requests & _SERVED_WHILE_BLOCKED and self.mp_state != _RUNNABLE:
            self._handle_other_requests_while_blocked()

    def _handle_other_requests_while_blocked(self) -> None:
        """Flushes and clock updates that came while the vCPU stays halted; everything else stays asked for."""
        with self.request_lock:
            requests = self.requests
            self.requests = requests & ~_SERVED_WHILE_BLOCKED
        if requests & KVM_REQ_TLB_FLUSH:
            self.flush_tlb_guest()
        if requests & KVM_REQ_CLOCK_UPDATE:
            guest_time.update_clocks(self)
        if requests & KVM_REQ_STEAL_UPDATE:
            guest_time.record_waiting(self)
        if requests & KVM_REQ_HV_STIMER:
            stimer.process(self)

    # --- what the local APIC asks of its vCPU (irqchip.seams.ApicVcpu) -------------------------------

    def set_apic_timer(self, deadline_ns: int) -> None:
        """Arm the processor's timer."""
        self.cpu.set_timer(deadline_ns)

    def tsc_deadline_to_ns(self, guest_tsc: int) -> int:
        """Return the clock's value when the guest's TSC reaches ``guest_tsc``."""
        return tsc.time_of(self, guest_tsc)

    def inject_smi(self) -> None:
        """There is no system management mode: an SMI is dropped, with a note in the log."""
        self.vm.log_limited(log, "vcpu%d: an SMI was dropped: there is no system management mode", self.vcpu_id)

    def report_tpr_access(self, *, write: bool) -> None:
        """Have KVM_RUN end behind this instruction, with its address."""
        self.run_q[TPR_RIP_Q] = self.q[V.RIP]
        self.run_d[TPR_IS_WRITE_D] = write
        self.make_request(KVM_REQ_REPORT_TPR_ACCESS)

    def apic_software_enabled(self) -> None:
        """Pages that have come while nobody could be told of them (``apic_set_spiv``)."""
        self.make_request(KVM_REQ_APF_READY)

    def apic_base_changed(self) -> None:
        """CPUID.APIC follows the APIC's enable bit."""
        self.cpuid.update_runtime(self)

    def init_signal_blocked(self) -> bool:
        """INIT is never blocked: there is neither SMM nor a guest that clears GIF."""
        return False

    def deliver_sipi_vector(self, vector: int) -> None:
        """Start in real mode at ``vector`` << 12."""
        cs = self.vmcb.segment(V.CS_OFFSET)
        self.vmcb.set_segment(V.CS_OFFSET, vector << 8, cs.attrib, cs.limit, vector << 12)
        self.q[V.RIP] = 0

    def vcpu_reset(self, init_event: bool) -> None:
        """RESET, or INIT with ``init_event`` (SDM vol. 3, table 9-1; APM vol. 2, 14.1.3)."""
        reset.vcpu_reset(self, init_event)
