# SPDX-License-Identifier: Apache-2.0
"""Time-stamp counters: how they come from the processor's, and which offset a write gives so that they agree.

A guest's counter is the processor's times the TSC ratio, plus an offset (APM vol. 2, 15.30.5).

Userspace starts the counters of all vCPUs by writing the same value to each, or restores what it saved from each, a
moment apart. A guest needs them equal, so writes that mean "the same counter" get the same offset
(``kvm_synchronize_tsc`` in KVM).
"""

from __future__ import annotations

import errno
import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.requests import KVM_REQ_CLOCK_UPDATE
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1
#: A time that does not come.
_NEVER_NS: Final = (1 << 63) - 1

#: Bits of a TSC ratio behind the point; no ratio; the largest, 8 bits before the point.
RATIO_BITS: Final = 32
RATIO_ONE: Final = 1 << RATIO_BITS
RATIO_MAX: Final = (1 << 40) - 1
#: A frequency that is not farther from the processor's is the processor's, in millionths (``tsc_tolerance_ppm``).
TOLERANCE_PPM: Final = 250


class TscSynchronizer:
    """The last write of a TSC in one VM, and whether its counters agree."""

    __slots__ = ("_counters", "_khz", "_lock", "_offset", "_start", "_value", "_written_ns")

    def __init__(self) -> None:
        self._lock = threading.Lock()  # each vCPU's counter may be written on a thread of its own
        self._start = _softcpu.rdtsc()
        self._offset: int | None = None
        self._khz = 0
        self._value = 0
        self._written_ns = 0
        #: How many vCPUs have each offset and ratio.
        self._counters: Counter[tuple[int, int]] = Counter()

    @property
    def agree(self) -> bool:
        """Whether all vCPUs' counters are the same at any moment."""
        return len(self._counters) <= 1

    def counter_changed(self, old: tuple[int, int] | None, new: tuple[int, int]) -> bool:
        """Note a vCPU's offset and ratio; returns whether the counters agree and did not before, or the reverse."""
        with self._lock:
            agreed = self.agree
            if old is not None:
                self._counters[old] -= 1
                if not self._counters[old]:
                    del self._counters[old]
            self._counters[new] += 1
            return agreed != self.agree

    def offset(self, vcpu: Vcpu) -> int:
        """The offset of a new vCPU: that of the last write, or one that starts the counter with the VM.

        A counter of another frequency than the last one that was written starts now.
        """
        with self._lock:
            if self._offset is None:
                return -_scaled(vcpu, self._start)
            return self._offset if vcpu.tsc_khz == self._khz else -_scaled(vcpu, _softcpu.rdtsc())

    def write(self, vcpu: Vcpu, tsc: int) -> int:
        """Return the offset for a write of *tsc* by userspace.

        Writes within a second of each other's time and of the running counter's value, and any of 0, mean "the same
        counter": they get the offset of the first, if the frequency is the same.
        """
        khz = vcpu.tsc_khz
        with self._lock:
            now = _softcpu.clock_ns()
            offset = tsc - _scaled(vcpu, _softcpu.rdtsc())
            if self._offset is not None and khz == self._khz:
                expected = self._value + (now - self._written_ns) * khz // 1_000_000
                if tsc == 0 or abs(tsc - expected) < khz * 1000:
                    offset = self._offset
            self._note(khz, offset, tsc, now)
            return offset

    def write_offset(self, vcpu: Vcpu, offset: int) -> int:
        """Note that userspace has given a vCPU this offset (KVM_VCPU_TSC_OFFSET), and return it.

        As if the counter's value of this moment had been written: writes of nearly the same value mean this one.
        """
        with self._lock:
            value = _scaled(vcpu, _softcpu.rdtsc()) + offset & _U64
            self._note(vcpu.tsc_khz, offset, value, _softcpu.clock_ns())
            return offset

    def _note(self, khz: int, offset: int, value: int, now: int) -> None:
        self._khz, self._offset, self._value, self._written_ns = khz, offset, value, now


# --- a vCPU's counter --------------------------------------------------------------------------


def _scaled(vcpu: Vcpu, host_tsc: int) -> int:
    """Return the processor's counter in the guest's ticks."""
    return host_tsc * vcpu.tsc_ratio >> RATIO_BITS & _U64


