# SPDX-License-Identifier: Apache-2.0
"""What the emulator knows to do: one table from mnemonic to handler (APM vol. 3).

Handlers get the operands in the decoder's order, destination first. What isn't here ends in KVM_EXIT_INTERNAL_ERROR,
as in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from softkvm.abi import DE_VECTOR, GP_VECTOR
from softkvm.kvm.x86 import emulate_flags as F
from softkvm.kvm.x86 import vmcb as V
from softkvm.kvm.x86.emulate_context import RAX, RBX, RCX, RDX, REGISTERS, Context, RegisterName
from softkvm.kvm.x86.emulate_sse import SSE
from softkvm.kvm.x86.emulate_string import STRING
from softkvm.kvm.x86.exceptions import X86Exception

Handler = Callable[[Context], None]

# --- moves ---------------------------------------------------------------------------------------------------------


def mov(c: Context) -> None:
    """MOV, MOVNTI."""
    c.write(0, c.read(1))


def _extended(c: Context, *, sign: bool) -> int:
    source = c.plan.operands[1]
    if source.register is not None:
        value = c.get(REGISTERS[source.register])
    else:
        value = int.from_bytes(c.load(c.linear(source.size), source.size), "little")
    return F.signed(value, source.size * 8) & F.mask(c.plan.bits) if sign else value


def movzx(c: Context) -> None:
    """MOVZX."""
    c.write(0, _extended(c, sign=False))


def movsx(c: Context) -> None:
    """MOVSX, MOVSXD."""
    c.write(0, _extended(c, sign=True))


def movbe(c: Context) -> None:
    """MOVBE."""
    size = c.plan.operands[0].size
    c.write(0, int.from_bytes(c.read(1).to_bytes(size, "little"), "big"))


def lea(c: Context) -> None:
    """LEA."""
    c.write(0, c.effective())


def xchg(c: Context) -> None:
    """XCHG: always locked with memory."""
    memory = 0 if c.plan.operands[0].kind == "memory" else 1
    if c.plan.operands[memory].kind != "memory":
        a, b = c.read(0), c.read(1)
        c.write(0, b)
        c.write(1, a)
        return
    value = c.read(1 - memory)
    old = _update(c, memory, lambda _: value)
    c.write(1 - memory, old)


def cmov(c: Context, code: int) -> None:
    """CMOVcc: the source is read whatever the condition; a 32-bit destination is always written."""
    value = c.read(1)
    c.write(0, value if F.condition(code, c.flags) else c.read(0))


def setcc(c: Context, code: int) -> None:
    """SETcc."""
    c.write(0, int(F.condition(code, c.flags)))


def push(c: Context) -> None:
    """PUSH of a register, memory or immediate."""
    size = c.plan.operands[0].size
    if c.plan.operands[0].kind == "immediate":
        size = 2 if size == 2 else c.plan.bitness // 8
        c.push(c.plan.operands[0].value, size)
    else:
        c.push(c.read(0), size)


def pop(c: Context) -> None:
    """POP to a register or memory; an address with RSP uses its value after the pop."""
    c.write(0, c.pop(c.plan.operands[0].size))


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _set(c: Context, flags: int) -> None:
    c.flags = c.flags & ~F.ARITH | flags


def _update(c: Context, n: int, f: Callable[[int], int]) -> int:
    """Replace memory operand ``n`` by ``f`` of it, atomically where the instruction is locked; the old value."""
    size = c.plan.operands[n].size
    linear = c.linear(size, write=True)
    old = c.load(linear, size, 2)
    while True:
        new = (f(int.from_bytes(old, "little")) & F.mask(size * 8)).to_bytes(size, "little")
        if not (c.plan.lock or c.plan.mnemonic == "xchg"):
            c.store(linear, new)
            return int.from_bytes(old, "little")
        found = c.compare_exchange(linear, old, new)
        if found == old:
            return int.from_bytes(old, "little")
        old = found


def _modify(c: Context, f: Callable[[int], F.Result]) -> int:
    """Apply ``f`` to operand 0, set flags, write it back; the old value."""
    flags = 0

    def apply(value: int) -> int:
        nonlocal flags
        result, flags = f(value)
        return result

    if c.plan.operands[0].kind == "memory":
        old = _update(c, 0, apply)
    else:
        old = c.read(0)
        c.write(0, apply(old))
    _set(c, flags)
    return old


def binary(c: Context) -> None:
    """ADD, ADC, SUB, SBB, AND, OR, XOR."""
    operation = F.BINARY[c.plan.mnemonic]
    bits, before, b = c.plan.bits, c.flags, c.read(1)
    _modify(c, lambda a: operation(a, b, bits, before))


def compare(c: Context) -> None:
    """CMP, TEST."""
    _set(c, F.BINARY[c.plan.mnemonic](c.read(0), c.read(1), c.plan.bits, c.flags)[1])


def unary(c: Context) -> None:
    """INC, DEC, NEG, NOT."""
    operation, bits, before = F.UNARY[c.plan.mnemonic], c.plan.bits, c.flags
    _modify(c, lambda a: operation(a, bits, before))


def shift(c: Context) -> None:
    """SHL, SHR, SAR, ROL, ROR, RCL, RCR."""
    kind, bits, before = c.plan.mnemonic, c.plan.bits, c.flags
    count = c.read(1) & 0xFF if len(c.plan.operands) > 1 else 1
    _modify(c, lambda a: F.shift(kind, a, count, bits, before))


def double_shift(c: Context) -> None:
    """SHLD, SHRD."""
    left, bits, before = c.plan.mnemonic == "shld", c.plan.bits, c.flags
    b, count = c.read(1), c.read(2) & 0xFF
    _modify(c, lambda a: F.double_shift(left, a, b, count, bits, before))


def xadd(c: Context) -> None:
    """XADD."""
    bits, b = c.plan.bits, c.read(1)
    old = _modify(c, lambda a: F.add(a, b, bits))
    if c.plan.operands[0].kind == "memory":
        c.write(1, old)
    else:
        total = c.read(0)
        c.write(1, old)
        c.write(0, total)


def cmpxchg(c: Context) -> None:
    """CMPXCHG."""
    size = c.plan.operands[0].size
    accumulator = RegisterName(RAX, size)
    expected, new = c.get(accumulator), c.read(1)
    if c.plan.operands[0].kind == "memory":
        linear = c.linear(size, write=True)
        old = c.compare_exchange(linear, expected.to_bytes(size, "little"), new.to_bytes(size, "little"))
        found = int.from_bytes(old, "little")
    else:
        found = c.read(0)
        if found == expected:
            c.write(0, new)
    _set(c, F.sub(expected, found, size * 8)[1])
    if found != expected:
        c.put(accumulator, found)


def cmpxchg_wide(c: Context) -> None:
    """CMPXCHG8B, CMPXCHG16B."""
    half = 8 if c.plan.mnemonic == "cmpxchg16b" else 4
    linear = c.linear(half * 2, write=True)
    if half == 8 and linear & 15:
        raise X86Exception(GP_VECTOR, 0)

    def pair(high: int, low: int) -> bytes:
        return (c.get(RegisterName(high, half)) << half * 8 | c.get(RegisterName(low, half))).to_bytes(
            half * 2, "little"
        )

    expected = pair(RDX, RAX)
    found = c.compare_exchange(linear, expected, pair(RCX, RBX))
    if found == expected:
        c.flags |= F.ZF
    else:
        c.flags &= ~F.ZF
        c.put(RegisterName(RAX, half), int.from_bytes(found[:half], "little"))
        c.put(RegisterName(RDX, half), int.from_bytes(found[half:], "little"))


def bit_test(c: Context) -> None:
    """BT, BTS, BTR, BTC: a register offset reaches beyond the memory operand."""
    bits = c.plan.bits
    size = bits // 8
    memory = c.plan.operands[0].kind == "memory"
    offset = c.read(1)
    if memory and c.plan.operands[1].kind == "register":
        away = (F.signed(offset, bits) >> (bits.bit_length() - 1)) * size
    else:
        away = 0
    position = 1 << (offset & (bits - 1))
    changed: dict[str, Callable[[int], int]] = {
        "bts": lambda v: v | position,
        "btr": lambda v: v & ~position,
        "btc": lambda v: v ^ position,
    }
    change = changed.get(c.plan.mnemonic)
    if not memory:
        value = c.read(0)
        if change:
            c.write(0, change(value))
    else:
        ea = (c.effective() + away) & c.plan.address_mask
        linear = c.segment_linear(c.plan.segment, ea, size, write=change is not None)
        data = c.load(linear, size, 2 if change else 0)
        while change:
            new = change(int.from_bytes(data, "little")).to_bytes(size, "little")
            found = c.compare_exchange(linear, data, new)
            if found == data:
                break
            data = found
        value = int.from_bytes(data, "little")
    c.flags = c.flags & ~F.CF | (F.CF if value & position else 0)


def bit_scan(c: Context) -> None:
    """BSF, BSR, TZCNT, LZCNT, POPCNT."""
    value, bits, kind = c.read(1), c.plan.bits, c.plan.mnemonic
    if kind in ("bsf", "bsr"):
        c.flags = c.flags & ~F.ZF | (0 if value else F.ZF)
        if value:
            c.write(0, (value & -value).bit_length() - 1 if kind == "bsf" else value.bit_length() - 1)
        return
    if kind == "popcnt":
        result, carry = value.bit_count(), 0
        _set(c, 0 if value else F.ZF)
    else:
        if kind == "tzcnt":
            result = (value & -value).bit_length() - 1 if value else bits
        else:
            result = bits - value.bit_length()
        carry = 0 if value else F.CF
        _set(c, carry | (0 if result else F.ZF))
    c.write(0, result)


def multiply(c: Context) -> None:
    """MUL and one-operand IMUL."""
    bits, size = c.plan.bits, c.plan.bits // 8
    a, b = c.get(RegisterName(RAX, size)), c.read(0)
    if c.plan.mnemonic == "imul":
        product = F.signed(a, bits) * F.signed(b, bits)
        overflow = product != F.signed(product & F.mask(bits), bits)
    else:
        product = a * b
        overflow = product >> bits != 0
    _high_low(c, size, product >> bits, product)
    _set(c, F.CF | F.OF if overflow else 0)


def _high_low(c: Context, size: int, high: int, low: int) -> None:
    if size == 1:
        c.put(RegisterName(RAX, 2), (high & 0xFF) << 8 | low & 0xFF)
    else:
        c.put(RegisterName(RDX, size), high & F.mask(size * 8))
        c.put(RegisterName(RAX, size), low & F.mask(size * 8))


def imul(c: Context) -> None:
    """IMUL, any form."""
    operands = c.plan.operands
    if len(operands) == 1:
        multiply(c)
        return
    bits = c.plan.bits
    a = c.read(1 if len(operands) == 3 else 0)
    b = c.read(2 if len(operands) == 3 else 1)
    product = F.signed(a, bits) * F.signed(b, bits)
    result = product & F.mask(bits)
    c.write(0, result)
    _set(c, F.CF | F.OF if product != F.signed(result, bits) else 0)


def divide(c: Context) -> None:
    """DIV, IDIV."""
    bits, size = c.plan.bits, c.plan.bits // 8
    if size == 1:
        dividend, wide = c.get(RegisterName(RAX, 2)), 16
    else:
        dividend = c.get(RegisterName(RDX, size)) << bits | c.get(RegisterName(RAX, size))
        wide = 2 * bits
    divisor = c.read(0)
    if not divisor:
        raise X86Exception(DE_VECTOR)
    if c.plan.mnemonic == "idiv":
        n, d = F.signed(dividend, wide), F.signed(divisor, bits)
        quotient = abs(n) // abs(d) * (1 if (n < 0) == (d < 0) else -1)
        fits = -(1 << (bits - 1)) <= quotient < 1 << (bits - 1)
        remainder = n - quotient * d
    else:
        quotient, remainder = divmod(dividend, divisor)
        fits = quotient >> bits == 0
    if not fits:
        raise X86Exception(DE_VECTOR)
    _high_low(c, size, remainder, quotient)


# --- control flow and flags ----------------------------------------------------------------------------------------


def _branch_width(c: Context, target: int) -> int:
    return target & 0xFFFF if c.plan.operands[0].size == 2 and c.bitness != 64 else target


def _target(c: Context) -> int:
    operand = c.plan.operands[0]
    if operand.kind == "near_branch":
        # The decoder was told IP 0.
        return _branch_width(c, operand.value + c.vcpu.q[V.RIP])
    return _branch_width(c, c.read(0))


def jmp(c: Context) -> None:
    """Near JMP."""
    if c.plan.operands[0].kind == "far_branch" or c.plan.operands[0].size not in (2, 4, 8):
        raise NotImplementedError("far jump")
    c.branch(_target(c))


def call(c: Context) -> None:
    """Near CALL."""
    target = _target(c)
    size = 8 if c.bitness == 64 else c.plan.operands[0].size
    c.push(c.ip, size)
    c.branch(target)


def ret(c: Context) -> None:
    """Near RET."""
    size = c.bitness // 8
    target = c.pop(size)
    if c.plan.operands:
        mask = c.stack_mask()
        sp = c.regs[4]
        c.regs[4] = sp & ~mask | (sp + c.plan.operands[0].value) & mask
    c.branch(target)


def nop(c: Context) -> None:
    """NOP and hints."""


def _flag(change: Callable[[int], int]) -> Handler:
    def handler(c: Context) -> None:
        c.flags = change(c.flags)

    return handler


HANDLERS: Final[dict[str, Handler]] = {
    "mov": mov, "movnti": mov, "movzx": movzx, "movsx": movsx, "movsxd": movsx, "movbe": movbe, "lea": lea,
    "xchg": xchg, "push": push, "pop": pop,
    "add": binary, "adc": binary, "sub": binary, "sbb": binary, "and": binary, "or": binary, "xor": binary,
    "cmp": compare, "test": compare, "inc": unary, "dec": unary, "neg": unary, "not": unary,
    "shl": shift, "sal": shift, "shr": shift, "sar": shift, "rol": shift, "ror": shift, "rcl": shift, "rcr": shift,
    "shld": double_shift, "shrd": double_shift, "xadd": xadd, "cmpxchg": cmpxchg,
    "cmpxchg8b": cmpxchg_wide, "cmpxchg16b": cmpxchg_wide,
    "bt": bit_test, "bts": bit_test, "btr": bit_test, "btc": bit_test,
    "bsf": bit_scan, "bsr": bit_scan, "tzcnt": bit_scan, "lzcnt": bit_scan, "popcnt": bit_scan,
    "mul": multiply, "imul": imul, "div": divide, "idiv": divide,
    "jmp": jmp, "call": call, "ret": ret, "nop": nop, "prefetchw": nop, "prefetcht0": nop, "prefetchnta": nop,
    "clflush": nop, "clflushopt": nop, "clwb": nop,
    "clc": _flag(lambda f: f & ~F.CF), "stc": _flag(lambda f: f | F.CF), "cmc": _flag(lambda f: f ^ F.CF),
    "cld": _flag(lambda f: f & ~F.DF), "std": _flag(lambda f: f | F.DF),
    **STRING,
    **SSE,
}  # fmt: skip


def _with_code(f: Callable[[Context, int], None], code: int) -> Handler:
    return lambda c: f(c, code)


for _name, _code in F.CONDITIONS.items():
    HANDLERS["cmov" + _name] = _with_code(cmov, _code)
    HANDLERS["set" + _name] = _with_code(setcc, _code)
