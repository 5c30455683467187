# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's MSRs: how each is read and written, and which privilege it needs (TLFS, appendix B).

Without Hyper-V's interface in its CPUID they are #GP for the guest. The host may always read and restore them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import abi
from softkvm.kvm.capabilities import KVM_MAX_VCPUS
from softkvm.kvm.memory.guest_memory import write_guest
from softkvm.kvm.x86.hyperv import syndbg
from softkvm.kvm.x86.hyperv.clock import reference_counter
from softkvm.kvm.x86.hyperv.partition import TscPageStatus
from softkvm.kvm.x86.hyperv.vp import VirtualProcessor, hide_invariant_tsc, vp_of
from softkvm.kvm.x86.irqchip import lapic_regs
from softkvm.kvm.x86.irqchip.apicdef import APIC_EOI, APIC_ICR, APIC_ICR2, APIC_TASKPRI, X2APIC_ICR_RESERVED_BITS
from softkvm.kvm.x86.requests import KVM_REQ_CLOCK_UPDATE, KVM_REQ_HV_CRASH, KVM_REQ_HV_RESET

if TYPE_CHECKING:
    from softkvm.kvm.x86.hyperv.partition import Partition
    from softkvm.kvm.x86.state import VcpuState as Vcpu

Reader = Callable[["Vcpu", int, bool], "int | None"]
Writer = Callable[["Vcpu", int, int, bool], bool]

_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1
_PAGE_MASK: Final = ~0xFFF
_NS: Final = 1_000_000_000 // abi.HV_CLOCK_HZ
#: VMMCALL, the silicon's hypercall, and RET.
_HYPERCALL_CODE: Final = b"\x0f\x01\xd9\xc3"
#: OR EAX, 1 << 31 before those: what tells a call from one of Xen's, where a guest may have both.
_BESIDE_XEN: Final = b"\x0d\0\0\0\x80"


class Privilege(NamedTuple):
    """Where in leaf 0x40000003 a guest is given a group of MSRs."""

    register: str
    mask: int

    def given(self, vp: VirtualProcessor) -> bool:
        """Tell whether the guest has it, or nobody looks."""
        return not vp.enforce_cpuid or bool(getattr(vp.features, self.register) & self.mask)


class HvMsr(NamedTuple):
    """One row. ``save``: KVM_GET_MSR_INDEX_LIST names it, or another of its group for all."""

    privilege: Privilege
    read: Reader
    write: Writer
    save: bool = False


def _eax(mask: int) -> Privilege:
    return Privilege("features_eax", mask)


def _edx(mask: int) -> Privilege:
    return Privilege("features_edx", mask)


# --- building blocks ---------------------------------------------------------------------------------------


