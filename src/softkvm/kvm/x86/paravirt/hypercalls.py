# SPDX-License-Identifier: Apache-2.0
"""Hypercalls (Documentation/virt/kvm/x86/hypercalls.rst): number in RAX, arguments in RBX, RCX, RDX, RSI."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from softkvm import _softcpu, abi
from softkvm.abi import run_page
from softkvm.abi.sizes import Size
from softkvm.kvm.memory.discard import discard
from softkvm.kvm.memory.guest_memory import write_guest
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE
from softkvm.kvm.x86.paravirt.pv_ipi import pv_send_ipi
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.tsc import guest_tsc_at

if TYPE_CHECKING:
    from softkvm.kvm.vm import Vm
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1
#: As the kernel has it: the numbers of the frames must not wrap.
_RANGE: Final = Size(
    "npages of KVM_HC_MAP_GPA_RANGE",
    _U64,
    None,
    least=1,
    giver="guest",
    effect="-KVM_EINVAL",
    where=__name__,
)
_U32: Final = (1 << 32) - 1
HUGE_PAGE_SIZE: Final = 1 << 21

#: Returns the result; None if it is userspace's to find.
Hypercall = Callable[["Vcpu", int, int, int, int], int | None]
Skip = Callable[["Vcpu"], int]


def _vapic_poll_irq(vcpu: Vcpu, a0: int, a1: int, a2: int, a3: int) -> int:
    return 0


def _kick_cpu(vcpu: Vcpu, flags: int, apic_id: int, a2: int, a3: int) -> int:
    """Wake a halted vCPU (paravirtual spinlocks)."""
    target = vcpu.vm.vcpu_by_id.get(apic_id)
    if target is not None:
        target.pv_unhalted = True
        target.request_event()
        yield_to(target)
    return 0


def _clock_pairing(vcpu: Vcpu, gpa: int, kind: int, a2: int, a3: int) -> int:
    """Host wall clock and the guest's TSC at one moment; not where the guest's clock isn't the TSC of all its vCPUs."""
    if kind != abi.KVM_CLOCK_PAIRING_WALLCLOCK or not vcpu.vm.tsc.agree:
        return -abi.KVM_EOPNOTSUPP
    before = _softcpu.rdtsc()
    now = time.time_ns()
    tsc = (before + _softcpu.rdtsc()) // 2
    seconds, nanoseconds = divmod(now, 1_000_000_000)
    data = struct.pack("<qqQI36x", seconds, nanoseconds, guest_tsc_at(vcpu, tsc), 0)
    return 0 if write_guest(vcpu.vm, gpa, data) else -abi.KVM_EFAULT


def _send_ipi(vcpu: Vcpu, low: int, high: int, first: int, icr: int) -> int:
    """Send one IPI to the APIC ids in a bitmap that begins at ``first``; returns how many took it."""
    if vcpu.chips is None:
        return -abi.KVM_EINVAL
    return pv_send_ipi(vcpu.chips.apic_map, low, high, first, icr, op_64_bit=vcpu.is_64bit_code())


def _sched_yield(vcpu: Vcpu, apic_id: int, a1: int, a2: int, a3: int) -> int:
    """Let the vCPU that the caller waits for run."""
    target = vcpu.vm.vcpu_by_id.get(apic_id)
    if target is not None and target is not vcpu:
        yield_to(target)
    return 0


def _map_gpa_range(vcpu: Vcpu, gpa: int, npages: int, attributes: int, a3: int) -> int | None:
    """Userspace's to do (KVM_CAP_EXIT_HYPERCALL): a range is to be encrypted, or shared."""
    if not vcpu.vm.hypercall_exits >> abi.KVM_HC_MAP_GPA_RANGE & 1:
        return -abi.KVM_ENOSYS
    if gpa & (PAGE_SIZE - 1) or not _RANGE.allows(npages) or (gpa >> PAGE_SHIFT) + npages > _U64:
        return -abi.KVM_EINVAL
    arguments = (gpa, npages, attributes)
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_HYPERCALL
    vcpu.run_q[run_page.HYPERCALL_NR_Q] = abi.KVM_HC_MAP_GPA_RANGE
    for n, value in enumerate(arguments):
        vcpu.run_q[run_page.HYPERCALL_ARGS_Q + n] = value
    vcpu.run_q[run_page.HYPERCALL_RET_Q] = 0
    vcpu.run_d[run_page.HYPERCALL_LONGMODE_D] = abi.KVM_EXIT_HYPERCALL_LONG_MODE if vcpu.is_64bit_code() else 0
    return None


