# SPDX-License-Identifier: Apache-2.0
"""State of an x86 VM and of its vCPUs (``struct kvm_arch``, ``struct kvm_vcpu_arch``): data, in groups by topic.

Registers are in the VMCB and in the processor's register block, reached through memory views; what neither holds is
here. What happens to it is in the modules that take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.abi import run_page
from softkvm.abi.x86 import run_page as x86_run_page
from softkvm.kvm import state
from softkvm.kvm.x86.exceptions import DR7_FIXED_1
from softkvm.kvm.x86.hyperv.partition import Partition
from softkvm.kvm.x86.irqchip.apicdef import APICBASE_RESET, MSR_IA32_APICBASE_BSP
from softkvm.kvm.x86.mmu.root_tdp import INVALID_PAGE, FlushGuestMapping, flush_by_silicon
from softkvm.kvm.x86.paravirt.apf import Apf
from softkvm.kvm.x86.register_block import DR_Q, PKRU_D, TSC_AUX_Q, UMWAIT_CONTROL_D, XCR0_Q
from softkvm.kvm.x86.requests import KVM_REQ_EVENT, KVM_REQ_NMI
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.xen.state import XenVcpu, XenVm

if TYPE_CHECKING:
    from softkvm.kvm.params import Params
    from softkvm.kvm.x86.cpuid import CpuidTable
    from softkvm.kvm.x86.emulate.table import Emulator
    from softkvm.kvm.x86.exceptions import QueuedException
    from softkvm.kvm.x86.hyperv.vp import VirtualProcessor
    from softkvm.kvm.x86.irqchip.kernel import KernelIrqchip
    from softkvm.kvm.x86.irqchip.lapic import Lapic
    from softkvm.kvm.x86.mmu.tdp_mmu import TdpMmu
    from softkvm.kvm.x86.msr_filter import MsrFilter
    from softkvm.kvm.x86.paravirt.pv_eoi import PvEoi
    from softkvm.kvm.x86.paravirt.vapic import Vapic
    from softkvm.kvm.x86.pmu.event_filter import PmuEventFilter
    from softkvm.kvm.x86.pmu.pmu import Pmu
    from softkvm.kvm.x86.svm.avic import Avic
    from softkvm.kvm.x86.tsc import TscSynchronizer

MSR_IA32_APICBASE = 0x1B


class VmState(state.VmState):
    """What a virtual machine of x86 has beside what every one has."""

    mmu: TdpMmu
    tsc: TscSynchronizer

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.maxphyaddr = (_softcpu.cpuid(0x8000_0008, 0)[0] & 0xFF) or 48
        self.max_gfn = (1 << (min(self.maxphyaddr, 48) - 12)) - 1
        self.iopm = self.machine.alloc_page(3)
        memoryview(self.iopm).cast("B")[:] = b"\xff" * self.iopm.size
        self.vcpus: Sequence[VcpuState] = ()

        # Interrupt chips
        self.chips: KernelIrqchip | None = None
        self.split_irqchip = False
        self.early_pit: int | None = None  # flags of a PIT that was asked for before the irqchip
        self.bsp_vcpu_id = 0
        self.x2apic_api = 0

        #: The virtual interrupt controller, and the frame of the APICs' registers while it has that mapped (-1: not).
        self.avic: Avic | None = None
        self.apic_access_gfn = -1

        # Limits, 0 while userspace has set none
        self.max_vcpu_ids = 0
        self.requested_mmu_pages = 0

        # Options (KVM_ENABLE_CAP)
        self.quirks_disabled = 0
        self.exception_payload_enabled = False
        self.triple_fault_event = False
        self.exit_on_emulation_error = False
        self.disable_hlt_exits = False
        self.pause_in_guest = not (params.pause_filter_count and params.pause_filter_thresh)
        self.user_space_msr_mask = 0
        self.msr_filter: MsrFilter | None = None
        self.guest_can_read_msr_platform_info = True
        self.unused_page_hints = 0  # KVM_CAP_UNUSED_PAGE_HINT: its bits
        self.bus_lock_detection = False  # KVM_CAP_X86_BUS_LOCK_EXIT
        self.enable_pmu = params.enable_pmu
        self.pmu_event_filter: PmuEventFilter | None = None
        self.hypercall_exits = 0  # KVM_CAP_EXIT_HYPERCALL: a bit per number

        # Time
        self.default_tsc_khz = _softcpu.tsc_khz()
        self.kvmclock_offset = -_softcpu.clock_ns()
        self.wall_clock_msr = 0
        self.boot_vcpu_runs_old_kvmclock = False

        self.hyperv = Partition()
        self.xen = XenVm()

        # TLBs (:mod:`.mmu.root_tdp`)
        self.root_tdp = INVALID_PAGE
        self.flush_guest_mapping: FlushGuestMapping = flush_by_silicon

    def has_quirk(self, quirk: int) -> bool:
        """Tell whether a deviation from the architecture that old userspace relies on is in force."""
        return not self.quirks_disabled & quirk

    @property
    def cd_nw_cleared_quirk(self) -> bool:
        """KVM_X86_QUIRK_CD_NW_CLEARED."""
        return self.has_quirk(abi.KVM_X86_QUIRK_CD_NW_CLEARED)

    @property
    def fix_hypercall_quirk(self) -> bool:
        """KVM_X86_QUIRK_FIX_HYPERCALL_INSN."""
        return self.has_quirk(abi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN)


@dataclass(eq=False)
class ControlState:
    """Control registers and modes that the VMCB doesn't show as the guest sees them."""

    shadow_cr0: int = 0
    #: CR0 is in the VMCB as the guest sees it: TS and MP change without an exit.
    cr0_in_vmcb: bool = False
    cr4: int = 0
    efer: int = 0
    shadow_cr8: int = 0
    #: What stands in the run page: CR8 and IA32_APIC_BASE (with a local APIC of ours), and whether an interrupt would
    #: be taken.
    told_cr8: int = 0
    told_apic_base: int = 0
    told_ready: int = 0
    init_event: bool = False
    maxphyaddr: int = 48
    guest_has_gbpages: bool = True
    #: CPUID raises #GP outside of ring 0 (MSR_MISC_FEATURES_ENABLES).
    cpuid_faulting: bool = False
    #: The nested tables that the processor uses, from the first KVM_RUN on.
    root_tdp: int = INVALID_PAGE
    mcg_cap: int = 0
    #: IA32_PERF_CAPABILITIES.
    perf_capabilities: int = 0


