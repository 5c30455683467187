# SPDX-License-Identifier: Apache-2.0
"""The state of a virtual processor: registers, pending events, requests, time, and its reset.

Registers are in the VMCB and in the processor's register block, reached through memory views. Other threads
change a vCPU only through requests: they set a bit in ``requests`` first and wake the vCPU second, so that no
wake-up is lost.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm import run_page
from softkvm.kvm.memory.guest_memory import read_guest, write_guest
from softkvm.kvm.requests import (
    KVM_REQ_CLOCK_UPDATE,
    KVM_REQ_EVENT,
    KVM_REQ_NMI,
    KVM_REQ_SIGNAL,
    KVM_REQ_SMI,
    KVM_REQ_TASK_WORK,
)
from softkvm.kvm.x86 import debug, msrs, reset, segments
from softkvm.kvm.x86.cpuid import CpuidTable
from softkvm.kvm.x86.emulate.table import Emulator
from softkvm.kvm.x86.exceptions import QueuedException, X86Exception
from softkvm.kvm.x86.irqchip.apicdef import APICBASE_RESET, MSR_IA32_APICBASE_BSP
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.paravirt.pv_eoi import PvEoi
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.memory.memslots import Memslots
    from softkvm.kvm.vm import Vm
    from softkvm.kvm.x86.msr_filter import MsrFilter

OUTSIDE_GUEST_MODE: Final = 0
IN_GUEST_MODE: Final = 1
BLOCKING: Final = 2

VCPU_MMAP_SIZE: Final = 3 * 4096

_RUNNABLE: Final = abi.KVM_MP_STATE_RUNNABLE
_HALTED: Final = abi.KVM_MP_STATE_HALTED
_U64: Final = (1 << 64) - 1


class VcpuState:
    """State of one virtual processor (``struct kvm_vcpu``)."""

    # What modules in an import cycle with this one need to know the type of
    q: memoryview
    b: memoryview
    w: memoryview
    d: memoryview
    efer: int
    mcg_cap: int
    tsc_adjust: int

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        self.vm = vm
        self.vcpu_id = vcpu_id
        machine = vm.machine
        self.cpu = _softcpu.Cpu(machine, vcpu_id)
        self.nrips = vm.params.nrips
        self.cpu.next_rip = self.nrips

        # Register block and VMCB (layouts: softkvm._softcpu, AMD APM vol. 2 appendix B)
        block = memoryview(self.cpu.registers).cast("B")
        self.rb = block
        self.rw = block.cast("H")
        self.rd = block.cast("I")
        self.rq = block.cast("Q")
        self.gpr = self.rq[:16]
        self.effective_db = self.rq[0xC0 >> 3 : (0xC0 >> 3) + 4]
        self.vmcb = V.Vmcb(machine.alloc_page())
        self.b, self.w, self.d, self.q = self.vmcb.b, self.vmcb.w, self.vmcb.d, self.vmcb.q
        self.msrpm = machine.alloc_page(2)
        self.permission_map = memoryview(self.msrpm).cast("B")
        self.permission_map[:] = b"\xff" * len(self.permission_map)

        # The pages shared with userspace
        self._mapping = mmap.mmap(-1, VCPU_MMAP_SIZE)
        self._shared = memoryview(self._mapping)
        self.run_b = self._shared
        self.run_w = self._shared.cast("H")
        self.run_d = self._shared.cast("I")
        self.run_q = self._shared.cast("Q")
        self._kvm_run = abi.kvm_run.from_buffer(self._mapping)

        # Requests
        self.request_lock = threading.Lock()
        self.requests = 0
        self.mode = OUTSIDE_GUEST_MODE
        self.guest_entries = 0
        self.running = False
        self._task_work: list[Callable[[], None]] = []

        # Processor state that the VMCB and the register block don't hold
        self.shadow_cr0 = 0
        self.cr0_in_vmcb = False
        self.cr4 = 0
        self.efer = 0
        self.shadow_cr8 = 0
        self.init_event = False
        self.maxphyaddr = vm.maxphyaddr
        self.guest_has_gbpages = True
        self.own_dr7 = 0x400
        self.saved_db: list[int] | None = None
        self.guest_debug = 0
        self.guest_debug_dr7 = 0
        self.singlestep_rip = 0
        self.tsc_offset = 0
        self.tsc_khz = vm.default_tsc_khz
        self.tsc_adjust = 0
        self.mcg_cap = msrs.MCG_CAP
        self.msr_values: dict[int, int] = {}
        self.cpuid = CpuidTable()
        self.msr_filter: MsrFilter | None = None
        self.set_msr_filter(vm.msr_filter)
        #: CPUID raises #GP outside of ring 0 (MSR_MISC_FEATURES_ENABLES).
        self.cpuid_faulting = False
        self.pv_cpuid_enforce = False
        self.pv_unhalted = False
        self.pvclock_set_guest_stopped = False
        self.last_steal = 0
        self._steal_checked_ns = 0

        # Events
        self.exception = QueuedException()
        self.interrupt_injected = False
        self.interrupt_nr = 0
        self.interrupt_soft = False
        self.injecting = False
        self.pending_external_vector = -1
        self.pending_ioapic_eoi = 0
        #: VMEXIT_VINTR has been asked for; writes of CR8 are intercepted (both as in the VMCB).
        self.irq_window = False
        self.cr8_intercepted = False
        self.nmi_queued = 0
        self.nmi_pending = 0
        self.nmi_injected = False
        self.nmi_masked = False
        self.nmi_singlestep = False
        self.nmi_singlestep_guest_rflags = 0
        self.awaiting_iret_completion = False
        self.nmi_iret_rip = 0
        self.mp_state = _RUNNABLE
        #: How long the vCPU waits awake when it halts, and whether it does so now (:mod:`.halt_poll`).
        self.halt_poll_ns = 0
        self.halt_polling = False
        #: The processor holds kicks for others until its next entry.
        self.holds_kicks = False

        # Exits to userspace
        self.complete_userspace_io: Callable[[VcpuState], int] | None = None
        self.pio_size = 0
        #: RIP of an IN or OUT that userspace completes; -1 while none is under way.
        self.pio_rip = -1
        #: Frame of the last MMIO access and the memory slots it was found under.
        self.mmio_gfn = -1
        self.mmio_slots: Memslots | None = None
        self.pio_bus = vm.pio_bus
        self.mmio_bus = vm.mmio_bus

        # Statistics
        self.exit_counts: dict[int, int] = {}
        self.stat_mmio_exits = 0
        self.stat_halt_exits = 0
        self.stat_halt_wakeup = 0
        self.stat_halt_attempted_poll = 0
        self.stat_halt_successful_poll = 0
        self.stat_halt_poll_success_ns = 0
        self.stat_halt_poll_fail_ns = 0
        self.stat_halt_wait_ns = 0
        self.stat_irq_injections = 0
        self.stat_nmi_injections = 0
        self.stat_irq_window_exits = 0
        self.stat_nmi_window_exits = 0
        self.stat_insn_emulation = 0
        self.stat_insn_emulation_fail = 0
        self.stat_hypercalls = 0
        self.stat_msr_writes = 0
        self.stat_pf_taken = 0
        self.stat_tlb_flush = 0
        self.stat_req_event = 0

        self.emulator = Emulator(self)
        self.chips = vm.chips
        #: Userspace has the PIC, so it asks for interrupt windows: without in-kernel chips, or with the APICs alone.
        self.pic_in_userspace = self.chips is None or vm.split_irqchip
        self.apic: Lapic | None = None
        self.pv_eoi: PvEoi | None = None
        if self.chips is not None:
            self.apic = Lapic(self, self.chips.apic_map)
            self.pv_eoi = PvEoi(
                self.apic,
                lambda gpa, size: read_guest(vm, gpa, size),
                lambda gpa, data: write_guest(vm, gpa, data),
            )
        self._closed = False
        self.vcpu_reset(False)
        if self.apic is not None and not self.is_bsp():
            self.mp_state = abi.KVM_MP_STATE_UNINITIALIZED

    # --- state that several modules need -----------------------------------------------------------

    @property
    def cr0(self) -> int:
        """CR0 as the guest sees it; TS and MP change without an exit."""
        return self.q[V.CR0] if self.cr0_in_vmcb else self.shadow_cr0

    @property
    def cr3(self) -> int:
        """CR3: never intercepted, so it is in the VMCB."""
        return self.q[V.CR3]

    @property
    def xcr0(self) -> int:
        """XCR0."""
        return self.rq[0xE0 >> 3]

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self.rq[0xE0 >> 3] = value

    @property
    def pkru(self) -> int:
        """PKRU."""
        return self.rd[0xF0 >> 2]

    @property
    def tsc_aux(self) -> int:
        """TSC_AUX."""
        return self.rq[0xF8 >> 3]

    @tsc_aux.setter
    def tsc_aux(self, value: int) -> None:
        self.rq[0xF8 >> 3] = value

    @property
    def db(self) -> memoryview | list[int]:
        """The guest's DR0 to DR3; the processor has the debugger's while it owns them."""
        return self.effective_db if self.saved_db is None else self.saved_db

    @property
    def guest_dr7(self) -> int:
        """The guest's DR7."""
        return self.q[V.DR7] if self.saved_db is None else self.own_dr7

    @guest_dr7.setter
    def guest_dr7(self, value: int) -> None:
        self.own_dr7 = value

    def update_dr7(self) -> None:
        """Load DR7 after the guest's value has changed."""
        debug.update_dr7(self)

    def is_64bit_code(self) -> bool:
        """Tell whether the guest executes 64-bit code."""
        return bool(self.efer & abi.EFER_LMA and self.w[V.CS_ATTRIB] & V.SEG_L)

    def is_bsp(self) -> bool:
        """Tell whether this vCPU boots the machine (KVM_SET_BOOT_CPU_ID)."""
        return self.vcpu_id == self.vm.bsp_vcpu_id

    def get_rflags(self) -> int:
        """Return RFLAGS without a TF that only the debugger or an NMI window set."""
        flags = self.q[V.RFLAGS]
        if self.guest_debug & abi.KVM_GUESTDBG_SINGLESTEP:
            flags &= ~abi.X86_EFLAGS_TF
        if self.nmi_singlestep:
            if not self.nmi_singlestep_guest_rflags & abi.X86_EFLAGS_TF:
                flags &= ~abi.X86_EFLAGS_TF
            if not self.nmi_singlestep_guest_rflags & abi.X86_EFLAGS_RF:
                flags &= ~abi.X86_EFLAGS_RF
        return flags

    def set_rflags(self, flags: int) -> None:
        """Load RFLAGS, keeping the TF that single-stepping needs."""
        if self.guest_debug & abi.KVM_GUESTDBG_SINGLESTEP:
            flags |= abi.X86_EFLAGS_TF
        if self.nmi_singlestep:
            flags |= abi.X86_EFLAGS_TF | abi.X86_EFLAGS_RF
        self.q[V.RFLAGS] = flags & 0x3F_7FD5 | abi.X86_EFLAGS_FIXED
        self.make_request(KVM_REQ_EVENT)

    def set_nmi_mask(self, masked: bool) -> None:
        """Block or unblock NMIs; blocked ones wait for the guest's IRET."""
        self.nmi_masked = masked
        self.awaiting_iret_completion = False
        if masked:
            self.d[V.INTERCEPT_WORD3] |= V.IRET
        else:
            self.d[V.INTERCEPT_WORD3] &= ~V.IRET

    def load_segment(self, emulator: Emulator, offset: int, selector: int) -> None:
        """Load a segment register from the guest's descriptor tables."""
        segments.load_segment(emulator, offset, selector)

    def instruction_length(self) -> int:
        """Return the decoded length of the instruction at RIP, 0 if it can't be decoded."""
        return self.emulator.instruction_length()

    def flush_tlb_guest(self) -> None:
        """Drop every translation of this vCPU at the next entry; vCPU thread only."""
        self.b[V.TLB_CTL] = V.TLB_CONTROL_FLUSH_ASID

    def set_msr_filter(self, msr_filter: MsrFilter | None) -> None:
        """Filter the guest's accesses to MSRs from now on; vCPU thread only."""
        self.msr_filter = msr_filter
        svm.recalc_msr_intercepts(self)

    # --- requests ----------------------------------------------------------------------------------

    def make_request(self, request: int) -> None:
        """Set request bits; the caller kicks if the vCPU may be running."""
        with self.request_lock:
            self.requests |= request

    def take_request(self, request: int) -> bool:
        """Clear request bits; True if any was set."""
        with self.request_lock:
            taken = self.requests & request
            self.requests &= ~request
        return bool(taken)

    def vcpu_kick(self, sender: VcpuState | None = None) -> None:
        """Make the vCPU look at its requests: out of guest mode, or awake (``kvm_vcpu_kick``).

        On the thread of another vCPU, ``sender``, the kick goes out when that leaves the interpreter, which is soon.
        """
        if self.mode != OUTSIDE_GUEST_MODE:
            if sender is None:
                self.cpu.kick()
            else:
                sender.holds_kicks = True
                sender.cpu.kick_at_entry(self.cpu)

    def request_event(self, sender: VcpuState | None = None) -> None:
        """Look for events to inject before the next guest instruction."""
        with self.request_lock:
            self.requests |= KVM_REQ_EVENT
        self.vcpu_kick(sender)

    def kick(self) -> None:
        """End KVM_RUN with EINTR, as a signal to a real vCPU's thread does."""
        self.make_request(KVM_REQ_SIGNAL)
        self.vcpu_kick()

    def call_soon(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the vCPU's own thread before it enters the guest again (task work)."""
        with self.request_lock:
            self._task_work.append(work)
            self.requests |= KVM_REQ_TASK_WORK
        self.vcpu_kick()

    def _run_task_work(self) -> None:
        while self._task_work:
            with self.request_lock:
                work = self._task_work.pop(0)
            work()

    # --- what the local APIC asks of its vCPU (irq_seams.ApicVcpu) ---------------------------------

    def set_apic_timer(self, deadline_ns: int) -> None:
        """Arm the processor's timer."""
        self.cpu.set_timer(deadline_ns)

    def tsc_deadline_to_ns(self, guest_tsc: int) -> int:
        """Return the clock's value when the guest's TSC reaches ``guest_tsc``."""
        return guest_tsc - self.tsc_offset_signed()

    def inject_nmi(self, sender: VcpuState | None = None) -> None:
        """Queue an NMI."""
        with self.request_lock:
            self.nmi_queued += 1
            self.requests |= KVM_REQ_NMI
        self.vcpu_kick(sender)

    def inject_smi(self) -> None:
        """Queue an SMI; there is no system management mode, so it is dropped with a note in the log."""
        self.make_request(KVM_REQ_SMI)
        self.vcpu_kick()

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

    def get_apic_base(self) -> int:
        """Return IA32_APIC_BASE."""
        if self.apic is not None:
            return self.apic.apic_base
        bsp = MSR_IA32_APICBASE_BSP if self.is_bsp() else 0
        return self.msr_values.get(msrs.MSR_IA32_APICBASE, APICBASE_RESET | bsp)

    def set_apic_base(self, value: int, host: bool) -> bool:
        """Write IA32_APIC_BASE; False for a mode or address that can't be."""
        if self.apic is not None:
            return self.apic.set_base(value, host)
        self.msr_values[msrs.MSR_IA32_APICBASE] = value
        return True

    # --- reset -------------------------------------------------------------------------------------

    def vcpu_reset(self, init_event: bool) -> None:
        """RESET, or INIT with ``init_event`` (SDM vol. 3, table 9-1; APM vol. 2, 14.1.3)."""
        reset.vcpu_reset(self, init_event)

    # --- time --------------------------------------------------------------------------------------

    def tsc_offset_signed(self) -> int:
        """Return the TSC offset as a signed number."""
        return self.tsc_offset - (1 << 64) if self.tsc_offset >> 63 else self.tsc_offset

    def read_guest_tsc(self) -> int:
        """Return the guest's time-stamp counter."""
        return (_softcpu.rdtsc() + self.tsc_offset) & _U64

    def set_tsc_offset(self, offset: int) -> None:
        """Change what is added to the physical TSC."""
        self.tsc_offset = offset & _U64
        self.tsc_offset_changed()
        if self.apic is not None:
            self.apic.timer.tsc_changed()
        if self.msr_values.get(abi.MSR_KVM_SYSTEM_TIME_NEW, 0) & abi.KVM_MSR_ENABLED:
            self.make_request(KVM_REQ_CLOCK_UPDATE)

    def tsc_offset_changed(self) -> None:
        """Bring the VMCB's TSC_OFFSET up to date."""
        self.q[V.TSC_OFFSET] = self.tsc_offset

    def synchronize_tsc(self, tsc: int) -> None:
        """Host write of the TSC: writes of nearly the same value keep the vCPUs' counters equal."""
        self.set_tsc_offset(self.vm.tsc.write(tsc, self.tsc_khz))

    # --- events ------------------------------------------------------------------------------------

    def queue_interrupt(self, vector: int, *, soft: bool) -> None:
        """Note that ``vector`` is being delivered."""
        self.interrupt_injected = True
        self.interrupt_nr = vector
        self.interrupt_soft = soft
        self.make_request(KVM_REQ_EVENT)

    def halt(self) -> int:
        """HLT has been executed: block, or leave for userspace if the chips are there. Returns 1 or 0."""
        self.stat_halt_exits += 1
        if self.apic is not None:
            self.mp_state = _HALTED
            return 1
        self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_HLT
        return 0

    def exit_debug(self, exception: int, dr6: int, pc: int) -> None:
        """Describe a KVM_EXIT_DEBUG."""
        debug.exit_debug(self, exception, dr6, pc)

    def internal_error(self, suberror: int, data: Sequence[int]) -> None:
        """Describe a KVM_EXIT_INTERNAL_ERROR with ``data``."""
        self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_INTERNAL_ERROR
        self.run_d[run_page.INTERNAL_SUBERROR_D] = suberror
        self.run_d[run_page.INTERNAL_NDATA_D] = len(data)
        for n, value in enumerate(data):
            self.run_q[run_page.INTERNAL_DATA_Q + n] = value

    def internal_error_emulation(self) -> None:
        """Describe a failed emulation, with the instruction bytes if they can be read."""
        try:
            code = self.emulator.fetch()
        except X86Exception:
            code = b""
        self.internal_error(abi.KVM_INTERNAL_ERROR_EMULATION, (0, 0, 0))
        if code:
            # ndata counts flags and the 16 bytes of length and instruction
            self.run_q[run_page.EMULATION_FAILURE_FLAGS_Q] = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
            self.run_b[run_page.EMULATION_FAILURE_INSN_SIZE_B] = len(code)
            start = run_page.EMULATION_FAILURE_INSN_BYTES_B
            self.run_b[start : start + len(code)] = code
