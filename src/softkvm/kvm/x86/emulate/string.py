# SPDX-License-Identifier: Apache-2.0
"""Emulated string instructions and port I/O, with REP prefixes.

A repeated instruction does one step, or as many as can be done at once, per emulation; while the count isn't
exhausted RIP stays, so that interrupts are taken in between as on a real processor.
"""

from __future__ import annotations

from typing import Final

from softkvm import abi
from softkvm.abi import run_page
from softkvm.abi.sizes import Size
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86.emulate.alu import DF, STATUS, ZF, sub_flags
from softkvm.kvm.x86.emulate.emulator import Emulator, PioNeeded, handler
from softkvm.kvm.x86.emulate.operands import IMM, REG, STR_DST, STR_SRC, Insn, Operand
from softkvm.kvm.x86.exceptions import gp
from softkvm.kvm.x86.svm import vmcb as V

_U64: Final = (1 << 64) - 1
#: Steps of a repeated instruction done in one emulation before the guest is entered again.
_STEPS: Final = Size(
    "steps of a repeated string instruction", 1024, None, giver="guest", effect="the rest comes later", where=__name__
)
#: The VMware backdoor's ports, open to user mode whatever the permission map says.
VMWARE_PORTS: Final = (0x5658, 0x5659)
RSI: Final = 6
RDI: Final = 7
RCX: Final = 1


def _offset(e: Emulator, i: Insn, register: int) -> int:
    return e.gpr[register] & i.address_mask


def _advance(e: Emulator, i: Insn, register: int, step: int) -> None:
    """Move an index register by ``step`` bytes against or with DF, in the address size."""
    if e.q[V.RFLAGS] & DF:
        step = -step
    new = e.gpr[register] + step & i.address_mask
    if i.address_mask == 0xFFFF:
        new |= e.gpr[register] & ~0xFFFF & _U64
    e.gpr[register] = new


def _count(e: Emulator, i: Insn) -> int:
    """Return how many steps are left: 1 without a prefix."""
    return e.gpr[RCX] & i.address_mask if i.rep or i.repne else 1


def _finish(e: Emulator, i: Insn, steps: int, *, stop: bool = False) -> None:
    """Account for ``steps``; RIP stays while there are more."""
    if not (i.rep or i.repne):
        return
    left = (e.gpr[RCX] & i.address_mask) - steps
    if i.address_mask == 0xFFFF:
        e.gpr[RCX] = e.gpr[RCX] & ~0xFFFF & _U64 | left
    else:
        e.gpr[RCX] = left
    if left and not stop:
        e.rip_written = True
        e.q[V.RFLAGS] |= abi.X86_EFLAGS_RF


def _element(i: Insn) -> int:
    return i.ops[0].size


def _source_address(e: Emulator, i: Insn, size: int) -> int:
    return e.linearize(i.segment, _offset(e, i, RSI), size, write=False)


def _destination_address(e: Emulator, i: Insn, size: int, *, write: bool) -> int:
    return e.linearize(V.ES_OFFSET, _offset(e, i, RDI), size, write=write)


@handler("movsb", "movsw", "movsq")
def movs(e: Emulator, i: Insn) -> None:
    """Move a string element. MOVSD comes here through the scalar move of the same name."""
    if not _count(e, i):
        return
    size = _element(i)
    data = e.read_linear(_source_address(e, i, size), size)
    e.write_linear(_destination_address(e, i, size, write=True), data)
    _advance(e, i, RSI, size)
    _advance(e, i, RDI, size)
    _finish(e, i, 1)


@handler("stosb", "stosw", "stosd", "stosq")
def stos(e: Emulator, i: Insn) -> None:
    """Store the accumulator."""
    if not _count(e, i):
        return
    size = _element(i)
    data = (e.gpr[0] & (1 << size * 8) - 1).to_bytes(size, "little")
    e.write_linear(_destination_address(e, i, size, write=True), data)
    _advance(e, i, RDI, size)
    _finish(e, i, 1)


@handler("lodsb", "lodsw", "lodsd", "lodsq")
def lods(e: Emulator, i: Insn) -> None:
    """Load the accumulator."""
    if not _count(e, i):
        return
    size = _element(i)
    data = e.read_linear(_source_address(e, i, size), size)
    e.write(Operand(REG, size, 0), int.from_bytes(data, "little"))
    _advance(e, i, RSI, size)
    _finish(e, i, 1)


def _compare(e: Emulator, i: Insn, a: int, b: int, size: int) -> None:
    _, flags = sub_flags(a, b, 0, size * 8)
    e.set_flags(STATUS, flags)
    equal = bool(flags & ZF)
    _finish(e, i, 1, stop=(i.rep and not equal) or (i.repne and equal))


@handler("scasb", "scasw", "scasd", "scasq")
def scas(e: Emulator, i: Insn) -> None:
    """Compare the accumulator with a string element."""
    if not _count(e, i):
        return
    size = max(op.size for op in i.ops)
    data = e.read_linear(_destination_address(e, i, size, write=False), size)
    _advance(e, i, RDI, size)
    _compare(e, i, e.gpr[0] & (1 << size * 8) - 1, int.from_bytes(data, "little"), size)