@dataclass(eq=False)
class EventState:
    """Exceptions, interrupts and NMIs on their way to the guest."""

    interrupt_injected: bool = False
    interrupt_nr: int = 0
    interrupt_soft: bool = False
    #: An event stands in the VMCB's EVENTINJ.
    injecting: bool = False
    pending_external_vector: int = -1
    pending_ioapic_eoi: int = 0
    #: VMEXIT_VINTR has been asked for; writes of CR8 are intercepted (both as in the VMCB).
    irq_window: bool = False
    cr8_intercepted: bool = False
    nmi_queued: int = 0
    nmi_pending: int = 0
    nmi_injected: bool = False
    nmi_masked: bool = False
    nmi_singlestep: bool = False
    nmi_singlestep_guest_rflags: int = 0
    awaiting_iret_completion: bool = False
    nmi_iret_rip: int = 0


@dataclass(eq=False)
class DebugState:
    """Debug registers, the guest's and the debugger's (KVM_SET_GUEST_DEBUG)."""

    own_dr7: int = 0x400
    saved_db: list[int] | None = None
    saved_dr6: int | None = None
    guest_debug: int = 0
    guest_debug_dr7: int = 0


@dataclass(eq=False)
class ClockState:
    """The TSC, kvmclock and steal time."""

    tsc_offset: int = 0
    tsc_khz: int = 0
    #: What the guest's TSC ticks for one of the processor's, in units of 2**-32 (APM vol. 2, 15.30.5).
    tsc_ratio: int = 1 << 32
    tsc_adjust: int = 0
    pvclock_set_guest_stopped: bool = False
    #: How long the vCPU's thread waits is of interest: for steal time, or for Xen's runstate in its place.
    steal_enabled: bool = False
    last_steal: int = 0
    steal_checked_ns: int = 0


@dataclass(eq=False)
class ParavirtState:
    """What the guest has agreed on with KVM."""

    pv_cpuid_enforce: bool = False
    pv_unhalted: bool = False
    apf: Apf = field(default_factory=Apf)
    #: The guest's CPUID has Hyper-V's interface; its state, once there is any.
    hyperv_enabled: bool = False
    hyperv: VirtualProcessor | None = None
    xen: XenVcpu = field(default_factory=XenVcpu)


