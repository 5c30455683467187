# SPDX-License-Identifier: Apache-2.0
"""Emulated integer arithmetic, logic, shifts and bit operations, with their flags (APM vol. 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from softkvm import abi
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.operands import IMM, MEM, REG, Insn, Operand
from softkvm.kvm.x86.exceptions import Unhandleable, X86Exception
from softkvm.kvm.x86.svm import vmcb as V

CF: Final = abi.X86_EFLAGS_CF
PF: Final = abi.X86_EFLAGS_PF
AF: Final = abi.X86_EFLAGS_AF
ZF: Final = abi.X86_EFLAGS_ZF
SF: Final = abi.X86_EFLAGS_SF
DF: Final = abi.X86_EFLAGS_DF
OF: Final = abi.X86_EFLAGS_OF
STATUS: Final = CF | PF | AF | ZF | SF | OF

_U64: Final = (1 << 64) - 1


def result_flags(result: int, bits: int) -> int:
    """Return PF, ZF and SF of a result of ``bits`` bits."""
    flags = 0 if (result & 0xFF).bit_count() & 1 else PF
    if not result:
        flags |= ZF
    if result >> (bits - 1) & 1:
        flags |= SF
    return flags


def add_flags(a: int, b: int, carry: int, bits: int) -> tuple[int, int]:
    """Return sum and status flags of ``a + b + carry``."""
    total = a + b + carry
    result = total & (1 << bits) - 1
    flags = result_flags(result, bits)
    if total >> bits:
        flags |= CF
    if (a ^ b ^ total) & 0x10:
        flags |= AF
    if (a ^ result) & (b ^ result) & 1 << (bits - 1):
        flags |= OF
    return result, flags


def sub_flags(a: int, b: int, borrow: int, bits: int) -> tuple[int, int]:
    """Return difference and status flags of ``a - b - borrow``."""
    total = a - b - borrow
    result = total & (1 << bits) - 1
    flags = result_flags(result, bits)
    if total < 0:
        flags |= CF
    if (a ^ b ^ total) & 0x10:
        flags |= AF
    if (a ^ b) & (a ^ result) & 1 << (bits - 1):
        flags |= OF
    return result, flags


def signed(value: int, bits: int) -> int:
    """Return ``value`` read as a signed number of ``bits`` bits."""
    return value - (1 << bits) if value >> (bits - 1) else value


def _source(e: Emulator, op: Operand, size: int) -> int:
    """Return a source operand, an immediate cut to the destination's size."""
    value = e.read(op)
    return value & (1 << size * 8) - 1 if op.kind == IMM else value


Binary = Callable[[int, int, int, int], tuple[int, int]]


def _binary(function: Binary, *, store: bool = True) -> Callable[[Emulator, Insn], None]:
    def run(e: Emulator, i: Insn) -> None:
        dst, src = i.ops[0], i.ops[1]
        bits = dst.size * 8
        a = e.read(dst)
        b = _source(e, src, dst.size)
        result, flags = function(a, b, e.q[V.RFLAGS] & CF, bits)
        if store:
            e.write(dst, result, a)
        e.set_flags(STATUS, flags)

    return run


def _logic(function: Callable[[int, int], int]) -> Binary:
    def run(a: int, b: int, carry: int, bits: int) -> tuple[int, int]:
        result = function(a, b)
        return result, result_flags(result, bits)

    return run


_BINARY: Final[dict[str, Binary]] = {
    "add": lambda a, b, c, bits: add_flags(a, b, 0, bits),
    "adc": add_flags,
    "sub": lambda a, b, c, bits: sub_flags(a, b, 0, bits),
    "sbb": sub_flags,
    "and": _logic(lambda a, b: a & b),
    "or": _logic(lambda a, b: a | b),
    "xor": _logic(lambda a, b: a ^ b),
}
for _name, _function in _BINARY.items():
    handler(_name)(_binary(_function))
