# SPDX-License-Identifier: Apache-2.0
"""The local APIC (SDM vol. 3, chapter 11; APM vol. 2, chapter 16): priorities, delivery, EOI, modes, INIT and SIPI.

Its registers as the guest reads and writes them are in :mod:`.lapic_regs`, its timer in
:mod:`.lapic_timer`, its bus in :mod:`.apic_map`.

Any thread may deliver an interrupt (:meth:`Lapic.accept_irq`); everything else belongs to the vCPU's thread, or to one
that holds the vCPU stopped. IRR, ISR and TMR are integers of 256 bits while the machine runs: the highest vector is
``bit_length() - 1``. :mod:`.lapic_state` puts them where the architecture has them.
"""

import threading

from softkvm.abi import (
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
)
from softkvm.kvm.x86.irqchip import apic_base, lapic_regs, lapic_state
from softkvm.kvm.x86.irqchip.apic_map import ApicMap
from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_DEFAULT_PHYS_BASE,
    APIC_DFR,
    APIC_DFR_FLAT,
    APIC_DM_EXTINT,
    APIC_DM_FIXED,
    APIC_DM_INIT,
    APIC_DM_LOWEST,
    APIC_DM_NMI,
    APIC_DM_SMI,
    APIC_DM_STARTUP,
    APIC_ESR,
    APIC_ESR_RECEIVE_ILLEGAL_VECTOR,
    APIC_ID,
    APIC_INPUT_POLARITY,
    APIC_LDR,
    APIC_LVR,
    APIC_LVR_DIRECTED_EOI,
    APIC_LVT0,
    APIC_LVT_LEVEL_TRIGGER,
    APIC_LVT_MASKED,
    APIC_LVT_MASKS,
    APIC_LVT_TIMER_TSCDEADLINE,
    APIC_LVTCMCI,
    APIC_LVTERR,
    APIC_LVTPC,
    APIC_LVTT,
    APIC_MODE_MASK,
    APIC_SPIV,
    APIC_SPIV_APIC_ENABLED,
    APIC_SPIV_DIRECTED_EOI,
    APIC_TASKPRI,
    APIC_TDCR,
    APIC_VECTOR_MASK,
    APIC_VERSION,
    APICBASE_RESET,
    KVM_APIC_INIT,
    KVM_APIC_SIPI,
    LAPIC_MMIO_LENGTH,
    LAPIC_MODE_DISABLED,
    LAPIC_MODE_X2APIC,
    MSR_IA32_APICBASE_BSP,
    MSR_IA32_APICBASE_ENABLE,
)
from softkvm.kvm.x86.irqchip.hrtimer import default_clock
from softkvm.kvm.x86.irqchip.lapic_timer import LapicTimer
from softkvm.kvm.x86.irqchip.seams import ApicVcpu, Clock

_PAGE_MASK = ~(LAPIC_MMIO_LENGTH - 1)


