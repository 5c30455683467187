# SPDX-License-Identifier: Apache-2.0
"""The attributes of a VM and of a vCPU (KVM_XEN_HVM_SET_ATTR and the like): one table row for each type."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.capabilities import KVM_MAX_VCPUS
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.guest_area import GuestArea
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE
from softkvm.kvm.x86.paravirt.kvmclock import PVCLOCK_SIZE, get_kvmclock_ns
from softkvm.kvm.x86.paravirt.steal_time import run_delay_ns
from softkvm.kvm.x86.requests import KVM_REQ_CLOCK_UPDATE
from softkvm.kvm.x86.xen import evtchn, ports, runstate, timer, upcall
from softkvm.kvm.x86.xen.layout import VCPU_INFO_SIZE
from softkvm.kvm.x86.xen.shared_info import set_long_mode, set_shared_info

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm

    SetHvm = Callable[[Vm, abi.kvm_xen_hvm_attr_u], None]
    GetHvm = Callable[[Vm, abi.kvm_xen_hvm_attr_u], None]
    SetVcpu = Callable[[Vcpu, abi.kvm_xen_vcpu_attr_u], None]
    GetVcpu = Callable[[Vcpu, abi.kvm_xen_vcpu_attr_u], None]

_U64: Final = (1 << 64) - 1
_INVALID: Final = abi.KVM_XEN_INVALID_GPA
_TIMES: Final = ("time_running", "time_runnable", "time_blocked", "time_offline")


def _check_vector(vector: int) -> int:
    if 0 < vector < 0x10:
        raise kvm_error(errno.EINVAL, f"vector={vector}, expected 0 or 16 to 255")
    return vector


def _named(area: GuestArea | None, *, hva: bool) -> int | None:
    """Return where an area is if it was named by this kind of address."""
    return area.address if area is not None and area.by_hva == hva else None


# --- a VM's ------------------------------------------------------------------------------------------------


def _set_long_mode(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    if not set_long_mode(vm, bool(u.long_mode)):
        raise kvm_error(errno.EFAULT, "the shared_info page is not there any more")


def _set_shared_info(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    gfn = u.shared_info.gfn
    set_shared_info(vm, None if gfn == abi.KVM_XEN_INVALID_GFN else GuestArea(vm, gfn << PAGE_SHIFT))


def _get_shared_info(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    address = _named(vm.xen.shared_info, hva=False)
    u.shared_info.gfn = abi.KVM_XEN_INVALID_GFN if address is None else address >> PAGE_SHIFT


def _set_shared_info_hva(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    hva = u.shared_info.hva
    set_shared_info(vm, GuestArea(vm, hva, by_hva=True) if hva else None)


def _get_shared_info_hva(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    u.shared_info.hva = _named(vm.xen.shared_info, hva=True) or 0


def _set_upcall_vector(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    upcall.set_vector(vm, _check_vector(u.vector))


def _get_upcall_vector(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    u.vector = vm.xen.upcall_vector


def _get_long_mode(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    u.long_mode = vm.xen.long_mode


def _set_xen_version(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    vm.xen.xen_version = u.xen_version


def _get_xen_version(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    u.xen_version = vm.xen.xen_version


def _set_update_flag(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    vm.xen.runstate_update_flag = bool(u.runstate_update_flag)


def _get_update_flag(vm: Vm, u: abi.kvm_xen_hvm_attr_u) -> None:
    u.runstate_update_flag = vm.xen.runstate_update_flag


_HVM: Final[dict[int, tuple[SetHvm, GetHvm | None]]] = {
    abi.KVM_XEN_ATTR_TYPE_LONG_MODE: (_set_long_mode, _get_long_mode),
    abi.KVM_XEN_ATTR_TYPE_SHARED_INFO: (_set_shared_info, _get_shared_info),
    abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR: (_set_upcall_vector, _get_upcall_vector),
    abi.KVM_XEN_ATTR_TYPE_EVTCHN: (lambda vm, u: ports.set_attr(vm, u.evtchn), None),
    abi.KVM_XEN_ATTR_TYPE_XEN_VERSION: (_set_xen_version, _get_xen_version),
    abi.KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG: (_set_update_flag, _get_update_flag),
    abi.KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA: (_set_shared_info_hva, _get_shared_info_hva),
}


def hvm_set_attr(vm: Vm, attr: abi.kvm_xen_hvm_attr) -> None:
    """KVM_XEN_HVM_SET_ATTR: ENOENT for a type that there is not."""
    row = _HVM.get(attr.type)
    if row is None:
        raise kvm_error(errno.ENOENT, f"type={attr.type}, expected a KVM_XEN_ATTR_TYPE_*")
    with vm.xen.lock:
        row[0](vm, attr.u)


def hvm_get_attr(vm: Vm, type: int) -> abi.kvm_xen_hvm_attr:
    """KVM_XEN_HVM_GET_ATTR: ENOENT for a type that there is not, or that cannot be read."""
    get = _HVM.get(type, (None, None))[1]
    if get is None:
        raise kvm_error(errno.ENOENT, f"type={type}, expected a KVM_XEN_ATTR_TYPE_* that can be read")
    attr = abi.kvm_xen_hvm_attr(type=type)
    with vm.xen.lock:
        get(vm, attr.u)
    return attr


# --- a vCPU's ----------------------------------------------------------------------------------------------


def _set_vcpu_info(vcpu: Vcpu, area: GuestArea | None) -> None:
    """Have ``vcpu_info`` there, with what could not be marked before and the time."""
    if area is not None:
        area.check(VCPU_INFO_SIZE)
    with vcpu.vm.xen.lock:
        vcpu.xen.vcpu_info = area
    if area is not None:
        evtchn.inject_pending_events(vcpu)
        vcpu.make_request(KVM_REQ_CLOCK_UPDATE)
    vcpu.call_soon(vcpu.choose_exit_handlers)


def _gpa(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> GuestArea | None:
    return None if u.gpa == _INVALID else GuestArea(vcpu.vm, u.gpa)


def _get_vcpu_info(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    address = _named(vcpu.xen.vcpu_info, hva=False)
    u.gpa = _INVALID if address is None else address


def _set_vcpu_info_hva(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    _set_vcpu_info(vcpu, GuestArea(vcpu.vm, u.hva, by_hva=True) if u.hva else None)


def _get_vcpu_info_hva(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    u.hva = _named(vcpu.xen.vcpu_info, hva=True) or 0


def _set_time_info(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    area = _gpa(vcpu, u)
    if area is not None:
        area.check(PVCLOCK_SIZE)
        vcpu.make_request(KVM_REQ_CLOCK_UPDATE)
    vcpu.xen.time_info = area


def _get_time_info(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    area = vcpu.xen.time_info
    u.gpa = _INVALID if area is None else area.address


def _set_runstate_addr(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    """The structure may lie across two pages; where one is missing there is none from now on."""
    area = _gpa(vcpu, u)
    vcpu.xen.runstate_area = None
    if area is None:
        return
    first = PAGE_SIZE - (area.address & PAGE_SIZE - 1)
    area.check(first)
    if first < vcpu.vm.xen.layout.runstate_size:
        GuestArea(vcpu.vm, area.address + first & _U64).check(1)
    vcpu.xen.runstate_area = area
    runstate.write(vcpu)


def _get_runstate_addr(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    area = vcpu.xen.runstate_area
    if area is None:
        raise kvm_error(errno.ENOENT, "the vCPU has no runstate area")
    u.gpa = area.address


def _check_state(given: abi.kvm_xen_attr_runstate) -> None:
    if given.state > abi.RUNSTATE_offline:
        raise kvm_error(errno.EINVAL, f"state={given.state:#x}, expected a RUNSTATE_*")


def _times(given: abi.kvm_xen_attr_runstate) -> list[int]:
    """Return the times in the states; EINVAL if they don't add up to that of the last change."""
    times: list[int] = [getattr(given, name) for name in _TIMES]
    if sum(times) & _U64 != given.state_entry_time:
        raise kvm_error(errno.EINVAL, f"state_entry_time={given.state_entry_time}, expected the times' sum")
    return times


