# SPDX-License-Identifier: Apache-2.0
"""What a vCPU looks like, as text."""

from __future__ import annotations

from typing import Final

from softkvm.vmm.debug.registers import Registers

_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_GENERAL: Final = (
    ("rip", "rsp", "rbp"),
    ("rax", "rbx", "rcx"),
    ("rdx", "rsi", "rdi"),
    ("r8", "r9", "r10"),
    ("r11", "r12", "r13"),
    ("r14", "r15", "rflags"),
)


def registers_text(registers: Registers) -> str:
    """Return the general registers, segments with their hidden parts, tables and control registers, as lines."""
    regs, sregs = registers.regs, registers.sregs
    lines = ["  ".join(f"{name:6} {getattr(regs, name):016x}" for name in row) for row in _GENERAL]
    lines.append("       selector base             limit     type")
    for name in _SEGMENTS:
        segment = getattr(sregs, name)
        kind = f"{segment.type:x}{' S' if segment.s else ''}{' L' if segment.l else ''}{' D' if segment.db else ''}"
        state = (
            "unusable" if segment.unusable else f"{kind} DPL {segment.dpl}{'' if segment.present else ' not present'}"
        )
        lines.append(f"{name:6} {segment.selector:04x}     {segment.base:016x} {segment.limit:08x}  {state}")
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        lines.append(f"{name:6}          {table.base:016x} {table.limit:08x}")
    lines.append("  ".join(f"{name} {getattr(sregs, name):016x}" for name in ("cr0", "cr2", "cr3")))
    lines.append("  ".join(f"{name} {getattr(sregs, name):016x}" for name in ("cr4", "cr8")))
    lines.append(f"efer {sregs.efer:016x}  k_gs_base {registers['k_gs_base']:016x}  apic_base {sregs.apic_base:016x}")
    return "\n".join(lines) + "\n"
