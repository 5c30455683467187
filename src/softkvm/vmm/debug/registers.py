# SPDX-License-Identifier: Apache-2.0
"""A vCPU's registers by name, from the structures that KVM has for them.

The names are gdb's and QEMU's (gdb's manual, appendix G: standard target features), and each register is the value of
an integer of its size. Sources: AMD64 Architecture Programmer's Manual, volume 2, 11.5 (layout of the XSAVE area) and
volume 1, 6.2 (x87 registers: the tag word, which XSAVE abridges).
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Iterator
from typing import Final, NamedTuple

from softkvm import abi, api

MSR_KERNEL_GS_BASE: Final = 0xC000_0102
X86_CR0_PE: Final = 1 << 0
X86_EFLAGS_VM: Final = 1 << 17

_X87, _SSE, _AVX = 1 << 0, 1 << 1, 1 << 2
_XSTATE_BV: Final = 512
_YMM_HIGH: Final = 576
_FCW_INITIAL: Final = 0x37F
_MXCSR_INITIAL: Final = 0x1F80


class Group(enum.Enum):
    """The structure of KVM's that a register is in."""

    GENERAL = "kvm_regs"
    SEGMENT = "kvm_segment.selector"
    BASE = "kvm_segment.base"
    CONTROL = "kvm_sregs"
    MSR = "kvm_msrs"
    XSAVE = "kvm_xsave"
    X87_TAG = "kvm_xsave, abridged"
    X87_POINTER = "kvm_xsave, shared"


class Register(NamedTuple):
    """A register: its name, its bytes to a debugger, where KVM has it, and as what a debugger shows it."""

    name: str
    size: int
    group: Group
    place: str | int
    """A field's name, an MSR's index, or an offset in the XSAVE area."""
    type: str
    stored: int = 0
    """Bytes that it has in the XSAVE area, if fewer than ``size``; the component's bit in XSTATE_BV is in ``part``."""
    part: int = 0


_GENERAL: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs")


def _core() -> Iterator[Register]:
    for name in _GENERAL:
        yield Register(name, 8, Group.GENERAL, name, "data_ptr" if name in ("rbp", "rsp") else "int64")
    yield Register("rip", 8, Group.GENERAL, "rip", "code_ptr")
    yield Register("eflags", 4, Group.GENERAL, "rflags", "i386_eflags")
    for name in _SEGMENTS:
        yield Register(name, 4, Group.SEGMENT, name, "int32")
    yield Register("fs_base", 8, Group.BASE, "fs", "int64")
    yield Register("gs_base", 8, Group.BASE, "gs", "int64")
    yield Register("k_gs_base", 8, Group.MSR, MSR_KERNEL_GS_BASE, "int64")
    for name, kind in (("cr0", "x64_cr0"), ("cr2", "int64"), ("cr3", "int64"), ("cr4", "x64_cr4"), ("cr8", "int64")):
        yield Register(name, 8, Group.CONTROL, name, kind)
    yield Register("efer", 8, Group.CONTROL, "efer", "x64_efer")
    for n in range(8):
        yield Register(f"st{n}", 10, Group.XSAVE, 32 + 16 * n, "i387_ext", 10, _X87)
    yield Register("fctrl", 4, Group.XSAVE, 0, "int", 2, _X87)
    yield Register("fstat", 4, Group.XSAVE, 2, "int", 2, _X87)
    yield Register("ftag", 4, Group.X87_TAG, 4, "int", 1, _X87)
    # the pointers' selectors are bits 47:32 of what is one offset of 64 bits to 64-bit code
    yield Register("fiseg", 4, Group.X87_POINTER, 12, "int", 2, _X87)
    yield Register("fioff", 4, Group.X87_POINTER, 8, "int", 4, _X87)
    yield Register("foseg", 4, Group.X87_POINTER, 20, "int", 2, _X87)
    yield Register("fooff", 4, Group.X87_POINTER, 16, "int", 4, _X87)
    yield Register("fop", 4, Group.XSAVE, 6, "int", 2, _X87)


def _sse() -> Iterator[Register]:
    for n in range(16):
        yield Register(f"xmm{n}", 16, Group.XSAVE, 160 + 16 * n, "vec128", 16, _SSE)
    yield Register("mxcsr", 4, Group.XSAVE, 24, "i386_mxcsr", 4, _SSE | _AVX)


CORE: Final = tuple(_core())
SSE: Final = tuple(_sse())
AVX: Final = tuple(Register(f"ymm{n}h", 16, Group.XSAVE, _YMM_HIGH + 16 * n, "uint128", 16, _AVX) for n in range(16))
BY_NAME: Final = {register.name: register for register in (*CORE, *SSE, *AVX)}


