# SPDX-License-Identifier: Apache-2.0
"""Time-stamp counters that agree: which offset a write of the TSC gives a vCPU.

Userspace starts the counters of all vCPUs by writing the same value to each, or restores what it saved from each, a
moment apart. A guest needs them equal, so writes that mean "the same counter" get the same offset
(``kvm_synchronize_tsc`` in KVM).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm.x86.requests import KVM_REQ_CLOCK_UPDATE
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1


class TscSynchronizer:
    """The last write of a TSC in one VM."""

    __slots__ = ("_initial_offset", "_lock", "_offset", "_value", "_written_ns")

    def __init__(self) -> None:
        self._lock = threading.Lock()  # each vCPU's counter may be written on a thread of its own
        self._initial_offset = -_softcpu.rdtsc()
        self._offset: int | None = None
        self._value = 0
        self._written_ns = 0

    @property
    def offset(self) -> int:
        """The offset of a new vCPU: that of the last write, or one that starts the counter with the VM."""
        return self._initial_offset if self._offset is None else self._offset

    def write(self, tsc: int, khz: int) -> int:
        """Return the offset for a write of *tsc* by userspace.

        Writes within a second of each other's time and of the running counter's value, and any of 0, mean "the same
        counter": they get the offset of the first.
        """
        with self._lock:
            now = _softcpu.clock_ns()
            offset = tsc - _softcpu.rdtsc()
            if self._offset is not None:
                expected = self._value + (now - self._written_ns) * khz // 1_000_000
                if tsc == 0 or abs(tsc - expected) < khz * 1000:
                    offset = self._offset
            self._value = tsc
            self._written_ns = now
            self._offset = offset
            return offset

    def write_offset(self, offset: int) -> int:
        """Note that userspace has given a vCPU this offset (KVM_VCPU_TSC_OFFSET), and return it.

        As if the counter's value of this moment had been written: writes of nearly the same value mean this one.
        """
        with self._lock:
            self._written_ns = _softcpu.clock_ns()
            self._value = _softcpu.rdtsc() + offset & _U64
            self._offset = offset
            return offset


def offset_signed(vcpu: Vcpu) -> int:
    """Return a vCPU's TSC offset as a signed number."""
    return vcpu.tsc_offset - (1 << 64) if vcpu.tsc_offset >> 63 else vcpu.tsc_offset


def read_guest_tsc(vcpu: Vcpu) -> int:
    """Return the guest's time-stamp counter."""
    return (_softcpu.rdtsc() + vcpu.tsc_offset) & _U64


def set_offset(vcpu: Vcpu, offset: int) -> None:
    """Change what is added to the physical TSC."""
    vcpu.tsc_offset = offset & _U64
    vcpu.q[V.TSC_OFFSET] = vcpu.tsc_offset
    if vcpu.apic is not None:
        vcpu.apic.timer.tsc_changed()
    vcpu.vm.hyperv.clock_changed()
    if vcpu.vm.hyperv.tsc_page_outdated:
        vcpu.make_request(KVM_REQ_CLOCK_UPDATE)
    if vcpu.msr_values.get(abi.MSR_KVM_SYSTEM_TIME_NEW, 0) & abi.KVM_MSR_ENABLED:
        vcpu.make_request(KVM_REQ_CLOCK_UPDATE)


def synchronize(vcpu: Vcpu, tsc: int) -> None:
    """Host write of the TSC: writes of nearly the same value keep the vCPUs' counters equal."""
    set_offset(vcpu, vcpu.vm.tsc.write(tsc, vcpu.tsc_khz))