def _check_not_ahead(vcpu: Vcpu, entry_time: int) -> None:
    if get_kvmclock_ns(vcpu.vm) < entry_time:
        raise kvm_error(errno.EINVAL, f"state_entry_time={entry_time}: the guest's clock has not come there yet")


def _set_runstate_current(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    _check_state(u.runstate)
    runstate.update(vcpu, u.runstate.state)


def _get_runstate_current(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    u.runstate.state = vcpu.xen.runstate


def _set_runstate_data(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    """All of it, as another KVM had it; the guest's structure follows with the next change."""
    given, xen = u.runstate, vcpu.xen
    _check_state(given)
    times = _times(given)
    _check_not_ahead(vcpu, given.state_entry_time)
    xen.runstate, xen.runstate_entry_time, xen.runstate_times = given.state, given.state_entry_time, times
    xen.last_steal = run_delay_ns()


def _get_runstate_data(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    xen = vcpu.xen
    u.runstate = abi.kvm_xen_attr_runstate(xen.runstate, xen.runstate_entry_time, *xen.runstate_times)


def _adjust_runstate(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    """Add to the times; the state stays for -1."""
    given, xen = u.runstate, vcpu.xen
    if given.state != _U64:
        _check_state(given)
    times = _times(given)
    entry_time = xen.runstate_entry_time + given.state_entry_time & _U64
    _check_not_ahead(vcpu, entry_time)
    xen.runstate_entry_time = entry_time
    xen.runstate_times = [old + more & _U64 for old, more in zip(xen.runstate_times, times, strict=True)]
    if given.state != _U64:
        runstate.update(vcpu, given.state)
    else:
        runstate.write(vcpu)


def _get_runstate_adjust(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    raise kvm_error(errno.EINVAL, "an adjustment of the runstate can't be read")


def _set_vcpu_id(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    if u.vcpu_id >= KVM_MAX_VCPUS:
        raise kvm_error(errno.EINVAL, f"vcpu_id={u.vcpu_id}, expected below {KVM_MAX_VCPUS}")
    vcpu.xen.vcpu_id = u.vcpu_id


def _get_vcpu_id(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    u.vcpu_id = vcpu.xen.vcpu_id


def _get_timer(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    u.timer = timer.get_attr(vcpu)


def _set_vcpu_upcall_vector(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    vcpu.xen.upcall_vector = _check_vector(u.vector)


def _get_vcpu_upcall_vector(vcpu: Vcpu, u: abi.kvm_xen_vcpu_attr_u) -> None:
    u.vector = vcpu.xen.upcall_vector


_VCPU: Final[dict[int, tuple[SetVcpu, GetVcpu]]] = {
    abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO: (lambda vcpu, u: _set_vcpu_info(vcpu, _gpa(vcpu, u)), _get_vcpu_info),
    abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO: (_set_time_info, _get_time_info),
    abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR: (_set_runstate_addr, _get_runstate_addr),
    abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT: (_set_runstate_current, _get_runstate_current),
    abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA: (_set_runstate_data, _get_runstate_data),
    abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST: (_adjust_runstate, _get_runstate_adjust),
    abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID: (_set_vcpu_id, _get_vcpu_id),
    abi.KVM_XEN_VCPU_ATTR_TYPE_TIMER: (lambda vcpu, u: timer.set_attr(vcpu, u.timer), _get_timer),
    abi.KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR: (_set_vcpu_upcall_vector, _get_vcpu_upcall_vector),
    abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA: (_set_vcpu_info_hva, _get_vcpu_info_hva),
}


def _vcpu_row(type: int) -> tuple[SetVcpu, GetVcpu]:
    row = _VCPU.get(type)
    if row is None:
        raise kvm_error(errno.ENOENT, f"type={type}, expected a KVM_XEN_VCPU_ATTR_TYPE_*")
    return row


def vcpu_set_attr(vcpu: Vcpu, attr: abi.kvm_xen_vcpu_attr) -> None:
    """KVM_XEN_VCPU_SET_ATTR: ENOENT for a type that there is not."""
    _vcpu_row(attr.type)[0](vcpu, attr.u)


def vcpu_get_attr(vcpu: Vcpu, type: int) -> abi.kvm_xen_vcpu_attr:
    """KVM_XEN_VCPU_GET_ATTR: ENOENT for a type that there is not."""
    attr = abi.kvm_xen_vcpu_attr(type=type)
    _vcpu_row(type)[1](vcpu, attr.u)
    return attr