@dataclass(eq=False)
class PortIoState:
    """An IN or OUT that userspace completes."""

    pio_size: int = 0
    #: Its RIP; -1 while none is under way.
    pio_rip: int = -1


@dataclass(eq=False)
class Statistics:
    """Counters of x86, with the names of KVM's binary statistics behind ``stat_``."""

    stat_irq_injections: int = 0
    stat_nmi_injections: int = 0
    stat_irq_window_exits: int = 0
    stat_nmi_window_exits: int = 0
    stat_insn_emulation: int = 0
    stat_insn_emulation_fail: int = 0
    stat_hypercalls: int = 0
    stat_async_pf_not_present: int = 0
    stat_async_pf_ready: int = 0
    stat_req_event: int = 0


class ProcessorState:
    """What a vCPU is made of: views of the VMCB and of the processor's registers, and its parts."""

    #: The run page, with names.
    _kvm_run: abi.kvm_run
    #: The VMCB's bytes, words, doublewords and quadwords (:mod:`.svm.vmcb` has the places).
    b: memoryview
    w: memoryview
    d: memoryview
    q: memoryview
    vmcb: V.Vmcb
    #: The processor's register block, in the same way.
    rb: memoryview
    rw: memoryview
    rd: memoryview
    rq: memoryview
    gpr: memoryview
    effective_db: memoryview
    msrpm: _softcpu.Page
    permission_map: memoryview
    nrips: bool
    msr_values: dict[int, int]
    msr_filter: MsrFilter | None
    exception: QueuedException
    cpuid: CpuidTable
    emulator: Emulator
    chips: KernelIrqchip | None
    #: Userspace has the PIC, so it asks for interrupt windows: without in-kernel chips, or with the APICs alone.
    pic_in_userspace: bool
    apic: Lapic | None
    pmu: Pmu
    pv_eoi: PvEoi | None
    vapic: Vapic | None


_GROUPS: Final = (ControlState, EventState, DebugState, ClockState, ParavirtState, PortIoState, Statistics)


