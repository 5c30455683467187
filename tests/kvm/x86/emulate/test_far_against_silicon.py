# SPDX-License-Identifier: Apache-2.0
"""Far transfers, segment loads and frames through the emulator end as on the silicon: registers, tables and memory.

Tables, selectors and stacks are drawn at random, so most transfers are refused: by the same exception, with the same
error code. The silicon itself is checked against real processors by its own tests.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from tests.support.conformance import watchdog
from tests.support.tiny import CODE, DATA, GDT, IDT, Tiny

from softkvm import abi
from softkvm.kvm import Params

FEP = bytes.fromhex("0f0b6b766d")  # ud2; "kvm"
HANDLERS = 0x2000
TSS, OTHER_TSS = 0x5000, 0x5800
LDT = 0x6000
STACKS = 0x7000
ROUNDS = 300

#: Selectors that often work: code and data of rings 0 and 3, gates, a TSS (see ``_Machine.tables``).
_LIKELY = [8, 27, 56, 64, 107, 115, 88, 81, 131, 147, 163, 16, 35, 123, 97, 211]
#: Where the guest may land: full of INT3, for which any ring may.
_LANDING = range(0x8000, 0xA000)
_VECTORS = 32


def _segment(kind: int, dpl: int, *, flags: int = 0xC, base: int = 0, present: int = 1, limit: int = 0xFFFFF) -> int:
    access = kind | 0x10 | dpl << 5 | present << 7
    low = limit & 0xFFFF | (base & 0xFF_FFFF) << 16 | access << 40
    return low | (limit >> 16 & 0xF) << 48 | flags << 52 | base >> 24 << 56


def _system(kind: int, dpl: int, base: int, limit: int, present: int = 1) -> int:
    return limit & 0xFFFF | (base & 0xFF_FFFF) << 16 | (kind | dpl << 5 | present << 7) << 40 | base >> 24 << 56


def _gate(kind: int, dpl: int, selector: int, offset: int, *, count: int = 0, present: int = 1) -> int:
    return offset & 0xFFFF | selector << 16 | count << 32 | (kind | dpl << 5 | present << 7) << 40 | offset >> 16 << 48


class _Machine:
    """One machine in a mode, set up anew for every case."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.tiny = Tiny(params=Params(force_emulation_prefix=True))
        if bits == 64:
            self.tiny.long_mode()
        else:
            self.tiny.protected_mode()
        self.sregs = self.tiny.vcpu.get_sregs()

    def _code(self, rng: random.Random, dpl: int, *, conforming: bool = False) -> int:
        flags = rng.choice((0xA, 0xC, 0xE, 0x8)) if self.bits == 64 else rng.choice((0xC, 0xC, 0x8, 0x4))
        limit = rng.choice((0xFFFFF, 0xFFFFF, 0xFFFFF, 0xFFFFF, 0xF))
        kind = 0xE if conforming else 0xA
        present = rng.random() < 0.9
        return _segment(kind | rng.randrange(2), dpl, flags=flags, present=present, limit=limit)

    def _data(self, rng: random.Random, dpl: int) -> int:
        present = rng.random() < 0.9
        return _segment(
            rng.choice((2, 3, 0, 6)), dpl, flags=rng.choice((0xC, 0x4)), present=present, base=rng.choice((0, 16))
        )

    def tables(self, rng: random.Random) -> list[int]:
        """Fill GDT and LDT; returns selectors worth trying. The first five entries are fixed."""
        wide = self.bits == 64
        code64 = 0xA if wide else 0xC
        # 8: code of ring 0; 16: data of ring 0; 24: code of ring 3; 32: data of ring 3; 40: TSS
        gdt = [0, _segment(0xB, 0, flags=code64), _segment(3, 0), _segment(0xB, 3, flags=code64), _segment(3, 3)]
        gdt += [_system(0xB, 0, TSS, 0x67), 0]
        for dpl in (0, 1, 3):
            gdt += [self._code(rng, dpl), self._code(rng, dpl, conforming=True), self._data(rng, dpl)]
        codes = (8, 24, 56, 64, 80, 88, 104, 112, 0, 4, 16)
        for kind in (12, 12, 12, 4, 5):
            dpl = rng.choice((3, 3, 0))
            target = rng.choice(codes) | rng.randrange(4)
            if kind == 5:
                target = rng.choice((len(gdt) * 8 + 16, 40, 8))
            offset = rng.choice(_LANDING)
            gdt.append(_gate(kind, dpl, target, offset, count=rng.choice((0, 1, 3)), present=rng.random() < 0.9))
            gdt.append(rng.choice((0, 0, 0, 1 << 40)))  # the upper half in long mode
        gdt.append(_system(rng.choice((9, 9, 0xB)), rng.choice((0, 3)), OTHER_TSS, rng.choice((0x67, 0x67, 0x66))))
        gdt.append(0)
        gdt.append(_system(2, 0, LDT, 0x3F))
        gdt.append(0)
        self.tiny.memory.write(GDT, struct.pack(f"<{len(gdt)}Q", *gdt))
        self.sregs.gdt.limit = 8 * len(gdt) - 1
        ldt = [
            self._code(rng, dpl) if n % 2 else self._data(rng, dpl) for n, dpl in enumerate((0, 0, 3, 3, 1, 1, 3, 0))
        ]
        self.tiny.memory.write(LDT, struct.pack("<8Q", *ldt))
        selectors = [8 * n for n in range(len(gdt) + 2)] + [8 * n | 4 for n in range(9)]
        random_rpl = [selector | rng.randrange(4) if rng.random() < 0.7 else selector for selector in selectors]
        return random_rpl + _LIKELY * 10

    def prepare(self, rng: random.Random) -> list[int]:
        """Memory and registers of a case, but for the instruction; returns the selectors to try."""
        memory = self.tiny.memory
        memory.write(0, bytes(DATA + 0x1000))
        selectors = self.tables(rng)
        if self.bits == 64:
            memory.write(TSS + 4, struct.pack("<3Q", *(STACKS + 0x400 + 0x100 * n for n in range(3))))
        else:
            memory.write(TSS + 4, struct.pack("<6I", STACKS + 0x400, 16, STACKS + 0x500, rng.choice(selectors), 0, 0))
            task = (0, rng.choice(_LANDING), 2, 1, 2, 3, 4, STACKS + 0x200, 5, 6, 7)
            memory.write(OTHER_TSS + 28, struct.pack("<18I", *task, 16, 8, 16, 16, 0, 0, 0))
        for vector in range(_VECTORS):
            handler = HANDLERS + 16 * vector
            memory.write(handler, b"\xf4")
            gate = _gate(0xE, 3, 8, handler)
            size = 16 if self.bits == 64 else 8
            memory.write(IDT + size * vector, struct.pack("<Q", gate) + bytes(size - 8))
        memory.write(STACKS, rng.randbytes(0x1000))
        memory.write(_LANDING.start, b"\xcc" * 0x4000)  # with the base of a segment of virtual-8086 mode
        return selectors

    def run(self, code: bytes, registers: dict[str, int], cpl: int, *, forced: bool) -> dict[str, object]:
        """Execute *code* and return everything that it may have changed."""
        tiny = self.tiny
        sregs = abi.kvm_sregs.from_buffer_copy(self.sregs)
        sregs.tr = abi.kvm_segment(selector=40, base=TSS, limit=0x67, type=11, present=1)
        sregs.ldt = abi.kvm_segment(selector=8, base=LDT, limit=0x3F, type=2, present=1)
        for name in ("cs", "ss", "ds", "es", "fs", "gs"):
            segment = getattr(sregs, name)
            segment.dpl, segment.selector = cpl, (24 if name == "cs" else 32) | 3 if cpl else 8 if name == "cs" else 16
            if registers["rflags"] & abi.X86_EFLAGS_VM:
                segment.selector, segment.limit, segment.type, segment.db, segment.g = 0, 0xFFFF, 3, 0, 0
        tiny.vcpu.set_sregs(sregs)
        tiny.vcpu.exception.clear()
        tiny.load(b"", **{"rip": CODE - len(FEP) if forced else CODE, **registers})
        tiny.memory.write(CODE - len(FEP), FEP + code + b"\xf4" * 16)
        tiny.vcpu.set_vcpu_events(abi.kvm_vcpu_events(flags=abi.KVM_VCPUEVENT_VALID_SHADOW))
        with watchdog(tiny.vcpu, 20):
            exit_reason = tiny.run()
        after = tiny.vcpu.get_sregs()
        state: dict[str, object] = {"exit": abi.EXIT_REASON_NAMES[exit_reason]}
        regs = tiny.vcpu.get_regs()
        state |= {name: hex(getattr(regs, name)) for name, *_ in abi.kvm_regs._fields_}
        for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt"):
            segment = getattr(after, name)
            state |= {
                f"{name}.{field}": getattr(segment, field)
                for field, *_ in abi.kvm_segment._fields_
                if field != "padding"
            }
        state["cr0"], state["cr2"] = after.cr0, after.cr2
        for start in (GDT, TSS, LDT, STACKS, DATA):
            memory = tiny.memory.read(start, 0x1000)
            state |= {f"memory {start + n:#x}": memory[n : n + 16].hex() for n in range(0, 0x1000, 16)}
        return state