def _ignored_by_host(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Writes of a read-only register: the host's, who restores all it has saved, do nothing."""
    return host


def _of_partition(name: str) -> Reader:
    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        value: int = getattr(vcpu.vm.hyperv, name)
        return value

    return read


def _keep(name: str) -> Writer:
    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        setattr(vcpu.vm.hyperv, name, data)
        return True

    return write


# --- the partition's ---------------------------------------------------------------------------------------


def _write_guest_os_id(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    hv = vcpu.vm.hyperv
    with hv.lock:
        hv.guest_os_id = data
        if not data:
            hv.hypercall &= ~abi.HV_X64_MSR_HYPERCALL_ENABLE
    return True


def _write_hypercall(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Place the page with the hypercall instruction; nothing until the guest has told what it is."""
    hv = vcpu.vm.hyperv
    with hv.lock:
        if not hv.guest_os_id:
            return True
        code = _BESIDE_XEN + _HYPERCALL_CODE if vcpu.vm.xen.intercepts_hypercalls else _HYPERCALL_CODE
        if data & abi.HV_X64_MSR_HYPERCALL_ENABLE and not write_guest(vcpu.vm, data & _PAGE_MASK, code):
            return False
        hv.hypercall = data
    return True


def _write_reset(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if data == 1:
        vcpu.make_request(KVM_REQ_HV_RESET)
    return True


def _write_reference_tsc(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    hv = vcpu.vm.hyperv
    with hv.lock:
        hv.tsc_page = data
        if data & abi.HV_X64_MSR_TSC_REFERENCE_ENABLE:
            hv.tsc_page_status = TscPageStatus.HOST_CHANGED if host else TscPageStatus.GUEST_CHANGED
            vcpu.make_request(KVM_REQ_CLOCK_UPDATE)
        else:
            hv.tsc_page_status = TscPageStatus.UNSET
    return True


def _read_crash_param(vcpu: Vcpu, index: int, host: bool) -> int:
    return vcpu.vm.hyperv.crash_params[index - abi.HV_X64_MSR_CRASH_P0]


def _write_crash_param(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    vcpu.vm.hyperv.crash_params[index - abi.HV_X64_MSR_CRASH_P0] = data
    return True


def _write_crash_ctl(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """The guest tells that it has crashed, the host what a guest may tell."""
    if host:
        vcpu.vm.hyperv.crash_ctl = data & abi.HV_CRASH_CTL_CRASH_NOTIFY
    elif data & abi.HV_CRASH_CTL_CRASH_NOTIFY:
        vcpu.make_request(KVM_REQ_HV_CRASH)
    return True


def _write_tsc_emulation_status(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if data and not host:
        return False
    vcpu.vm.hyperv.tsc_emulation_status = data
    return True


def _write_tsc_invariant(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Let CPUID show the invariant TSC; a guest can't take that back."""
    hv: Partition = vcpu.vm.hyperv
    with hv.lock:
        if data & ~abi.HV_EXPOSE_INVARIANT_TSC or (not host and hv.invtsc_control and not data):
            return False
        hv.invtsc_control = data
        for other in vcpu.vm.vcpus:
            hide_invariant_tsc(other)
    return True


# --- a virtual processor's ---------------------------------------------------------------------------------


def _write_vp_index(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not host or data & _U32 >= KVM_MAX_VCPUS:
        return False
    vp_of(vcpu).index = data & _U32
    return True


def _read_vp_runtime(vcpu: Vcpu, index: int, host: bool) -> int:
    return time.thread_time_ns() // _NS + vp_of(vcpu).runtime_offset & _U64


def _write_vp_runtime(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if host:
        vp_of(vcpu).runtime_offset = data - time.thread_time_ns() // _NS
    return host


def _read_apic_frequency(vcpu: Vcpu, index: int, host: bool) -> int:
    return 1_000_000_000 // (vcpu.chips.apic_map.bus_cycle_ns if vcpu.chips is not None else 1)


def _write_assist_page(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """The page by which the guest saves EOIs (TLFS, 10.3.5): the first word's first bit is that of KVM's own."""
    vp, pv_eoi = vp_of(vcpu), vcpu.pv_eoi
    if not data & abi.HV_X64_MSR_VP_ASSIST_PAGE_ENABLE:
        vp.assist_page = data
        return pv_eoi is None or pv_eoi.set_msr(0)
    # Only that word: the rest holds what a migrated guest goes on from.
    if not write_guest(vcpu.vm, data & _PAGE_MASK, bytes(4)):
        return False
    vp.assist_page = data
    return pv_eoi is None or pv_eoi.set_msr(data & _PAGE_MASK | abi.KVM_MSR_ENABLED)


def _no_read(vcpu: Vcpu, index: int, host: bool) -> None:
    return None


def _write_eoi(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if vcpu.apic is None or data >> 32:
        return False
    lapic_regs.mmio_write(vcpu.apic, APIC_EOI, data)
    return True


def _read_icr(vcpu: Vcpu, index: int, host: bool) -> int | None:
    apic = vcpu.apic
    return None if apic is None else apic.regs[APIC_ICR2 >> 2] << 32 | apic.regs[APIC_ICR >> 2]


def _write_icr(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Both halves at once, the destination where the APIC's mode has it."""
    apic = vcpu.apic
    if apic is None or data & X2APIC_ICR_RESERVED_BITS:
        return False
    if apic.x2apic_mode:
        return lapic_regs.x2apic_icr_write(apic, data)
    lapic_regs.mmio_write(apic, APIC_ICR2, data >> 32)
    lapic_regs.mmio_write(apic, APIC_ICR, data & _U32)
    return True


def _read_tpr(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return None if vcpu.apic is None else lapic_regs.mmio_read(vcpu.apic, APIC_TASKPRI, 4)


def _write_tpr(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if vcpu.apic is None or data >> 32:
        return False
    lapic_regs.mmio_write(vcpu.apic, APIC_TASKPRI, data)
    return True


# --- the SynIC's and the timers' ---------------------------------------------------------------------------


def _of_synic(get: Callable[[VirtualProcessor, int], int]) -> Reader:
    """Reads by the guest need an active SynIC."""

    def read(vcpu: Vcpu, index: int, host: bool) -> int | None:
        vp = vp_of(vcpu)
        return get(vp, index) if vp.synic.active or host else None

    return read


def _to_synic(put: Callable[[VirtualProcessor, int, int, bool], bool]) -> Writer:
    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        vp = vp_of(vcpu)
        return vp.synic.may_write(data, host) and put(vp, index, data, host)

    return write


def _put_version(vp: VirtualProcessor, index: int, data: int, host: bool) -> bool:
    if host:
        vp.synic.version = data
    return host


def _put_eom(vp: VirtualProcessor, index: int, data: int, host: bool) -> bool:
    vp.synic.write_eom()
    return True


_STIMER0: Final = abi.HV_X64_MSR_STIMER0_CONFIG


def _read_stimer(vcpu: Vcpu, index: int, host: bool) -> int:
    timer = vp_of(vcpu).stimers[(index - _STIMER0) // 2]
    return timer.count if (index - _STIMER0) & 1 else timer.config


def _write_stimer(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    timer = vp_of(vcpu).stimers[(index - _STIMER0) // 2]
    return timer.write_count(data, host) if (index - _STIMER0) & 1 else timer.write_config(data, host)


# --- the table ---------------------------------------------------------------------------------------------

_HYPERCALL: Final = _eax(abi.HV_MSR_HYPERCALL_AVAILABLE)
_APIC: Final = _eax(abi.HV_MSR_APIC_ACCESS_AVAILABLE)
_SYNIC: Final = _eax(abi.HV_MSR_SYNIC_AVAILABLE)
_STIMER: Final = _eax(abi.HV_MSR_SYNTIMER_AVAILABLE)
_FREQUENCIES: Final = _eax(abi.HV_ACCESS_FREQUENCY_MSRS)
_REENLIGHTENMENT: Final = _eax(abi.HV_ACCESS_REENLIGHTENMENT)
_CRASH: Final = _edx(abi.HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE)
_DEBUG: Final = _edx(abi.HV_FEATURE_DEBUG_MSRS_AVAILABLE)

HV_MSRS: Final[dict[int, HvMsr]] = {
    abi.HV_X64_MSR_GUEST_OS_ID: HvMsr(_HYPERCALL, _of_partition("guest_os_id"), _write_guest_os_id, True),
    abi.HV_X64_MSR_HYPERCALL: HvMsr(_HYPERCALL, _of_partition("hypercall"), _write_hypercall, True),
    abi.HV_X64_MSR_VP_INDEX: HvMsr(
        _eax(abi.HV_MSR_VP_INDEX_AVAILABLE), lambda vcpu, index, host: vp_of(vcpu).index, _write_vp_index, True
    ),
    abi.HV_X64_MSR_RESET: HvMsr(_eax(abi.HV_MSR_RESET_AVAILABLE), lambda vcpu, index, host: 0, _write_reset, True),
    abi.HV_X64_MSR_VP_RUNTIME: HvMsr(_eax(abi.HV_MSR_VP_RUNTIME_AVAILABLE), _read_vp_runtime, _write_vp_runtime, True),
    abi.HV_X64_MSR_TIME_REF_COUNT: HvMsr(
        _eax(abi.HV_MSR_TIME_REF_COUNT_AVAILABLE),
        lambda vcpu, index, host: reference_counter(vcpu.vm),
        _ignored_by_host,
        True,
    ),
    abi.HV_X64_MSR_REFERENCE_TSC: HvMsr(
        _eax(abi.HV_MSR_REFERENCE_TSC_AVAILABLE), _of_partition("tsc_page"), _write_reference_tsc, True
    ),
    abi.HV_X64_MSR_TSC_FREQUENCY: HvMsr(
        _FREQUENCIES, lambda vcpu, index, host: vcpu.tsc_khz * 1000, _ignored_by_host, True
    ),
    abi.HV_X64_MSR_APIC_FREQUENCY: HvMsr(_FREQUENCIES, _read_apic_frequency, _ignored_by_host, True),
    abi.HV_X64_MSR_EOI: HvMsr(_APIC, _no_read, _write_eoi),
    abi.HV_X64_MSR_ICR: HvMsr(_APIC, _read_icr, _write_icr),
    abi.HV_X64_MSR_TPR: HvMsr(_APIC, _read_tpr, _write_tpr),
    abi.HV_X64_MSR_VP_ASSIST_PAGE: HvMsr(
        _APIC, lambda vcpu, index, host: vp_of(vcpu).assist_page, _write_assist_page, True
    ),
    abi.HV_X64_MSR_SCONTROL: HvMsr(
        _SYNIC,
        _of_synic(lambda vp, index: vp.synic.control),
        _to_synic(lambda vp, index, data, host: vp.synic.write_control(data, host)),
        True,
    ),
    abi.HV_X64_MSR_SVERSION: HvMsr(_SYNIC, _of_synic(lambda vp, index: vp.synic.version), _to_synic(_put_version)),
    abi.HV_X64_MSR_SIEFP: HvMsr(
        _SYNIC,
        _of_synic(lambda vp, index: vp.synic.evt_page),
        _to_synic(lambda vp, index, data, host: vp.synic.write_evt_page(data, host)),
    ),
    abi.HV_X64_MSR_SIMP: HvMsr(
        _SYNIC,
        _of_synic(lambda vp, index: vp.synic.msg_page),
        _to_synic(lambda vp, index, data, host: vp.synic.write_msg_page(data, host)),
    ),
    abi.HV_X64_MSR_EOM: HvMsr(_SYNIC, _of_synic(lambda vp, index: 0), _to_synic(_put_eom)),
    **{
        index: HvMsr(
            _SYNIC,
            _of_synic(lambda vp, index: vp.synic.sints[index - abi.HV_X64_MSR_SINT0]),
            _to_synic(lambda vp, index, data, host: vp.synic.write_sint(index - abi.HV_X64_MSR_SINT0, data, host)),
        )
        for index in range(abi.HV_X64_MSR_SINT0, abi.HV_X64_MSR_SINT15 + 1)
    },
    **{
        index: HvMsr(_STIMER, _read_stimer, _write_stimer, index == _STIMER0)
        for index in range(_STIMER0, abi.HV_X64_MSR_STIMER3_COUNT + 1)
    },
    **{
        index: HvMsr(_CRASH, _read_crash_param, _write_crash_param, True)
        for index in range(abi.HV_X64_MSR_CRASH_P0, abi.HV_X64_MSR_CRASH_P4 + 1)
    },
    abi.HV_X64_MSR_CRASH_CTL: HvMsr(_CRASH, _of_partition("crash_ctl"), _write_crash_ctl, True),
    abi.HV_X64_MSR_REENLIGHTENMENT_CONTROL: HvMsr(
        _REENLIGHTENMENT, _of_partition("reenlightenment_control"), _keep("reenlightenment_control"), True
    ),
    abi.HV_X64_MSR_TSC_EMULATION_CONTROL: HvMsr(
        _REENLIGHTENMENT, _of_partition("tsc_emulation_control"), _keep("tsc_emulation_control"), True
    ),
    abi.HV_X64_MSR_TSC_EMULATION_STATUS: HvMsr(
        _REENLIGHTENMENT, _of_partition("tsc_emulation_status"), _write_tsc_emulation_status, True
    ),
    abi.HV_X64_MSR_TSC_INVARIANT_CONTROL: HvMsr(
        _eax(abi.HV_ACCESS_TSC_INVARIANT), _of_partition("invtsc_control"), _write_tsc_invariant, True
    ),
    **{index: HvMsr(_DEBUG, syndbg.read, syndbg.write, True) for index in syndbg.MSRS},
}


def _read(vcpu: Vcpu, index: int, host: bool) -> int | None:
    if not host and not vcpu.hyperv_enabled:
        return None
    row = HV_MSRS[index]
    if not host and not row.privilege.given(vp_of(vcpu)):
        return None
    return row.read(vcpu, index, host)


def _write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not host and not vcpu.hyperv_enabled:
        return False
    row = HV_MSRS[index]
    if not host and not row.privilege.given(vp_of(vcpu)):
        return False
    return row.write(vcpu, index, data, host)


#: Index -> reader, writer, whether it is in the list of registers to save.
MSRS: Final[dict[int, tuple[Reader, Writer, bool]]] = {
    index: (_read, _write, row.save) for index, row in HV_MSRS.items()
}