handler("cmp")(_binary(_BINARY["sub"], store=False))
handler("test")(_binary(_BINARY["and"], store=False))


@handler("inc", "dec")
def inc_dec(e: Emulator, i: Insn) -> None:
    """INC and DEC leave CF alone."""
    op = i.ops[0]
    old = e.read(op)
    function = add_flags if i.mnemonic == "inc" else sub_flags
    result, flags = function(old, 1, 0, op.size * 8)
    e.write(op, result, old)
    e.set_flags(STATUS & ~CF, flags & ~CF)


@handler("neg")
def neg(e: Emulator, i: Insn) -> None:
    """Two's complement negation."""
    op = i.ops[0]
    old = e.read(op)
    result, flags = sub_flags(0, old, 0, op.size * 8)
    e.write(op, result, old)
    e.set_flags(STATUS, flags)


@handler("not")
def not_(e: Emulator, i: Insn) -> None:
    """One's complement; no flags."""
    op = i.ops[0]
    old = e.read(op)
    e.write(op, ~old & (1 << op.size * 8) - 1, old)


@handler("xchg")
def xchg(e: Emulator, i: Insn) -> None:
    """XCHG: locked by itself when an operand is memory."""
    a, b = i.ops
    if b.kind == MEM:
        a, b = b, a
    old, new = e.read(a), e.read(b)
    if a.kind == MEM:
        address = e.memory_address(i, a.size, write=True)
        e.cmpxchg_linear(address, old.to_bytes(a.size, "little"), new.to_bytes(a.size, "little"))
    else:
        e.write(a, new)
    e.write(b, old)


@handler("xadd")
def xadd(e: Emulator, i: Insn) -> None:
    """Exchange and add."""
    dst, src = i.ops
    old, add = e.read(dst), e.read(src)
    result, flags = add_flags(old, add, 0, dst.size * 8)
    e.write(dst, result, old)
    if dst.kind == MEM or dst.index != src.index or dst.shift != src.shift:
        e.write(src, old)
    e.set_flags(STATUS, flags)


@handler("cmpxchg")
def cmpxchg(e: Emulator, i: Insn) -> None:
    """Compare and exchange; memory is written either way."""
    dst, src = i.ops
    old = e.read(dst)
    accumulator = e.gpr[0] & (1 << dst.size * 8) - 1
    _, flags = sub_flags(accumulator, old, 0, dst.size * 8)
    if accumulator == old:
        e.write(dst, e.read(src), old)
    else:
        if dst.kind == MEM:
            e.write(dst, old, old)
        e.write(Operand(REG, dst.size, 0), old)
    e.set_flags(STATUS, flags)


@handler("cmpxchg8b", "cmpxchg16b")
def cmpxchg_wide(e: Emulator, i: Insn) -> None:
    """Compare and exchange of two registers' width."""
    dst = i.ops[0]
    half = dst.size * 4
    mask = (1 << half) - 1
    address = e.memory_address(i, dst.size, write=True)
    if dst.size == 16 and address & 15:
        raise X86Exception(abi.GP_VECTOR, 0)
    data = e.read_linear(address, dst.size, modify=True)
    old = int.from_bytes(data, "little")
    expected = (e.gpr[2] & mask) << half | e.gpr[0] & mask
    if old == expected:
        new = (e.gpr[1] & mask) << half | e.gpr[3] & mask
        e.cmpxchg_linear(address, data, new.to_bytes(dst.size, "little"))
        e.set_flags(ZF, ZF)
    else:
        e.cmpxchg_linear(address, data, data)
        e.gpr[0] = old & mask
        e.gpr[2] = old >> half
        e.set_flags(ZF, 0)


# --- shifts and rotates ------------------------------------------------------------------------


