# SPDX-License-Identifier: Apache-2.0
"""Whatever a guest writes to its local APIC, the registers are those of an emulated one, and others' are untouched."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.conformance import watchdog
from tests.support.tiny import CODE, Tiny

from softkvm import abi
from softkvm.kvm import Params

APIC = 0xFEE0_0000
SPIV, ICR, ICR2, LVTT, TMICT, TMCCT, APR, SELF_IPI = 0xF0, 0x300, 0x310, 0x320, 0x380, 0x390, 0x90, 0x3F0
GP = CODE + 0x900
#: Delivery modes that do more than set a bit of the IRR: an NMI, an SMI, INIT and a start-up IPI.
_EVENTS = 1 << 10 | 1 << 9

offsets = st.one_of(
    st.sampled_from([0x20, 0x80, 0xB0, 0xD0, 0xE0, SPIV, 0x280, ICR, ICR2, 0x350, 0x360, 0x370, 0x3E0, 0x3F0]),
    st.integers(0, 0x3FF).map(lambda n: n * 4),
)
writes = st.lists(st.tuples(offsets, st.integers(0, (1 << 32) - 1)), max_size=20)

#: Instructions with an operand at [r8 + disp32] that no driver has for it: other sizes, read-modify-write, SSE.
ODD = (
    *("418a98", "418898", "66418b98", "66418998", "498b98", "498998"),  # mov of 1, 2 and 8 bytes
    *("f0410fc198", "418798", "41ff80", "f3410f6f80", "f3410f7f80"),  # lock xadd, xchg, inc, movdqu
)
odd = st.lists(
    st.tuples(
        st.integers(0, 0xFF0).filter(lambda at: not 0x2F0 <= at < 0x330 and not 0x370 <= at < 0x3A0),  # ICR, timer
        st.sampled_from(ODD),
        st.integers(0, (1 << 64) - 1),
    ),
    max_size=20,
)


def odd_code(accesses: list[tuple[int, str, int]]) -> bytes:
    """``mov rbx, value; movq xmm0, rbx`` and the instruction, for each."""
    parts = [
        b"\x48\xbb" + value.to_bytes(8, "little") + bytes.fromhex("66480f6ec3" + insn) + at.to_bytes(4, "little")
        for at, insn, value in accesses
    ]
    return b"".join(parts) + b"\xe6\x10"


def code(accesses: list[tuple[int, int]]) -> bytes:
    """``mov dword [r8 + offset], value`` for each, then a read of the register, and ``out 0x10, al``."""
    parts = []
    for offset, value in accesses:
        if offset in (LVTT, TMICT):
            continue  # time would pass
        if offset == ICR:
            value &= ~_EVENTS
        parts.append(b"\x41\xc7\x80" + offset.to_bytes(4, "little") + value.to_bytes(4, "little"))
        if offset & 0xFF0 not in (TMCCT, APR):
            parts.append(b"\x41\x8b\x98" + offset.to_bytes(4, "little") + b"\x01\xde")  # mov ebx, ...; add esi, ebx
    return b"".join(parts) + b"\xe6\x10"


x2apic_offsets = st.one_of(
    st.sampled_from([0x20, 0x80, 0xB0, 0xD0, 0xE0, SPIV, 0x280, ICR, ICR2, 0x350, 0x360, 0x370, 0x3E0, SELF_IPI]),
    st.integers(0, 0xFF).map(lambda n: n * 16),
).filter(lambda at: at not in (LVTT, TMICT, TMCCT, APR))
x2apic_values = st.one_of(st.integers(0, 0xFF), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1))
x2apic_accesses = st.lists(st.tuples(x2apic_offsets, st.none() | x2apic_values), max_size=20)


def x2apic_code(accesses: list[tuple[int, int | None]]) -> bytes:
    """WRMSR of each value, and RDMSR, of which ESI and EDI have the sums, for each None; then ``out 0x10, al``."""
    parts = []
    for offset, value in accesses:
        if value is not None and offset == ICR:
            value &= ~_EVENTS
        loads = (b"\xb9", 0x800 + (offset >> 4)), (b"\xb8", (value or 0) & 0xFFFF_FFFF), (b"\xba", (value or 0) >> 32)
        parts += [opcode + number.to_bytes(4, "little") for opcode, number in loads]
        parts.append(b"\x0f\x30" if value is not None else bytes.fromhex("0f32 01c6 01d7"))
        parts.append(bytes.fromhex("d1c6"))  # rol esi, 1
    return b"".join(parts) + b"\xe6\x10"


def registers(program: bytes, *, avic: bool, x2apic: bool = False) -> tuple[int, list[int], bytes]:
    machine = Tiny(irqchip=True, params=Params(avic=avic), vcpus=2).long_mode(gigabytes=4)
    # #GP: add rsp, 8; add qword [rsp], 2; inc ebx; iretq
    machine.gate64(13, GP)
    machine.memory.write(GP, bytes.fromhex("4883c408 4883042402 ffc3 48cf"))
    for vcpu in machine.vcpus:
        if x2apic:
            sregs = vcpu.get_sregs()
            sregs.apic_base |= 1 << 10
            vcpu.set_sregs(sregs)
        lapic = vcpu.get_lapic()
        lapic.regs[SPIV : SPIV + 2] = [0xFF, 1]
        lapic.regs[0x350 + 2] = 1  # LINT0 masked
        vcpu.set_lapic(lapic)
    machine.load(program, rbx=0, rsi=0, rdi=0, r8=APIC)
    with watchdog(machine.vcpu, 20):
        reason = machine.run()
    state = bytes(machine.vcpu.get_lapic())
    words = [int.from_bytes(state[at : at + 4], "little") for at in range(0, 0x400, 16)]
    if not x2apic:
        words[ICR2 >> 4] &= 0xFF00_0000  # the rest is reserved: what is written stays, or doesn't
    words[TMCCT >> 4] = words[APR >> 4] = words[SELF_IPI >> 4] = 0
    regs = machine.vcpu.get_regs()
    words += [regs.rbx, regs.rsi, regs.rdi, regs.rip] if x2apic else []
    other = bytes(machine.vcpus[1].get_lapic())
    machine.close()
    return reason, words, other


@settings(max_examples=60, deadline=None)
@given(writes)
def test_a_guests_writes_do_what_they_do_to_an_emulated_apic(accesses: list[tuple[int, int]]) -> None:
    compare(code(accesses))


@settings(max_examples=60, deadline=None)
@given(odd)
def test_accesses_of_other_sizes_and_places_do_what_they_do_to_an_emulated_apic(
    accesses: list[tuple[int, str, int]],
) -> None:
    compare(odd_code(accesses))


@settings(max_examples=60, deadline=None)
@example([(SELF_IPI, 4), (0x280, 0), (0x280, None)])  # a vector that is none: in the ESR, not in the IRR
@given(x2apic_accesses)
def test_accesses_in_x2apic_mode_do_what_they_do_to_an_emulated_apic(accesses: list[tuple[int, int | None]]) -> None:
    compare(x2apic_code(accesses), x2apic=True)


def compare(program: bytes, *, x2apic: bool = False) -> None:
    emulated, virtualized = (registers(program, avic=avic, x2apic=x2apic) for avic in (False, True))
    assert emulated[0] == virtualized[0] == abi.KVM_EXIT_IO
    assert [hex(word) for word in emulated[1]] == [hex(word) for word in virtualized[1]]
    assert emulated[2] == virtualized[2]
