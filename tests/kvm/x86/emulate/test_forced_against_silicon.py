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


@pytest.mark.parametrize("prefix", ["", "66"])
@pytest.mark.parametrize("code", ["cb", "ca0800", "cf", "60", "61", "ea00200000", "9a00200000", "ff2f", "ff1f", "c50f"])
def test_far_transfers_of_real_mode_do_what_the_silicons_do(prefix: str, code: str) -> None:
    # retf; retf 8; iret; pusha; popa; jmp 0:0x2000; call 0:0x2000; jmp far [bx]; call far [bx]; lds cx, [bx]
    instruction = bytes.fromhex(prefix + code)
    if code[:2] in ("ea", "9a") and prefix:
        instruction = instruction[:2] + struct.pack("<IH", 0x2000, 0)
    registers = {"rax": 0x1122_3344, "rbx": STACK, "rcx": 5, "rbp": 6, "rsi": 7, "rdi": 8}
    native = _outcome(16, instruction, forced=False, **registers)
    assert _outcome(16, instruction, forced=True, **registers) == native


@pytest.mark.parametrize(
    ("code", "registers"),
    [
        ("d93b", {}),  # fnstcw [rbx]
        ("dd3b", {}),  # fnstsw [rbx]
        ("dfe0", {}),  # fnstsw ax
        ("d92b", {}),  # fldcw [rbx]
        ("dbe3 d93b", {}),  # fninit; fnstcw [rbx]
        ("dbe2 dd3b", {}),  # fnclex; fnstsw [rbx]
        ("0fae1b", {}),  # stmxcsr [rbx]
        ("0fae13", {}),  # ldmxcsr [rbx]: reserved bits
        ("0fae03", {}),  # fxsave [rbx]
        ("480fae03", {}),  # fxsave64 [rbx] in 64-bit code
        ("0fae03", {"rbx": STACK - 56}),  # not aligned
        ("0fae0b", {"rbx": STACK - 56}),
    ],
)
@pytest.mark.parametrize("bits", [32, 64])
def test_x87_control_does_what_the_silicon_does(bits: int, code: str, registers: dict[str, int]) -> None:
    parts = [bytes.fromhex(part) for part in code.split()]
    wanted = {"rbx": STACK - 64, **registers}
    if bits == 32:
        parts = [part.removeprefix(b"\x48") for part in parts]
    native = _outcome(bits, b"".join(parts), forced=False, **wanted)
    emulated = _outcome(bits, FEP.join(parts), forced=True, **wanted)
    assert emulated[0::2] == native[0::2]


def test_fxrstor_loads_what_the_silicons_does() -> None:
    area = bytearray(range(256)) * 2
    area[24:28] = (0x1F80).to_bytes(4, "little")
    for code in ("0fae0b", "480fae0b"):  # fxrstor, fxrstor64 [rbx]
        states = []
        for forced in (False, True):
            tiny = _machine(64)
            tiny.memory.write(STACK - 512, bytes(area))
            start = CODE - len(FEP) if forced else CODE
            tiny.load(b"", rip=start, rbx=STACK - 512)
            tiny.memory.write(start, (FEP if forced else b"") + bytes.fromhex(code) + b"\xf4")
            tiny.run_to_halt()
            states.append(bytes(tiny.vcpu.get_xsave()))
            tiny.close()
        assert states[0] == states[1]


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