def shift(kind: str, value: int, count: int, flags: int, bits: int) -> tuple[int, int, int]:
    """Return (result, flags, mask of flags that change) of a shift or rotate; ``count`` is masked already."""
    mask = (1 << bits) - 1
    top = bits - 1
    if kind in ("rol", "ror"):
        n = count % bits
        if kind == "rol":
            result = (value << n | value >> (bits - n)) & mask if n else value
            carry = result & 1
            overflow = (result >> top ^ carry) & 1
        else:
            result = (value >> n | value << (bits - n)) & mask if n else value
            carry = result >> top & 1
            overflow = (result >> top ^ result >> (top - 1)) & 1
        return result, (CF if carry else 0) | (OF if overflow else 0), CF | OF
    if kind in ("rcl", "rcr"):
        wide = bits + 1
        n = count % wide
        full = value | (flags & CF) << bits
        if not n:
            return value, 0, 0
        if kind == "rcl":
            full = (full << n | full >> (wide - n)) & (1 << wide) - 1
            result, carry = full & mask, full >> bits
            overflow = (result >> top ^ carry) & 1
        else:
            full = (full >> n | full << (wide - n)) & (1 << wide) - 1
            result, carry = full & mask, full >> bits
            overflow = (result >> top ^ result >> (top - 1)) & 1
        return result, (CF if carry else 0) | (OF if overflow else 0), CF | OF
    if kind in ("shl", "sal"):
        full = value << count
        result = full & mask
        carry = full >> bits & 1
        overflow = (result >> top ^ carry) & 1
    elif kind == "shr":
        result = value >> count
        carry = value >> (count - 1) & 1
        overflow = value >> top & 1
    else:
        number = signed(value, bits)
        result = number >> count & mask
        carry = number >> (count - 1) & 1
        overflow = 0
    new = result_flags(result, bits) | (CF if carry else 0) | (OF if overflow else 0)
    return result, new, STATUS & ~AF


@handler("rol", "ror", "rcl", "rcr", "shl", "sal", "shr", "sar")
def shift_rotate(e: Emulator, i: Insn) -> None:
    """Shifts and rotates by an immediate, by one, or by CL."""
    dst = i.ops[0]
    bits = dst.size * 8
    count = (e.read(i.ops[1]) if len(i.ops) > 1 else 1) & (63 if bits == 64 else 31)
    old = e.read(dst)
    if not count:
        e.write(dst, old, old)
        return
    result, flags, mask = shift(i.mnemonic, old, count, e.q[V.RFLAGS], bits)
    e.write(dst, result, old)
    e.set_flags(mask, flags)


@handler("shld", "shrd")
def double_shift(e: Emulator, i: Insn) -> None:
    """Shifts that take bits from a register."""
    dst, src, amount = i.ops
    bits = dst.size * 8
    count = e.read(amount) & (63 if bits == 64 else 31)
    old, fill = e.read(dst), e.read(src)
    if not count or count > bits:
        e.write(dst, old, old)
        return
    mask = (1 << bits) - 1
    if i.mnemonic == "shld":
        result = (old << count | fill >> (bits - count)) & mask
        carry = old >> (bits - count) & 1
    else:
        result = (old >> count | fill << (bits - count)) & mask
        carry = old >> (count - 1) & 1
    overflow = (old ^ result) >> (bits - 1) & 1
    e.write(dst, result, old)
    e.set_flags(STATUS & ~AF, result_flags(result, bits) | (CF if carry else 0) | (OF if overflow else 0))


# --- bits --------------------------------------------------------------------------------------


