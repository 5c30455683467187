# SPDX-License-Identifier: Apache-2.0
"""Where the events of x86's tracepoints happen: functions of KVM's, and what their arguments say of the event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from softkvm import abi
from softkvm.abi import run_page
from softkvm.kvm import trace
from softkvm.kvm.memory.guest_memory import read_guest
from softkvm.kvm.memory.pages import PAGE_SHIFT
from softkvm.kvm.trace_events import MMIO_READ, MMIO_READ_UNSATISFIED, MMIO_WRITE
from softkvm.kvm.x86 import cpuid, events, io, msr_exits, tsc
from softkvm.kvm.x86 import vcpu as x86_vcpu
from softkvm.kvm.x86.emulate import emulator, string
from softkvm.kvm.x86.emulate import system as emulate_system
from softkvm.kvm.x86.emulate.operands import STR_SRC
from softkvm.kvm.x86.irqchip import i8259, ioapic, irq_comm, lapic, lapic_regs
from softkvm.kvm.x86.irqchip.apicdef import APIC_BASE_MSR, APIC_ICR
from softkvm.kvm.x86.irqchip.seams import IRQ_COALESCED
from softkvm.kvm.x86.paravirt import async_pf, hypercalls, kvmclock, pv_eoi
from softkvm.kvm.x86.svm import exits, svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.trace.events import (
    EMUL_CR0_PE,
    EMUL_CS_D,
    EMUL_CS_L,
    EMUL_EFL_VM,
    EVENTS,
    HOST_CLOCK_TSC,
    ISA_SVM,
)
from softkvm.kvm.x86.xen import hypercall_page
from softkvm.kvm.x86.xen import hypercalls as xen_hypercalls
from softkvm.trace.patch import Wrapper
from softkvm.trace.tracepoint import Emit, Probe, Tracepoint, after, before

if TYPE_CHECKING:
    from softkvm.kvm.x86.emulate.emulator import Emulator
    from softkvm.kvm.x86.emulate.operands import Insn
    from softkvm.kvm.x86.irqchip.i8259 import Pic
    from softkvm.kvm.x86.irqchip.ioapic import IoApic
    from softkvm.kvm.x86.irqchip.irq_comm import IrqRouting
    from softkvm.kvm.x86.irqchip.lapic import Lapic
    from softkvm.kvm.x86.paravirt.pv_eoi import PvEoi
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.vcpu import Vcpu as RunningVcpu

_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1
_SIZE_MASKS: Final = {1: 0xFF, 2: 0xFFFF, 4: _U32}

# --- entries and exits ---------------------------------------------------------------------------------

Vmrun = Callable[[int], int]


def _around_vmrun(make: Callable[[RunningVcpu, Vmrun], Vmrun]) -> Wrapper:
    """Return the wrapper of the loop that gives it another VMRUN; all else of the loop stays as it is."""

    def enter(call: Callable[[RunningVcpu], bool], vcpu: RunningVcpu) -> bool:
        loop = vcpu._loop
        vcpu._loop = (make(vcpu, loop[0]), *loop[1:])  # type: ignore[assignment]  # any function is as good
        try:
            return call(vcpu)
        finally:
            vcpu._loop = loop

    return enter


def _entry(emit: Emit) -> Wrapper:
    def make(vcpu: RunningVcpu, vmrun: Vmrun) -> Vmrun:
        q, vcpu_id = vcpu.q, vcpu.vcpu_id

        def traced(address: int) -> int:
            emit(vcpu_id, q[V.RIP], False)
            return vmrun(address)

        return traced

    return _around_vmrun(make)


def _exit(emit: Emit) -> Wrapper:
    def make(vcpu: RunningVcpu, vmrun: Vmrun) -> Vmrun:
        q, vcpu_id = vcpu.q, vcpu.vcpu_id

        def traced(address: int) -> int:
            code = vmrun(address)
            info = q[V.EXIT_INT_INFO]
            error = info >> 32 if info & (V.EVTINJ_VALID | V.EVTINJ_VALID_ERR) == _WITH_ERROR else 0
            emit(
                code & _U32,
                q[V.RIP],
                ISA_SVM,
                q[V.EXIT_INFO_1],
                q[V.EXIT_INFO_2],
                info & _U32,
                error,
                vcpu_id,
            )
            return code

        return traced

    return _around_vmrun(make)


_WITH_ERROR: Final = V.EVTINJ_VALID | V.EVTINJ_VALID_ERR


def _page_fault(vcpu: Vcpu) -> tuple[int, ...]:
    q = vcpu.q
    return vcpu.vcpu_id, q[V.RIP], q[V.EXIT_INFO_2], q[V.EXIT_INFO_1]


def _hypercall(vcpu: Vcpu, skip: object) -> tuple[int, ...]:
    gpr = vcpu.gpr
    mask = _U64 if vcpu.is_64bit_code() else _U32
    return tuple(gpr[n] & mask for n in (0, 3, 1, 2, 6))


def _cpuid(leaf: Sequence[int], table: cpuid.CpuidTable, function: int, index: int) -> tuple[int, ...]:
    found = table.leaf(function, index) is not None
    basic = not found and table.intel_compatible and table._out_of_range(function)
    return function, index, *leaf, found, basic


# --- port I/O and MMIO ---------------------------------------------------------------------------------


def _fast_out(vcpu: Vcpu) -> tuple[int, ...] | None:
    """OUT of the accumulator; IN is told of when there is what it reads."""
    info = vcpu.q[V.EXIT_INFO_1]
    size = info >> 4 & 7
    return None if info & (1 | V.IOIO_STR) else (1, info >> 16, size, 1, vcpu.gpr[0] & _SIZE_MASKS[size])


def _fast_in(vcpu: Vcpu, size: int, value: int) -> tuple[int, ...]:
    return 0, vcpu.q[V.EXIT_INFO_1] >> 16, size, 1, value


def _emulated_in(data: bytes, e: Emulator, port: int, size: int, count: int) -> tuple[int, ...]:
    return 0, port, size, len(data) // size, int.from_bytes(data[:size], "little")


def _emulated_out(_: None, e: Emulator, insn: Insn) -> tuple[int, ...]:
    dst, src = insn.ops
    return 1, string._port(e, dst), src.size, 1, e.read(src)


def _emulated_outs(_: None, e: Emulator, insn: Insn) -> tuple[int, ...] | None:
    size = next(op.size for op in insn.ops if op.kind == STR_SRC)
    data = e.reads[-1].data if e.reads else b""
    return (1, e.gpr[2] & 0xFFFF, size, len(data) // size, int.from_bytes(data[:size], "little")) if data else None


def _mmio_read(value: int | None, vcpu: Vcpu, gpa: int, size: int) -> tuple[int, ...] | None:
    return None if value is None else (MMIO_READ, size, gpa, value)


def _mmio_exit(vcpu: Vcpu, gpa: int, size: int, value: int, is_write: int) -> tuple[int, ...] | None:
    return None if is_write else (MMIO_READ_UNSATISFIED, size, gpa, 0)


def _mmio_completed(e: Emulator, vcpu: Vcpu) -> tuple[int, ...]:
    """What userspace has answered, in the run page."""
    size = vcpu.run_q[run_page.MMIO_LEN_Q] & _U32
    value = vcpu.run_q[run_page.MMIO_DATA_Q] & (1 << 8 * size) - 1
    return MMIO_READ, size, vcpu.run_q[run_page.MMIO_PHYS_ADDR_Q], value


# --- registers -----------------------------------------------------------------------------------------


def _rdmsr(value: int | None, vcpu: Vcpu, index: int) -> tuple[int, ...] | None:
    return None if value is None else (0, index, value, False)


def _wrmsr(written: bool, vcpu: Vcpu, index: int, data: int) -> tuple[int, ...] | None:
    return (1, index, data, False) if written else None


def _msr_refused(
    userspace: bool, vcpu: Vcpu, index: int, data: int, skip: object, *, write: bool
) -> tuple[int, ...] | None:
    return None if userspace else (write, index, data, True)


# --- events --------------------------------------------------------------------------------------------

#: Of the thread that injects: whether an interrupt, and an exception, had been given to the processor before.
_again = threading.local()


def _noting_what_comes_again() -> Wrapper:
    def inject(call: Callable[[Vcpu], None], vcpu: Vcpu) -> None:
        _again.interrupt, _again.exception = vcpu.interrupt_injected, vcpu.exception.injected
        try:
            call(vcpu)
        finally:
            _again.interrupt = _again.exception = False

    return inject


def _inj_virq(vcpu: Vcpu) -> tuple[int, ...]:
    return vcpu.interrupt_nr, vcpu.interrupt_soft, getattr(_again, "interrupt", False)


def _inj_exception(vcpu: Vcpu) -> tuple[int, ...]:
    exception = vcpu.exception
    error = exception.error_code if exception.has_error_code else 0
    again, _again.exception = getattr(_again, "exception", False), False  # the next one is another's
    return exception.vector, exception.has_error_code, error, again


# --- interrupt chips -----------------------------------------------------------------------------------


def _apic_msr(index: int) -> int:
    return (index - APIC_BASE_MSR) << 4


def _apic_read(value: int | None, apic: Lapic, offset: int) -> tuple[int, ...] | None:
    return None if value is None else (0, offset, value)


def _apic_icr_read(value: int | None, apic: Lapic, index: int) -> tuple[int, ...] | None:
    return (0, APIC_ICR, value) if value is not None and _apic_msr(index) == APIC_ICR else None


def _eoi(apic: Lapic) -> tuple[int, ...]:
    return apic.vcpu_id, apic.isr.bit_length() - 1


def _pv_eoi(emit: Emit) -> Wrapper:
    def sync(call: Callable[[PvEoi], None], eoi: PvEoi) -> None:
        lapic, isr, pending = eoi._lapic, eoi._lapic.isr, eoi.pending
        call(eoi)
        if pending and lapic.isr != isr:
            emit(lapic.vcpu_id, isr.bit_length() - 1)

    return sync


def _ioapic_set_irq(emit: Emit) -> Wrapper:
    def assert_pin(call: Callable[[IoApic, int], int], chip: IoApic, pin: int) -> int:
        entry = chip._redirtbl[pin]
        result = call(chip, pin)
        emit(entry, pin, result == IRQ_COALESCED)
        return result

    return assert_pin


def _pic_set_irq(result: int, chips: Pic, pin: int, level: int, source_id: int = 0) -> tuple[int, ...]:
    chip = chips._chips[pin >> 3]
    return pin >> 3, pin & 7, chip.elcr, chip.imr, result == IRQ_COALESCED


def _routed_msi(routing: IrqRouting, gsi: int, level: int, source_id: int = 0) -> tuple[int, ...] | None:
    msi = routing.routed_msi(gsi)
    return _msi(routing, *msi) if msi is not None and level else None


def _msi(routing: IrqRouting, address_lo: int, address_hi: int, data: int) -> tuple[int, ...]:
    return address_lo | (address_hi << 32 if routing._map.x2apic_format else 0), data


# --- the emulator --------------------------------------------------------------------------------------

_EMULATED: Final = 15


def _mode(vcpu: Vcpu) -> int:
    """Return how the instruction was decoded, in the event's flags."""
    if not vcpu.cr0 & abi.X86_CR0_PE:
        return 0
    if vcpu.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
        return EMUL_CR0_PE | EMUL_EFL_VM
    return EMUL_CR0_PE | {64: EMUL_CS_L, 32: EMUL_CS_D}.get(svm.code_bitness(vcpu), 0)