class Registers:
    """The registers of *vcpu*, which has to be out of KVM_RUN while they are used.

    Each structure is fetched when one of its registers is first asked for. :meth:`set` changes KVM's at once;
    :meth:`forget` has all fetched again, once the vCPU has run.
    """

    def __init__(self, vcpu: api.Vcpu) -> None:
        self._vcpu = vcpu
        self.forget()

    def forget(self) -> None:
        """The vCPU has run, or somebody else has set registers of it."""
        self._regs: abi.kvm_regs | None = None
        self._sregs: abi.kvm_sregs | None = None
        self._xsave: bytearray | None = None

    @property
    def regs(self) -> abi.kvm_regs:
        """The general registers."""
        if self._regs is None:
            self._regs = self._vcpu.get_regs()
        return self._regs

    @property
    def sregs(self) -> abi.kvm_sregs:
        """Segments, tables and control registers."""
        if self._sregs is None:
            self._sregs = self._vcpu.get_sregs()
        return self._sregs

    @property
    def xsave(self) -> bytearray:
        """The XSAVE area; components in their initial state have that in it."""
        if self._xsave is None:
            area = bytearray(self._vcpu.get_xsave())
            present = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
            if not present & _X87:
                area[:24] = _FCW_INITIAL.to_bytes(24, "little")
                area[32:160] = bytes(128)
            if not present & (_SSE | _AVX):
                area[24:28] = _MXCSR_INITIAL.to_bytes(4, "little")
            if not present & _SSE:
                area[160:416] = bytes(256)
            if not present & _AVX:
                area[_YMM_HIGH : _YMM_HIGH + 256] = bytes(256)
            self._xsave = area
        return self._xsave

    def __getitem__(self, name: str) -> int:
        """Return a register; KeyError if there is none of that name."""
        return self.get(BY_NAME[name])

    def __setitem__(self, name: str, value: int) -> None:
        """Set a register; KeyError if there is none of that name, OSError for what KVM refuses."""
        self.set(BY_NAME[name], value)

    def get(self, register: Register) -> int:
        """Return the value of a register."""
        place = register.place
        match register.group:
            case Group.GENERAL:
                return int(getattr(self.regs, str(place))) & (1 << 8 * register.size) - 1
            case Group.SEGMENT:
                return int(getattr(self.sregs, str(place)).selector)
            case Group.BASE:
                return int(getattr(self.sregs, str(place)).base)
            case Group.CONTROL:
                return int(getattr(self.sregs, str(place)))
            case Group.MSR:
                values = self._vcpu.get_msrs([int(place)])
                return values[0] if values else 0
            case Group.X87_TAG:
                return _full_tags(self.xsave)
            case _:
                at = int(place)
                return int.from_bytes(self.xsave[at : at + register.stored], "little")

    def set(self, register: Register, value: int) -> None:
        """Set a register to *value*, cut to its size; OSError for what KVM refuses.

        A selector in real and virtual 8086 mode brings its base along; in protected mode the descriptor stays.
        """
        place = register.place
        value &= (1 << 8 * register.size) - 1
        if register.group in (Group.GENERAL, Group.SEGMENT, Group.BASE, Group.CONTROL) and value == self.get(register):
            return
        try:
            match register.group:
                case Group.GENERAL:
                    setattr(self.regs, str(place), value)
                    self._vcpu.set_regs(self.regs)
                case Group.SEGMENT:
                    segment = getattr(self.sregs, str(place))
                    segment.selector = value & 0xFFFF
                    if not self.sregs.cr0 & X86_CR0_PE or self.regs.rflags & X86_EFLAGS_VM:
                        segment.base = (value & 0xFFFF) << 4
                    self._vcpu.set_sregs(self.sregs)
                case Group.BASE:
                    getattr(self.sregs, str(place)).base = value
                    self._vcpu.set_sregs(self.sregs)
                case Group.CONTROL:
                    setattr(self.sregs, str(place), value)
                    self._vcpu.set_sregs(self.sregs)
                case Group.MSR:
                    if self._vcpu.set_msrs({int(place): value}) != 1:
                        raise OSError(22, f"MSR {place:#x} cannot be {value:#x}")
                case _:
                    self._set_xsave(register, value)
        except OSError:
            self.forget()
            raise

    def _set_xsave(self, register: Register, value: int) -> None:
        area = self.xsave
        at = int(register.place)
        if register.group is Group.X87_TAG:
            value = sum(1 << n for n in range(8) if value >> 2 * n & 3 != 3)
        value &= (1 << 8 * register.stored) - 1
        area[at : at + register.stored] = value.to_bytes(register.stored, "little")
        # all that there is, initial or not; only what the guest may have is in XSTATE_BV before
        present = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little") | _X87 | _SSE
        if register.part == _AVX:
            present |= _AVX
        area[_XSTATE_BV : _XSTATE_BV + 8] = present.to_bytes(8, "little")
        xsave = abi.kvm_xsave()
        ctypes.memmove(ctypes.addressof(xsave), bytes(area), min(len(area), ctypes.sizeof(xsave)))
        self._vcpu.set_xsave(xsave)


def _full_tags(area: bytearray) -> int:
    """Return the x87 tag word of 16 bits: XSAVE has a bit for each register, whether it is in use.

    The area has registers by their place on the stack, the tag word by their number.
    """
    top = int.from_bytes(area[2:4], "little") >> 11 & 7
    tags = 0
    for number in range(8):
        if not area[4] >> number & 1:
            tag = 3  # empty
        else:
            at = 32 + 16 * ((number - top) & 7)
            significand = int.from_bytes(area[at : at + 8], "little")
            exponent = int.from_bytes(area[at + 8 : at + 10], "little") & 0x7FFF
            if exponent == 0:
                tag = 1 if significand == 0 else 2
            else:
                tag = 0 if exponent != 0x7FFF and significand >> 63 else 2
        tags |= tag << 2 * number
    return tags
