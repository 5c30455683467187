# SPDX-License-Identifier: Apache-2.0
"""The instruction emulator, checked against the silicon: the same instruction, the same state, both ways.

The silicon itself is checked against real processors by its own tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from tests.support.tiny import CODE, DATA, Tiny

from softkvm import abi
from softkvm.kvm.x86.emulate.table import HANDLERS

_GPRS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10")
_STATUS = 0x8D5
_AF = 0x10
_PATTERNS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    (1 << 63) - 1,
    1 << 63,
)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Tiny]:
    machine = Tiny().long_mode()
    yield machine
    machine.close()


# Encodings with RBX as the pointer to memory; the comment is the instruction.
_ALU = {
    "add [rbx], al": "0003",
    "add [rbx], rax": "480103",
    "add ax, [rbx]": "660303",
    "or dword [rbx], eax": "0903",
    "adc [rbx], rax": "481103",
    "adc byte [rbx], 0x7f": "80137f",
    "sbb [rbx], ax": "661903",
    "sbb rax, [rbx]": "481b03",
    "and [rbx], eax": "2103",
    "sub [rbx], rax": "482903",
    "sub word [rbx], -3": "66832bfd",
    "xor [rbx], r9": "4c310b",
    "cmp [rbx], al": "3803",
    "cmp qword [rbx], -1": "48833bff",
    "test [rbx], eax": "8503",
    "test byte [rbx], 0x81": "f60381",
    "inc dword [rbx]": "ff03",
    "dec qword [rbx]": "48ff0b",
    "inc byte [rbx]": "fe03",
    "neg word [rbx]": "66f71b",
    "neg qword [rbx]": "48f71b",
    "not dword [rbx]": "f713",
    "xchg [rbx], ah": "8623",
    "xchg [rbx], rdx": "488713",
    "xadd [rbx], eax": "0fc103",
    "lock xadd [rbx], rax": "f0480fc103",
    "lock add [rbx], eax": "f00103",
    "cmpxchg [rbx], edx": "0fb113",
    "lock cmpxchg [rbx], rdx": "f0480fb113",
    "cmpxchg8b [rbx]": "0fc70b",
    "cmpxchg16b [rbx]": "480fc70b",
    "mov [rbx], rax": "488903",
    "mov [rbx], ah": "8823",
    "mov word [rbx], 0x1234": "66c7033412",
    "mov qword [rbx], -2": "48c703feffffff",
    "mov eax, [rbx]": "8b03",
    "mov ch, [rbx]": "8a2b",
    "movzx eax, byte [rbx]": "0fb603",
    "movzx rax, word [rbx]": "480fb703",
    "movsx ax, byte [rbx]": "660fbe03",
    "movsx rax, word [rbx]": "480fbf03",
    "movsxd rax, dword [rbx]": "486303",
    "movbe [rbx], rax": "480f38f103",
    "movbe ax, [rbx]": "660f38f003",
    "bswap r10": "490fca",
    "lea rax, [rbx + rcx*4 + 8]": "488d448b08",
    "setbe [rbx]": "0f9603",
    "setl [rbx]": "0f9c03",
    "cmovs rax, [rbx]": "480f4803",
    "cmovg eax, [rbx]": "0f4f03",
    "bt [rbx], eax_small": "0fba2311",
    "bts qword [rbx], 63": "480fba2b3f",
    "btr dword [rbx], 5": "0fba3305",
    "lock btc qword [rbx], 33": "f0480fba3b21",
    "bsf rax, [rbx]": "480fbc03",
    "bsr eax, [rbx]": "0fbd03",
    "popcnt rax, [rbx]": "f3480fb803",
    "lzcnt eax, [rbx]": "f30fbd03",
    "tzcnt rax, [rbx]": "f3480fbc03",
    "push [rbx]": "ff33",
    "pop [rbx]": "8f03",
    "push ax": "6650",
    "clc": "f8",
    "cmc": "f5",
    "std": "fd",
    "cwde": "98",
    "cqo": "4899",
    "imul rax, [rbx]": "480faf03",
    "imul eax, [rbx], 77": "6b034d",
    "mul dword [rbx]": "f723",
    "mul byte [rbx]": "f623",
    "imul qword [rbx]": "48f72b",
    "imul word [rbx]": "66f72b",
    "enter 0x20, 0": "c8200000",
    "lahf": "9f",
    "sahf": "9e",
    "xlatb": "d7",
    "mfence": "0faef0",
    "loop 0": "e200",
    "a32 loop 0": "67e200",
    "rdpid r10": "f3410fc7fa",
}
_SHIFTS = {
    f"{name} {size} [rbx], {amount}": code
    for n, name in enumerate(("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar"))
    for size, prefix, op in (("byte", "", 0), ("word", "66", 1), ("dword", "", 1), ("qword", "48", 1))
    for amount, code in (
        ("1", f"{prefix}{0xD0 | op:02x}{n << 3 | 3:02x}"),
        ("cl", f"{prefix}{0xD2 | op:02x}{n << 3 | 3:02x}"),
        ("13", f"{prefix}{0xC0 | op:02x}{n << 3 | 3:02x}0d"),
    )
    if name != "sal"
}
_DOUBLE_SHIFTS = {
    "shld [rbx], eax, cl": "0fa503",
    "shrd [rbx], eax, cl": "0fad03",
    "shld [rbx], rax, 17": "480fa40311",
    "shrd [rbx], rax, 63": "480fac033f",
}
_STRINGS = {
    "movsb": "a4",
    "movsq": "48a5",
    "stosd": "ab",
    "stosq": "48ab",
    "lodsw": "66ad",
    "scasb": "ae",
    "cmpsd": "a7",
    "rep movsb": "f3a4",
    "rep stosd": "f3ab",
    "repe cmpsb": "f3a6",
    "repne scasb": "f2ae",
}
_VECTORS = {
    "movups xmm1, [rbx]": "0f100b",
    "movups [rbx], xmm1": "0f110b",
    "movdqa [rbx], xmm2": "660f7f13",
    "movdqu xmm3, [rbx]": "f30f6f1b",
    "movq xmm1, [rbx]": "f30f7e0b",
    "movq [rbx], xmm1": "660fd60b",
    "movd xmm1, [rbx]": "660f6e0b",
    "movd [rbx], xmm2": "660f7e13",
    "movss xmm1, [rbx]": "f30f100b",
    "movsd [rbx], xmm2": "f20f1113",
    "movsd xmm1, xmm2": "f20f10ca",
    "movlps xmm1, [rbx]": "0f120b",
    "movhps [rbx], xmm2": "0f1713",
    "movntdq [rbx], xmm1": "660fe70b",
    "movnti [rbx], rax": "480fc303",
    "movq mm1, [rbx]": "0f6f0b",
    "movq [rbx], mm2": "0f7f13",
}
_FLAG_EXCEPTIONS = {
    # flags that the manual leaves undefined
    "and": _AF,
    "or": _AF,
    "xor": _AF,
    "test": _AF,
    "mul": 0xD4,
    "imul": 0xD4,
    "bt": 0x894,
    "bts": 0x894,
    "btr": 0x894,
    "btc": 0x894,
    "bsf": 0x895,
    "bsr": 0x895,
    "lzcnt": 0x894,
    "tzcnt": 0x894,
}


def _random(rng: random.Random) -> int:
    return rng.choice((rng.choice(_PATTERNS), rng.getrandbits(64), rng.getrandbits(8)))


def _prepare(tiny: Tiny, code: bytes, seed: int) -> None:
    rng = random.Random(seed)
    values = {name: _random(rng) for name in _GPRS}
    values["rcx"] = rng.randrange(70)
    values["rbx"] = DATA
    values["rsi"] = DATA + 0x100
    values["rdi"] = DATA + 0x200
    values["rflags"] = 2 | (rng.getrandbits(12) & _STATUS)
    tiny.memory.write(DATA, rng.randbytes(0x400))
    word = _random(rng)
    tiny.memory.write(DATA, word.to_bytes(8, "little"))
    if rng.random() < 0.4:  # so that comparisons succeed now and then
        values["rax"] = word
        values["rdx"] = int.from_bytes(tiny.memory.read(DATA + 8, 8), "little")
        tiny.memory.write(DATA + 0x200, tiny.memory.read(DATA + 0x100, 0x60))
    fpu = abi.kvm_fpu(fcw=0x37F, mxcsr=0x1F80)
    for n in range(8):
        fpu.xmm[n][:] = list(rng.randbytes(16))
        fpu.fpr[n][:10] = list(rng.randbytes(10))
    tiny.vcpu.set_fpu(fpu)
    tiny.load(code + b"\xf4", **values)


def _state(tiny: Tiny) -> dict[str, object]:
    regs = tiny.vcpu.get_regs()
    fpu = tiny.vcpu.get_fpu()
    state: dict[str, object] = {name: getattr(regs, name) for name in (*_GPRS, "rsp", "rflags")}
    state["memory"] = tiny.memory.read(DATA, 0x400) + tiny.memory.read(0x7F00, 0x200)
    state["xmm"] = [bytes(x) for x in fpu.xmm]
    state["mm"] = [bytes(x[:8]) for x in fpu.fpr]
    return state


@pytest.mark.parametrize(
    ("name", "code"), [*_ALU.items(), *_SHIFTS.items(), *_DOUBLE_SHIFTS.items(), *_STRINGS.items(), *_VECTORS.items()]
)
def test_the_emulator_does_what_the_silicon_does(tiny: Tiny, name: str, code: str) -> None:
    encoded = bytes.fromhex(code)
    mnemonic = name.split()[1 if name.startswith(("lock", "rep")) else 0]
    shift = mnemonic in ("shl", "shr", "sar", "shld", "shrd", "rol", "ror", "rcl", "rcr")
    for seed in range(25):
        _prepare(tiny, encoded, seed)
        tiny.run_to_halt()
        native = _state(tiny)

        _prepare(tiny, encoded, seed)
        vcpu = tiny.vcpu
        while vcpu.get_regs().rip != CODE + len(encoded):
            assert vcpu.emulator.emulate() == 1
            assert not vcpu.exception.pending
        emulated = _state(tiny)

        undefined = _FLAG_EXCEPTIONS.get(mnemonic, 0)
        if shift:
            undefined |= _AF | 0x800  # OF is defined for a count of one only
            if mnemonic in ("shld", "shrd", "shl", "shr", "sar"):
                undefined |= 1  # CF for counts beyond the operand
        keep = ~(undefined | 1 << 16)
        native["rflags"] = int(str(native["rflags"])) & keep
        emulated["rflags"] = int(str(emulated["rflags"])) & keep
        assert emulated == native, f"seed {seed}"


@pytest.mark.parametrize("code", ["f733", "48f73b", "66f733", "f63b", "f633"])  # div/idiv [rbx]
def test_division_gives_the_silicons_result_or_its_fault(tiny: Tiny, code: str) -> None:
    encoded = bytes.fromhex(code)
    tiny.gate64(0, 0x2000)
    tiny.memory.write(0x2000, b"\x48\xc7\xc5\xde\x00\x00\x00\xf4")  # mov rbp, 0xde; hlt
    for seed in range(60):
        _prepare(tiny, encoded, seed)
        if seed % 2:
            tiny.registers(rdx=seed % 3, rbp=0)
        else:
            tiny.registers(rbp=0)
        start = tiny.vcpu.get_regs()
        regs = tiny.run_to_halt()
        faulted = regs.rbp == 0xDE
        tiny.vcpu.set_regs(start)
        vcpu = tiny.vcpu
        assert vcpu.emulator.emulate() == 1
        assert vcpu.exception.pending == faulted
        if faulted:
            assert vcpu.exception.vector == abi.DE_VECTOR
            vcpu.exception.clear()
        else:
            after = vcpu.get_regs()
            assert (after.rax, after.rdx) == (regs.rax, regs.rdx)


def test_bit_strings_reach_beyond_the_operand(tiny: Tiny) -> None:
    """BTS with a register index addresses bit (index) of a string at the operand (SDM vol. 2, BTS)."""
    for index in (-1, -64, -65, 64, 1000):
        code = bytes.fromhex("480fab03")  # bts [rbx], rax
        tiny.memory.write(DATA, bytes(0x400))
        tiny.load(code, rbx=DATA + 0x100, rax=index & (1 << 64) - 1)
        assert tiny.vcpu.emulator.emulate() == 1
        at = DATA + 0x100 + (index >> 3)
        assert tiny.memory.read(at, 1)[0] == 1 << (index & 7)


def test_faults_are_those_of_the_manual(tiny: Tiny) -> None:
    vcpu = tiny.vcpu
    for registers, vector, error in (
        ({"rbx": 1 << 63}, abi.GP_VECTOR, 0),  # not canonical
        ({"rbx": 0x4000_0000}, abi.PF_VECTOR, 2),  # a write to a page that isn't present
    ):
        tiny.load(bytes.fromhex("488903"), **registers)  # mov [rbx], rax
        assert vcpu.emulator.emulate() == 1
        assert (vcpu.exception.vector, vcpu.exception.error_code) == (vector, error)
        assert vcpu.get_regs().rip == CODE
        vcpu.exception.clear()
    assert vcpu.get_sregs().cr2 == 0x4000_0000


def test_an_unknown_instruction_is_an_internal_error_with_its_bytes(tiny: Tiny) -> None:
    tiny.load(bytes.fromhex("0fae20"))  # xsave [rax]
    assert tiny.vcpu.emulator.emulate() == 0
    run = tiny.vcpu.kvm_run
    assert run.exit_reason == abi.KVM_EXIT_INTERNAL_ERROR
    assert run.emulation_failure.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
    assert run.emulation_failure.flags == abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    assert bytes(run.emulation_failure.insn_bytes[:3]) == bytes.fromhex("0fae20")


def test_every_handler_has_a_name_that_the_decoder_uses() -> None:
    from softkvm import _softcpu

    decoded = {_softcpu.decode(bytes.fromhex(code), 64, 0).mnemonic for code in (*_ALU.values(), *_STRINGS.values())}
    assert decoded <= HANDLERS.keys()
