# SPDX-License-Identifier: Apache-2.0
"""Every instruction of the decoder's tables that may touch memory is emulated, or named in docs/emulator.md."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tests.support.tiny import DATA, STACK, Tiny

from softkvm import _softcpu, abi
from softkvm.kvm.x86.emulate.table import HANDLERS

DOCUMENT = Path(__file__).parents[4] / "docs" / "emulator.md"
#: Known to the emulator, which leaves them to the processor.
_SOFTWARE_INTERRUPTS = frozenset({"int", "int1", "int3", "into"})


def _encodings() -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Every opcode of every map with each ModRM extension, memory and register forms, and the modes it has."""
    forms = [bytes((base | reg << 3,)) + bytes(10) for base in (0x03, 0xC0) for reg in range(8)]
    gathers = [bytes((0x04 | reg << 3, 0x23)) + bytes(9) for reg in (0, 2)]
    for opcode in range(256):
        for escape in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"):
            for prefix in (b"", b"\x66", b"\xf2", b"\xf3"):
                for form in forms:
                    yield prefix + escape + bytes((opcode,)) + form, (16, 32, 64)
                    yield prefix + b"\x48" + escape + bytes((opcode,)) + form, (64,)
        for vex in range(3 * 4 * 4):
            opcode_map, pp, length, wide = 1 + vex // 16, vex & 3, vex & 4, (vex & 8) << 4
            for form in (*forms[:8], *gathers):
                yield bytes((0xC4, 0xE0 | opcode_map, 0x78 | wide | length | pp, opcode)) + form, (64,)


@cache
def _instructions() -> dict[tuple[str, str, int], tuple[bytes, frozenset[str]]]:
    """Return what touches memory: (mnemonic, the decoder's name of the encoding, bitness): bytes, CPUID features."""
    found: dict[tuple[str, str, int], tuple[bytes, frozenset[str]]] = {}
    for code, modes in _encodings():
        for bitness in modes:
            try:
                decoded = _softcpu.decode(code, bitness, 0)
            except ValueError:
                continue
            if decoded.accesses_memory or decoded.mnemonic in _SOFTWARE_INTERRUPTS:
                key = decoded.mnemonic, decoded.code, bitness
                found.setdefault(key, (code[: decoded.length], frozenset(decoded.cpuid_features)))
    return found


def _documented() -> tuple[set[str], set[str]]:
    """Return the features whose instructions are all named, and single mnemonics."""
    features, mnemonics = set(), set()
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 2 or cells[0] in ("CPUID feature", "---"):
            continue
        if cells[1] == "all":
            features.add(cells[0])
        else:
            mnemonics.update(cells[1].split())
    return features, mnemonics


def test_every_instruction_that_touches_memory_is_emulated_or_named() -> None:
    features, mnemonics = _documented()
    emulated = HANDLERS.keys() - _SOFTWARE_INTERRUPTS
    missing = {
        mnemonic
        for (mnemonic, _, _), (_, of) in _instructions().items()
        if mnemonic not in emulated | mnemonics and not of & features
    }
    assert not missing
    assert len(_instructions()) > 1500


def test_nothing_that_is_named_is_emulated() -> None:
    features, mnemonics = _documented()
    emulated = HANDLERS.keys() - _SOFTWARE_INTERRUPTS
    assert not mnemonics & emulated
    known = {mnemonic for mnemonic, _, _ in _instructions()}
    assert mnemonics <= known
    named = {f for (mnemonic, _, _), (_, of) in _instructions().items() if mnemonic not in emulated for f in of}
    assert features <= named
    both = {m for (m, _, _), (_, of) in _instructions().items() if m in emulated and of and of <= features}
    assert not both


@pytest.mark.parametrize("bitness", [16, 32, 64])
def test_every_encoding_of_what_is_emulated_is_carried_out(bitness: int) -> None:
    emulated = HANDLERS.keys() - _SOFTWARE_INTERRUPTS
    tiny = Tiny()
    {16: tiny.real_mode, 32: tiny.protected_mode, 64: tiny.long_mode}[bitness]()
    sregs = tiny.vcpu.get_sregs()
    failed = []
    for (mnemonic, name, mode), (code, _) in _instructions().items():
        if mode == bitness and mnemonic in emulated:
            tiny.vcpu.set_sregs(sregs)
            tiny.load(code, rbx=DATA, rbp=DATA, rsp=STACK, rsi=DATA, rdi=DATA, rcx=1)
            tiny.vcpu.kvm_run.exit_reason = 0
            tiny.vcpu.emulator.emulate()
            if tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_INTERNAL_ERROR:
                failed.append(f"{name} {code.hex()}")
            tiny.vcpu.exception.clear()
            tiny.vcpu.complete_userspace_io = None
            tiny.vcpu.mp_state = abi.KVM_MP_STATE_RUNNABLE
    assert not failed
    tiny.close()
