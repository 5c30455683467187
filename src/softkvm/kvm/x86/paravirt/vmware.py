# SPDX-License-Identifier: Apache-2.0
"""The VMware backdoor: two ports and three pseudo-counters that user mode may use (``enable_vmware_backdoor``)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu
from softkvm.kvm.x86.exceptions import X86Exception, inject_gp
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.svm import svm

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

PMC_HOST_TSC: Final = 0x10000
PMC_REAL_TIME: Final = 0x10001
PMC_APPARENT_TIME: Final = 0x10002

#: Instructions that are carried out again without the processor's permission check.
_BACKDOOR: Final = frozenset({"in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd", "rdpmc"})


def read_pmc(vcpu: Vcpu, index: int) -> int | None:
    """Return a pseudo-counter (host TSC, nanoseconds since boot, the guest's nanoseconds); None for others."""
    if not vcpu.vm.params.enable_vmware_backdoor:
        return None
    if index == PMC_HOST_TSC:
        return _softcpu.rdtsc()
    if index == PMC_REAL_TIME:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    if index == PMC_APPARENT_TIME:
        return kvmclock.get_kvmclock_ns(vcpu.vm)
    return None


def gp_interception(vcpu: Vcpu) -> int:
    """#GP without an error code: emulate the backdoor's instructions, give the rest to the guest."""
    try:
        code = vcpu.emulator.fetch()
        insn = vcpu.emulator.cache.get(code, svm.code_bitness(vcpu))
    except (X86Exception, ValueError):
        insn = None
    if insn is None or insn.mnemonic not in _BACKDOOR:
        inject_gp(vcpu)
        return 1
    return vcpu.emulator.emulate()
