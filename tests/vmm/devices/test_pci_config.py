# SPDX-License-Identifier: Apache-2.0
"""PCI configuration mechanism #1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2)."""

import pytest

from softkvm.vmm.devices.pci import host_bridge
from softkvm.vmm.devices.pci_config import PciConfig

ENABLE = 1 << 31
ADDRESS, DATA = 0, 4
INTEL, I82441FX = 0x8086, 0x1237


@pytest.fixture
def config() -> PciConfig:
    config = PciConfig()
    config.add(0, 0, host_bridge())
    return config


def at(config: PciConfig, address: int, offset: int, size: int) -> int:
    config.write(ADDRESS, 4, ENABLE | address)
    return config.read(DATA + offset, size)


def test_data_port_reads_the_selected_dword_and_its_parts(config: PciConfig) -> None:
    assert at(config, 0, 0, 4) == I82441FX << 16 | INTEL
    assert at(config, 0, 0, 2) == INTEL
    assert at(config, 0, 2, 2) == I82441FX
    assert at(config, 0, 3, 1) == I82441FX >> 8


def test_low_bits_of_the_address_select_within_the_dword_as_on_qemu(config: PciConfig) -> None:
    assert at(config, 2, 0, 2) == I82441FX
    assert at(config, 3, 0, 1) == I82441FX >> 8
    assert config.read(ADDRESS, 4) == ENABLE | 3


def test_nothing_is_selected_without_the_enable_bit(config: PciConfig) -> None:
    config.write(ADDRESS, 4, 0)
    assert config.read(DATA, 4) == 0xFFFFFFFF
