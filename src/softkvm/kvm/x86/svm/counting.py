# SPDX-License-Identifier: Apache-2.0
"""Exits of a guest that counts instructions: those that KVM carries out in its place count, too.

The processor counts what it retires itself, and an instruction that exits doesn't. While none of the guest's counters
counts instructions or branches, the vCPU has the plain table of handlers and the plain emulator, which know nothing of
this (``Vcpu.counts_instructions``).
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Final

from softkvm.kvm.x86.emulate.table import Emulator
from softkvm.kvm.x86.pmu.pmu import trigger_branch, trigger_instruction
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.exits import Handler
from softkvm.kvm.x86.svm.vmcb import RIP

if TYPE_CHECKING:
    from collections.abc import Callable

    from softkvm.kvm.x86.emulate.operands import Insn
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: How the mnemonics of branches begin.
_BRANCHES: Final = ("j", "loop", "call", "ret", "iret", "int", "syscall", "sysret", "sysenter", "sysexit")
#: Exits that no instruction is behind, or that change RIP without one.
_NO_INSTRUCTION: Final = frozenset({V.EXIT_INTR, V.EXIT_NMI, V.EXIT_SMI, V.EXIT_INIT, V.EXIT_SHUTDOWN})


class CountingEmulator(Emulator):
    """The emulator, counting branches; each instruction goes the whole way."""

    def _retire(self, insn: Insn) -> None:
        super()._retire(insn)
        if insn.mnemonic.startswith(_BRANCHES):
            trigger_branch(self.vcpu)


def _counted(function: Callable[[Vcpu], int]) -> Handler:
    """Return the function with an instruction counted where it has gone past one, now or behind userspace's answer."""

    @wraps(function)
    def counted(vcpu: Vcpu) -> int:
        q = vcpu.q
        rip = q[RIP]
        result = function(vcpu)
        if q[RIP] != rip:
            trigger_instruction(vcpu)
        elif not result and vcpu.complete_userspace_io is not None:
            vcpu.complete_userspace_io = _counted(vcpu.complete_userspace_io)
        return result

    return counted


def counting_exit_handlers(handlers: dict[int, Handler]) -> dict[int, Handler]:
    """Return a table of handlers as it is now, with each counting what it goes past."""
    return {code: handler if code in _NO_INSTRUCTION else _counted(handler) for code, handler in handlers.items()}
