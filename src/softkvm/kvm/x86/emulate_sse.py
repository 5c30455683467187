# SPDX-License-Identifier: Apache-2.0
"""Vector register moves of the emulator: what drivers use on MMIO (APM vol. 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm.abi import GP_VECTOR, NM_VECTOR, UD_VECTOR
from softkvm.kvm.x86.exceptions import X86Exception

if TYPE_CHECKING:
    from softkvm.kvm.x86.emulate_context import Context

_CR0_EM: Final = 1 << 2
_CR0_TS: Final = 1 << 3
_CR4_OSFXSR: Final = 1 << 9
#: Offsets in the register block: MMX registers are the significands of R0..R7, XMM the low half of YMM.
_ST: Final = 0x180
_YMM: Final = 0x200
#: Memory operands of these must lie on 16 bytes.
_ALIGNED: Final = frozenset({"movaps", "movapd", "movdqa", "movntps", "movntpd", "movntdq", "movntdqa"})


def _check(c: Context) -> None:
    vcpu = c.vcpu
    mmx = any(o.register is not None and o.register.startswith("mm") for o in c.plan.operands)
    if vcpu.cr0 & _CR0_EM or (not mmx and not vcpu.cr4 & _CR4_OSFXSR):
        raise X86Exception(UD_VECTOR)
    if vcpu.cr0 & _CR0_TS:
        raise X86Exception(NM_VECTOR)


def _slot(register: str) -> tuple[int, int] | None:
    """Return (offset in the register block, bytes) of a vector register."""
    if register.startswith("xmm"):
        return _YMM + 32 * int(register[3:]), 16
    if register.startswith("mm"):
        return _ST + 16 * int(register[2:]), 8
    return None


def sse_movsd(c: Context) -> None:
    """MOVSD of vector registers (the string instruction shares the mnemonic)."""
    _move(c)


def _move(c: Context) -> None:
    _check(c)
    plan = c.plan
    target, source = plan.operands[0], plan.operands[1]
    size = target.size if target.kind == "memory" else source.size
    if target.kind == "memory" or source.kind == "memory":
        linear = c.linear(size, write=target.kind == "memory")
        if plan.mnemonic in _ALIGNED and size == 16 and linear & 15:
            raise X86Exception(GP_VECTOR, 0)
    registers = c.vcpu.register_bytes
    if source.register is not None:
        slot = _slot(source.register)
        data = bytes(registers[slot[0] : slot[0] + size]) if slot else c.read(1).to_bytes(source.size, "little")
    else:
        data = c.load(linear, size)
    if target.register is None:
        c.store(linear, data)
        return
    slot = _slot(target.register)
    if slot is None:
        c.write(0, int.from_bytes(data[: target.size], "little"))
        return
    offset, width = slot
    # Loads shorter than the register clear the rest; register to register MOVSS and MOVSD do not.
    keep = plan.mnemonic in ("movss", "movsd") and source.register is not None
    registers[offset : offset + len(data)] = data
    if len(data) < width and not keep:
        registers[offset + len(data) : offset + width] = bytes(width - len(data))


SSE: Final[dict[str, Callable[[Context], None]]] = dict.fromkeys(
    (
        "movaps", "movapd", "movdqa", "movups", "movupd", "movdqu", "movntps", "movntpd", "movntdq", "movntdqa",
        "lddqu", "movd", "movq", "movntq", "movss",
    ),
    _move,
)  # fmt: skip