@handler("bt", "bts", "btr", "btc")
def bit_test(e: Emulator, i: Insn) -> None:
    """Bit tests; a register index reaches beyond the operand when that is memory."""
    dst, src = i.ops
    bits = dst.size * 8
    number = e.read(src)
    if dst.kind == MEM:
        offset = e.effective_address(i)
        if src.kind != IMM:
            offset = offset + (signed(number, bits) >> (bits.bit_length() - 1)) * dst.size & i.address_mask
        address = e.linearize(i.segment, offset, dst.size, write=i.mnemonic != "bt")
        data = e.read_linear(address, dst.size, modify=i.mnemonic != "bt")
        old = int.from_bytes(data, "little")
    else:
        address, data = 0, b""
        old = e.read(dst)
    bit = 1 << (number & bits - 1)
    if i.mnemonic != "bt":
        new = {"bts": old | bit, "btr": old & ~bit, "btc": old ^ bit}[i.mnemonic]
        if dst.kind == MEM:
            if i.lock:
                e.cmpxchg_linear(address, data, new.to_bytes(dst.size, "little"))
            else:
                e.write_linear(address, new.to_bytes(dst.size, "little"))
        else:
            e.write(dst, new)
    e.set_flags(CF, CF if old & bit else 0)


@handler("bsf", "bsr")
def bit_scan(e: Emulator, i: Insn) -> None:
    """Bit scans; a zero source leaves the destination alone."""
    value = e.read(i.ops[1])
    if not value:
        e.set_flags(ZF, ZF)
        return
    e.write(i.ops[0], value.bit_length() - 1 if i.mnemonic == "bsr" else (value & -value).bit_length() - 1)
    e.set_flags(ZF, 0)


@handler("popcnt", "lzcnt", "tzcnt")
def bit_count(e: Emulator, i: Insn) -> None:
    """Counts of set bits, leading and trailing zeros."""
    bits = i.ops[0].size * 8
    value = e.read(i.ops[1])
    if i.mnemonic == "popcnt":
        result = value.bit_count()
        flags = ZF if not value else 0
        e.write(i.ops[0], result)
        e.set_flags(STATUS, flags)
        return
    if i.mnemonic == "lzcnt":
        result = bits - value.bit_length()
    else:
        result = (value & -value).bit_length() - 1 if value else bits
    e.write(i.ops[0], result)
    e.set_flags(CF | ZF, (CF if not value else 0) | (ZF if not result else 0))


# --- multiplication and division ---------------------------------------------------------------


def _wide(e: Emulator, size: int) -> tuple[int, int]:
    """Return (low, high) of the accumulator pair of an operand of ``size`` bytes."""
    mask = (1 << size * 8) - 1
    if size == 1:
        return e.gpr[0] & 0xFF, e.gpr[0] >> 8 & 0xFF
    return e.gpr[0] & mask, e.gpr[2] & mask


def _store_wide(e: Emulator, size: int, low: int, high: int) -> None:
    if size == 1:
        e.write(Operand(REG, 2, 0), high << 8 | low)
    else:
        e.write(Operand(REG, size, 0), low)
        e.write(Operand(REG, size, 2), high)


@handler("mul", "imul")
def multiply(e: Emulator, i: Insn) -> None:
    """MUL, and IMUL with one, two or three operands."""
    bits = i.ops[0].size * 8
    mask = (1 << bits) - 1
    if len(i.ops) == 1:
        size = i.ops[0].size
        factor = e.read(i.ops[0])
        low, _ = _wide(e, size)
        if i.mnemonic == "mul":
            product = low * factor
            overflow = product >> bits != 0
        else:
            product = signed(low, bits) * signed(factor, bits)
            overflow = product != signed(product & mask, bits)
        _store_wide(e, size, product & mask, product >> bits & mask)
    else:
        a = e.read(i.ops[-1]) if len(i.ops) == 2 else e.read(i.ops[1])
        b = e.read(i.ops[0]) if len(i.ops) == 2 else e.read(i.ops[2]) & mask
        product = signed(a, bits) * signed(b, bits)
        overflow = product != signed(product & mask, bits)
        e.write(i.ops[0], product & mask)
    e.set_flags(CF | OF, CF | OF if overflow else 0)