def guest_tsc_at(vcpu: Vcpu, host_tsc: int) -> int:
    """Return the guest's time-stamp counter at the moment when the processor's is ``host_tsc``."""
    return _scaled(vcpu, host_tsc) + vcpu.tsc_offset & _U64


def read_guest_tsc(vcpu: Vcpu) -> int:
    """Return the guest's time-stamp counter."""
    return guest_tsc_at(vcpu, _softcpu.rdtsc())


def frequency(vcpu: Vcpu) -> int:
    """Return how fast the guest's counter really ticks, in units of 2**-32 Hz (:data:`RATIO_BITS`)."""
    return _softcpu.tsc_khz() * 1000 * vcpu.tsc_ratio


def time_of(vcpu: Vcpu, guest_tsc: int) -> int:
    """Return the clock's value in ns when the guest's TSC reaches ``guest_tsc``: not sooner."""
    host_tsc, now = _softcpu.clocks()
    ahead = guest_tsc - guest_tsc_at(vcpu, host_tsc)
    return min(now - -(ahead * 1_000_000_000 << RATIO_BITS) // frequency(vcpu), _NEVER_NS)


def set_offset(vcpu: Vcpu, offset: int) -> None:
    """Change what is added to the physical TSC."""
    _change(vcpu, offset & _U64, vcpu.tsc_ratio)


def start(vcpu: Vcpu) -> None:
    """Give a new vCPU the VM's frequency, and the counter that its others have."""
    set_khz(vcpu, vcpu.vm.default_tsc_khz, new=True)
    _change(vcpu, vcpu.vm.tsc.offset(vcpu) & _U64, vcpu.tsc_ratio, new=True)


def _change(vcpu: Vcpu, offset: int, ratio: int, *, new: bool = False) -> None:
    """Have the silicon use an offset and a ratio, and everything that the guest's time depends on."""
    vm = vcpu.vm
    old = None if new else (vcpu.tsc_offset, vcpu.tsc_ratio)
    vcpu.tsc_offset = vcpu.q[V.TSC_OFFSET] = offset
    vcpu.tsc_ratio = vcpu.cpu.tsc_ratio = ratio
    if vcpu.apic is not None:
        vcpu.apic.timer.tsc_changed()
    vm.hyperv.clock_changed()
    if vm.tsc.counter_changed(old, (offset, ratio)):
        vm.make_all_cpus_request(KVM_REQ_CLOCK_UPDATE)
    if vm.hyperv.tsc_page_outdated or vcpu.msr_values.get(abi.MSR_KVM_SYSTEM_TIME_NEW, 0) & abi.KVM_MSR_ENABLED:
        vcpu.make_request(KVM_REQ_CLOCK_UPDATE)


def synchronize(vcpu: Vcpu, tsc: int) -> None:
    """Host write of the TSC: writes of nearly the same value keep the vCPUs' counters equal."""
    set_offset(vcpu, vcpu.vm.tsc.write(vcpu, tsc))


# --- its frequency -----------------------------------------------------------------------------


def max_khz() -> int:
    """Return the first frequency that KVM_SET_TSC_KHZ refuses (``max_guest_tsc_khz``)."""
    return min(0x7FFF_FFFF, _softcpu.tsc_khz() * RATIO_MAX >> RATIO_BITS)


def check_khz(khz: int) -> int:
    """Return what KVM_SET_TSC_KHZ means by ``khz``: EINVAL for more than a ratio can make, 0 is the processor's own."""
    if khz >= max_khz():
        raise kvm_error(errno.EINVAL, f"tsc_khz={khz}, expected less than {max_khz()}")
    return khz or _softcpu.tsc_khz()


def set_khz(vcpu: Vcpu, khz: int, *, new: bool = False) -> None:
    """Have the guest's counter tick ``khz`` thousand times a second: it jumps, unless userspace writes it then.

    EINVAL for less than a ratio can make. Within the tolerance of the processor's own it isn't scaled.
    """
    host = _softcpu.tsc_khz()
    ratio = RATIO_ONE
    if abs(khz - host) * 1_000_000 > TOLERANCE_PPM * host:
        ratio = (khz << RATIO_BITS) // host
        if not 0 < ratio < RATIO_MAX:
            raise kvm_error(errno.EINVAL, f"tsc_khz={khz}: no TSC ratio makes that of {host} kHz")
    vcpu.tsc_khz = khz
    if new:
        vcpu.tsc_ratio = ratio
    else:
        _change(vcpu, vcpu.tsc_offset, ratio)
