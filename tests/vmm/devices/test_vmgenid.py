# SPDX-License-Identifier: Apache-2.0
"""The generation ID in memory, and the event that tells of its change."""

from __future__ import annotations

import pytest

from softkvm.vmm.boot import acpi, layout
from softkvm.vmm.devices.acpi_pm import GPE0_EN, GPE0_STS, AcpiPm
from softkvm.vmm.devices.vmgenid import GPE, VmGenId
from softkvm.vmm.memory import MIB, GuestMemory


def test_it_lies_in_a_reserved_page_of_its_own() -> None:
    """Microsoft's specification: 8-byte aligned, reserved, nothing else of the firmware's in that page."""
    memory = GuestMemory(2 * MIB)
    device = VmGenId(memory, lambda: None)
    acpi.write_tables(memory, range(16))
    assert memory.read(layout.VM_GENERATION, 16) == device.identifier
    assert memory.read(layout.VM_GENERATION + 16, 4080) == bytes(4080)
    reserved = [entry for entry in layout.memory_map(memory) if entry.type == layout.E820_RESERVED]
    assert any(entry.start <= layout.VM_GENERATION < entry.start + entry.size for entry in reserved)
    memory.close()


def test_a_change_is_another_id_and_an_event() -> None:
    memory = GuestMemory(2 * MIB)
    levels: list[int] = []
    pm = AcpiPm(set_irq=levels.append)
    device = VmGenId(memory, lambda: pm.raise_event(GPE))
    pm.write(GPE0_EN, 2, 1 << GPE)
    before = device.identifier
    assert levels == []
    device.change()
    assert device.identifier != before
    assert memory.read(layout.VM_GENERATION, 16) == device.identifier
    assert levels == [1]
    assert pm.read(GPE0_STS, 2) == 1 << GPE
    pm.write(GPE0_STS, 2, 1 << GPE)
    assert levels == [1, 0]
    device.change(bytes(range(16)))
    assert memory.read(layout.VM_GENERATION, 16) == bytes(range(16))
    with pytest.raises(ValueError, match="generation ID of 3 bytes: expected 16"):
        device.change(b"abc")
    memory.close()


def test_two_machines_have_two() -> None:
    memory = GuestMemory(2 * MIB)
    assert VmGenId(memory, lambda: None).identifier != VmGenId(memory, lambda: None).identifier
    memory.close()


def test_a_restored_one_is_the_same_until_it_is_changed() -> None:
    memory = GuestMemory(2 * MIB)
    events: list[int] = []
    device = VmGenId(memory, lambda: events.append(1))
    state = device.save()
    other = VmGenId(memory, lambda: events.append(1))
    other.restore(state)
    assert memory.read(layout.VM_GENERATION, 16) == state["identifier"]
    assert events == []
    memory.close()