_HINT_ERRORS: Final = {errno.EFAULT: -abi.KVM_EFAULT, errno.EOPNOTSUPP: -abi.KVM_EOPNOTSUPP}


def _unused_page_hint(vcpu: Vcpu, gpa: int, size: int, a2: int, a3: int) -> int:
    """The guest does not use a huge page: the host gets its memory back.

    -KVM_ENOSYS unless userspace allows it (KVM_CAP_UNUSED_PAGE_HINT), -KVM_EINVAL for what is no aligned huge page,
    -KVM_EOPNOTSUPP where the memory has to stay, -KVM_EFAULT where there is none of the guest's.
    """
    vm = vcpu.vm
    with vm.mmu_lock:
        hints = vm.unused_page_hints
        if not hints & abi.KVM_UNUSED_PAGE_HINT_ENABLE:
            return -abi.KVM_ENOSYS
        if size != HUGE_PAGE_SIZE or gpa & (HUGE_PAGE_SIZE - 1):
            return -abi.KVM_EINVAL
        if hints != abi.KVM_UNUSED_PAGE_HINT_ENABLE:
            return -abi.KVM_EOPNOTSUPP
        try:
            discard(cast("Vm", vm), gpa, size)
        except OSError as error:
            return _HINT_ERRORS.get(error.errno or 0, -abi.KVM_EFAULT)
    return 0


def yield_to(target: Vcpu) -> None:
    """Give the host's processor away for a moment, if the other one could use it."""
    _softcpu.sched_yield()


#: Hypercall numbers: handler, and the feature bit that KVM_CAP_ENFORCE_PV_FEATURE_CPUID demands.
HYPERCALLS: Final[dict[int, tuple[Hypercall, int | None]]] = {
    abi.KVM_HC_VAPIC_POLL_IRQ: (_vapic_poll_irq, None),
    abi.KVM_HC_KICK_CPU: (_kick_cpu, abi.KVM_FEATURE_PV_UNHALT),
    abi.KVM_HC_CLOCK_PAIRING: (_clock_pairing, None),
    abi.KVM_HC_SEND_IPI: (_send_ipi, abi.KVM_FEATURE_PV_SEND_IPI),
    abi.KVM_HC_MAP_GPA_RANGE: (_map_gpa_range, None),
    abi.KVM_HC_SCHED_YIELD: (_sched_yield, abi.KVM_FEATURE_PV_SCHED_YIELD),
    abi.KVM_HC_UNUSED_PAGE_HINT: (_unused_page_hint, abi.KVM_FEATURE_UNUSED_PAGE_HINT),
}


def _complete_hypercall(vcpu: Vcpu, skip: Skip) -> int:
    """After KVM_EXIT_HYPERCALL: the result is userspace's."""
    vcpu.gpr[0] = vcpu.run_q[run_page.HYPERCALL_RET_Q] & (_U64 if vcpu.is_64bit_code() else _U32)
    return skip(vcpu)


def emulate_hypercall(vcpu: Vcpu, skip: Skip) -> bool:
    """Carry out the hypercall in the guest's registers; False to leave for userspace, behind which ``skip`` goes on."""
    gpr = vcpu.gpr
    vcpu.stat_hypercalls += 1
    number, a0, a1, a2, a3 = gpr[0], gpr[3], gpr[1], gpr[2], gpr[6]
    long_mode = vcpu.is_64bit_code()
    if not long_mode:
        number, a0, a1, a2, a3 = (value & _U32 for value in (number, a0, a1, a2, a3))
    if vcpu.b[V.CPL] != 0:
        result = -abi.KVM_EPERM
    else:
        entry = HYPERCALLS.get(number)
        if entry is None:
            result = -abi.KVM_ENOSYS
        else:
            function, feature = entry
            denied = feature is not None and vcpu.pv_cpuid_enforce and not vcpu.cpuid.kvm_features >> feature & 1
            answer = -abi.KVM_ENOSYS if denied else function(vcpu, a0, a1, a2, a3)
            if answer is None:
                vcpu.complete_userspace_io = partial(_complete_hypercall, skip=skip)
                return False
            result = answer
    gpr[0] = result & (_U64 if long_mode else _U32)
    return True