@pytest.fixture(scope="module", params=[32, 64])
def machine(request: pytest.FixtureRequest) -> Iterator[_Machine]:
    made = _Machine(request.param)
    yield made
    made.tiny.close()


def _frame(rng: random.Random, items: list[int], width: int) -> bytes:
    return b"".join((item & (1 << 8 * width) - 1).to_bytes(width, "little") for item in items)


def _instruction(rng: random.Random, machine: _Machine, selectors: list[int], registers: dict[str, int]) -> bytes:
    """Draw an instruction, its operands in memory and on the stack."""
    wide = machine.bits == 64
    memory = machine.tiny.memory
    prefix = rng.choice((b"", b"", b"\x66")) if not wide else rng.choice((b"", b"", b"\x66", b"\x48"))
    width = 2 if prefix == b"\x66" else 8 if prefix == b"\x48" else 4
    selector, target = rng.choice(selectors), rng.choice(_LANDING)
    if width > 2 and rng.random() < 0.1:
        target = rng.choice((0xFFFF_0000, 1 << 47 if width == 8 else 0xFFFF_FFFF))
    memory.write(DATA, target.to_bytes(width, "little") + struct.pack("<H", selector) + rng.randbytes(16))
    kinds = ["memory", "retf", "retf", "iret", "iret", "pointer", "load", "look", "frame"]
    if prefix == b"\x48":
        kinds.remove("memory")  # with REX.W the emulator has Intel's 64-bit offsets
    kind = rng.choice(kinds)
    if kind == "memory":
        return prefix + bytes((0xFF, rng.choice((0x2B, 0x1B))))  # jmp far or call far [rbx]
    if kind == "pointer" and not wide:
        return (
            prefix + bytes((rng.choice((0xEA, 0x9A)),)) + target.to_bytes(width, "little") + struct.pack("<H", selector)
        )
    if kind in ("retf", "iret"):
        flags = [rng.choice((2, 0x202, 0x246, 0x3002, 0x4002, 0x8D7, 0x1_0002, 0x2_3002))] if kind == "iret" else []
        stack = [rng.choice((STACKS + 0x80, 0x1_0000_7080, STACKS + 0x82)), rng.choice(selectors)]
        memory.write(registers["rsp"], _frame(rng, [target, selector, *flags, *stack], width))
        if kind == "iret":
            return prefix + b"\xcf"
        return prefix + rng.choice((b"\xcb", b"\xca\x00\x00", b"\xca\x08\x00"))
    if kind == "load":
        memory.write(registers["rsp"], struct.pack("<Q", selector))
        loads = ["0fb203", "0fb403", "0fb503", "0fa1", "0fa9"]  # lss, lfs, lgs eax, [rbx]; pop fs, gs
        if not wide:
            loads += ["c403", "c503", "07", "1f", "17"]  # les, lds eax, [rbx]; pop es, ds, ss
        return prefix + bytes.fromhex(rng.choice(loads))
    if kind == "look":
        memory.write(DATA, struct.pack("<H", selector))
        looks = ["0f0203", "0f0303", "0f0023", "0f002b"]  # lar, lsl eax, [rbx]; verr, verw [rbx]
        return prefix + bytes.fromhex(rng.choice(looks if wide else [*looks, "630b"]))  # arpl [rbx], cx
    frames = ["c8100003", "c8100000", "c8080001", "c9"]  # enter 16, 3; 16, 0; 8, 1; leave
    frames += [] if wide else ["60", "61"]  # pusha, popa
    return (b"" if prefix == b"\x48" else prefix) + bytes.fromhex(rng.choice(frames))


