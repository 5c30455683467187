# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the emulator: results and the six arithmetic flags (APM vol. 3, instruction reference)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

CF: Final = 1 << 0
PF: Final = 1 << 2
AF: Final = 1 << 4
ZF: Final = 1 << 6
SF: Final = 1 << 7
DF: Final = 1 << 10
OF: Final = 1 << 11
ARITH: Final = CF | PF | AF | ZF | SF | OF

#: (result, the six flags) of an operation on ``bits``-bit values with the flags before it.
Result = tuple[int, int]
_PARITY: Final = bytes(0 if i.bit_count() & 1 else PF for i in range(256))


def mask(bits: int) -> int:
    """Return ``bits`` ones."""
    return (1 << bits) - 1


def signed(value: int, bits: int) -> int:
    """Interpret ``value`` as a two's complement number."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def szp(result: int, bits: int) -> int:
    """Return SF, ZF and PF of a result."""
    flags = _PARITY[result & 0xFF]
    if not result:
        flags |= ZF
    elif result >> (bits - 1) & 1:
        flags |= SF
    return flags


def add(a: int, b: int, bits: int, carry: int = 0) -> Result:
    """ADD, ADC."""
    total = a + b + carry
    result = total & mask(bits)
    flags = szp(result, bits) | (a ^ b ^ result) & AF
    if total >> bits:
        flags |= CF
    if ~(a ^ b) & (a ^ result) & 1 << (bits - 1):
        flags |= OF
    return result, flags


def sub(a: int, b: int, bits: int, borrow: int = 0) -> Result:
    """SUB, SBB, CMP."""
    total = a - b - borrow
    result = total & mask(bits)
    flags = szp(result, bits) | (a ^ b ^ result) & AF
    if total < 0:
        flags |= CF
    if (a ^ b) & (a ^ result) & 1 << (bits - 1):
        flags |= OF
    return result, flags


def logic(result: int, bits: int) -> Result:
    """AND, OR, XOR, TEST."""
    return result, szp(result, bits)


BINARY: Final[dict[str, Callable[[int, int, int, int], Result]]] = {
    "add": lambda a, b, n, f: add(a, b, n),
    "adc": lambda a, b, n, f: add(a, b, n, f & CF),
    "sub": lambda a, b, n, f: sub(a, b, n),
    "sbb": lambda a, b, n, f: sub(a, b, n, f & CF),
    "cmp": lambda a, b, n, f: sub(a, b, n),
    "and": lambda a, b, n, f: logic(a & b, n),
    "or": lambda a, b, n, f: logic(a | b, n),
    "xor": lambda a, b, n, f: logic(a ^ b, n),
    "test": lambda a, b, n, f: logic(a & b, n),
}

UNARY: Final[dict[str, Callable[[int, int, int], Result]]] = {
    "inc": lambda a, n, f: _keep_cf(add(a, 1, n), f),
    "dec": lambda a, n, f: _keep_cf(sub(a, 1, n), f),
    "neg": lambda a, n, f: sub(0, a, n),
    "not": lambda a, n, f: (~a & mask(n), f & ARITH),
}


def _keep_cf(result: Result, flags: int) -> Result:
    return result[0], result[1] & ~CF | flags & CF


def shift(kind: str, a: int, count: int, bits: int, flags: int) -> Result:
    """SHL, SHR, SAR, ROL, ROR, RCL, RCR by ``count`` (not yet masked)."""
    count &= 63 if bits == 64 else 31
    if not count:
        return a, flags & ARITH
    top = bits - 1
    if kind in ("rol", "ror"):
        turn = count % bits
        left = turn if kind == "rol" else (bits - turn) % bits
        result = ((a << left) | (a >> (bits - left))) & mask(bits) if left else a
        carry = result & 1 if kind == "rol" else result >> top & 1
        overflow = carry ^ (result >> top & 1) if kind == "rol" else (result >> top ^ result >> (top - 1)) & 1
        return result, flags & ARITH & ~(CF | OF) | carry | (OF if overflow else 0)
    if kind in ("rcl", "rcr"):
        turn = count % (bits + 1)
        wide = a | (flags & CF) << bits
        left = turn if kind == "rcl" else (bits + 1 - turn) % (bits + 1)
        wide = ((wide << left) | (wide >> (bits + 1 - left))) & mask(bits + 1)
        result, carry = wide & mask(bits), wide >> bits
        overflow = carry ^ (result >> top) if kind == "rcl" else (result >> top ^ result >> (top - 1)) & 1
        return result, flags & ARITH & ~(CF | OF) | carry | (OF if overflow else 0)
    if kind in ("shl", "sal"):
        wide = a << count
        result = wide & mask(bits)
        carry = wide >> bits & 1
        overflow = carry ^ (result >> top)
    elif kind == "shr":
        result = a >> count
        carry = a >> (count - 1) & 1
        overflow = a >> top
    else:
        number = signed(a, bits)
        result = (number >> count) & mask(bits)
        carry = number >> (count - 1) & 1
        overflow = 0
    return result, szp(result, bits) | carry | (OF if overflow & 1 else 0)


def double_shift(left: bool, a: int, b: int, count: int, bits: int, flags: int) -> Result:
    """SHLD and SHRD of ``a`` with bits from ``b``."""
    count &= 63 if bits == 64 else 31
    if not count or count > bits:
        return a, flags & ARITH
    if left:
        result = ((a << count) | (b >> (bits - count))) & mask(bits)
        carry = a >> (bits - count) & 1
    else:
        result = ((a >> count) | (b << (bits - count))) & mask(bits)
        carry = a >> (count - 1) & 1
    overflow = (a ^ result) >> (bits - 1) & 1
    return result, szp(result, bits) | carry | (OF if overflow else 0)


def condition(code: int, flags: int) -> bool:
    """Evaluate condition code 0..15 of Jcc, SETcc and CMOVcc."""
    of, sf = bool(flags & OF), bool(flags & SF)
    value = (
        of,
        bool(flags & CF),
        bool(flags & ZF),
        bool(flags & (CF | ZF)),
        sf,
        bool(flags & PF),
        sf != of,
        bool(flags & ZF) or sf != of,
    )[code >> 1]
    return value != bool(code & 1)


CONDITIONS: Final[dict[str, int]] = {
    name: code
    for code, names in enumerate(
        ("o", "no", "b c nae", "ae nb nc", "e z", "ne nz", "be na", "a nbe", "s", "ns", "p pe", "np po",
         "l nge", "ge nl", "le ng", "g nle")
    )
    for name in names.split()
}  # fmt: skip
