# SPDX-License-Identifier: Apache-2.0
"""AVIC: the processor's virtual interrupt controller (APM vol. 2, 15.29; ``arch/x86/kvm/svm/avic.c``).

A VM has it with the module parameter ``avic`` and local APICs in the kernel, with PIC and IOAPIC beside them or not.
Each vCPU activates it and gives it up on its own thread (:meth:`AvicVcpu.update_apicv
<softkvm.kvm.x86.avic_vcpu.AvicVcpu.update_apicv>`): it is in force for all as long as there is no reason against it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntFlag
from typing import TYPE_CHECKING, Final, cast

from softkvm import abi
from softkvm.kvm.memory.memslots import KVM_USER_MEM_SLOTS, MemorySlot
from softkvm.kvm.memory.pages import PAGE_SHIFT
from softkvm.kvm.x86.exceptions import inject_gp
from softkvm.kvm.x86.irqchip import lapic_regs
from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_BASE_MSR,
    APIC_DEFAULT_PHYS_BASE,
    APIC_DFR,
    APIC_DFR_FLAT,
    APIC_EOI,
    APIC_ESR,
    APIC_ICR,
    APIC_ID,
    APIC_IRR,
    APIC_ISR,
    APIC_LDR,
    APIC_LVR,
    APIC_LVT0,
    APIC_LVT1,
    APIC_LVTERR,
    APIC_LVTPC,
    APIC_LVTT,
    APIC_LVTTHMR,
    APIC_PROCPRI,
    APIC_SELF_IPI,
    APIC_SPIV,
    APIC_TASKPRI,
    APIC_TDCR,
    APIC_TMICT,
    APIC_TMR,
    KVM_APIC_CHECK_VAPIC,
)
from softkvm.kvm.x86.irqchip.apicv_lapic import AvicLapic
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.debug import db_interception

if TYPE_CHECKING:
    from softkvm.kvm.x86.avic_vcpu import AvicVcpu
    from softkvm.kvm.x86.irqchip.lapic import Lapic
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm

#: The slot of the page that guest-physical accesses to the APIC are translated to (``vmx.h``'s name, both vendors').
APIC_ACCESS_PAGE_PRIVATE_MEMSLOT: Final = KVM_USER_MEM_SLOTS + 1
APIC_ACCESS_GFN: Final = APIC_DEFAULT_PHYS_BASE >> PAGE_SHIFT
#: Last indexes of the physical APIC ID table.
AVIC_MAX_PHYSICAL_ID: Final = 0xFE
X2AVIC_MAX_PHYSICAL_ID: Final = 0x1FF

#: Of an entry of the physical APIC ID table.
PHYSICAL_VALID: Final = 1 << 63
_PHYSICAL_RUNNING: Final = 1 << 62
_LOGICAL_VALID: Final = 1 << 31
_LOGICAL_ENTRIES: Final = 60
_WAITING: Final = (abi.KVM_MP_STATE_UNINITIALIZED, abi.KVM_MP_STATE_INIT_RECEIVED)
_U32: Final = (1 << 32) - 1

#: Registers whose writes exit behind the instruction (APM vol. 2, table 15-22).
_TRAPS: Final = frozenset(
    {APIC_ID, APIC_EOI, 0xC0, APIC_LDR, APIC_DFR, APIC_SPIV, APIC_ESR, APIC_TMICT, APIC_TDCR}
    | set(range(APIC_LVTT, APIC_LVTERR + 1, 0x10))
)
#: EXITINFO1, reserved in the manual: an access of another size or place than a register's, so before the instruction.
_NOT_A_REGISTER: Final = 1
_BITMAPS: Final = tuple(base + 16 * word for base in (APIC_ISR, APIC_TMR, APIC_IRR) for word in range(8))
_LVTS: Final = (APIC_LVTT, APIC_LVTTHMR, APIC_LVTPC, APIC_LVT0, APIC_LVT1, APIC_LVTERR)
#: x2APIC registers that the guest reads, and writes, without an exit.
_X2APIC_READ: Final = tuple(
    APIC_BASE_MSR + (offset >> 4)
    for offset in (
        APIC_ID, APIC_LVR, APIC_TASKPRI, APIC_PROCPRI, APIC_LDR, APIC_SPIV, APIC_ESR, APIC_ICR, APIC_TMICT, APIC_TDCR,
        *_BITMAPS, *_LVTS,
    )
)  # fmt: skip
_X2APIC_WRITE: Final = tuple(
    APIC_BASE_MSR + (offset >> 4) for offset in (APIC_TASKPRI, APIC_EOI, APIC_ICR, APIC_SELF_IPI)
)


class Inhibit(IntFlag):
    """Why no vCPU of a VM has AVIC now (``enum kvm_apicv_inhibit``)."""

    #: The module parameter is off: such a VM has no :class:`Avic` at all.
    DISABLED = 1 << 0
    #: A SynIC is active: its sources' EOIs have to be seen, and with AutoEOI there are none.
    HYPERV = 1 << 1
    #: The local APICs are userspace's: no :class:`Avic` either.
    ABSENT = 1 << 2
    #: A debugger holds a vCPU's interrupts off (KVM_GUESTDBG_BLOCKIRQ).
    BLOCKIRQ = 1 << 3
    #: Two processors answer to one physical ID, or one's has no place in the table.
    PHYSICAL_ID_ALIASED = 1 << 4
    #: A guest has changed an APIC's ID.
    APIC_ID_MODIFIED = 1 << 5
    #: The page of the registers is not where the APIC has it after a reset.
    APIC_BASE_MODIFIED = 1 << 6
    #: A vCPU runs a nested guest.
    NESTED = 1 << 7
    #: An interrupt of the PIC waits for the guest: AVIC has no interrupt windows.
    IRQWIN = 1 << 8
    #: The PIT's ticks are re-injected by acknowledgements: never in force here, as the PIT looks for them by itself
    #: (:class:`~.i8254.Pit`). In Linux it is, for each VM with a PIT whose userspace keeps the default.
    PIT_REINJ = 1 << 9
    #: SEV guests.
    SEV = 1 << 10
    #: Logical IDs are not one bit each, in one model, of one processor each.
    LOGICAL_ID_ALIASED = 1 << 11
    #: Not in Linux: userspace wants to know of accesses to the task priority (KVM_TPR_ACCESS_REPORTING), or has that in
    #: the guest's memory (KVM_SET_VAPIC_ADDR).
    TPR_ACCESS = 1 << 12


class Avic:
    """What the processors of one VM have in common: both ID tables, the access page, and what is against AVIC."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        #: Of :attr:`inhibits`, the tables and counts; taken before ``mmu_lock``.
        self._lock = threading.RLock()
        self.inhibits = Inhibit(0)
        #: How many vCPUs have an interrupt window open for the PIC.
        self._windows = 0
        self._physical = vm.machine.alloc_page()
        self._logical = vm.machine.alloc_page()
        self.physical_table = memoryview(self._physical).cast("B").cast("Q")
        self.logical_table = memoryview(self._logical).cast("B").cast("I")
        self.last_id = 0
        self._access_page = vm.machine.alloc_page()
        #: Where nested tables lead the APIC's page to: the processor only looks whether it may be accessed.
        self.access_slot = MemorySlot(
            APIC_ACCESS_PAGE_PRIVATE_MEMSLOT, APIC_ACCESS_GFN, 1, 0, self._access_page.address
        )

    @property
    def activated(self) -> bool:
        """Whether nothing is against it (``kvm_apicv_activated``)."""
        return not self.inhibits

    def _lapics(self) -> tuple[Lapic, ...]:
        assert self._vm.chips is not None
        return self._vm.chips.apic_map.lapics

    # --- inhibits ------------------------------------------------------------------------------------

    def set_inhibit(self, reason: Inhibit, on: bool) -> None:
        """Set or clear a reason; vCPUs follow before they enter the guest again. Any thread."""
        with self._lock:
            old = self.inhibits
            self.inhibits = old | reason if on else old & ~reason
            changed = bool(old) != bool(self.inhibits)
        if changed:
            self.update_access_page()
            for vcpu in self._vm.vcpus:
                cast("AvicVcpu", vcpu).request_apicv_update()

    def set_irq_window(self, on: bool) -> None:
        """One vCPU more, or less, has an interrupt window open."""
        with self._lock:  # until it is done: what another vCPU says meanwhile comes behind it
            self._windows += 1 if on else -1
            self.set_inhibit(Inhibit.IRQWIN, self._windows > 0)

    def synic_activated(self, vcpu: Vcpu) -> None:
        """A vCPU, which stands, gets an active SynIC: its APIC is another class's from here on."""
        self.set_inhibit(Inhibit.HYPERV, True)
        cast("AvicVcpu", vcpu).update_apicv()

    def recalculate(self) -> None:
        """Look at the IDs, modes and bases of all APICs: one has changed. The logical table is made anew."""
        if len(self._lapics()) > X2AVIC_MAX_PHYSICAL_ID + 1:
            self.set_inhibit(Inhibit.PHYSICAL_ID_ALIASED, True)
            return
        lapics = [apic for apic in self._lapics() if apic.hw_enabled]
        xapics = [apic for apic in lapics if not apic.x2apic_mode]
        with self._lock:
            found = Inhibit(0)
            ids = [apic.vcpu_id if apic.x2apic_mode else apic.regs[APIC_ID >> 2] >> 24 for apic in lapics]
            if len(set(ids)) != len(ids) or any(apic.vcpu_id > AVIC_MAX_PHYSICAL_ID for apic in xapics):
                found |= Inhibit.PHYSICAL_ID_ALIASED
            if any(apic.vcpu_id > X2AVIC_MAX_PHYSICAL_ID for apic in lapics):
                found |= Inhibit.PHYSICAL_ID_ALIASED
            if any(apic.regs[APIC_ID >> 2] >> 24 != apic.vcpu_id & 0xFF for apic in xapics):
                found |= Inhibit.APIC_ID_MODIFIED
            if any(apic.base_address != APIC_DEFAULT_PHYS_BASE for apic in xapics):
                found |= Inhibit.APIC_BASE_MODIFIED
            if any(apic.tpr_access_reporting or apic.attention & KVM_APIC_CHECK_VAPIC for apic in lapics):
                found |= Inhibit.TPR_ACCESS
            table = self._logical_entries(lapics)
            if table is None:
                found |= Inhibit.LOGICAL_ID_ALIASED
                table = {}
            for index in range(_LOGICAL_ENTRIES):
                if self.logical_table[index] != table.get(index, 0):
                    self.logical_table[index] = table.get(index, 0)
            for reason in _OF_APICS:
                if bool(found & reason) != bool(self.inhibits & reason):
                    self.set_inhibit(reason, bool(found & reason))
        self.update_access_page()

    def _logical_entries(self, lapics: list[Lapic]) -> dict[int, int] | None:
        """Return the entries of the logical APIC ID table; None if the IDs are aliased.

        Those of x2APIC mode need no table, and none is aliased there: they follow from the IDs.
        """
        table: dict[int, int] = {}
        taken = set()
        models = set()
        for apic in lapics:
            ldr = apic.regs[APIC_LDR >> 2]
            if not ldr or not apic.sw_enabled:
                continue
            flat = apic.regs[APIC_DFR >> 2] == APIC_DFR_FLAT
            models.add("x2apic" if apic.x2apic_mode else "flat" if flat else "cluster")
            if apic.x2apic_mode:
                continue
            cluster, bits = (0, ldr >> 24) if flat else (ldr >> 28, ldr >> 24 & 0xF)
            if not bits:
                continue
            index = 4 * cluster + bits.bit_length() - 1
            if bits & bits - 1 or index in taken:
                return None
            taken.add(index)
            if index < _LOGICAL_ENTRIES:
                table[index] = _LOGICAL_VALID | apic.vcpu_id
        return table if len(models) <= 1 else None

    # --- the access page -----------------------------------------------------------------------------

    def update_access_page(self) -> None:
        """Map the page of the APIC's registers while every vCPU that has them there has AVIC, else take it away.

        Others' accesses have to be emulated, and all share the nested tables. The processor's are, too, without. vCPUs
        that wait for their start-up IPI access nothing. Where userspace has memory of its own, that is mapped.
        """
        vm = self._vm
        with self._lock, vm.mmu_lock:
            xapics = [apic for apic in self._lapics() if apic.hw_enabled and not apic.x2apic_mode]
            active = [apic for apic in xapics if apic.apicv_active]
            waiting = [apic for apic in xapics if not apic.apicv_active and apic.vcpu.mp_state in _WAITING]
            wanted = self.activated and bool(active) and len(active) + len(waiting) == len(xapics)
            wanted = wanted and vm.memslots.gfn_to_memslot(APIC_ACCESS_GFN) is None
            if wanted == (vm.apic_access_gfn >= 0):
                return
            if vm.mmu.zap_range(APIC_ACCESS_GFN, APIC_ACCESS_GFN + 1):
                vm.finish_zap()
            vm.apic_access_gfn = -1
            if wanted:
                vm.apic_access_gfn = APIC_ACCESS_GFN
                self.map_access_page()

    def map_access_page(self) -> int:
        """Enter the page in the nested tables, with ``mmu_lock`` held; returns a RET_PF_* code."""
        return self._vm.mmu.map_gfn(self.access_slot, APIC_ACCESS_GFN, write=True)

    # --- the physical APIC ID table ------------------------------------------------------------------

    def entry(self, vcpu: Vcpu) -> int:
        """Return a vCPU's entry while it has AVIC: others ring, whether it is in KVM_RUN or not.

        The doorbell of a processor that runs nothing stays pending, and the vCPU looks at its IRR when it is run again.
        So there is nothing to note at the beginning and at the end of each KVM_RUN (``avic_vcpu_load``), and a sender
        needs no exit.
        """
        apic = vcpu.apic
        assert isinstance(apic, AvicLapic)
        return PHYSICAL_VALID | _PHYSICAL_RUNNING | apic.backing_page | vcpu.vcpu_id

    # --- a vCPU's VMCB -------------------------------------------------------------------------------

    def init_vmcb(self, vcpu: Vcpu) -> None:
        """Enable AVIC in the VMCB of a vCPU whose APIC is an :class:`AvicLapic`; vCPU thread only."""
        apic = vcpu.apic
        assert isinstance(apic, AvicLapic)
        q, d = vcpu.q, vcpu.d
        if vcpu.irq_window:
            svm.clear_irq_window(vcpu)
        d[V.INT_CTL] = d[V.INT_CTL] & ~V.X2AVIC_ENABLE | V.AVIC_ENABLE | (V.X2AVIC_ENABLE if apic.x2apic_mode else 0)
        q[V.AVIC_APIC_BAR] = apic.base_address
        q[V.AVIC_BACKING_PAGE] = apic.backing_page
        q[V.AVIC_LOGICAL_ID] = self._logical.address
        last = X2AVIC_MAX_PHYSICAL_ID if apic.x2apic_mode else AVIC_MAX_PHYSICAL_ID
        q[V.AVIC_PHYSICAL_ID] = self._physical.address | min(self.last_id, last)
        vcpu.b[V.V_TPR] = vcpu.b[V.V_TPR] & 0xF0 | apic.cr8
        vcpu.cr8_intercepted = False
        d[V.INTERCEPT_CR] &= ~V.CR8_WRITE
        if d[V.INTERCEPT_WORD3] & V.HLT:
            d[V.INTERCEPT_WORD3] &= ~V.HLT
            d[V.INTERCEPT_WORD5] |= V.IDLE_HLT
        self._intercept_x2apic(vcpu, not apic.x2apic_mode)

    def clear_vmcb(self, vcpu: Vcpu) -> None:
        """Undo :meth:`init_vmcb`."""
        d = vcpu.d
        d[V.INT_CTL] &= ~(V.AVIC_ENABLE | V.X2AVIC_ENABLE)
        if d[V.INTERCEPT_WORD5] & V.IDLE_HLT:
            d[V.INTERCEPT_WORD5] &= ~V.IDLE_HLT
            d[V.INTERCEPT_WORD3] |= V.HLT
        self._intercept_x2apic(vcpu, True)

    def _intercept_x2apic(self, vcpu: Vcpu, intercept: bool) -> None:
        owner = cast("AvicVcpu", vcpu)
        if owner.x2avic_msrs_intercepted is intercept:
            return
        owner.x2avic_msrs_intercepted = intercept
        for msr in {*_X2APIC_READ, *_X2APIC_WRITE}:
            read = intercept or msr not in _X2APIC_READ
            write = intercept or msr not in _X2APIC_WRITE
            svm.set_msr_interception(vcpu.permission_map, msr, read=read, write=write)


