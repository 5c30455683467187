# SPDX-License-Identifier: Apache-2.0
"""Whole register files through the API, beside what the guest's own instructions store and the VMCB's layout says."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from tests.support.tiny import DATA, Tiny

from softkvm import abi

_X87, _SSE, _YMM = 1, 2, 4
#: What the silicon has of these.
_ALL = _X87 | _SSE
_XSAVE64 = bytes.fromhex("b803000000 31d2 480fae2425") + DATA.to_bytes(4, "little") + b"\xf4"
_XRSTOR64 = bytes.fromhex("b803000000 31d2 480fae2c25") + DATA.to_bytes(4, "little") + b"\xf4"
#: Where CS, DS, ES, FS, GS, SS, TR and LDTR are in the VMCB (APM vol. 2, table B-2).
_PLACES = {"cs": 0x410, "ds": 0x430, "es": 0x400, "fs": 0x440, "gs": 0x450, "ss": 0x420, "tr": 0x490, "ldt": 0x470}
_TABLES = {"gdt": 0x460, "idt": 0x480}
_CPL = 0x4CB


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny()
    sregs = machine.long_mode().vcpu.get_sregs()
    sregs.cr4 |= abi.X86_CR4_OSXSAVE
    machine.vcpu.set_sregs(sregs)
    xcrs = machine.vcpu.get_xcrs()
    xcrs.xcrs[0].value = _ALL
    machine.vcpu.set_xcrs(xcrs)
    yield machine
    machine.close()


def _area(rng: random.Random, features: int = _ALL) -> bytearray:
    """Return an XSAVE area (APM vol. 2, 11.5.4) with random components."""
    area = bytearray(4096)
    status = rng.randrange(8) << 11 | rng.choice((0, 0x4700))
    struct.pack_into("<HHBxH", area, 0, rng.choice((0x37F, 0x27F)), status, rng.randrange(256), 0)
    struct.pack_into("<II", area, 24, rng.choice((0x1F80, 0x7F80)), 0x2_FFFF)
    for n in range(8):
        area[32 + 16 * n : 42 + 16 * n] = rng.randbytes(10)
    area[160:416] = rng.randbytes(256)
    struct.pack_into("<Q", area, 512, features)
    area[576:832] = rng.randbytes(256)
    return area


@pytest.mark.parametrize("seed", range(8))
def test_xsave_of_the_guest_stores_what_was_set(tiny: Tiny, seed: int) -> None:
    """The x87 registers from the top of the stack on, tags by physical number (APM vol. 2, 11.4.4)."""
    area = _area(random.Random(seed))
    tiny.vcpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    tiny.load(_XSAVE64)
    tiny.run_to_halt()
    assert tiny.memory.read(DATA, 576) == area[:576]


@pytest.mark.parametrize("seed", range(8))
def test_what_xrstor_of_the_guest_loads_is_got(tiny: Tiny, seed: int) -> None:
    area = _area(random.Random(seed))
    tiny.memory.write(DATA, bytes(area))
    tiny.load(_XRSTOR64)
    tiny.run_to_halt()
    assert bytes(tiny.vcpu.get_xsave())[:512] == area[:512]
    fpu = tiny.vcpu.get_fpu()
    assert (fpu.fcw, fpu.fsw, fpu.ftwx) == struct.unpack_from("<HHB", area)
    assert (fpu.mxcsr,) == struct.unpack_from("<I", area, 24)
    assert b"".join(map(bytes, fpu.fpr)) == area[32:160]
    assert b"".join(map(bytes, fpu.xmm)) == area[160:416]


@pytest.mark.parametrize("features", range(8))
def test_components_that_xstate_bv_leaves_out_are_initial(tiny: Tiny, features: int) -> None:
    """APM vol. 2, 11.5.9: FCW 037Fh and all empty; vector registers zero; MXCSR 1F80h."""
    tiny.vcpu.cpuid.supported_xcr0 |= _YMM  # which the silicon's XSAVE has not, though its registers have the room
    tiny.vcpu.set_xsave(abi.kvm_xsave.from_buffer_copy(_area(random.Random(9), _ALL | _YMM)))
    area = _area(random.Random(features), features)
    tiny.vcpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    got = bytes(tiny.vcpu.get_xsave())
    x87, xmm, ymm = bool(features & _X87), bool(features & _SSE), bool(features & _YMM)
    assert got[:5] == (bytes(area[:5]) if x87 else struct.pack("<HHB", 0x37F, 0, 0))
    assert got[32:160] == (area[32:160] if x87 else bytes(128))
    assert got[24:28] == (area[24:28] if xmm or ymm else struct.pack("<I", 0x1F80))
    assert got[160:416] == (area[160:416] if xmm else bytes(256))
    assert got[576:832] == (area[576:832] if ymm else bytes(256))


@pytest.mark.parametrize("seed", range(8))
def test_segments_and_tables_are_where_the_vmcb_has_them(tiny: Tiny, seed: int) -> None:
    """Selector, attributes (descriptor bits 55:52 and 47:40; APM vol. 2, 15.5.1), limit, base; CPL is SS's DPL."""
    rng = random.Random(seed)
    sregs = tiny.vcpu.get_sregs()
    for name in _PLACES:
        s = getattr(sregs, name)
        s.base, s.limit, s.selector = rng.getrandbits(64), rng.getrandbits(32), rng.getrandbits(16)
        s.type, s.dpl, s.s, s.l, s.db, s.avl, s.g, s.present = (rng.getrandbits(n) for n in (4, 2, 1, 1, 1, 1, 1, 1))
        s.unusable = rng.choice((0, not s.present))
    for name in _TABLES:
        table = getattr(sregs, name)
        table.base, table.limit = rng.getrandbits(64), rng.getrandbits(16)
    tiny.vcpu.set_sregs(sregs)
    vmcb = bytes(tiny.vcpu.b[:0x500])
    for name, at in _PLACES.items():
        s = getattr(sregs, name)
        present = s.present and not s.unusable
        low = s.type | s.s << 4 | s.dpl << 5 | present << 7
        attributes = low | (s.avl | s.l << 1 | s.db << 2 | s.g << 3) << 8
        assert struct.unpack_from("<HHIQ", vmcb, at) == (s.selector, attributes, s.limit, s.base), name
    for name, at in _TABLES.items():
        table = getattr(sregs, name)
        assert struct.unpack_from("<HHIQ", vmcb, at) == (0, 0, table.limit, table.base), name
    assert vmcb[_CPL] == sregs.ss.dpl
    # What KVM reports otherwise than it was given (arch/x86/kvm/svm/svm.c, svm_get_segment).
    for name in _PLACES:
        s = getattr(sregs, name)
        s.unusable, s.g = not s.present, s.limit > 0xFFFFF
        if name in ("ds", "es", "fs", "gs") and s.present:
            s.type |= 1
    sregs.tr.type |= 2
    sregs.ss.db &= sregs.ss.present
    assert bytes(tiny.vcpu.get_sregs()) == bytes(sregs)
    common = 280  # up to kvm_sregs' interrupt_bitmap
    assert bytes(tiny.vcpu.get_sregs2())[:common] == bytes(sregs)[:common]


@pytest.mark.parametrize("seed", range(4))
def test_general_registers_have_their_numbers(tiny: Tiny, seed: int) -> None:
    """PUSH of register number 0 to 15 (APM vol. 3, PUSH: 50h + number, with REX.B from 8 on)."""
    rng = random.Random(seed)
    numbers = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
    values = {name: rng.getrandbits(64) for name in numbers}
    values["rsp"] = DATA + 16 * 8
    code = b"".join((b"" if n < 8 else b"\x41") + bytes([0x50 + n % 8]) for n in range(16))
    tiny.load(code + b"\xf4", **values)
    tiny.run_to_halt()
    pushed = dict(zip(numbers, reversed(struct.unpack("<16Q", tiny.memory.read(DATA, 128))), strict=True))
    assert pushed == {**values, "rsp": DATA + 12 * 8}
    regs = tiny.vcpu.get_regs()
    assert {name: getattr(regs, name) for name in numbers} == {**values, "rsp": DATA}