class Lapic:
    """The local APIC of one vCPU.

    *page* is the register page, one 32-bit register at every multiple of 16 (a fresh one by default).
    """

    #: The processor works on the registers (:mod:`.apicv_lapic`).
    apicv_active = False

    def __init__(
        self, vcpu: ApicVcpu, apic_map: ApicMap, clock: Clock | None = None, page: bytearray | memoryview | None = None
    ) -> None:
        self.vcpu = vcpu
        self.vcpu_id = vcpu.vcpu_id
        self.apic_map = apic_map
        self.clock: Clock = clock or default_clock()
        self.page = memoryview(bytearray(LAPIC_MMIO_LENGTH) if page is None else page)
        self.regs = self.page.cast("I")  # regs[offset >> 2]
        self.timer: LapicTimer = LapicTimer(
            vcpu, self.clock, apic_map.bus_cycle_ns, apic_map.min_timer_period_us * 1000
        )
        self.irr = 0
        self.isr = 0
        self.tmr = 0
        self.ppr: int = 0
        self.pending_esr = 0
        self.pending_events = 0  # 1 << KVM_APIC_INIT, 1 << KVM_APIC_SIPI
        self.sipi_vector = 0
        self.attention = 0  # what has to be looked at in the guest's memory after an exit
        self.tpr_access_reporting = False  # KVM_TPR_ACCESS_REPORTING
        self.arb_prio = 0
        self.apic_base = 0
        self.base_address = APIC_DEFAULT_PHYS_BASE
        self.hw_enabled = False
        self.sw_enabled = False
        self.x2apic_mode = False
        self.lvt_masks = dict(APIC_LVT_MASKS)
        #: A performance counter's interrupt masks its entry (SDM 11.5.1); on AMD's processors it doesn't.
        self.masks_lvtpc = True
        self._base_valid = 0
        self.lock = threading.Lock()  # of irr, tmr, pending_esr, pending_events
        self.cpuid_changed(x2apic=True, tsc_deadline=True, maxphyaddr=48)
        self.reset(init_event=False)
        # Some APICs change their class (AVIC, SynIC), and have a dictionary from then on. One that shares its keys with
        # other instances is the slow kind: CPython 3.11 does not speed up accesses through it, and each exit has some.
        self.__dict__ = dict(vars(self))
        apic_map.add(self)

    # Set-up

    def cpuid_changed(self, *, x2apic: bool, tsc_deadline: bool, maxphyaddr: int, cmci: bool = False) -> None:
        """Follow the guest's CPUID: which modes there are, how wide the base address is, how many LVT entries."""
        self._base_valid = apic_base.valid_bits(maxphyaddr, x2apic=x2apic)
        self.lvt_masks = dict(APIC_LVT_MASKS)
        if tsc_deadline:
            self.lvt_masks[APIC_LVTT] |= APIC_LVT_TIMER_TSCDEADLINE
        if not cmci:
            del self.lvt_masks[APIC_LVTCMCI]
        version = APIC_VERSION | (len(self.lvt_masks) - 1) << 16
        if x2apic and self.apic_map.directed_eoi:
            version |= APIC_LVR_DIRECTED_EOI
        self.regs[APIC_LVR >> 2] = version

    @property
    def is_bsp(self) -> bool:
        """Whether this is the processor that boots."""
        return bool(self.apic_base & MSR_IA32_APICBASE_BSP)

    def reset(self, init_event: bool) -> None:
        """Power up, or with *init_event* do what an INIT does: mode and ID stay (SDM 11.4.7.1, 11.12.5.1)."""
        regs = self.regs
        self.timer.reset()
        if not init_event:
            bsp = MSR_IA32_APICBASE_BSP if self.vcpu_id == self.apic_map.bsp_vcpu_id else 0
            self._load_base(APICBASE_RESET | bsp)
            self.set_xapic_id(self.vcpu_id)
        version = regs[APIC_LVR >> 2]
        for offset in range(APIC_TASKPRI, APIC_TDCR + 1, 0x10):
            if not (offset == APIC_LDR and self.x2apic_mode):
                regs[offset >> 2] = 0
        regs[APIC_LVR >> 2] = version
        regs[APIC_DFR >> 2] = APIC_DFR_FLAT
        self.set_spiv(0xFF)
        for offset in self.lvt_masks:
            regs[offset >> 2] = APIC_LVT_MASKED
        if self.vcpu_id == self.apic_map.bsp_vcpu_id and self.apic_map.lint0_reenabled:
            regs[APIC_LVT0 >> 2] = APIC_DM_EXTINT  # virtual wire
        with self.lock:
            self.irr = self.isr = self.tmr = self.pending_esr = 0
            if not init_event:
                self.pending_events = 0
        self.ppr = self.arb_prio = self.attention = 0
        self.apic_map.changed()

    # IA32_APIC_BASE and the modes

    def _load_base(self, value: int) -> None:
        self.apic_base = value
        self.base_address = value & _PAGE_MASK
        self.hw_enabled = bool(value & MSR_IA32_APICBASE_ENABLE)
        self.x2apic_mode = value & LAPIC_MODE_X2APIC == LAPIC_MODE_X2APIC

    def set_base(self, value: int, host_initiated: bool = False) -> bool:
        """Write IA32_APIC_BASE. False, with nothing changed, stands for #GP."""
        if not apic_base.may_load(self.apic_base, value, self._base_valid, host=host_initiated):
            return False
        if value == self.apic_base:
            return True
        old, new = self.apic_base & LAPIC_MODE_X2APIC, value & LAPIC_MODE_X2APIC
        self._load_base(value)
        if old != new:
            if new == LAPIC_MODE_X2APIC:
                self.set_x2apic_id()
            elif old in (LAPIC_MODE_DISABLED, LAPIC_MODE_X2APIC):
                self.set_xapic_id(self.vcpu_id)
            if new == LAPIC_MODE_DISABLED:
                self.timer.cancel()
            self.apic_map.changed()
        self.vcpu.apic_base_changed()
        self.vcpu.request_event()
        return True

    def set_xapic_id(self, apic_id: int) -> None:
        """Set the 8-bit ID of xAPIC mode."""
        self.regs[APIC_ID >> 2] = (apic_id & 0xFF) << 24
        self.apic_map.changed()

    def set_x2apic_id(self) -> None:
        """Set the ID of x2APIC mode and the logical ID that follows from it (SDM 11.12.10.2)."""
        self.regs[APIC_ID >> 2] = self.vcpu_id
        self.regs[APIC_LDR >> 2] = self.vcpu_id >> 4 << 16 | 1 << (self.vcpu_id & 0xF)
        self.apic_map.changed()

    def matches_physical(self, dest: int) -> bool:
        """Return whether *dest* is this APIC's ID. An xAPIC whose ID needs more than 8 bits answers to all of it."""
        if self.x2apic_mode or dest > 0xFF:
            return dest == self.vcpu_id
        return dest == self.regs[APIC_ID >> 2] >> 24

    def matches_logical(self, dest: int) -> bool:
        """Return whether the logical destination *dest* includes this APIC (SDM 11.6.2.2, 11.12.10.1)."""
        ldr = self.regs[APIC_LDR >> 2]
        if self.x2apic_mode:
            return ldr >> 16 == dest >> 16 and ldr & dest & 0xFFFF != 0
        ldr >>= 24
        if self.regs[APIC_DFR >> 2] >> 28 == 0xF:
            return ldr & dest != 0
        if self.regs[APIC_DFR >> 2] >> 28 == 0:
            return ldr >> 4 == dest >> 4 and ldr & dest & 0xF != 0
        return False

    # Priorities

    @property
    def tpr(self) -> int:
        """The task-priority register."""
        return self.regs[APIC_TASKPRI >> 2]

    def report_tpr_access(self, *, write: bool) -> None:
        """An instruction accesses the task-priority register: userspace may want to know."""
        if self.tpr_access_reporting:
            self.vcpu.report_tpr_access(write=write)

    def set_tpr(self, value: int) -> None:
        """Write the task-priority register; the processor's own copy (V_TPR) follows before the next instruction."""
        self._load_tpr(value)
        self.vcpu.request_event()

    def _load_tpr(self, value: int) -> None:
        self.regs[APIC_TASKPRI >> 2] = value & 0xFF
        self.update_ppr()

    @property
    def cr8(self) -> int:
        """CR8: the task priority's class."""
        return self.regs[APIC_TASKPRI >> 2] >> 4

    def set_cr8(self, value: int) -> None:
        """Take over CR8, which the guest can change without an exit (V_TPR)."""
        if value != self.regs[APIC_TASKPRI >> 2] >> 4:
            self._load_tpr((value & 0xF) << 4)

    def update_ppr(self) -> None:
        """Find the processor priority (SDM 11.8.3.1); where it falls, something may have become deliverable."""
        tpr = self.regs[APIC_TASKPRI >> 2]
        isr = self.isr
        in_service = isr.bit_length() - 1 & 0xF0 if isr else 0
        old, self.ppr = self.ppr, tpr if tpr & 0xF0 >= in_service else in_service
        if self.irr and self.ppr < old:
            self.vcpu.request_event()

    def highest_irr(self) -> int:
        """Return the highest requested vector whatever the priorities, or -1."""
        return self.irr.bit_length() - 1

    def has_interrupt(self) -> int:
        """Return the vector that the processor would be given now, or -1."""
        vector = self.irr.bit_length() - 1
        return vector if vector >= 0 and vector & 0xF0 > self.ppr and self.hw_enabled else -1

    #: The same, for an interrupt that KVM has to inject.
    has_injectable = has_interrupt

    def get_interrupt(self) -> int:
        """Acknowledge the deliverable interrupt: it goes from IRR to ISR. Returns its vector, or -1."""
        with self.lock:
            vector = self.irr.bit_length() - 1
            if vector < 0 or vector & 0xF0 <= self.ppr or not self.hw_enabled:
                return -1
            bit = 1 << vector
            self.irr ^= bit
            self.isr |= bit
        self.ppr = vector & 0xF0
        return vector

    def eoi(self) -> None:
        """End the service of the highest vector in service; tell the IOAPIC (SDM 11.8.5)."""
        isr = self.isr
        if not isr:
            return  # after a spurious interrupt, or none
        vector = isr.bit_length() - 1
        bit = 1 << vector
        self.isr = isr ^ bit
        self.update_ppr()
        target = self.apic_map.eoi_target
        if target is not None and target.handled_vectors & bit and not self.eoi_broadcast_suppressed():
            target.update_eoi(vector, self.tmr & bit != 0, self.vcpu_id)

    def eoi_broadcast_suppressed(self) -> bool:
        """Whether software asked for directed EOIs (SVR bit 12): it writes the IOAPIC's EOI register itself."""
        return bool(self.regs[APIC_SPIV >> 2] & APIC_SPIV_DIRECTED_EOI)

    # Delivery

    def request_vector(self, vector: int, level_triggered: bool) -> None:
        """Note an interrupt in IRR and TMR; the lock is held."""
        bit = 1 << vector
        if level_triggered:
            self.tmr |= bit
        else:
            self.tmr &= ~bit
        self.irr |= bit

    def deliver_interrupt(
        self, delivery_mode: int, vector: int, level_triggered: bool, sender: ApicVcpu | None
    ) -> None:
        """Request an interrupt that has been accepted, and have the vCPU look at it; any thread."""
        with self.lock:
            self.request_vector(vector, level_triggered)
        self.vcpu.request_event(sender)

    def accept_irq(
        self,
        delivery_mode: int,
        vector: int,
        level: bool = True,
        level_triggered: bool = False,
        sender: ApicVcpu | None = None,
    ) -> int:
        """Take a message from the bus or from an LVT entry; any thread. Returns 1 if accepted, else 0.

        *sender* is the vCPU that sent it, on whose thread this is.
        """
        if delivery_mode <= APIC_DM_LOWEST:  # or fixed
            if (level_triggered and not level) or not self.sw_enabled or not self.hw_enabled:
                return 0
            if vector < 16:
                self.set_error(APIC_ESR_RECEIVE_ILLEGAL_VECTOR)
                return 0
            self.deliver_interrupt(delivery_mode, vector, level_triggered, sender)
            return 1
        if delivery_mode == APIC_DM_NMI:
            self.vcpu.inject_nmi(sender)
            return 1
        if delivery_mode == APIC_DM_SMI:
            self.vcpu.inject_smi()
            return 1
        if delivery_mode == APIC_DM_INIT:
            if level_triggered and not level:
                return 0  # INIT level de-assert: nothing since the Pentium 4
            with self.lock:
                self.pending_events = 1 << KVM_APIC_INIT  # a start-up IPI that came before is void
            self.vcpu.request_event()
            return 1
        if delivery_mode == APIC_DM_STARTUP:
            with self.lock:
                self.sipi_vector = vector
                self.pending_events |= 1 << KVM_APIC_SIPI
            self.vcpu.request_event()
            return 1
        return 0  # ExtINT: the processor fetches it from the PIC, see accept_pic_intr; remote read: not since 1997

    def local_deliver(self, offset: int) -> bool:
        """Signal the LVT entry at *offset*. Returns whether it led to an interrupt."""
        entry = self.regs[offset >> 2]
        if not self.hw_enabled or entry & APIC_LVT_MASKED:
            return False
        mode = APIC_DM_FIXED if offset in (APIC_LVTT, APIC_LVTERR) else entry & APIC_MODE_MASK
        level = bool(entry & APIC_LVT_LEVEL_TRIGGER) and mode == APIC_DM_FIXED
        accepted = self.accept_irq(mode, entry & APIC_VECTOR_MASK, True, level)
        if accepted and offset == APIC_LVTPC and self.masks_lvtpc:
            self.regs[offset >> 2] = entry | APIC_LVT_MASKED
        return bool(accepted)

    def set_error(self, error: int) -> None:
        """Note an error for the ESR, and signal it through the LVT error entry; any thread."""
        with self.lock:
            known = self.pending_esr & error
            self.pending_esr |= error
        if not known:  # bounds the recursion through an LVT entry that names an illegal vector
            self.local_deliver(APIC_LVTERR)

    def latch_errors(self) -> None:
        """Bring the errors since the last time into the error status register (SDM 11.5.3)."""
        with self.lock:
            self.regs[APIC_ESR >> 2], self.pending_esr = self.pending_esr, 0

    def accept_pic_intr(self) -> bool:
        """Whether the PIC's output reaches this processor: APIC disabled, or LINT0 in ExtINT mode (virtual wire)."""
        lvt0 = self.regs[APIC_LVT0 >> 2]
        return not self.hw_enabled or lvt0 & (APIC_LVT_MASKED | APIC_MODE_MASK) == APIC_DM_EXTINT

    def nmi_watchdog_deliver(self) -> None:
        """A tick of the PIT on LINT0: an NMI where the guest set LINT0 up as its NMI watchdog."""
        if self.regs[APIC_LVT0 >> 2] & (APIC_LVT_MASKED | APIC_MODE_MASK | APIC_INPUT_POLARITY) == APIC_DM_NMI:
            self.local_deliver(APIC_LVT0)

    def accept_events(self) -> None:
        """Act on a pending INIT and start-up IPI (SDM 9.4.4). The vCPU's thread calls it with none of its own locks."""
        if not self.pending_events:
            return
        vcpu = self.vcpu
        if vcpu.init_signal_blocked():
            with self.lock:
                self.pending_events &= ~(1 << KVM_APIC_SIPI)  # not in wait-for-SIPI: lost; INIT stays pending
            return
        with self.lock:
            events, self.pending_events = self.pending_events, 0
        if events >> KVM_APIC_INIT & 1:
            vcpu.vcpu_reset(True)
            vcpu.mp_state = KVM_MP_STATE_RUNNABLE if self.is_bsp else KVM_MP_STATE_INIT_RECEIVED
        if events >> KVM_APIC_SIPI & 1 and vcpu.mp_state == KVM_MP_STATE_INIT_RECEIVED:
            vcpu.deliver_sipi_vector(self.sipi_vector)
            vcpu.mp_state = KVM_MP_STATE_RUNNABLE

    # Timer

    @property
    def next_deadline_ns(self) -> int:
        """When the timer is due, on the machine's clock; 0: not running."""
        return self.timer.deadline_ns

    def inject_timer_irqs(self) -> bool:
        """Signal the timer if it is due. Returns whether it was."""
        timer = self.timer
        if not timer.deadline_ns or not timer.expired(self.clock()):
            return False
        self.local_deliver(APIC_LVTT)
        return True

    @property
    def tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE: reads 0 when the timer has expired, and outside of TSC-deadline mode."""
        return self.timer.tscdeadline

    def set_tsc_deadline(self, tsc: int) -> None:
        """Write IA32_TSC_DEADLINE; one that has passed already fires at once."""
        self.timer.set_tscdeadline(tsc)
        self.inject_timer_irqs()

    # Registers: see lapic_regs

    def set_spiv(self, value: int) -> None:
        """Write the spurious-interrupt vector register: disabling the APIC masks all its LVT entries."""
        self.load_spiv(value)
        if not self.sw_enabled:
            for offset in self.lvt_masks:
                self.regs[offset >> 2] |= APIC_LVT_MASKED

    def load_spiv(self, value: int) -> None:
        """Set the register alone: loaded LVT entries stay as they are, LINT0 of a reset processor among them."""
        self.regs[APIC_SPIV >> 2] = value
        was, self.sw_enabled = self.sw_enabled, bool(value & APIC_SPIV_APIC_ENABLED)
        if self.sw_enabled and not was:
            self.vcpu.apic_software_enabled()

    def mmio_in_range(self, gpa: int) -> bool:
        """Return whether *gpa* lies in the register page and the mode leaves that page to the APIC."""
        if gpa & _PAGE_MASK != self.base_address:
            return False
        return (self.hw_enabled and not self.x2apic_mode) or self.apic_map.mmio_hole

    def mmio_read(self, offset: int, size: int) -> int:
        """Read *size* bytes at *offset* of the page; all ones unless in xAPIC mode."""
        if not self.hw_enabled or self.x2apic_mode:
            return (1 << 8 * size) - 1
        return lapic_regs.mmio_read(self, offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Write to the page; anything but an aligned 32-bit access in xAPIC mode is ignored."""
        if self.hw_enabled and not self.x2apic_mode and size == 4 and not offset & 0xF:
            lapic_regs.mmio_write(self, offset, value)

    def msr_read(self, index: int) -> int | None:
        """RDMSR of 0x800..0x8FF; None stands for #GP."""
        return lapic_regs.msr_read(self, index) if self.x2apic_mode else None

    def msr_write(self, index: int, value: int) -> bool:
        """WRMSR to 0x800..0x8FF; False stands for #GP."""
        return self.x2apic_mode and lapic_regs.msr_write(self, index, value)

    # Save and restore: see lapic_state

    def get_state(self) -> bytes:
        """Return the registers as KVM_GET_LAPIC does (``kvm_lapic_state``)."""
        return lapic_state.get_state(self)

    def set_state(self, state: bytes) -> None:
        """Load the registers as KVM_SET_LAPIC does; EINVAL for an x2APIC ID that isn't the vCPU's."""
        lapic_state.set_state(self, state)