class VcpuState(
    state.VcpuState,
    ProcessorState,
    ControlState,
    EventState,
    DebugState,
    ClockState,
    ParavirtState,
    PortIoState,
    Statistics,
):
    """What a virtual processor of x86 has beside what every one has."""

    # Only one of a class's bases may have slots, so the groups' are made here.
    __slots__ = tuple(name for group in (ProcessorState, *_GROUPS) for name in group.__annotations__)

    vm: VmState

    def __init__(self, vm: VmState, vcpu_id: int) -> None:
        machine = vm.machine
        super().__init__(vm, vcpu_id, _softcpu.Cpu(machine, vcpu_id))
        for group in _GROUPS:
            group.__init__(self)
        self.maxphyaddr = vm.maxphyaddr
        self.tsc_khz = vm.default_tsc_khz
        self.nrips = vm.params.nrips
        self.cpu.next_rip = self.nrips
        self._kvm_run = abi.kvm_run.from_buffer(self._mapping)
        self.cpu.watch(self.run_q[x86_run_page.KVM_VALID_REGS_Q : x86_run_page.KVM_DIRTY_REGS_Q + 1])

        # Register block and VMCB (layouts: softkvm._softcpu, AMD APM vol. 2 appendix B)
        block = memoryview(self.cpu.registers).cast("B")
        self.rb = block
        self.rw = block.cast("H")
        self.rd = block.cast("I")
        self.rq = block.cast("Q")
        self.gpr = self.rq[:16]
        self.effective_db = self.rq[DR_Q : DR_Q + 4]
        self.vmcb = V.Vmcb(machine.alloc_page())
        self.b, self.w, self.d, self.q = self.vmcb.b, self.vmcb.w, self.vmcb.d, self.vmcb.q
        self.msrpm = machine.alloc_page(2)
        self.permission_map = memoryview(self.msrpm).cast("B")
        self.permission_map[:] = b"\xff" * len(self.permission_map)

        self.msr_values = {}
        self.msr_filter = None
        self.chips = vm.chips
        self.pic_in_userspace = self.chips is None or vm.split_irqchip

    # --- registers ---------------------------------------------------------------------------------

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
        return self.rq[XCR0_Q]

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self.rq[XCR0_Q] = value

    @property
    def pkru(self) -> int:
        """PKRU."""
        return self.rd[PKRU_D]

    @property
    def tsc_aux(self) -> int:
        """TSC_AUX."""
        return self.rq[TSC_AUX_Q]

    @tsc_aux.setter
    def tsc_aux(self, value: int) -> None:
        self.rq[TSC_AUX_Q] = value

    @property
    def umwait_control(self) -> int:
        """IA32_UMWAIT_CONTROL."""
        return self.rd[UMWAIT_CONTROL_D]

    @umwait_control.setter
    def umwait_control(self, value: int) -> None:
        self.rd[UMWAIT_CONTROL_D] = value

    @property
    def db(self) -> memoryview | list[int]:
        """The guest's DR0 to DR3; the processor has the debugger's while it owns them."""
        return self.effective_db if self.saved_db is None else self.saved_db

    @property
    def guest_dr6(self) -> int:
        """The guest's DR6; the processor has the debugger's while #DB is for it."""
        return self.q[V.DR6] if self.saved_dr6 is None else self.saved_dr6

    @guest_dr6.setter
    def guest_dr6(self, value: int) -> None:
        if self.saved_dr6 is None:
            self.q[V.DR6] = value
        else:
            self.saved_dr6 = value

    @property
    def guest_dr7(self) -> int:
        """The guest's DR7."""
        return self.q[V.DR7] if self.saved_db is None else self.own_dr7

    @guest_dr7.setter
    def guest_dr7(self, value: int) -> None:
        self.own_dr7 = value

    def update_dr7(self) -> None:
        """Load DR7 with the debugger's value while it owns the breakpoints, else with the guest's."""
        if self.guest_debug & abi.KVM_GUESTDBG_USE_HW_BP:
            self.q[V.DR7] = self.guest_debug_dr7 | DR7_FIXED_1
        else:
            self.q[V.DR7] = self.own_dr7

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

    def get_apic_base(self) -> int:
        """Return IA32_APIC_BASE."""
        if self.apic is not None:
            return self.apic.apic_base
        bsp = MSR_IA32_APICBASE_BSP if self.is_bsp() else 0
        return self.msr_values.get(MSR_IA32_APICBASE, APICBASE_RESET | bsp)

    def load_root_tdp(self, root: int) -> None:
        """Let the processor use these nested tables from its next entry on; vCPU thread only."""
        self.root_tdp = root
        self.q[V.NESTED_CR3] = root

    def flush_tlb_guest(self) -> None:
        """Drop every translation of this vCPU at the next entry; vCPU thread only."""
        self.b[V.TLB_CTL] = V.TLB_CONTROL_FLUSH_ASID

    def choose_exit_handlers(self) -> None:
        """Have exits handled by what the vCPU needs now; on the vCPU's thread."""
        raise NotImplementedError

    def counts_instructions(self, on: bool) -> None:
        """Count the instructions that KVM carries out in the guest's place, or don't any more."""
        raise NotImplementedError

    # --- events ------------------------------------------------------------------------------------

    def request_event(self, sender: VcpuState | None = None) -> None:
        """Look for events to inject before the next guest instruction."""
        with self.request_lock:
            self.requests |= KVM_REQ_EVENT
        self.vcpu_kick(sender)

    def inject_nmi(self, sender: VcpuState | None = None) -> None:
        """Queue an NMI."""
        with self.request_lock:
            self.nmi_queued += 1
            self.requests |= KVM_REQ_NMI
        self.vcpu_kick(sender)

    def set_nmi_mask(self, masked: bool) -> None:
        """Block or unblock NMIs; blocked ones wait for the guest's IRET."""
        self.nmi_masked = masked
        self.awaiting_iret_completion = False
        if masked:
            self.d[V.INTERCEPT_WORD3] |= V.IRET
        else:
            self.d[V.INTERCEPT_WORD3] &= ~V.IRET

    def queue_interrupt(self, vector: int, *, soft: bool) -> None:
        """Note that ``vector`` is being delivered."""
        self.interrupt_injected = True
        self.interrupt_nr = vector
        self.interrupt_soft = soft
        self.make_request(KVM_REQ_EVENT)

    # --- exits -------------------------------------------------------------------------------------

    def exit_debug(self, exception: int, dr6: int, pc: int) -> None:
        """Describe a KVM_EXIT_DEBUG."""
        self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_DEBUG
        self.run_d[x86_run_page.DEBUG_EXCEPTION_D] = exception
        self.run_q[x86_run_page.DEBUG_PC_Q] = pc
        self.run_q[x86_run_page.DEBUG_DR6_Q] = dr6
        self.run_q[x86_run_page.DEBUG_DR7_Q] = self.q[V.DR7]
