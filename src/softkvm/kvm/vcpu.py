# SPDX-License-Identifier: Apache-2.0
"""A virtual processor: its state, and the loop that runs it (``vcpu_run``, ``vcpu_enter_guest``).

The thread that calls :meth:`Vcpu.run` is the vCPU's thread. Other threads change it only through requests:
they set a bit in ``requests`` first and wake the vCPU second, so that no wake-up is lost.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from softkvm import _softcpu, abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.mmu.paging import walk
from softkvm.kvm.requests import (
    KVM_REQ_CLOCK_UPDATE,
    KVM_REQ_EVENT,
    KVM_REQ_NMI,
    KVM_REQ_SIGNAL,
    KVM_REQ_SMI,
    KVM_REQ_STEAL_UPDATE,
    KVM_REQ_TASK_WORK,
    KVM_REQ_TLB_FLUSH,
    KVM_REQ_TLB_FLUSH_GUEST,
    KVM_REQ_TRIPLE_FAULT,
    KVM_REQ_UNBLOCK,
    KVM_REQ_VM_DEAD,
)
from softkvm.kvm.stats import vcpu_stats
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import debug, events, fpu, io, kvmclock, msrs, regs, segments, svm
from softkvm.kvm.x86 import vmcb as V
from softkvm.kvm.x86.cpuid import CpuidTable
from softkvm.kvm.x86.emulate_table import Emulator
from softkvm.kvm.x86.exceptions import QueuedException, X86Exception, inject_gp
from softkvm.kvm.x86.lapic import Lapic
from softkvm.kvm.x86.svm_exits import EXIT_HANDLERS

if TYPE_CHECKING:
    from softkvm.kvm.vm import Vm

OUTSIDE_GUEST_MODE: Final = 0
IN_GUEST_MODE: Final = 1
BLOCKING: Final = 2

VCPU_MMAP_SIZE: Final = 3 * 4096

_RUNNABLE: Final = abi.KVM_MP_STATE_RUNNABLE
_HALTED: Final = abi.KVM_MP_STATE_HALTED
_U64: Final = (1 << 64) - 1
#: Steal time is looked at again when this much time has passed.
_STEAL_INTERVAL_NS: Final = 10_000_000


class Vcpu:
    """One virtual processor (implements :class:`softkvm.api.Vcpu`)."""

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
        permission_map = memoryview(self.msrpm).cast("B")
        permission_map[:] = b"\xff" * len(permission_map)
        for msr in svm.DIRECT_ACCESS_MSRS:
            svm.set_msr_interception(permission_map, msr, read=False, write=False)

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
        self._run_lock = threading.Lock()
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
        self.has_run = False
        self.pv_cpuid_enforce = False
        self.pv_unhalted = False
        self.pvclock_set_guest_stopped = False
        self.last_steal = 0
        self._steal_checked_ns = 0
        self._schedstat_path = ""

        # Events
        self.exception = QueuedException()
        self.interrupt_injected = False
        self.interrupt_nr = 0
        self.interrupt_soft = False
        self.injecting = False
        self.pending_external_vector = -1
        self.nmi_queued = 0
        self.nmi_pending = 0
        self.nmi_injected = False
        self.nmi_masked = False
        self.nmi_singlestep = False
        self.nmi_singlestep_guest_rflags = 0
        self.awaiting_iret_completion = False
        self.nmi_iret_rip = 0
        self.mp_state = _RUNNABLE

        # Exits to userspace
        self.complete_userspace_io: Callable[[Vcpu], int] | None = None
        self.pio_size = 0
        self.pio_linear_rip = 0
        self.pio_bus = vm.pio_bus
        self.mmio_bus = vm.mmio_bus

        # Statistics
        self.exit_counts: dict[int, int] = {}
        self.stat_exits = 0
        self.stat_halt_exits = 0
        self.stat_halt_wakeup = 0
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
        self.apic: Lapic | None = None
        if self.chips is not None:
            self.apic = Lapic(self, self.chips.apic_map)
        self._closed = False
        self.vcpu_reset(False)
        if self.apic is not None and not self.is_bsp():
            self.mp_state = abi.KVM_MP_STATE_UNINITIALIZED

    # --- state that several modules need ----------------------------------------------------------------

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
        return bool(self.efer & svm.EFER_LMA and self.w[V.CS_ATTRIB] & V.SEG_L)

    def is_bsp(self) -> bool:
        """Tell whether this vCPU boots the machine (KVM_SET_BOOT_CPU_ID)."""
        return self.vcpu_id == self.vm.bsp_vcpu_id

    def get_rflags(self) -> int:
        """Return RFLAGS without a TF that only the debugger or an NMI window set."""
        flags = self.q[V.RFLAGS]
        if self.guest_debug & abi.KVM_GUESTDBG_SINGLESTEP:
            flags &= ~svm.RFLAGS_TF
        if self.nmi_singlestep:
            if not self.nmi_singlestep_guest_rflags & svm.RFLAGS_TF:
                flags &= ~svm.RFLAGS_TF
            if not self.nmi_singlestep_guest_rflags & svm.RFLAGS_RF:
                flags &= ~svm.RFLAGS_RF
        return flags

    def set_rflags(self, flags: int) -> None:
        """Load RFLAGS, keeping the TF that single-stepping needs."""
        if self.guest_debug & abi.KVM_GUESTDBG_SINGLESTEP:
            flags |= svm.RFLAGS_TF
        if self.nmi_singlestep:
            flags |= svm.RFLAGS_TF | svm.RFLAGS_RF
        self.q[V.RFLAGS] = flags & 0x3F_7FD5 | svm.RFLAGS_FIXED
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

    # --- requests ----------------------------------------------------------------------------------------------

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

    def vcpu_kick(self) -> None:
        """Make the vCPU look at its requests: out of guest mode, or awake (``kvm_vcpu_kick``)."""
        if self.mode != OUTSIDE_GUEST_MODE:
            self.cpu.kick()

    def request_event(self) -> None:
        """Look for events to inject before the next guest instruction."""
        with self.request_lock:
            self.requests |= KVM_REQ_EVENT
        if self.mode != OUTSIDE_GUEST_MODE:
            self.cpu.kick()

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

    # --- what the local APIC asks of its vCPU (irq_seams.ApicVcpu) ------------------------------------------------

    def set_apic_timer(self, deadline_ns: int) -> None:
        """Arm the processor's timer."""
        self.cpu.set_timer(deadline_ns)

    def tsc_deadline_to_ns(self, guest_tsc: int) -> int:
        """Return the clock's value when the guest's TSC reaches ``guest_tsc``."""
        return guest_tsc - self.tsc_offset_signed()

    def inject_nmi(self) -> None:
        """Queue an NMI."""
        with self.request_lock:
            self.nmi_queued += 1
            self.requests |= KVM_REQ_NMI
        self.vcpu_kick()

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
        return self.apic.apic_base if self.apic is not None else self.msr_values.get(msrs.MSR_IA32_APICBASE, 0)

    def set_apic_base(self, value: int, host: bool) -> bool:
        """Write IA32_APIC_BASE; False for a mode or address that can't be."""
        if self.apic is not None:
            return self.apic.set_base(value, host)
        self.msr_values[msrs.MSR_IA32_APICBASE] = value
        return True

    # --- reset -------------------------------------------------------------------------------------------------------

    def vcpu_reset(self, init_event: bool) -> None:
        """RESET, or INIT with ``init_event`` (SDM vol. 3, table 9-1; APM vol. 2, 14.1.3)."""
        self.init_event = init_event
        self.exception.clear()
        self.interrupt_injected = False
        self.injecting = False
        self.nmi_pending = self.nmi_queued = 0
        self.nmi_injected = False
        self.nmi_singlestep = False
        self.set_nmi_mask(False)
        if self.apic is not None:
            self.apic.reset(init_event)
        if not init_event:
            self.msr_values.pop(abi.MSR_KVM_SYSTEM_TIME_NEW, None)
            fpu.reset(self)
            self.tsc_aux = 0
        for n in range(16):
            self.gpr[n] = 0
        leaf = self.cpuid.leaf(1, 0)
        self.gpr[2] = leaf[0] if leaf is not None else 0x600
        for n in range(4):
            self.effective_db[n] = 0
        self.saved_db = None
        self.own_dr7 = 0x400
        svm.init_vmcb(self)
        if init_event:
            # The mask survives in the VMCB; a guest debugger's intercepts come back.
            svm.set_exception_intercepts(self)
        self.make_request(KVM_REQ_EVENT)

    # --- time ------------------------------------------------------------------------------------------------------------

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
        self.set_tsc_offset(self.vm.synchronized_tsc_offset(tsc, self.tsc_khz))

    def run_delay_ns(self) -> int:
        """Return how long the vCPU's thread has waited for a processor, as the host's scheduler counts it."""
        if not self._schedstat_path:
            self._schedstat_path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        try:
            with open(self._schedstat_path) as f:
                return int(f.read().split()[1])
        except (OSError, IndexError, ValueError):
            return 0

    # --- events ---------------------------------------------------------------------------------------------------------------

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
        self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_HLT
        return 0

    def exit_debug(self, exception: int, dr6: int, pc: int) -> None:
        """Describe a KVM_EXIT_DEBUG."""
        debug.exit_debug(self, exception, dr6, pc)

    def internal_error(self, suberror: int, data: Sequence[int]) -> None:
        """Describe a KVM_EXIT_INTERNAL_ERROR with ``data``."""
        self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_INTERNAL_ERROR
        self.run_d[32 // 4] = suberror
        self.run_d[36 // 4] = len(data)
        for n, value in enumerate(data):
            self.run_q[40 // 8 + n] = value

    def internal_error_emulation(self) -> None:
        """Describe a failed emulation, with the instruction bytes if they can be read."""
        try:
            code = self.emulator.fetch()
        except X86Exception:
            code = b""
        self.internal_error(abi.KVM_INTERNAL_ERROR_EMULATION, (0, 0, 0))
        if code:
            # ndata counts flags and the 16 bytes of length and instruction
            self.run_q[40 // 8] = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
            self.run_b[48] = len(code)
            self.run_b[49 : 49 + len(code)] = code

    def msr_failed(self, index: int, data: int, *, write: bool) -> int:
        """An MSR access that KVM refuses: #GP, or KVM_EXIT_X86_RDMSR/WRMSR if userspace asked for them."""
        if self.vm.user_space_msr_mask & abi.KVM_MSR_EXIT_REASON_UNKNOWN:
            self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_X86_WRMSR if write else abi.KVM_EXIT_X86_RDMSR
            self.run_q[32 // 8] = 0
            self.run_d[40 // 4] = abi.KVM_MSR_EXIT_REASON_UNKNOWN
            self.run_d[44 // 4] = index
            self.run_q[48 // 8] = data
            self.complete_userspace_io = _complete_wrmsr if write else _complete_rdmsr
            return 0
        inject_gp(self)
        return 1

    def emulate_vmware_backdoor(self) -> int:
        """#GP on the VMware backdoor's instructions: emulated without the permission check."""
        try:
            code = self.emulator.fetch()
            insn = self.emulator.cache.get(code, svm.code_bitness(self))
        except (X86Exception, ValueError):
            inject_gp(self)
            return 1
        if insn.mnemonic in ("in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd"):
            port = self.gpr[2] & 0xFFFF
            if port in (0x5658, 0x5659):
                return self.emulator.emulate()
        inject_gp(self)
        return 1

    # --- the run loop ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """KVM_RUN (KVM API 4.10)."""
        if not self._run_lock.acquire(blocking=False):
            raise kvm_error(errno.EBUSY, "another thread runs the vCPU")
        try:
            self._run()
        finally:
            self._post_run_save()
            self._run_lock.release()

    def _run(self) -> None:
        self.vm.check_alive()
        if self.requests & KVM_REQ_SIGNAL:
            self._signal_exit()
        if self.mp_state == abi.KVM_MP_STATE_UNINITIALIZED:
            if self.run_b[io.RUN_IMMEDIATE_EXIT]:
                raise InterruptedError(errno.EINTR, "immediate_exit is set")
            # A processor that waits for its start-up IPI: blocked until something comes.
            self._block()
            assert self.apic is not None
            self.apic.accept_events()
            self._take_signal()
            if self.mp_state == abi.KVM_MP_STATE_UNINITIALIZED:
                raise BlockingIOError(errno.EAGAIN, "the vCPU waits for INIT and a start-up IPI")
        if self.apic is None and self.run_q[io.RUN_CR8] != self.shadow_cr8:
            if not cr.kvm_set_cr8(self, self.run_q[io.RUN_CR8]):
                raise kvm_error(errno.EINVAL, f"cr8={self.run_q[io.RUN_CR8]:#x}, expected 4 bits")
        complete = self.complete_userspace_io
        if complete is not None:
            self.complete_userspace_io = None
            if not complete(self):
                return
        if self.run_b[io.RUN_IMMEDIATE_EXIT]:
            self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_INTR
            raise InterruptedError(errno.EINTR, "immediate_exit is set")
        self.has_run = True
        self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_UNKNOWN
        self.vcpu_run()

    def _signal_exit(self) -> None:
        self.take_request(KVM_REQ_SIGNAL)
        self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_INTR
        raise InterruptedError(errno.EINTR, "kicked")

    def _take_signal(self) -> None:
        if self.requests & KVM_REQ_SIGNAL:
            self._signal_exit()

    def _post_run_save(self) -> None:
        """Fill in what KVM_RUN reports whatever the exit reason (``post_kvm_run_save``)."""
        run_b, run_q, apic = self.run_b, self.run_q, self.apic
        run_b[io.RUN_IF_FLAG] = self.q[V.RFLAGS] >> 9 & 1
        if apic is not None:
            run_q[io.RUN_CR8] = apic.cr8
            run_q[io.RUN_APIC_BASE] = apic.apic_base
            run_b[io.RUN_READY_FOR_INJECTION] = 1
        else:
            run_q[io.RUN_CR8] = self.shadow_cr8
            run_q[io.RUN_APIC_BASE] = self.get_apic_base()
            run_b[io.RUN_READY_FOR_INJECTION] = self._ready_for_interrupt_injection()

    def _ready_for_interrupt_injection(self) -> bool:
        """Tell whether userspace's next KVM_INTERRUPT would be taken at once."""
        return (
            self.pending_external_vector < 0
            and not self.interrupt_injected
            and not self.exception.injected
            and not self.exception.pending
            and not svm.interrupt_blocked(self)
        )

    def vcpu_run(self) -> None:
        """Run until there is an exit for userspace."""
        cpu = self.cpu
        vmrun = cpu.vmrun
        address = self.vmcb.address
        q, b, gpr = self.q, self.b, self.gpr
        counts = self.exit_counts
        handlers = EXIT_HANDLERS
        apic = self.apic
        rax, rsp, exit_int_info, v_tpr = V.RAX, V.RSP, V.EXIT_INT_INFO, V.V_TPR
        valid = V.EVTINJ_VALID
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
            q[rax] = gpr[0]
            q[rsp] = gpr[4]
            code = vmrun(address)
            self.mode = OUTSIDE_GUEST_MODE
            gpr[0] = q[rax]
            gpr[4] = q[rsp]
            b[0x5C] = 0  # TLB_CTL
            if apic is not None and apic.regs[0x20] >> 4 != b[v_tpr] & 0xF:
                apic.set_cr8(b[v_tpr] & 0xF)
            if self.injecting or q[exit_int_info] & valid:
                svm.complete_interrupts(self)
            if self.awaiting_iret_completion:
                self._check_iret_completion()
            try:
                counts[code] += 1
            except KeyError:
                counts[code] = 1
            handler = handlers.get(code)
            if handler is None:
                self._unexpected_exit(code)
                return
            if not handler(self):
                return
            if apic is None and self._userspace_irqchip_exit():
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
            self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_FAIL_ENTRY
            self.run_q[32 // 8] = code
            self.run_d[40 // 4] = self.vcpu_id
            self.vm.log_invalid_vmcb(self)
            return
        self.internal_error(abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, (code, self.vcpu_id))

    def _userspace_irqchip_exit(self) -> bool:
        """With chips in userspace: leave as soon as an interrupt window that it asked for is open."""
        if self.run_b[io.RUN_REQUEST_INTERRUPT_WINDOW] and self._ready_for_interrupt_injection():
            self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_IRQ_WINDOW_OPEN
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
            self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_INTR
            raise InterruptedError(errno.EINTR, "kicked")
        if requests & KVM_REQ_VM_DEAD:
            raise kvm_error(errno.EIO, "the VM is dead")
        if requests & (KVM_REQ_TLB_FLUSH | KVM_REQ_TLB_FLUSH_GUEST):
            self.stat_tlb_flush += 1
            self.b[V.TLB_CTL] = V.TLB_CONTROL_FLUSH_ASID
        if requests & KVM_REQ_CLOCK_UPDATE:
            kvmclock.update_guest_time(self)
        if requests & KVM_REQ_STEAL_UPDATE:
            kvmclock.record_steal_time(self)
        if requests & KVM_REQ_TRIPLE_FAULT:
            self.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_SHUTDOWN
            self.make_request(requests & KVM_REQ_EVENT)
            return False
        if requests & KVM_REQ_NMI:
            events.process_nmi(self)
            requests |= KVM_REQ_EVENT
            self.take_request(KVM_REQ_EVENT)
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
        elif self.run_b[io.RUN_REQUEST_INTERRUPT_WINDOW] and self.pending_external_vector < 0:
            if not self._ready_for_interrupt_injection():
                svm.enable_irq_window(self)
        return True

    def _update_cr8_intercept(self, apic: Lapic) -> None:
        """Intercept CR8 writes only while an interrupt waits for the priority to fall; load V_TPR."""
        self.b[V.V_TPR] = self.b[V.V_TPR] & 0xF0 | apic.cr8
        highest = apic.highest_irr()
        if highest >= 0 and highest >> 4 <= apic.cr8:
            self.d[V.INTERCEPT_CR] |= V.CR8_WRITE
        else:
            self.d[V.INTERCEPT_CR] &= ~V.CR8_WRITE

    # --- blocking -----------------------------------------------------------------------------------------------------------------

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
        """Wait until the vCPU is runnable or asked to do something (``kvm_vcpu_block``)."""
        cpu, apic = self.cpu, self.apic
        self.mode = BLOCKING
        try:
            while True:
                cpu.clear_kick()
                if apic is not None and apic.timer.deadline_ns:
                    apic.inject_timer_irqs()
                if self.requests & ~(KVM_REQ_EVENT | KVM_REQ_NMI) or self.is_runnable():
                    return
                cpu.wait()
        finally:
            self.mode = OUTSIDE_GUEST_MODE

    def _vcpu_block(self) -> None:
        """Block, then bring the multiprocessing state up to date."""
        if not self.is_runnable():
            self._block()
            self.stat_halt_wakeup += 1
            self._check_steal_time()
        requests = self.requests
        if requests & (KVM_REQ_SIGNAL | KVM_REQ_TASK_WORK | KVM_REQ_VM_DEAD):
            self._handle_blocked_requests(requests)
        apic = self.apic
        if apic is not None and apic.pending_events:
            apic.accept_events()
        if self.mp_state == _HALTED and self.is_runnable():
            self.pv_unhalted = False
            self.mp_state = _RUNNABLE
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

    # --- the API --------------------------------------------------------------------------------------------------------------------

    @property
    def kvm_run(self) -> abi.kvm_run:
        """The shared page as a structure."""
        return self._kvm_run

    @property
    def shared(self) -> memoryview:
        """The pages shared with userspace."""
        return self._shared

    def get_regs(self) -> abi.kvm_regs:
        """KVM_GET_REGS (KVM API 4.11)."""
        return regs.get_regs(self)

    def set_regs(self, registers: abi.kvm_regs) -> None:
        """KVM_SET_REGS (KVM API 4.12)."""
        regs.set_regs(self, registers)

    def get_sregs(self) -> abi.kvm_sregs:
        """KVM_GET_SREGS (KVM API 4.13)."""
        return regs.get_sregs(self)

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        """KVM_SET_SREGS (KVM API 4.14)."""
        regs.set_sregs(self, sregs)

    def get_sregs2(self) -> abi.kvm_sregs2:
        """KVM_GET_SREGS2 (KVM API 4.131)."""
        return regs.get_sregs2(self)

    def set_sregs2(self, sregs: abi.kvm_sregs2) -> None:
        """KVM_SET_SREGS2 (KVM API 4.132)."""
        regs.set_sregs2(self, sregs)

    def get_fpu(self) -> abi.kvm_fpu:
        """KVM_GET_FPU (KVM API 4.22)."""
        return fpu.get_fpu(self)

    def set_fpu(self, state: abi.kvm_fpu) -> None:
        """KVM_SET_FPU (KVM API 4.23)."""
        fpu.set_fpu(self, state)

    def get_xsave(self) -> abi.kvm_xsave:
        """KVM_GET_XSAVE (KVM API 4.42)."""
        return fpu.get_xsave(self)

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        """KVM_SET_XSAVE (KVM API 4.43)."""
        fpu.set_xsave(self, xsave)

    def get_xcrs(self) -> abi.kvm_xcrs:
        """KVM_GET_XCRS (KVM API 4.44)."""
        return fpu.get_xcrs(self)

    def set_xcrs(self, xcrs: abi.kvm_xcrs) -> None:
        """KVM_SET_XCRS (KVM API 4.45)."""
        fpu.set_xcrs(self, xcrs)

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        """KVM_GET_MSRS (KVM API 4.18): values up to the first MSR that cannot be read."""
        values = []
        for index in indices:
            value = msrs.get_msr(self, index, host=True)
            if value is None:
                break
            values.append(value)
        return values

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS (KVM API 4.19): how many were set; stops at the first that cannot be written."""
        count = 0
        for index, data in values.items():
            if not msrs.set_msr(self, index, data, host=True):
                break
            count += 1
        return count

    def _lapic(self) -> Lapic:
        if self.apic is None:
            raise kvm_error(errno.EINVAL, "the vCPU has no in-kernel local APIC")
        return self.apic

    def get_lapic(self) -> abi.kvm_lapic_state:
        """KVM_GET_LAPIC (KVM API 4.57)."""
        return abi.kvm_lapic_state.from_buffer_copy(self._lapic().get_state())

    def set_lapic(self, lapic: abi.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC (KVM API 4.58)."""
        self._lapic().set_state(bytes(lapic))
        self.make_request(KVM_REQ_EVENT)

    def get_mp_state(self) -> abi.kvm_mp_state:
        """KVM_GET_MP_STATE (KVM API 4.38)."""
        if self.apic is not None:
            self.apic.accept_events()
        state = self.mp_state
        if state == _HALTED and self.pv_unhalted:
            state = _RUNNABLE
        return abi.kvm_mp_state(mp_state=state)

    def set_mp_state(self, state: abi.kvm_mp_state) -> None:
        """KVM_SET_MP_STATE (KVM API 4.39): EINVAL for states that x86 doesn't have, or not without a local APIC."""
        value = state.mp_state
        if value not in _MP_STATES or (self.apic is None and value != _RUNNABLE):
            raise kvm_error(errno.EINVAL, f"mp_state={value}, expected 0 to 4, or 0 without an in-kernel APIC")
        if value == abi.KVM_MP_STATE_SIPI_RECEIVED:
            self.mp_state = abi.KVM_MP_STATE_INIT_RECEIVED
            self._lapic().pending_events |= 2
        else:
            self.mp_state = value
        self.make_request(KVM_REQ_EVENT)

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS (KVM API 4.31)."""
        return events.get_vcpu_events(self)

    def set_vcpu_events(self, state: abi.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS (KVM API 4.32)."""
        events.set_vcpu_events(self, state)

    def get_debugregs(self) -> abi.kvm_debugregs:
        """KVM_GET_DEBUGREGS (KVM API 4.33)."""
        return debug.get_debugregs(self)

    def set_debugregs(self, debugregs: abi.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS (KVM API 4.34)."""
        debug.set_debugregs(self, debugregs)

    def set_cpuid2(self, entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2 (KVM API 4.20): EINVAL once the vCPU has run, unless nothing changes."""
        if self.has_run:
            same = len(entries) == len(self.cpuid.entries) and all(
                bytes(a) == bytes(b) for a, b in zip(entries, self.cpuid.entries, strict=True)
            )
            if not same:
                raise kvm_error(errno.EINVAL, "the vCPU has run: its CPUID can't change any more")
            return
        self.cpuid.set(self, entries)
        leaf = self.cpuid.leaf(0x8000_0008, 0)
        self.maxphyaddr = leaf[0] & 0xFF if leaf is not None and leaf[0] & 0xFF else 36
        self.guest_has_gbpages = self.cpuid.feature(0x8000_0001, 0, 3, 26)
        if self.apic is not None:
            self.apic.cpuid_changed(
                x2apic=self.cpuid.feature(1, 0, 2, 21),
                tsc_deadline=self.cpuid.feature(1, 0, 2, 24),
                maxphyaddr=self.maxphyaddr,
            )

    def get_cpuid2(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2."""
        return self.cpuid.get()

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT (KVM API 4.16): EINVAL for no vector, ENXIO with in-kernel chips, EEXIST if one waits."""
        if not 0 <= irq < abi.KVM_NR_INTERRUPTS:
            raise kvm_error(errno.EINVAL, f"irq={irq}, expected 0 to 255")
        if self.apic is not None and not self.vm.split_irqchip:
            raise kvm_error(errno.ENXIO, "interrupts come from the in-kernel chips")
        if self.pending_external_vector >= 0:
            raise kvm_error(errno.EEXIST, f"vector {self.pending_external_vector} is waiting already")
        self.pending_external_vector = irq
        self.request_event()

    def nmi(self) -> None:
        """KVM_NMI (KVM API 4.64)."""
        self.inject_nmi()

    def smi(self) -> None:
        """KVM_SMI (KVM API 4.124): there is no system management mode."""
        raise kvm_error(errno.EINVAL, "there is no system management mode (KVM_CAP_X86_SMM is 0)")

    def set_guest_debug(self, control: abi.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG (KVM API 4.87)."""
        debug.set_guest_debug(self, control)

    def translate(self, linear_address: int) -> abi.kvm_translation:
        """KVM_TRANSLATE (KVM API 4.15)."""
        result = abi.kvm_translation(linear_address=linear_address)
        try:
            translation = walk(self, linear_address, 0, set_bits=False)
        except X86Exception:
            result.physical_address = _U64
            return result
        result.physical_address = translation.gpa
        result.valid = 1
        result.writeable = 1
        return result

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (KVM API 4.55): EINVAL for another frequency, as the silicon doesn't scale."""
        host = self.vm.default_tsc_khz
        khz = khz or host
        if abs(khz - host) * 1_000_000 > 250 * host:
            raise kvm_error(errno.EINVAL, f"tsc_khz={khz}, expected {host}: the processor has no TSC scaling")
        self.tsc_khz = host

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (KVM API 4.56)."""
        return self.tsc_khz

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL (KVM API 4.69)."""
        kvmclock.kvmclock_ctrl(self)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on a vCPU (KVM API 4.37)."""
        if cap == abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
            self.pv_cpuid_enforce = bool(args and args[0])
            return
        raise kvm_error(errno.EINVAL, f"cap={cap}, expected KVM_CAP_ENFORCE_PV_FEATURE_CPUID")

    def set_signal_mask(self, sigset: bytes | None) -> None:
        """KVM_SET_SIGNAL_MASK (KVM API 4.21): vCPUs are ended by :meth:`kick`, so the mask changes nothing."""
        if sigset is not None and len(sigset) != 8:
            raise kvm_error(errno.EINVAL, f"sigset of {len(sigset)} bytes, expected 8")

    def stats(self) -> dict[str, int]:
        """Counters with the names of KVM's binary statistics, and the exits by reason."""
        return vcpu_stats(self)

    def close(self) -> None:
        """Give the vCPU back; the VM keeps its number taken, as KVM does."""
        if not self._closed:
            self._closed = True
            self.cpu.set_timer(0)
            self.vm.vcpu_closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_MP_STATES: Final = frozenset(
    {
        abi.KVM_MP_STATE_RUNNABLE,
        abi.KVM_MP_STATE_UNINITIALIZED,
        abi.KVM_MP_STATE_INIT_RECEIVED,
        abi.KVM_MP_STATE_HALTED,
        abi.KVM_MP_STATE_SIPI_RECEIVED,
    }
)


def _complete_rdmsr(vcpu: Vcpu) -> int:
    """After KVM_EXIT_X86_RDMSR: userspace's value, or #GP."""
    if vcpu.run_b[32]:
        inject_gp(vcpu)
        return 1
    value = vcpu.run_q[48 // 8]
    vcpu.gpr[0] = value & 0xFFFF_FFFF
    vcpu.gpr[2] = value >> 32
    return svm.skip_emulated_instruction(vcpu)


def _complete_wrmsr(vcpu: Vcpu) -> int:
    """After KVM_EXIT_X86_WRMSR: done, or #GP."""
    if vcpu.run_b[32]:
        inject_gp(vcpu)
        return 1
    return svm.skip_emulated_instruction(vcpu)
