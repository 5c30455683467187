# SPDX-License-Identifier: Apache-2.0
"""The target description: which registers there are, as gdb and QEMU name them.

Sources: gdb's manual, appendix G (target descriptions; G.5.14, i386 features); AMD64 Architecture Programmer's Manual,
volume 2, 3.1 (bits of CR0, CR4 and EFER).
"""

from __future__ import annotations

from typing import Final

from softkvm import api
from softkvm.vmm.debug.registers import AVX, CORE, SSE, Register

_FLAGS: Final = {
    "i386_eflags": (
        4,
        "CF:0 PF:2 AF:4 ZF:6 SF:7 TF:8 IF:9 DF:10 OF:11 NT:14 RF:16 VM:17 AC:18 VIF:19 VIP:20 ID:21",
    ),
    "x64_cr0": (8, "PE:0 MP:1 EM:2 TS:3 ET:4 NE:5 WP:16 AM:18 NW:29 CD:30 PG:31"),
    "x64_cr4": (
        8,
        "VME:0 PVI:1 TSD:2 DE:3 PSE:4 PAE:5 MCE:6 PGE:7 PCE:8 OSFXSR:9 OSXMMEXCPT:10 UMIP:11 LA57:12 VMXE:13 SMXE:14 "
        "FSGSBASE:16 PCIDE:17 OSXSAVE:18 SMEP:20 SMAP:21 PKE:22 CET:23",
    ),
    "x64_efer": (8, "SCE:0 LME:8 LMA:10 NXE:11 SVME:12 LMSLE:13 FFXSR:14 TCE:15"),
}
_MXCSR: Final = (4, "IE:0 DE:1 ZE:2 OE:3 UE:4 PE:5 DAZ:6 IM:7 DM:8 ZM:9 OM:10 UM:11 PM:12 FZ:15")
_VECTORS: Final = (
    ("v4f", "v4_float", "ieee_single", 4),
    ("v2d", "v2_double", "ieee_double", 2),
    ("v16i8", "v16_int8", "int8", 16),
    ("v8i16", "v8_int16", "int16", 8),
    ("v4i32", "v4_int32", "int32", 4),
    ("v2i64", "v2_int64", "int64", 2),
)
_CPUID_1_ECX_AVX: Final = 1 << 28


def _flags(name: str, size: int, fields: str) -> str:
    parts = (field.split(":") for field in fields.split())
    inner = "".join(f'<field name="{field}" start="{bit}" end="{bit}"/>' for field, bit in parts)
    return f'<flags id="{name}" size="{size}">{inner}</flags>'


def _register(register: Register, number: int) -> str:
    group = {"int": ' group="float"', "i387_ext": "", "vec128": "", "i386_mxcsr": ' group="vector"'}.get(
        register.type, ""
    )
    bits = 8 * register.size
    return f'<reg name="{register.name}" bitsize="{bits}" type="{register.type}" regnum="{number}"{group}/>'


def registers(vcpu: api.Vcpu) -> tuple[Register, ...]:
    """Return the registers that *vcpu* has, by gdb's numbers."""
    avx = any(entry.function == 1 and entry.ecx & _CPUID_1_ECX_AVX for entry in vcpu.get_cpuid2())
    return CORE + SSE + (AVX if avx else ())


def target_xml(there: tuple[Register, ...]) -> str:
    """Return the description of a target with these registers."""
    numbers = {register.name: number for number, register in enumerate(there)}
    core = "".join(_flags(name, *fields) for name, fields in _FLAGS.items())
    core += "".join(_register(register, numbers[register.name]) for register in CORE)
    vectors = "".join(f'<vector id="{name}" type="{kind}" count="{count}"/>' for name, _, kind, count in _VECTORS)
    members = "".join(f'<field name="{field}" type="{name}"/>' for name, field, _, _ in _VECTORS)
    sse = vectors + f'<union id="vec128">{members}<field name="uint128" type="uint128"/></union>'
    sse += _flags("i386_mxcsr", *_MXCSR) + "".join(_register(register, numbers[register.name]) for register in SSE)
    features = {"org.gnu.gdb.i386.core": core, "org.gnu.gdb.i386.sse": sse}
    if AVX[0].name in numbers:
        features["org.gnu.gdb.i386.avx"] = "".join(_register(register, numbers[register.name]) for register in AVX)
    inner = "".join(f'<feature name="{name}">{content}</feature>' for name, content in features.items())
    return (
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">'
        f"<target><architecture>i386:x86-64</architecture>{inner}</target>"
    )
