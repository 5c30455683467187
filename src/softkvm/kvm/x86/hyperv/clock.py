# SPDX-License-Identifier: Apache-2.0
"""The partition's reference time: a counter of 100 ns by MSR, and the page to compute it from the TSC (TLFS, 12.7)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm.memory.guest_memory import read_guest, write_guest
from softkvm.kvm.x86 import tsc
from softkvm.kvm.x86.hyperv.partition import TscPageStatus
from softkvm.kvm.x86.paravirt import kvmclock

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm

_NS: Final = 1_000_000_000 // abi.HV_CLOCK_HZ
_PAGE_MASK: Final = ~0xFFF
_U64: Final = (1 << 64) - 1
_TSC_PAGE_SIZE: Final = ctypes.sizeof(abi.ms_hyperv_tsc_page)
_SEQUENCE_END: Final = 0xFFFF_FFFF


def reference_counter(vm: Vm) -> int:
    """Return the time since the partition began, in 100 ns: by the page's own formula once the guest has a page."""
    hv = vm.hyperv
    if hv.tsc_page_status is not TscPageStatus.SET:
        return kvmclock.get_kvmclock_ns(vm) // _NS & _U64
    return (tsc.read_guest_tsc(vm.vcpus[0]) * hv.tsc_scale >> 64) + hv.tsc_offset & _U64


def update_tsc_page(vcpu: Vcpu) -> None:
    """Write the page if the guest has moved it or the clock behind it is another; before the vCPU enters the guest."""
    hv = vcpu.vm.hyperv
    with hv.lock:
        if hv.tsc_page_outdated and hv.tsc_page & abi.HV_X64_MSR_TSC_REFERENCE_ENABLE:
            done = _write_page(vcpu.vm, vcpu, hv.tsc_page & _PAGE_MASK)
            hv.tsc_page_status = TscPageStatus.SET if done else TscPageStatus.BROKEN


def _write_page(vm: Vm, vcpu: Vcpu, gpa: int) -> bool:
    """Write the page, its sequence 0 while the rest changes; False where there is no memory or no such scale."""
    hv = vm.hyperv
    old = read_guest(vm, gpa, _TSC_PAGE_SIZE)
    if old is None:
        return False
    page = abi.ms_hyperv_tsc_page.from_buffer_copy(old)
    if page.tsc_sequence and hv.tsc_page_frozen:
        hv.tsc_scale, hv.tsc_offset = page.tsc_scale, page.tsc_offset
        return True
    scale = (abi.HV_CLOCK_HZ << 64 + tsc.RATIO_BITS) // tsc.frequency(vcpu)
    if scale > _U64 or not write_guest(vm, gpa, bytes(4)):
        return False
    host_tsc, now = _softcpu.clocks()
    guest_tsc = tsc.guest_tsc_at(vm.vcpus[0], host_tsc)
    hv.tsc_scale = scale
    hv.tsc_offset = (now + vm.kvmclock_offset) // _NS - (guest_tsc * scale >> 64)
    sequence = page.tsc_sequence + 1
    page.tsc_sequence, page.tsc_scale, page.tsc_offset = 0, hv.tsc_scale, hv.tsc_offset
    if not write_guest(vm, gpa, bytes(page)):
        return False
    return write_guest(vm, gpa, (1 if sequence >= _SEQUENCE_END else sequence).to_bytes(4, "little"))