@handler("div", "idiv")
def divide(e: Emulator, i: Insn) -> None:
    """DIV and IDIV; #DE for a zero divisor or a quotient that doesn't fit."""
    size = i.ops[0].size
    bits = size * 8
    mask = (1 << bits) - 1
    divisor = e.read(i.ops[0])
    low, high = _wide(e, size)
    dividend = high << bits | low
    if not divisor:
        raise X86Exception(abi.DE_VECTOR)
    if i.mnemonic == "div":
        quotient, remainder = divmod(dividend, divisor)
        if quotient > mask:
            raise X86Exception(abi.DE_VECTOR)
    else:
        a, b = signed(dividend, bits * 2), signed(divisor, bits)
        quotient = abs(a) // abs(b)
        if (a < 0) != (b < 0):
            quotient = -quotient
        remainder = a - quotient * b
        if not -(1 << (bits - 1)) <= quotient < 1 << (bits - 1):
            raise X86Exception(abi.DE_VECTOR)
    _store_wide(e, size, quotient & mask, remainder & mask)


# --- flags -------------------------------------------------------------------------------------


@handler("clc", "stc", "cmc", "cld", "std")
def flag_operations(e: Emulator, i: Insn) -> None:
    """Operations on CF and DF."""
    flags = e.q[V.RFLAGS]
    e.q[V.RFLAGS] = {
        "clc": flags & ~CF,
        "stc": flags | CF,
        "cmc": flags ^ CF,
        "cld": flags & ~DF,
        "std": flags | DF,
    }[i.mnemonic]


_CONDITIONS: Final[dict[str, Callable[[int], bool]]] = {
    "o": lambda f: bool(f & OF),
    "b": lambda f: bool(f & CF),
    "e": lambda f: bool(f & ZF),
    "be": lambda f: bool(f & (CF | ZF)),
    "s": lambda f: bool(f & SF),
    "p": lambda f: bool(f & PF),
    "l": lambda f: bool(f & SF) != bool(f & OF),
    "le": lambda f: bool(f & ZF) or bool(f & SF) != bool(f & OF),
}
_OPPOSITES: Final = {"no": "o", "ae": "b", "ne": "e", "a": "be", "ns": "s", "np": "p", "ge": "l", "g": "le"}


def condition(name: str, flags: int) -> bool:
    """Evaluate a condition code by its mnemonic suffix."""
    opposite = _OPPOSITES.get(name)
    if opposite is not None:
        return not _CONDITIONS[opposite](flags)
    return _CONDITIONS[name](flags)


@handler(*(f"set{name}" for name in (*_CONDITIONS, *_OPPOSITES)))
def setcc(e: Emulator, i: Insn) -> None:
    """Store a condition as 0 or 1."""
    e.write(i.ops[0], int(condition(i.mnemonic[3:], e.q[V.RFLAGS])))


@handler(*(f"cmov{name}" for name in (*_CONDITIONS, *_OPPOSITES)))
def cmovcc(e: Emulator, i: Insn) -> None:
    """Conditional move: the source is read, and a 32-bit destination cleared above, either way."""
    value = e.read(i.ops[1])
    if not condition(i.mnemonic[4:], e.q[V.RFLAGS]):
        value = e.read(i.ops[0])
    e.write(i.ops[0], value)


@handler(*(f"j{name}" for name in (*_CONDITIONS, *_OPPOSITES)))
def jcc(e: Emulator, i: Insn) -> None:
    """Conditional jump."""
    if condition(i.mnemonic[1:], e.q[V.RFLAGS]):
        e.jump(i.ops[0].value + e.q[V.RIP], i.ops[0].size)


@handler("adcx", "adox")
def adx(e: Emulator, i: Insn) -> None:
    """Add with one flag as carry, leaving the others alone."""
    if i.ops[0].kind != REG:
        raise Unhandleable
    flag = CF if i.mnemonic == "adcx" else OF
    bits = i.ops[0].size * 8
    total = e.read(i.ops[0]) + e.read(i.ops[1]) + bool(e.q[V.RFLAGS] & flag)
    e.write(i.ops[0], total & (1 << bits) - 1)
    e.set_flags(flag, flag if total >> bits else 0)
