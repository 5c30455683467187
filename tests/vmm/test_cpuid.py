# SPDX-License-Identifier: Apache-2.0
"""Expected values from the SDM's and APM's descriptions of the leaves."""

import pytest

from softkvm import abi
from softkvm.vmm.cpuid import vcpu_cpuid


def supported() -> list[abi.kvm_cpuid_entry2]:
    """A small table like those of KVM_GET_SUPPORTED_CPUID."""
    make = abi.kvm_cpuid_entry2
    return [
        make(function=0, eax=0x1F, ebx=0x68747541, ecx=0x444D4163, edx=0x69746E65),
        make(function=1, eax=0x800F12, ebx=0xFF010800, ecx=1 << 21, edx=1 << 12),
        make(function=4, index=0, eax=0xFC000121),
        make(function=4, index=3, eax=0xFC000163),
        make(function=4, index=4, eax=0),
        make(function=0xB, index=0, edx=99),
        make(function=0x40000000, ebx=0x4B4D564B),
        make(function=0x80000008, eax=0x3030, ecx=0xF0FF),
        make(function=0x8000001D, index=0, eax=0xFFFC121),
        make(function=0x8000001E, eax=7, ebx=0x107, ecx=0x300),
    ]


def table(apic_id: int, vcpus: int) -> dict[tuple[int, int], abi.kvm_cpuid_entry2]:
    entries = vcpu_cpuid(supported(), apic_id, vcpus, deadline_timer=True)
    result = {(entry.function, entry.index): entry for entry in entries}
    assert len(result) == len(entries), "an entry occurs twice"
    return result


@pytest.mark.parametrize(("apic_id", "vcpus", "ids"), [(0, 1, 1), (1, 2, 2), (2, 3, 4), (15, 16, 16)])
def test_leaf_1_has_apic_id_and_logical_processors(apic_id: int, vcpus: int, ids: int) -> None:
    leaf = table(apic_id, vcpus)[1, 0]
    assert leaf.ebx == apic_id << 24 | ids << 16 | 0x0800
    assert bool(leaf.edx & 1 << 28) == (vcpus > 1)  # HTT
    assert leaf.ecx & 1 << 31, "hypervisor present"
    assert leaf.ecx & 1 << 24, "TSC deadline"


def test_leaf_b_describes_one_thread_per_core() -> None:
    entries = table(5, 6)
    assert [(e.eax, e.ebx, e.ecx, e.edx) for e in (entries[0xB, i] for i in range(3))] == [
        (0, 1, 0x100, 5),
        (3, 6, 0x201, 5),
        (0, 0, 0x002, 5),
    ]
    assert (0x1F, 1) in entries


def test_caches_are_shared_by_level() -> None:
    entries = table(0, 4)
    assert entries[4, 0].eax >> 14 & 0xFFF == 0
    assert entries[4, 3].eax >> 14 & 0xFFF == 3
    assert entries[4, 0].eax >> 26 == 3
    assert entries[4, 4].eax == 0


def test_amd_leaves_count_cores() -> None:
    entries = table(2, 3)
    assert entries[0x80000008, 0].ecx == 2 << 12 | 2
    assert entries[0x8000001E, 0].eax == 2
    assert entries[0x8000001E, 0].ebx & 0xFF == 2


def test_brand_string_is_spelt_over_three_leaves() -> None:
    entries = table(0, 1)
    text = b"".join(
        getattr(entries[leaf, 0], register).to_bytes(4, "little")
        for leaf in (0x80000002, 0x80000003, 0x80000004)
        for register in ("eax", "ebx", "ecx", "edx")
    )
    assert text.rstrip(b"\0") == b"softkvm virtual processor"
    assert len(text) == 48


def test_the_supported_table_itself_is_left_alone() -> None:
    original = supported()
    before = [bytes(entry) for entry in original]
    vcpu_cpuid(original, 3, 4, deadline_timer=False)
    assert [bytes(entry) for entry in original] == before