def _insn(e: Emulator, code: bytes, *, failed: bool) -> tuple[Any, ...]:
    vcpu = e.vcpu
    code = code[:_EMULATED]
    return vcpu.q[V.RIP], vcpu.q[V.CS_BASE], len(code), code.ljust(_EMULATED, b"\0"), _mode(vcpu), failed


def _emulate(e: Emulator, insn: Insn | None) -> tuple[Any, ...] | None:
    return None if insn is None else _insn(e, insn.code, failed=False)


def _emulate_mmio(e: Emulator, gpa: int) -> tuple[Any, ...] | None:
    """The fast path of plain loads and stores; what it hands on begins as every other instruction."""
    assist = e.assist.tobytes()
    code = assist[1 : 1 + assist[0]]
    try:
        insn = e.cache.get(code, svm.code_bitness(e.vcpu))
    except ValueError:
        return None
    return None if insn.mmio is None or gpa < 0 else _insn(e, insn.code, failed=False)


def _emulation_failed(e: Emulator) -> tuple[Any, ...]:
    return _insn(e, e.insn.code if e.insn is not None else b"", failed=True)


# --- time ----------------------------------------------------------------------------------------------


def _pvclock(_: None, vcpu: Vcpu) -> tuple[int, ...] | None:
    msr = vcpu.msr_values.get(abi.MSR_KVM_SYSTEM_TIME_NEW, 0)
    data = read_guest(vcpu.vm, msr & ~1, kvmclock.PVCLOCK_SIZE) if msr & abi.KVM_MSR_ENABLED else None
    if data is None:
        return None
    version, _pad, timestamp, system_time, multiplier, shift, flags = kvmclock._PVCLOCK.unpack(data)
    return vcpu.vcpu_id, version, timestamp, system_time, multiplier, shift, flags