_OF_APICS: Final = (
    Inhibit.PHYSICAL_ID_ALIASED,
    Inhibit.APIC_ID_MODIFIED,
    Inhibit.APIC_BASE_MODIFIED,
    Inhibit.LOGICAL_ID_ALIASED,
    Inhibit.TPR_ACCESS,
)


# --- exits -------------------------------------------------------------------------------------------


def incomplete_ipi_interception(vcpu: Vcpu) -> int:
    """An interrupt to other processors that could not be completed; the instruction has retired.

    The processor has sent it to everybody or, for another reason than that somebody does not run, to nobody. Here all
    run (:meth:`Avic.entry`).
    """
    q = vcpu.q
    info = q[V.EXIT_INFO_1]
    icr, dest = info & _U32, info >> 32
    apic = vcpu.apic
    assert isinstance(apic, AvicLapic)
    if not apic.x2apic_mode:
        dest >>= 24
    lapic_regs.send_ipi(apic, icr, dest)
    return _behind_the_write(vcpu)


def _behind_the_write(vcpu: Vcpu) -> int:
    """The write's instruction may have been stepped, or its data watched: then its #DB is in EXITINTINFO.

    It is nobody's yet, as one that was an exit.
    """
    exception = vcpu.exception
    if exception.injected and exception.vector == abi.DB_VECTOR:
        exception.injected = False
        return db_interception(vcpu)
    return 1


