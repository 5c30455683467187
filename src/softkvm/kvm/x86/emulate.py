# SPDX-License-Identifier: Apache-2.0
"""The instruction emulator: carries out one guest instruction whose memory operand is not memory.

:func:`emulate_instruction` is called on an MMIO fault. The instruction comes from the VMCB's decode assists or is
fetched through the guest's page tables, decoded by the silicon's decoder (once per distinct encoding), and carried out
on a :class:`Context <softkvm.kvm.x86.emulate_context.Context>`.

An access that no in-kernel device answers leaves for userspace with KVM_EXIT_MMIO, at most 8 bytes at a time, as
described in the KVM API, section 5 ("KVM_EXIT_MMIO").
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from softkvm._softcpu import decode
from softkvm.abi import GP_VECTOR, KVM_EXIT_MMIO, UD_VECTOR
from softkvm.kvm.x86 import svm
from softkvm.kvm.x86 import vmcb as V
from softkvm.kvm.x86.emulate_context import Context, NeedsUserspace, Plan, Unhandleable
from softkvm.kvm.x86.emulate_ops import HANDLERS
from softkvm.kvm.x86.emulate_sse import sse_movsd
from softkvm.kvm.x86.emulate_string import BATCH
from softkvm.kvm.x86.exceptions import X86Exception, inject_emulated_exception

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

#: Decoded instructions that are remembered; their bytes come from the guest, so the memo is bounded.
PLANS: Final = 4096
MAX_INSTRUCTION: Final = 15
_plans: dict[tuple[int, bytes], Plan] = {}
#: struct kvm_run: exit_reason; mmio.phys_addr, data[8], len, is_write.
_EXIT_REASON: Final = struct.Struct("<I")
_MMIO: Final = struct.Struct("<Q8sIB")
_EXIT_REASON_AT: Final = 8
_MMIO_AT: Final = 32
_MMIO_DATA_AT: Final = 40
_RFLAGS_TF: Final = 1 << 8


def _plan(code: bytes, bitness: int) -> Plan:
    """Return the plan of the instruction at the start of ``code``. Raises ValueError or Unhandleable."""
    key = (bitness, code)
    plan = _plans.get(key)
    if plan is None:
        insn = decode(code, bitness, 0)
        mnemonic = insn.mnemonic
        handler = HANDLERS.get(mnemonic)
        if mnemonic in ("movsd", "cmpsd") and not insn.is_string:
            handler = sse_movsd if mnemonic == "movsd" else None
        if handler is None:
            raise Unhandleable(str(insn))
        plan = Plan(insn, bitness, handler)
        if len(_plans) >= PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def fetch(vcpu: Vcpu) -> bytes:
    """Return the bytes at RIP: up to 15, fewer where a following page can't be fetched. Raises X86Exception."""
    c = Context.__new__(Context)
    c.vcpu, c.bitness, c.gpa = vcpu, svm.code_bitness(vcpu), None
    c.user = 4 if vcpu.cpl() == 3 else 0
    linear = svm.linear_rip(vcpu)
    first = min(MAX_INSTRUCTION, 4096 - (linear & 4095))
    data = c.load_code(linear, first)
    if first < MAX_INSTRUCTION:
        try:
            data += c.load_code(linear + first, MAX_INSTRUCTION - first)
        except X86Exception:
            # Only a fault if the instruction really reaches into that page: the decoder finds out.
            return data
    return data


def instruction_length(vcpu: Vcpu) -> int:
    """Return the decoded length of the instruction at RIP, 0 if it can't be had."""
    try:
        return decode(fetch(vcpu), svm.code_bitness(vcpu), 0).length
    except (ValueError, X86Exception):
        return 0


def emulate_instruction(vcpu: Vcpu, gpa: int | None = None) -> int:
    """Emulate the instruction at RIP; ``gpa`` is what the processor reported for its access.

    Returns 1 to go on with the guest, 0 to leave for userspace (``kvm_run`` is filled in).
    """
    bitness = svm.code_bitness(vcpu)
    try:
        count = vcpu.b[V.INSN_LEN]
        code = bytes(vcpu.b[V.INSN_BYTES : V.INSN_BYTES + count]) if count and gpa is not None else fetch(vcpu)
        plan = _plan(code, bitness)
    except X86Exception as exception:
        inject_emulated_exception(vcpu, exception)
        return 1
    except Unhandleable:
        return vcpu.internal_error_emulation()
    except ValueError:
        # What the processor itself could not decode raises #UD (or #GP if too long) there; here memory changed.
        inject_emulated_exception(vcpu, X86Exception(UD_VECTOR if len(code) < MAX_INSTRUCTION else GP_VECTOR, None))
        return 1
    return _run(Context(vcpu, plan, gpa))


def _run(c: Context) -> int:
    vcpu = c.vcpu
    for _ in range(BATCH):
        try:
            c.plan.handler(c)
        except NeedsUserspace as need:
            return _exit_for_read(c, need)
        except X86Exception as exception:
            inject_emulated_exception(vcpu, exception)
            return 1
        except NotImplementedError:
            return vcpu.internal_error_emulation()
        c.commit()
        if c.writes:
            return _exit_for_write(c)
        if not c.restart or c.flags & _RFLAGS_TF or vcpu.requests:
            break
        c.gpa = None
        c.replies.clear()
        c.begin()
    return _finish(c)


def _finish(c: Context) -> int:
    if c.flags & _RFLAGS_TF and not c.restart:
        return svm.do_singlestep(c.vcpu)
    return 1


def _exit_mmio(vcpu: Vcpu, gpa: int, data: bytes, size: int, is_write: bool) -> int:
    _EXIT_REASON.pack_into(vcpu.shared, _EXIT_REASON_AT, KVM_EXIT_MMIO)
    _MMIO.pack_into(vcpu.shared, _MMIO_AT, gpa, data, size, is_write)
    return 0


def _exit_for_read(c: Context, need: NeedsUserspace) -> int:
    gpa, size = need.gpa, need.size

    def complete() -> int:
        c.replies.append((gpa, bytes(c.vcpu.shared[_MMIO_DATA_AT : _MMIO_DATA_AT + size])))
        c.begin()
        return _run(c)

    c.vcpu.complete_userspace_io = complete
    return _exit_mmio(c.vcpu, gpa, b"", size, False)


def _exit_for_write(c: Context) -> int:
    """Leave with the first write; the rest follow when userspace comes back. The instruction is already done."""
    gpa, data = c.writes.pop(0)

    def complete() -> int:
        return _exit_for_write(c) if c.writes else _finish(c)

    c.vcpu.complete_userspace_io = complete
    return _exit_mmio(c.vcpu, gpa, data, len(data), True)