def _tsc_offset(vcpu: Vcpu, offset: int, ratio: int, *, new: bool = False) -> tuple[int, ...]:
    return vcpu.vcpu_id, 0 if new else vcpu.tsc_offset, offset


def _ple_window(emit: Emit) -> Wrapper:
    def change(call: Callable[[Vcpu], None], vcpu: Vcpu) -> None:
        old = vcpu.w[V.PAUSE_FILTER_COUNT]
        call(vcpu)
        if vcpu.w[V.PAUSE_FILTER_COUNT] != old:
            emit(vcpu.vcpu_id, vcpu.w[V.PAUSE_FILTER_COUNT], old)

    return change


_COMES_AGAIN: Final = Probe(events.inject_events, lambda emit: _noting_what_comes_again())

PROBES: Final[dict[str, Sequence[Probe]]] = {
    "kvm_entry": [Probe(x86_vcpu.Vcpu.arch_enter_guest, _entry)],
    "kvm_exit": [Probe(x86_vcpu.Vcpu.arch_enter_guest, _exit)],
    "kvm_hypercall": [before(hypercalls.emulate_hypercall, _hypercall)],
    "kvm_xen_hypercall": [
        before(xen_hypercalls._carry_out, lambda vcpu, call: (call.cpl, call.input, *call.params)),
    ],
    "kvm_pio": [
        before(io.io_interception, _fast_out),
        before(io._load_accumulator, _fast_in),
        after(string._pio_read, _emulated_in),
        after(string.out, _emulated_out),
        after(string.outs, _emulated_outs),
    ],
    "kvm_cpuid": [after(cpuid.CpuidTable.answer, _cpuid)],
    "kvm_apic": [
        after(lapic_regs._read, _apic_read),
        after(lapic_regs.msr_read, _apic_icr_read),
        before(lapic_regs.mmio_write, lambda apic, offset, value: (1, offset, value)),
        before(lapic_regs.msr_write, lambda apic, index, value: (1, _apic_msr(index), value)),
    ],
    "kvm_inj_virq": [_COMES_AGAIN, before(svm.inject_irq, _inj_virq)],
    "kvm_inj_exception": [_COMES_AGAIN, before(svm.inject_exception, _inj_exception)],
    "kvm_page_fault": [before(exits.npf_interception, _page_fault)],
    "kvm_msr": [
        after(msr_exits.read_msr, _rdmsr),
        after(msr_exits.write_msr, _wrmsr),
        after(hypercall_page.write_msr, _wrmsr),
        after(msr_exits.exit_msr, _msr_refused),
    ],
    "kvm_cr": [
        after(emulate_system.read_cr, lambda value, e, number: (0, number, value)),
        before(emulate_system.write_cr, lambda e, number, value: (1, number, value)),
    ],
    "kvm_pic_set_irq": [after(i8259.Pic.set_pin, _pic_set_irq)],
    "kvm_apic_ipi": [before(lapic_regs.send_ipi, lambda apic, icr, dest: (icr, dest))],
    "kvm_apic_accept_irq": [
        before(
            lapic.Lapic.accept_irq,
            lambda apic, mode, vector, level=True, triggered=False, sender=None: (
                apic.vcpu_id,
                mode,
                triggered,
                vector,
            ),
        ),
    ],
    "kvm_eoi": [before(lapic.Lapic.eoi, _eoi)],
    "kvm_pv_eoi": [Probe(pv_eoi.PvEoi.sync_from_guest, _pv_eoi)],
    "kvm_emulate_insn": [
        before(emulator.Emulator.begin, _emulate),
        before(emulator.Emulator.mmio, _emulate_mmio),
        before(emulator.Emulator.failed, _emulation_failed),
    ],
    "kvm_write_tsc_offset": [before(tsc._change, _tsc_offset)],
    "kvm_update_master_clock": [after(kvmclock.set_clock, lambda _, vm, data: (True, HOST_CLOCK_TSC, True))],
    "kvm_ple_window_update": [Probe(svm.grow_ple_window, _ple_window), Probe(svm.shrink_ple_window, _ple_window)],
    "kvm_pvclock_update": [after(kvmclock.update_guest_time, _pvclock)],
}