@pytest.mark.parametrize("seed", range(3))
def test_far_transfers_end_as_on_the_silicon(machine: _Machine, seed: int) -> None:
    rng = random.Random(seed)
    landed = 0
    for number in range(ROUNDS):
        case = rng.getrandbits(64)
        cpl = rng.choice((0, 3))
        v86 = machine.bits == 32 and cpl == 3 and rng.random() < 0.3
        outcomes = []
        code = b""
        for forced in (False, True):
            drawn = random.Random(case)
            selectors = machine.prepare(drawn)
            registers = dict.fromkeys(("rdx", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))), 0x3333)
            registers |= {"rax": 0x1111_2222, "rcx": drawn.randrange(4), "rbx": DATA, "rbp": STACKS + 0x180}
            registers["rsp"] = drawn.choice((STACKS + 0x100, STACKS + 0x102))
            registers["rflags"] = drawn.choice((2, 2, 0x202, 0x3002, 0x3202, 0x4002, 0x8D7))
            if v86:
                registers["rflags"] |= abi.X86_EFLAGS_VM
            code = _instruction(drawn, machine, selectors, registers)
            outcomes.append(machine.run(code, registers, cpl, forced=forced))
        native, emulated = outcomes
        different = {name: (value, emulated[name]) for name, value in native.items() if emulated[name] != value}
        assert not different, f"seed {seed} round {number} cpl {cpl}: {code.hex()}: silicon, emulator: {different}"
        landed += native["rip"] == hex(HANDLERS + 16 * abi.BP_VECTOR + 1)
    assert landed > 2