@handler("cmpsb", "cmpsw", "cmpsd", "cmpsq")
def cmps(e: Emulator, i: Insn) -> None:
    """Compare two string elements."""
    if not _count(e, i):
        return
    size = _element(i)
    a = e.read_linear(_source_address(e, i, size), size)
    b = e.read_linear(_destination_address(e, i, size, write=False), size)
    _advance(e, i, RSI, size)
    _advance(e, i, RDI, size)
    _compare(e, i, int.from_bytes(a, "little"), int.from_bytes(b, "little"), size)


# --- port I/O ----------------------------------------------------------------------------------


def check_io_permission(e: Emulator, port: int, size: int) -> None:
    """Raise #GP unless IOPL or the TSS's permission map allow the access (APM vol. 2, 12.2.4)."""
    vcpu = e.vcpu
    cr0 = vcpu.cr0
    flags = e.q[V.RFLAGS]
    if not cr0 & abi.X86_CR0_PE:
        return
    if e.vm.params.enable_vmware_backdoor and port in VMWARE_PORTS:
        return
    if not flags & abi.X86_EFLAGS_VM and vcpu.b[V.CPL] <= flags >> 12 & 3:
        return
    tr = vcpu.vmcb.segment(V.TR_OFFSET)
    if not tr.attrib & V.SEG_P or tr.limit < 103:
        raise gp()
    base = int.from_bytes(e.read_linear(tr.base + 102, 2, implicit=True), "little")
    if base + port // 8 + 1 > tr.limit:
        raise gp()
    bits = int.from_bytes(e.read_linear(tr.base + base + port // 8, 2, implicit=True), "little")
    if bits >> (port & 7) & (1 << size) - 1:
        raise gp()


def _port(e: Emulator, op: Operand) -> int:
    return op.value & 0xFF if op.kind == IMM else e.gpr[2] & 0xFFFF


@handler("in")
def in_(e: Emulator, i: Insn) -> None:
    """IN into the accumulator."""
    dst, src = i.ops
    port = _port(e, src)
    check_io_permission(e, port, dst.size)
    e.write(dst, int.from_bytes(_pio_read(e, port, dst.size, 1), "little"))


@handler("out")
def out(e: Emulator, i: Insn) -> None:
    """OUT from the accumulator."""
    dst, src = i.ops
    port = _port(e, dst)
    check_io_permission(e, port, src.size)
    value = e.read(src)
    if not e.vcpu.pio_bus.write(port, src.size, value):
        e.pio_out = (port, src.size, value.to_bytes(src.size, "little"))


def _pio_read(e: Emulator, port: int, size: int, count: int) -> bytes:
    """Return ``count`` elements from a port; leaves for userspace if no device in the kernel answers."""
    if e.pio_data:
        return e.pio_data
    first = e.vcpu.pio_bus.read(port, size)
    if first is None:
        raise PioNeeded(port, size, count)
    parts = [first]
    while len(parts) < count:
        parts.append(e.vcpu.pio_bus.read(port, size) or 0)
    return b"".join(value.to_bytes(size, "little") for value in parts)


def _batch(e: Emulator, i: Insn, register: int, size: int) -> int:
    """Return how many elements can be transferred at once: within one page, forwards or backwards."""
    count = _count(e, i)
    within = _offset(e, i, register) & (PAGE_SIZE - 1)
    room = (within + size) // size if e.q[V.RFLAGS] & DF else (PAGE_SIZE - within) // size
    return max(1, _STEPS.cut(min(count, room, run_page.PIO_PAGE_SIZE // size)))


@handler("insb", "insw", "insd")
def ins(e: Emulator, i: Insn) -> None:
    """INS: read ahead for as many elements as lie in the destination's page."""
    if not _count(e, i):
        return
    size = next(op.size for op in i.ops if op.kind == STR_DST)
    port = e.gpr[2] & 0xFFFF
    check_io_permission(e, port, size)
    count = _batch(e, i, RDI, size)
    backwards = bool(e.q[V.RFLAGS] & DF)
    if backwards:
        count = 1
    address = _destination_address(e, i, size * count, write=True)
    e.pages(address, size * count, e.access(True))  # a fault has to come before the port is read
    data = _pio_read(e, port, size, count)
    e.write_linear(address, data)
    _advance(e, i, RDI, size * count)
    _finish(e, i, count)


@handler("outsb", "outsw", "outsd")
def outs(e: Emulator, i: Insn) -> None:
    """OUTS: as many elements at once as lie in the source's page."""
    if not _count(e, i):
        return
    size = next(op.size for op in i.ops if op.kind == STR_SRC)
    port = e.gpr[2] & 0xFFFF
    check_io_permission(e, port, size)
    count = 1 if e.q[V.RFLAGS] & DF else _batch(e, i, RSI, size)
    data = e.read_linear(_source_address(e, i, size * count), size * count)
    bus = e.vcpu.pio_bus
    done = 0
    while done < len(data) and bus.write(port, size, int.from_bytes(data[done : done + size], "little")):
        done += size
    if done < len(data):  # the rest is nobody's in the kernel: there is none, or a ring of coalesced writes is full
        e.pio_out = (port, size, data[done:])
    _advance(e, i, RSI, size * count)
    _finish(e, i, count)
