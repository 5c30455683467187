# SPDX-License-Identifier: Apache-2.0
"""The ABI equals the C headers: checked against the system's, and against numbers written down from them."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from softkvm import abi

# name: (size, {field: offset}) on x86-64, from Linux 6.1's headers
GOLDEN = {
    "kvm_regs": (144, {"rax": 0, "rsi": 32, "r15": 120, "rip": 128, "rflags": 136}),
    "kvm_segment": (24, {"limit": 8, "selector": 12, "type": 14, "present": 15, "unusable": 22}),
    "kvm_dtable": (16, {"limit": 8}),
    "kvm_sregs": (312, {"tr": 144, "gdt": 192, "cr0": 224, "efer": 264, "apic_base": 272}),
    "kvm_sregs2": (320, {"flags": 280, "pdptrs": 288}),
    "kvm_fpu": (416, {"fcw": 128, "ftwx": 132, "xmm": 152, "mxcsr": 408}),
    "kvm_xsave": (4096, {"region": 0}),
    "kvm_xcrs": (392, {"xcrs": 8, "padding": 264}),
    "kvm_msr_entry": (16, {"data": 8}),
    "kvm_cpuid_entry2": (40, {"eax": 12, "padding": 28}),
    "kvm_lapic_state": (1024, {"regs": 0}),
    "kvm_irqchip": (520, {"chip": 8}),
    "kvm_ioapic_state": (216, {"redirtbl": 24}),
    "kvm_pit_state2": (112, {"flags": 72}),
    "kvm_irq_routing_entry": (48, {"u": 16}),
    "kvm_msi": (32, {"devid": 16}),
    "kvm_irqfd": (32, {"resamplefd": 12}),
    "kvm_ioeventfd": (64, {"fd": 20}),
    "kvm_vcpu_events": (64, {"nmi": 12, "smi": 24, "triple_fault": 28, "exception_payload": 56}),
    "kvm_debugregs": (128, {"dr6": 32, "reserved": 56}),
    "kvm_guest_debug": (72, {"arch": 8}),
    "kvm_clock_data": (48, {"realtime": 16}),
    "kvm_enable_cap": (104, {"args": 8, "pad": 40}),
    "kvm_nested_state": (128, {"hdr": 8}),
    "kvm_run": (2352, {"exit_reason": 8, "cr8": 16, "exit": 32, "kvm_valid_regs": 288, "s": 304}),
    "pvclock_vcpu_time_info": (32, {"tsc_to_system_mul": 24, "flags": 29}),
}

REQUESTS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_RUN": 0xAE80,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_IRQ_LINE": 0x4008AE61,
    "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_SET_GSI_ROUTING": 0x4008AE6A,
    "KVM_GET_XSAVE": 0x9000AEA4,
}

# classes that name an anonymous C structure or member, and headers newer than 6.1
NOT_IN_HEADER_PREFIXES = (
    "kvm_run_", "kvm_vcpu_events_", "kvm_hyperv_exit_", "kvm_xen_exit_", "kvm_ioapic_redirect_", "pvclock_",
    "hv_", "ms_hyperv_", "kvm_xen_attr_",
)  # fmt: skip
NOT_IN_HEADER = {
    "kvm_irqchip_state",
    "kvm_irq_routing_target",
    "kvm_nested_state_hdr",
    "kvm_userspace_memory_region2",
    "kvm_create_guest_memfd",
    "kvm_memory_attributes",
    "kvm_pre_fault_memory",
    "kvm_vmx_nested_state_smm",
    "kvm_xen_hvm_attr_u",
    "kvm_xen_vcpu_attr_u",
}

MEMBERS: dict[str, Any] = {field[0]: field[1] for field in abi.kvm_run_exit._fields_}


def structures() -> dict[str, type[ctypes.Structure]]:
    """Every structure of the package by its name."""
    return {
        name: value
        for name, value in vars(abi).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and name != "Structure"
    }


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_structure_has_the_size_and_offsets_written_down(name: str) -> None:
    size, offsets = GOLDEN[name]
    cls = structures()[name]
    assert ctypes.sizeof(cls) == size
    assert {field: getattr(cls, field).offset for field in offsets} == offsets


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_request_number_is_the_one_written_down(name: str) -> None:
    assert getattr(abi, name) == REQUESTS[name]


def test_kvm_run_union_members_start_at_32() -> None:
    for member in ("hw", "io", "mmio", "internal", "msr", "system_event", "hypercall"):
        assert getattr(abi.kvm_run, member).offset == 32
    assert abi.kvm_run_io.data_offset.offset == 8  # type: ignore[attr-defined]
    assert abi.kvm_run_mmio.data.offset == 8  # type: ignore[attr-defined]


def test_flexible_structure_appends_its_entries() -> None:
    msrs = abi.flexible(abi.kvm_msrs, abi.kvm_msr_entry, 3)(nmsrs=3)
    assert ctypes.sizeof(msrs) == 8 + 3 * 16
    msrs.entries[2].data = 7
    assert bytes(msrs)[-8:] == b"\7" + bytes(7)


def test_exit_reason_names_are_exit_reasons_only() -> None:
    assert abi.EXIT_REASON_NAMES[abi.KVM_EXIT_IO] == "KVM_EXIT_IO"
    assert len(abi.EXIT_REASON_NAMES) == len(range(40))
    assert sorted(abi.EXIT_REASON_NAMES) == list(range(40))


def _run_c(tmp_path: Path, body: str) -> str:
    """Compile and run a C program around *body*; skips where that cannot be done."""
    if platform.machine() != "x86_64":
        pytest.skip(f"the C headers here are those of {platform.machine()}, not x86_64")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <errno.h>\n"
        "#include <linux/kvm.h>\n#include <linux/kvm_para.h>\n"
        "#define GENMASK(h, l) ((~0UL << (l)) & (~0UL >> (63 - (h))))\n"
        "int main(void) {\n" + body + "return 0; }\n"
    )
    built = subprocess.run([compiler, "-w", "-o", tmp_path / "layout", source], capture_output=True, text=True)
    if "No such file" in built.stderr:
        pytest.skip("no <linux/kvm.h>")
    assert built.returncode == 0, built.stderr
    return subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout


def test_structures_equal_the_systems_headers(tmp_path: Path) -> None:
    expected = {}
    body = ""
    for name, cls in structures().items():
        if name in NOT_IN_HEADER or name.startswith(NOT_IN_HEADER_PREFIXES):
            continue
        body += f'printf("{name} %zu\\n", sizeof(struct {name}));\n'
        expected[name] = ctypes.sizeof(cls)
        for field, *_ in cls._fields_:
            if field == "_u" or (name, field) == ("kvm_run", "exit"):
                continue
            body += f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));\n'
            expected[f"{name}.{field}"] = getattr(cls, field).offset
    for name in (
        "io",
        "mmio",
        "internal",
        "emulation_failure",
        "msr",
        "system_event",
        "hypercall",
        "hyperv",
        "xen",
    ):
        for field, *_ in MEMBERS[name]._fields_:
            if field == "_u":
                continue
            body += f'printf("run.{name}.{field} %zu\\n", offsetof(struct kvm_run, {name}.{field}));\n'
            kind: type = type(getattr(abi.kvm_run(), name))
            expected[f"run.{name}.{field}"] = 32 + getattr(kind, field).offset
    found = {key: int(value) for key, value in (line.split() for line in _run_c(tmp_path, body).splitlines())}
    assert found == expected


def test_constants_equal_the_systems_headers(tmp_path: Path) -> None:
    names = [
        name
        for name, value in vars(abi).items()
        if isinstance(value, int) and name.startswith(("KVM_", "MSR_KVM_")) and not name.startswith("KVM_VCPU_TSC")
    ]
    body = "".join(
        f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long)({name}));\n#endif\n' for name in names
    )
    found = {key: int(value) for key, value in (line.split() for line in _run_c(tmp_path, body).splitlines())}
    assert len(found) > 400
    assert {name: getattr(abi, name) for name in found} == found
