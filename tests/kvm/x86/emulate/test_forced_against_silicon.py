# SPDX-License-Identifier: Apache-2.0
"""Instructions through the emulator (forced-emulation prefix) end as they do on the silicon, faults included."""

from __future__ import annotations

import struct

import pytest
from tests.support.tiny import CODE, IDT, STACK, Tiny

from softkvm import abi
from softkvm.kvm import Params

FEP = bytes.fromhex("0f0b6b766d")  # ud2; "kvm"
_HANDLERS = 0x2000
_REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rflags")
_UNMAPPED = 0x8000_0000


def _handler(vector: int) -> bytes:
    return bytes((0x6A, vector, 0x5D, 0xF4))  # push vector; pop rbp; hlt


def _machine(bits: int) -> Tiny:
    tiny = Tiny(params=Params(force_emulation_prefix=True))
    for vector in range(20):
        tiny.memory.write(_HANDLERS + 16 * vector, _handler(vector))
    if bits == 64:
        tiny.long_mode()
        for vector in range(20):
            tiny.gate64(vector, _HANDLERS + 16 * vector)
    elif bits == 32:
        tiny.protected_mode()
        for vector in range(20):
            gate = _HANDLERS + 16 * vector | 8 << 16 | 0x8E << 40
            tiny.memory.write(IDT + 8 * vector, struct.pack("<Q", gate))
    else:
        tiny.real_mode()
    return tiny


def _outcome(bits: int, code: bytes, *, forced: bool, **registers: int) -> tuple[dict[str, int], int, bytes]:
    """Return registers, RIP counted from behind the prefix, and the stack."""
    tiny = _machine(bits)
    tiny.memory.write(STACK - 64, b"\xcc" * 64 + struct.pack("<Q", CODE + 0x80) + b"\xcc" * 56)
    start = CODE - len(FEP) if forced else CODE
    tiny.load(b"", **{"rip": start, **registers})
    tiny.memory.write(start, (FEP if forced else b"") + code + b"\xf4" * 0x100)
    regs = tiny.run_to_halt()
    result = {name: getattr(regs, name) for name in _REGISTERS}, regs.rip, tiny.memory.read(STACK - 64, 128)
    tiny.close()
    return result


_STACK_INSTRUCTIONS = ("6a81", "50", "58", "9d", "c9", "c8340000", "c3", "0fa0", "0fa9")


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("prefix", ["", "66"])
@pytest.mark.parametrize("code", [*_STACK_INSTRUCTIONS, "eb10", "e810", "7410", "e210"])
def test_stack_and_branches_follow_the_operand_size(bits: int, prefix: str, code: str) -> None:
    # push -127; push rax; pop rax; popf; leave; enter 0x34, 0; ret; push fs; pop gs; jmp, call, jz, loop
    instruction = bytes.fromhex(prefix + code)
    if code == "e810":
        wide = (bits != 16) ^ bool(prefix)
        instruction += bytes(3 if wide else 1)
    registers = {"rax": 0x1122_3344, "rcx": 5, "rbp": STACK + 8}
    if code == "0fa9":
        registers["rsp"] = STACK + 16  # nothing but zeros for a selector
    native = _outcome(bits, instruction, forced=False, **registers)
    assert _outcome(bits, instruction, forced=True, **registers) == native


@pytest.mark.parametrize("override", ["", "26", "2e", "36", "3e"])
@pytest.mark.parametrize(("code", "vector"), [("8903", abi.GP_VECTOR), ("894500", abi.SS_VECTOR)])
def test_64_bit_code_has_no_override_of_old(override: str, code: str, vector: int) -> None:
    # mov [rbx], eax; mov [rbp], eax: not canonical
    registers, rip, stack = _outcome(64, bytes.fromhex(override + code), forced=True, rbx=1 << 63, rbp=1 << 63)
    assert registers["rbp"] == vector
    assert (registers, rip, stack) == _outcome(
        64, bytes.fromhex(override + code), forced=False, rbx=1 << 63, rbp=1 << 63
    )


@pytest.mark.parametrize("code", ["ff03", "0103", "0fc103", "0fb10b", "8703", "d12b", "0fab03", "0fc70b", "0fa40304"])
def test_a_read_before_a_write_faults_as_a_write(code: str) -> None:
    # inc, add, xadd, cmpxchg, xchg, shr, bts, cmpxchg8b, shld
    instruction = bytes.fromhex(code)
    native = _outcome(64, instruction, forced=False, rbx=_UNMAPPED, rax=0)
    assert native[0]["rbp"] == abi.PF_VECTOR
    assert _error_code(native) & 2
    assert _outcome(64, instruction, forced=True, rbx=_UNMAPPED, rax=0) == native


@pytest.mark.parametrize("code", ["3b03", "0fa303", "8b03"])  # cmp, bt, mov
def test_a_read_faults_as_a_read(code: str) -> None:
    outcome = _outcome(64, bytes.fromhex(code), forced=True, rbx=_UNMAPPED, rax=0)
    assert outcome[0]["rbp"] == abi.PF_VECTOR
    assert not _error_code(outcome) & 2


def _error_code(outcome: tuple[dict[str, int], int, bytes]) -> int:
    """Return the error code of an exception's frame, which the handler's push and pop have left at RSP."""
    at = outcome[0]["rsp"] - (STACK - 64)
    return int.from_bytes(outcome[2][at : at + 4], "little")


def test_a_register_that_is_not_exchanged_keeps_its_upper_half() -> None:
    registers, _, _ = _outcome(64, bytes.fromhex("0fb1ca"), forced=True, rax=1, rdx=0xAA_0000_0002)  # cmpxchg edx, ecx
    assert (registers["rax"], registers["rdx"]) == (2, 0xAA_0000_0002)
