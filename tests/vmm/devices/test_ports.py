# SPDX-License-Identifier: Apache-2.0
"""The one-register devices: pvpanic, debug exit, PCI configuration."""

from softkvm.vmm.bus import Bus
from softkvm.vmm.devices.acpi_pm import ResetRegister
from softkvm.vmm.devices.debug_exit import DebugExit
from softkvm.vmm.devices.pci_config import PciConfig
from softkvm.vmm.devices.pvpanic import CRASH_LOADED, PANICKED, SHUTDOWN, PvPanic, PvPanicPci


def test_pvpanic_reports_known_events_only() -> None:
    events: list[int] = []
    device = PvPanic(events.append)
    assert device.read(0) == PANICKED | CRASH_LOADED | SHUTDOWN
    device.write(0, 1, 0x80)
    device.write(0, 1, 0x81)
    assert events == [PANICKED]


def test_pvpanic_is_a_pci_function_too() -> None:
    events: list[int] = []
    function = PvPanicPci(PvPanic(events.append), 0xFE010000)
    assert function.read(0, 4) == 0x00111B36
    assert function.read(8, 4) == 0x08800001
    mmio = Bus("memory", 52)
    function.connect(Bus("I/O port", 16), mmio)
    address = function.read(0x10, 4)
    assert mmio.read(address, 1) == PANICKED | CRASH_LOADED | SHUTDOWN
    mmio.write(address, 1, CRASH_LOADED)
    assert events == [CRASH_LOADED]


def test_debug_exit_status_is_odd_as_qemus() -> None:
    statuses: list[int] = []
    device = DebugExit(statuses.append)
    for value in (0, 1, 0x10, 0xFFFFFFFF):
        device.write(0, 4, value)
    assert statuses == [1, 3, 0x21, 0xFF]


def test_pci_mechanism_1_answers_and_finds_nothing() -> None:
    pci = PciConfig()
    pci.write(0, 4, 0x80000000)
    assert pci.read(0, 4) == 0x80000000  # pci_check_type1()
    for device in range(32):
        pci.write(0, 4, 0x80000000 | device << 11)
        assert pci.read(4, 4) == 0xFFFFFFFF
        assert pci.read(6, 2) == 0xFFFF
        assert pci.read(7, 1) == 0xFF


def test_reset_register_shares_the_address_port() -> None:
    resets: list[int] = []
    pci = PciConfig(ResetRegister(lambda: resets.append(1)))
    pci.write(0, 4, 0x80000600)  # a configuration address is no reset
    assert resets == []
    pci.write(1, 1, 0x06)
    assert resets == [1]
    assert pci.read(0, 4) == 0x80000600
