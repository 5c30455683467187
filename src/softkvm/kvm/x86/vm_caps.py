# SPDX-License-Identifier: Apache-2.0
"""KVM_ENABLE_CAP on a VM of x86 (KVM API, section 7): one function per capability, found by a table."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.capabilities import VCPU_IDS
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.capabilities import CAPABILITIES

if TYPE_CHECKING:
    from softkvm.kvm.x86.vm import Vm

_X2APIC_API: Final = abi.KVM_X2APIC_API_USE_32BIT_IDS | abi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
_MSR_EXIT_REASONS: Final = (
    abi.KVM_MSR_EXIT_REASON_INVAL | abi.KVM_MSR_EXIT_REASON_UNKNOWN | abi.KVM_MSR_EXIT_REASON_FILTER
)
_CAP_SYS_BOOT: Final = 22
#: The longest timer, 2**32-1 periods of the largest divisor, has to fit into 64 bits.
_MAX_BUS_CYCLE_NS: Final = ((1 << 64) - 1) // (((1 << 32) - 1) * 128)


def enable_cap(vm: Vm, cap: int, value: int) -> None:
    """Enable *cap* with its first argument; EINVAL for what cannot be enabled on a VM."""
    enable = _ENABLE.get(cap)
    if enable is None:
        raise kvm_error(errno.EINVAL, f"cap={cap}, expected one that can be enabled on a VM")
    enable(vm, value)


def _max_vcpu_id(vm: Vm, value: int) -> None:
    VCPU_IDS.check(value, called="args[0]")
    with vm.lock:
        if vm.max_vcpu_ids not in (0, value):
            raise kvm_error(errno.EINVAL, f"args[0]={value}, and it is {vm.max_vcpu_ids} already")
        vm.max_vcpu_ids = value


def _disable_quirks(vm: Vm, value: int) -> None:
    vm.quirks_disabled = value
    if vm.chips is not None:
        vm.apply_options(vm.chips)


def _disable_quirks2(vm: Vm, value: int) -> None:
    if value & ~CAPABILITIES[abi.KVM_CAP_DISABLE_QUIRKS2]:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected known quirks")
    _disable_quirks(vm, value)


def _x2apic_api(vm: Vm, value: int) -> None:
    if value & ~_X2APIC_API:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected KVM_X2APIC_API_* bits")
    vm.x2apic_api |= value
    if vm.chips is not None:
        vm.apply_options(vm.chips)


def _disable_exits(vm: Vm, value: int) -> None:
    if vm.vcpus or value & ~abi.KVM_X86_DISABLE_VALID_EXITS:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected known exits, before the first vCPU")
    vm.disable_hlt_exits |= bool(value & abi.KVM_X86_DISABLE_EXITS_HLT)
    vm.pause_in_guest |= bool(value & abi.KVM_X86_DISABLE_EXITS_PAUSE)


def _exception_payload(vm: Vm, value: int) -> None:
    vm.exception_payload_enabled = bool(value)


def _triple_fault_event(vm: Vm, value: int) -> None:
    vm.triple_fault_event = bool(value)


def _exit_on_emulation_failure(vm: Vm, value: int) -> None:
    if value & ~1:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected 0 or 1")
    vm.exit_on_emulation_error = bool(value)


def _user_space_msr(vm: Vm, value: int) -> None:
    if value & ~_MSR_EXIT_REASONS:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected KVM_MSR_EXIT_REASON_* bits")
    vm.user_space_msr_mask = value


def _msr_platform_info(vm: Vm, value: int) -> None:
    vm.guest_can_read_msr_platform_info = bool(value)


def _unused_page_hint(vm: Vm, value: int) -> None:
    if value & ~CAPABILITIES[abi.KVM_CAP_UNUSED_PAGE_HINT]:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected KVM_UNUSED_PAGE_HINT_* bits")
    with vm.mmu_lock:  # behind it no hint is under way that an assigned device forbids
        vm.unused_page_hints = value


def _bus_lock_exit(vm: Vm, value: int) -> None:
    off, detect = abi.KVM_BUS_LOCK_DETECTION_OFF, abi.KVM_BUS_LOCK_DETECTION_EXIT
    if value & ~(off | detect) or value == off | detect:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected KVM_BUS_LOCK_DETECTION_OFF or _EXIT")
    vm.bus_lock_detection |= bool(value & detect)


def _exit_hypercall(vm: Vm, value: int) -> None:
    if value & ~CAPABILITIES[abi.KVM_CAP_EXIT_HYPERCALL]:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected 1 << KVM_HC_MAP_GPA_RANGE or 0")
    vm.hypercall_exits = value


def _apic_bus_cycles(vm: Vm, value: int) -> None:
    if not 0 < value <= _MAX_BUS_CYCLE_NS:
        raise kvm_error(errno.EINVAL, f"args[0]={value}, expected a period of 1 to {_MAX_BUS_CYCLE_NS} ns")
    chips = vm.kernel_irqchip()
    if vm.vcpus:
        raise kvm_error(errno.EINVAL, "vCPUs exist: the APIC bus's period can't change")
    chips.apic_map.bus_cycle_ns = value


def _disable_nx_huge_pages(vm: Vm, value: int) -> None:
    """Nothing to turn off: this silicon has no erratum that executable huge pages would be split for."""
    if not _may_reboot():
        raise kvm_error(errno.EPERM, "the process has not got CAP_SYS_BOOT")
    with vm.lock:
        if value or vm.vcpus:
            raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected 0, before the first vCPU")


def _may_reboot() -> bool:
    """Tell whether the calling thread has CAP_SYS_BOOT (capabilities(7))."""
    with open("/proc/thread-self/status") as status:
        effective = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_BOOT & 1)


def _pmu_capability(vm: Vm, value: int) -> None:
    if not vm.params.enable_pmu or value & ~abi.KVM_PMU_CAP_DISABLE:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected KVM_PMU_CAP_DISABLE or 0, with enable_pmu")
    with vm.lock:
        if vm.vcpus:
            raise kvm_error(errno.EINVAL, "vCPUs exist: whether they have performance counters can't change")
        vm.enable_pmu = not value & abi.KVM_PMU_CAP_DISABLE


_ENABLE: Final[dict[int, Callable[[Vm, int], None]]] = {
    abi.KVM_CAP_MAX_VCPU_ID: _max_vcpu_id,
    abi.KVM_CAP_DISABLE_QUIRKS: _disable_quirks,
    abi.KVM_CAP_DISABLE_QUIRKS2: _disable_quirks2,
    abi.KVM_CAP_SPLIT_IRQCHIP: lambda vm, value: vm.create_split_irqchip(value),
    abi.KVM_CAP_X2APIC_API: _x2apic_api,
    abi.KVM_CAP_X86_DISABLE_EXITS: _disable_exits,
    abi.KVM_CAP_EXCEPTION_PAYLOAD: _exception_payload,
    abi.KVM_CAP_X86_TRIPLE_FAULT_EVENT: _triple_fault_event,
    abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE: _exit_on_emulation_failure,
    abi.KVM_CAP_X86_USER_SPACE_MSR: _user_space_msr,
    abi.KVM_CAP_MSR_PLATFORM_INFO: _msr_platform_info,
    abi.KVM_CAP_EXIT_HYPERCALL: _exit_hypercall,
    abi.KVM_CAP_X86_BUS_LOCK_EXIT: _bus_lock_exit,
    abi.KVM_CAP_UNUSED_PAGE_HINT: _unused_page_hint,
    abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS: _apic_bus_cycles,
    abi.KVM_CAP_PMU_CAPABILITY: _pmu_capability,
    abi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: _disable_nx_huge_pages,
}
