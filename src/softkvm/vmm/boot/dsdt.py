# SPDX-License-Identifier: Apache-2.0
"""The definition block: what a guest cannot find by itself, and which resources it takes.

Source: ACPI specification 6.4, section 5.6.1 (what devices are told of how), 6.2.2 (_CRS), 6.2.13 (_PRT), 7.4.2
(\\_S3 and \\_S5);
PCI Firmware Specification 3.2, section 4.1 (the host bridge's resources).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from softkvm.vmm.boot import aml, layout
from softkvm.vmm.devices import acpi_pm, cmos, hpet, pci_config, pvpanic, serial, vmgenid

DEVICE_CHANGED = 0x80  # a device's own first notification (5.6.6)
PRESENT = 0xF  # _STA: present, enabled, shown, working


class VirtioMmio(NamedTuple):
    """A virtio device's registers, and the interrupt that it raises."""

    address: int
    size: int
    gsi: int


class Devices(NamedTuple):
    """What a machine has that not every one has."""

    hpet: bool = True
    pci_lines: Sequence[tuple[int, int]] = ()
    """PCI devices on bus 0 whose INTA# is wired, and to which GSI."""
    virtio_mmio: Sequence[VirtioMmio] = ()
    firmware: bool = False
    """Firmware boots the machine: it owns the BIOS area, and whether it can resume from S3 is its own affair."""
    pci_memory: int = layout.PCI_MEMORY
    """Where the memory of PCI devices may begin."""


def definition_block(devices: Devices) -> bytes:
    """Return the terms of the DSDT."""
    terms = [_pci_host_bridge(devices), _com1(), _rtc(), _panic_event()]
    if not devices.firmware:
        terms.append(_generation())
    if devices.hpet:
        terms.append(_hpet())
    terms += [_virtio_mmio(number, device) for number, device in enumerate(devices.virtio_mmio)]
    block = _sleep_states(s3=not devices.firmware) + aml.scope("_SB_", *terms)
    return block if devices.firmware else block + _events()


def _sleep_states(*, s3: bool) -> bytes:
    """Return what PM1_CNT.SLP_TYP is for suspend to RAM and for soft off."""
    states = (*((("_S3_", acpi_pm.S3_SLP_TYP),) if s3 else ()), ("_S5_", acpi_pm.S5_SLP_TYP))
    return b"".join(
        aml.name(path, aml.package(aml.integer(kind), aml.integer(kind), aml.integer(0), aml.integer(0)))
        for path, kind in states
    )


def _pci_host_bridge(devices: Devices) -> bytes:
    """Return the root of PCI: all buses, the ports and the memory that no chip of the machine's has."""
    routing = [
        aml.package(aml.integer(device << 16 | 0xFFFF), aml.integer(0), aml.integer(0), aml.integer(gsi))
        for device, gsi in devices.pci_lines
    ]
    config = pci_config.PCI_CONFIG_PORT
    config_end = config + pci_config.PCI_CONFIG_SIZE
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.word_bus_numbers(0, 0xFF),
                aml.io(config, pci_config.PCI_CONFIG_SIZE),
                aml.word_io(0, config - 1),
                aml.word_io(config_end, 0xFFFF),
                aml.dword_memory(layout.VIDEO_MEMORY, layout.VIDEO_MEMORY_END - 1),
                aml.dword_memory(devices.pci_memory, layout.PCI_MEMORY_END - 1),
            ),
        ),
        *([aml.name("_PRT", aml.package(*routing))] if routing else []),
    )


def _com1() -> bytes:
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_STA", aml.integer(PRESENT)),
        aml.name(
            "_CRS",
            aml.resource_template(aml.io(serial.COM1_PORT, serial.REGISTERS), aml.irq(serial.COM1_IRQ)),
        ),
    )


def _rtc() -> bytes:
    return aml.device(
        "RTC_",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resource_template(aml.io(cmos.CMOS_PORT, 2), aml.irq(cmos.RTC_IRQ))),
    )


def _panic_event() -> bytes:
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_STA", aml.integer(PRESENT)),
        aml.name("_CRS", aml.resource_template(aml.io(pvpanic.PVPANIC_PORT, 1))),
    )


def _generation() -> bytes:
    """Return the virtual machine generation ID's device (Microsoft's specification of it): where the ID lies."""
    address = layout.VM_GENERATION
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("SKVM0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(address & 0xFFFFFFFF), aml.integer(address >> 32))),
    )


def _events() -> bytes:
    """Return what the general-purpose events mean (5.6.4): whom the guest notifies of each."""
    handlers = [aml.method(f"_E{vmgenid.GPE:02X}", 0, aml.notify("\\_SB.VGEN", DEVICE_CHANGED))]
    return aml.scope("_GPE", *handlers)


def _hpet() -> bytes:
    """Return the HPET's memory (IA-PC HPET specification 1.0a, section 3.2.5); the HPET table has the rest."""
    return aml.device(
        "HPET",
        aml.name("_HID", aml.eisa_id("PNP0103")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_STA", aml.integer(PRESENT)),
        aml.name("_CRS", aml.resource_template(aml.memory32_fixed(hpet.HPET_ADDRESS, hpet.HPET_SIZE))),
    )


def _virtio_mmio(number: int, device: VirtioMmio) -> bytes:
    """Return a virtio device, by the hardware ID that Linux knows it by (drivers/virtio/virtio_mmio.c)."""
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name(
            "_CRS",
            aml.resource_template(aml.memory32_fixed(device.address, device.size), aml.interrupt(device.gsi)),
        ),
    )
