# SPDX-License-Identifier: Apache-2.0
"""Queueing of exceptions for a vCPU, and how two of them combine (APM vol. 2, 8.2.9; SDM vol. 3, table 6-5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm.abi import (
    AC_VECTOR,
    BP_VECTOR,
    DB_VECTOR,
    DE_VECTOR,
    DF_VECTOR,
    GP_VECTOR,
    MC_VECTOR,
    NP_VECTOR,
    OF_VECTOR,
    PF_VECTOR,
    SS_VECTOR,
    TS_VECTOR,
)
from softkvm.kvm.x86.requests import KVM_REQ_EVENT, KVM_REQ_TRIPLE_FAULT
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

EXCPT_BENIGN: Final = 0
EXCPT_CONTRIBUTORY: Final = 1
EXCPT_PF: Final = 2

_CONTRIBUTORY: Final = frozenset({DE_VECTOR, TS_VECTOR, NP_VECTOR, SS_VECTOR, GP_VECTOR})
_WITH_ERROR_CODE: Final = frozenset({DF_VECTOR, TS_VECTOR, NP_VECTOR, SS_VECTOR, GP_VECTOR, PF_VECTOR, AC_VECTOR})
_NOT_FAULTS: Final = frozenset({BP_VECTOR, OF_VECTOR, DF_VECTOR, MC_VECTOR})

DR_TRAP_BITS: Final = 0xF
DR6_BS: Final = 1 << 14
DR6_BT: Final = 1 << 15
DR6_BD: Final = 1 << 13
DR6_RTM: Final = 1 << 16
DR6_FIXED_1: Final = 0xFFFE_0FF0
DR6_ACTIVE_LOW: Final = 0xFFFF_0FF0
DR6_VOLATILE: Final = 0x0001_E80F
DR6_BUS_LOCK: Final = 1 << 11
DR7_FIXED_1: Final = 0x400
DR7_GD: Final = 1 << 13
DR7_BP_EN_MASK: Final = 0xFF
DR7_VOLATILE: Final = 0xFFFF_2BFF


class X86Exception(Exception):
    """An exception that emulated guest code raises; caught where it is queued for the guest."""

    __slots__ = ("address", "error_code", "vector")

    def __init__(self, vector: int, error_code: int | None = None, address: int = 0) -> None:
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        #: Faulting linear address of a #PF, the value for CR2.
        self.address = address


class Unhandleable(Exception):
    """The emulator doesn't know an instruction, or can't carry it out."""


def gp(error_code: int = 0) -> X86Exception:
    """Return a general protection fault."""
    return X86Exception(GP_VECTOR, error_code)


class QueuedException:
    """The exception that waits for delivery, or whose delivery was interrupted."""

    __slots__ = ("error_code", "has_error_code", "has_payload", "injected", "payload", "pending", "vector")

    def __init__(self) -> None:
        #: Not yet handed to the processor: side effects (DR6, CR2) may still be outstanding.
        self.pending = False
        #: Handed to the processor; to be given again if delivery didn't complete.
        self.injected = False
        self.vector = 0
        self.has_error_code = False
        self.error_code = 0
        self.has_payload = False
        self.payload = 0

    def clear(self) -> None:
        """Forget the exception."""
        self.pending = False
        self.injected = False
        self.has_payload = False
        self.payload = 0


#: #BP and #OF: an instruction raises them, which is executed again where their delivery did not complete.
SOFT_EXCEPTIONS: Final = (BP_VECTOR, OF_VECTOR)


def exception_class(vector: int) -> int:
    """Return the class of an exception for the double-fault rules."""
    if vector == PF_VECTOR:
        return EXCPT_PF
    return EXCPT_CONTRIBUTORY if vector in _CONTRIBUTORY else EXCPT_BENIGN


def exception_has_error_code(vector: int) -> bool:
    """Tell whether the processor pushes an error code for ``vector`` in protected mode."""
    return vector in _WITH_ERROR_CODE


def exception_is_fault(vector: int, payload: int = 0) -> bool:
    """Tell whether delivery sets RF in the pushed flags (faults; a #DB for an instruction breakpoint)."""
    if vector == DB_VECTOR:
        # General detect and code breakpoints are faults; only the former is told apart by its payload.
        return bool(payload & DR6_BD)
    return vector not in _NOT_FAULTS and vector < 32


def deliver_exception_payload(vcpu: Vcpu, exception: QueuedException) -> None:
    """Carry out the side effect of a pending exception: DR6 for #DB, CR2 for #PF."""
    if not exception.has_payload:
        return
    if exception.vector == DB_VECTOR:
        dr6 = vcpu.guest_dr6 & ~DR_TRAP_BITS
        dr6 |= DR6_ACTIVE_LOW
        dr6 |= exception.payload
        dr6 ^= exception.payload & DR6_ACTIVE_LOW
        vcpu.guest_dr6 = dr6 & ~(1 << 12)
    elif exception.vector == PF_VECTOR:
        vcpu.q[V.CR2] = exception.payload
    exception.has_payload = False
    exception.payload = 0


def multiple_exception(
    vcpu: Vcpu,
    vector: int,
    error_code: int | None,
    payload: int | None = None,
    *,
    reinject: bool = False,
) -> None:
    """Queue ``vector``, combining it with one that is queued already: #DF or shutdown by the rules."""
    vcpu.make_request(KVM_REQ_EVENT)
    queued = vcpu.exception
    if queued.pending or queued.injected:
        previous = queued.vector
        if previous == DF_VECTOR:
            vcpu.make_request(KVM_REQ_TRIPLE_FAULT)
            queued.clear()
            return
        class1, class2 = exception_class(previous), exception_class(vector)
        if (class1 == EXCPT_CONTRIBUTORY and class2 == EXCPT_CONTRIBUTORY) or (
            class1 == EXCPT_PF and class2 != EXCPT_BENIGN
        ):
            queued.clear()
            multiple_exception(vcpu, DF_VECTOR, 0)
            return
        # Otherwise the new one replaces the old: re-executing the instruction brings that one back.
    queued.pending = not reinject
    queued.injected = reinject
    queued.vector = vector
    queued.has_error_code = error_code is not None
    queued.error_code = error_code or 0
    queued.has_payload = payload is not None
    queued.payload = payload or 0
    if not reinject and not vcpu.vm.exception_payload_enabled:
        deliver_exception_payload(vcpu, queued)


def queue_exception(vcpu: Vcpu, vector: int) -> None:
    """Queue an exception without an error code."""
    multiple_exception(vcpu, vector, None)


def queue_exception_e(vcpu: Vcpu, vector: int, error_code: int) -> None:
    """Queue an exception with an error code."""
    multiple_exception(vcpu, vector, error_code)


def queue_exception_p(vcpu: Vcpu, vector: int, payload: int) -> None:
    """Queue a #DB whose DR6 bits are ``payload``."""
    multiple_exception(vcpu, vector, None, payload)


def inject_gp(vcpu: Vcpu, error_code: int = 0) -> None:
    """Queue a #GP."""
    multiple_exception(vcpu, GP_VECTOR, error_code)


def inject_page_fault(vcpu: Vcpu, error_code: int, address: int) -> None:
    """Queue a #PF that loads ``address`` into CR2."""
    multiple_exception(vcpu, PF_VECTOR, error_code, address)


def inject_emulated_exception(vcpu: Vcpu, exception: X86Exception) -> None:
    """Queue what emulated code raised."""
    if exception.vector == PF_VECTOR:
        inject_page_fault(vcpu, exception.error_code or 0, exception.address)
    else:
        multiple_exception(vcpu, exception.vector, exception.error_code)