#: Places of events that :mod:`softkvm.kvm.trace_events` has, as other architectures have them too.
GENERAL: Final[dict[str, Sequence[Probe]]] = {
    "kvm_set_irq": [
        before(irq_comm.IrqRouting.set_gsi, lambda routing, gsi, level, source_id=0: (gsi, level, source_id))
    ],
    "kvm_ioapic_set_irq": [Probe(ioapic.IoApic._assert, _ioapic_set_irq)],
    "kvm_msi_set_irq": [before(irq_comm.IrqRouting.set_msi, _msi), before(irq_comm.IrqRouting.set_gsi, _routed_msi)],
    "kvm_ack_irq": [before(irq_comm.IrqRouting.notify_acked, lambda routing, irqchip, pin: (irqchip, pin))],
    "kvm_async_pf_not_present": [
        after(async_pf._setup, lambda taken, vcpu, work: (work.token, work.gfn << PAGE_SHIFT) if taken else None)
    ],
    "kvm_async_pf_ready": [
        before(async_pf._present, lambda vcpu, work: (work.token, 0 if work.wakeup_all else work.gfn << PAGE_SHIFT))
    ],
    "kvm_mmio": [
        after(io.kernel_mmio_read, _mmio_read),
        before(io.kernel_mmio_write, lambda vcpu, gpa, size, value: (MMIO_WRITE, size, gpa, value)),
        before(io.exit_mmio, _mmio_exit),
        before(emulator.Emulator._complete_read, _mmio_completed),
        before(emulator.Emulator._complete_load, _mmio_completed),
    ],
}


def x86() -> list[Tracepoint]:
    """Return the tracepoints of x86, without Hyper-V's."""
    found = trace.tracepoints(EVENTS, PROBES)
    for tracepoint in found:
        if tracepoint.event.name in ("kvm_entry", "kvm_exit"):
            tracepoint.on_change = trace.begin_anew
    return found