def unaccelerated_access_interception(vcpu: Vcpu) -> int:
    """An access to a register that the processor leaves to KVM, before the instruction or behind it."""
    info = vcpu.q[V.EXIT_INFO_1]
    offset = info & 0xFF0
    apic = vcpu.apic
    assert isinstance(apic, AvicLapic)
    if info >> 32 & 1 and offset in _TRAPS and not info & _NOT_A_REGISTER:
        lapic_regs.write_nodecode(apic, offset)
        apic.regs[APIC_TMICT >> 2] = apic.timer.tmict
        return _behind_the_write(vcpu)
    if apic.x2apic_mode and offset == APIC_SELF_IPI:  # with a vector that is none, trap-like as well
        lapic_regs.msr_write(apic, APIC_BASE_MSR + (offset >> 4), apic.regs[offset >> 2])
        return _behind_the_write(vcpu)
    if apic.x2apic_mode:
        inject_gp(vcpu)
        return 1
    return vcpu.emulator.emulate()


EXIT_HANDLERS: Final[dict[int, Callable[[Vcpu], int]]] = {
    V.EXIT_AVIC_INCOMPLETE_IPI: incomplete_ipi_interception,
    V.EXIT_AVIC_UNACCELERATED_ACCESS: unaccelerated_access_interception,
}
