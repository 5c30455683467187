# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's constants and structures: each once, with the values of the TLFS."""

import ast
import ctypes
from collections import Counter
from pathlib import Path

import pytest

from softkvm import abi
from softkvm.abi.x86 import hyperv

SOURCE = Path(hyperv.__file__)
#: Where an element begins that one with the same number belongs to: a leaf or an MSR of its own.
PLACES = ("HYPERV_CPUID_", "HV_X64_MSR_")


def definitions() -> list[tuple[str, int | None]]:
    """Names that the module defines, in their order, with their values."""
    names = []
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ClassDef):
            names.append(node.name)
    return [(name, value if isinstance(value := getattr(hyperv, name), int) else None) for name in names]


def test_nothing_is_defined_twice() -> None:
    assert [name for name, times in Counter(name for name, _ in definitions()).items() if times > 1] == []


def test_nothing_of_it_is_defined_elsewhere() -> None:
    own = {name for name, _ in definitions()}
    for path in SOURCE.parents[1].rglob("*.py"):
        if path == SOURCE:
            continue
        tree = ast.parse(path.read_text())
        targets = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        assert not targets & own, path


@pytest.mark.parametrize("prefix", PLACES)
def test_no_leaf_and_no_register_has_two_names(prefix: str) -> None:
    numbers = Counter(
        value for name, value in definitions() if name.startswith(prefix) and value is not None and value >> 30 == 1
    )
    assert [hex(number) for number, times in numbers.items() if times > 1] == []


def test_no_bit_of_a_group_has_two_names() -> None:
    """A group's constants are of one leaf, register or kind: a comment or an empty line begins it."""
    groups: list[list[str]] = [[]]
    for line in SOURCE.read_text().splitlines():
        if not line or line.startswith("# "):
            groups.append([])
        elif " = 1 << " in line:
            groups[-1].append(line)
    leaf_groups = [group for group in groups if len(group) > 5]
    assert len(leaf_groups) >= 4, "leaf 0x40000003's three registers and 0x40000004's EAX"
    for group in leaf_groups:
        bits = Counter(line.split(" = ")[1].split("#")[0].strip() for line in group)
        assert [bit for bit, times in bits.items() if times > 1] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # TLFS 6.0b: 2.4.4, 2.4.5, appendix A (hypercalls), B (status), F (registers)
        ("HV_MSR_SYNIC_AVAILABLE", 0x4), ("HV_MSR_REFERENCE_TSC_AVAILABLE", 0x200), ("HV_SIGNAL_EVENTS", 0x20),
        ("HV_STIMER_DIRECT_MODE_AVAILABLE", 0x80000), ("HV_X64_CLUSTER_IPI_RECOMMENDED", 0x400),
        ("HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX", 0x14), ("HVCALL_SIGNAL_EVENT", 0x5D), ("HV_STATUS_ACCESS_DENIED", 6),
        ("HV_X64_MSR_REFERENCE_TSC", 0x40000021), ("HV_X64_MSR_SINT15", 0x4000009F),
        ("HV_X64_MSR_STIMER3_COUNT", 0x400000B7), ("HV_X64_MSR_CRASH_CTL", 0x40000105),
        ("HV_HYPERCALL_RSVD_MASK", 0xF000_F000_F800_0000), ("HV_HYPERCALL_VARHEAD_MASK", 0x7FE_0000),
        ("HVMSG_TIMER_EXPIRED", 0x80000010),
    ],
)  # fmt: skip
def test_values_are_the_specifications(name: str, value: int) -> None:
    assert getattr(abi, name) == value


@pytest.mark.parametrize(
    ("structure", "size", "offsets"),
    [
        (abi.hv_message, 256, {"payload_size": 4, "message_flags": 5, "sender": 8, "payload": 16}),
        (abi.hv_message_page, 4096, {}),
        (abi.hv_timer_message_payload, 24, {"expiration_time": 8, "delivery_time": 16}),
        (abi.hv_post_message, 256, {"message_type": 8, "payload_size": 12, "payload": 16}),
        (abi.ms_hyperv_tsc_page, 24, {"tsc_scale": 8, "tsc_offset": 16}),
    ],
)
def test_structures_are_the_specifications(
    structure: type[ctypes.Structure], size: int, offsets: dict[str, int]
) -> None:
    assert ctypes.sizeof(structure) == size
    assert {name: getattr(structure, name).offset for name in offsets} == offsets
