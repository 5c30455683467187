# SPDX-License-Identifier: Apache-2.0
"""What both transports do with registers, status and interrupts: VIRTIO 1.3, 2.1, 3.1, 4.1 and 4.2."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    VERSION_1,
    Driver,
    MmioRegisters,
    PciRegisters,
    driving,
)

from softkvm.vmm.virtio.device import VirtioDevice

TRANSPORTS = pytest.mark.parametrize("transport", ["pci", "mmio"])


class Box(VirtioDevice):
    """A device with a configuration space that can be written, and a record of what happens to it."""

    type = 42
    name = "box"
    features = 1 << 3 | 1 << 50
    queue_sizes = (4, 64)

    def __init__(self) -> None:
        super().__init__()
        self.config = b"0123456789abcdef"
        self.log: list[str] = []
        self.broken = False

    def activate(self) -> None:
        self.log.append(f"activate {self.driver_features:#x} {[queue.ready for queue in self.queues]}")

    def reset(self) -> None:
        self.log.append("reset")

    def notified(self, index: int) -> None:
        self.log.append(f"notified {index}")
        if self.broken:
            raise ZeroDivisionError("a bug")

    def write_config(self, offset: int, data: bytes) -> None:
        self.config = self.config[:offset] + data + self.config[offset + len(data) :]


@TRANSPORTS
def test_a_driver_comes_to_driver_ok_by_the_steps_of_3_1(transport: str) -> None:
    with driving(Box(), transport=transport, queues=1) as driver:
        box = driver.device
        assert isinstance(box, Box)
        assert driver.registers.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        assert box.log[-1].endswith("[True, False]")
        assert box.negotiated(3)
        assert box.negotiated(50)
        assert box.negotiated(VERSION_1)
        driver.registers.notify(0)
        driver.registers.notify(1)
        driver.wait_until(lambda: "notified 0" in box.log)
        driver.registers.set_status(0)
        assert box.log[-1] == "reset"
        assert driver.registers.status() == 0
        driver.registers.notify(0)  # of a device that isn't active
        driver.transport.worker.call(box.log.append, "behind that")
        driver.wait_until(lambda: box.log[-1] == "behind that")
        assert box.log[-2] == "reset"


@TRANSPORTS
@pytest.mark.parametrize("features", [1 << 3, 1 << VERSION_1 | 1 << 4])
def test_features_that_cannot_be_are_not_ok(transport: str, features: int) -> None:
    """Without VERSION_1, or with one that was not offered: the driver reads that FEATURES_OK is clear (3.1.1)."""
    with driving(Box(), transport=transport, start=False) as driver:
        registers = driver.registers
        registers.set_status(ACKNOWLEDGE | DRIVER)
        registers.accept(features)
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert registers.status() == ACKNOWLEDGE | DRIVER
        registers.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK)
        assert registers.status() == ACKNOWLEDGE | DRIVER
        assert isinstance(driver.device, Box)
        assert not any(line.startswith("activate") for line in driver.device.log)


@TRANSPORTS
def test_features_stay_what_was_agreed(transport: str) -> None:
    with driving(Box(), transport=transport) as driver:
        before = driver.transport._driver_features
        driver.registers.accept(0)
        assert driver.transport._driver_features == before


@TRANSPORTS
def test_configuration_space(transport: str) -> None:
    with driving(Box(), transport=transport) as driver:
        registers = driver.registers
        assert [registers.config(at, size) for at, size in ((0, 1), (2, 2), (4, 4))] == [0x30, 0x3332, 0x37363534]
        assert registers.config(14, 4) == 0x6665  # what is behind reads as zeroes
        assert registers.config(200, 4) == 0
        registers.set_config(1, 2, 0x4241)
        assert registers.config(0, 4) == 0x33424130
        before = registers.generation()
        registers.interrupts()
        driver.device.config_changed()
        assert registers.generation() == (before + 1) % 256
        assert registers.interrupts() & 2


@TRANSPORTS
def test_what_a_device_raises_leaves_it_in_need_of_a_reset(transport: str, capfd: pytest.CaptureFixture[str]) -> None:
    with driving(Box(), transport=transport) as driver:
        box = driver.device
        assert isinstance(box, Box)
        box.broken = True
        driver.registers.notify(0)
        driver.wait_until(lambda: driver.registers.status() & NEEDS_RESET)
        box.broken = False
        driver.start()
        driver.registers.notify(1)
        driver.wait_until(lambda: box.log[-1] == "notified 1")
    assert "box: the device needs a reset: ZeroDivisionError: a bug" in capfd.readouterr().err


@TRANSPORTS
def test_queues_that_are_not_there_read_as_none(transport: str) -> None:
    with driving(Box(), transport=transport, start=False) as driver:
        registers = driver.registers
        assert [registers.size_max(index) for index in (0, 1, 2, 0xFFFF)] == [4, 64, 0, 0]
        registers.set_up(2, 4, (0, 0, 0))
        for index in (2, 1000):
            driver.transport.notify(index)


def pci(driver: Driver) -> tuple[PciRegisters, Any]:
    registers = driver.registers
    assert isinstance(registers, PciRegisters)
    return registers, registers.transport


def test_pci_identity_is_that_of_a_modern_device() -> None:
    with driving(Box()) as driver:
        registers, transport = pci(driver)
        function = transport.function
        assert function.read(0, 4) == 0x1040 + 42 << 16 | 0x1AF4
        assert function.read(8, 1) >= 1
        assert sorted(set(registers.at)) == [1, 2, 3, 4]
        assert registers.capabilities.count(9) == 5
        assert registers.capabilities.count(0x11) == 1


def test_pci_vectors_wait_behind_a_mask() -> None:
    """PCI 3.0, 6.8.2: a masked vector's bit is in the pending bit array, and is sent when the mask goes."""
    with driving(Box()) as driver:
        registers, transport = pci(driver)
        msix = transport.msix
        sent = driver.vm.messages

        def pending() -> int:
            return int(msix.read(0x800, 4))

        msix.write(16 * 1 + 12, 4, 1)
        transport.interrupt_queue(0)
        assert (sent, pending()) == ([], 1 << 1)
        transport.interrupt_queue(1)
        assert sent == [2]
        msix.write(16 * 1 + 12, 4, 0)
        assert (sent, pending()) == ([2, 1], 0)
        transport.function.write(registers.msix + 2, 2, 0xC000)  # function mask
        transport.interrupt_config()
        assert (len(sent), pending()) == (2, 1)
        transport.function.write(registers.msix + 2, 2, 0x8000)
        assert (sent, pending()) == ([2, 1, 0], 0)


def test_pci_vectors_that_are_not_there_are_refused() -> None:
    with driving(Box()) as driver:
        _, transport = pci(driver)
        for at in (16, 26):
            transport.write(at, 2, 2)
            assert transport.read(at, 2) == 2
            transport.write(at, 2, 3)  # of 0 to 2
            assert transport.read(at, 2) == 0xFFFF
        transport.interrupt_queue(1)
        transport.interrupt_config()
        assert driver.vm.messages == []


def test_pci_line_is_up_until_the_status_is_read() -> None:
    with driving(Box(), msix=False) as driver:
        registers, transport = pci(driver)
        function = transport.function
        assert function.read(0x3D, 1) == 1
        transport.interrupt_queue(0)
        transport.interrupt_queue(1)
        assert driver.vm.levels == [(10, 1)]
        assert function.read(6, 2) & 8
        driver.device.config_changed()
        assert registers.interrupts() == 3
        assert driver.vm.levels == [(10, 1), (10, 0)]
        assert registers.interrupts() == 0
        assert not function.read(6, 2) & 8
        function.write(4, 2, 0x406)  # interrupt disable
        transport.interrupt_queue(0)
        assert len(driver.vm.levels) == 2
        function.write(4, 2, 0x006)
        assert driver.vm.levels[2:] == [(10, 1)]
        registers.set_status(0)
        assert driver.vm.levels[3:] == [(10, 0)]


def test_pci_structures_are_reached_through_configuration_space() -> None:
    """4.1.4.9: the window's BAR, offset and length, and then its data."""
    with driving(Box(), start=False) as driver:
        registers, transport = pci(driver)
        function, window = transport.function, registers.window

        def access(offset: int, size: int) -> None:
            function.write(window + 4, 1, 0)
            function.write(window + 8, 4, offset)
            function.write(window + 12, 4, size)

        access(registers.at[1] + 20, 1)
        function.write(window + 16, 1, 3)
        assert registers.status() == 3
        assert function.read(window + 16, 1) == 3
        access(registers.at[4] + 4, 4)
        assert function.read(window + 16, 4) == 0x37363534
        function.write(window + 16, 4, 0x5A5A5A5A)
        assert registers.config(4, 4) == 0x5A5A5A5A
        for offset, size, width in ((0, 4, 2), (1, 2, 2), (0x4000, 4, 4), (0xFFFFFFFC, 4, 4), (0, 8, 4)):
            access(offset, size)
            assert function.read(window + 16, width) == (1 << 8 * width) - 1
            function.write(window + 16, width, 0)
        function.write(window + 4, 1, 1)
        assert function.read(window + 16, 4) == 0xFFFFFFFF


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_pci_common_configuration_is_its_bytes_in_any_width(size: int) -> None:
    with driving(Box()) as driver:
        _, transport = pci(driver)
        for at in (0, 8, 16, 24, 32, 40, 48, 56):
            whole = b"".join(transport.read(at + n, 1).to_bytes(1, "little") for n in range(8))
            for start in range(0, 8, size):
                value = transport.read(at + start, size)
                assert value.to_bytes(size, "little") == whole[start : start + size]
        transport.write(22, 2, 1)
        transport.write(32, 8, 1 << 40 | 5)  # of a queue that is enabled: stays
        assert transport.read(32, 8) != 1 << 40 | 5


def test_mmio_registers() -> None:
    with driving(Box(), transport="mmio") as driver:
        registers = driver.registers
        assert isinstance(registers, MmioRegisters)
        read = registers.transport.read
        assert [read(at, 4) for at in (0, 4, 8, 0xC)] == [0x74726976, 2, 42, 0x1AF4]
        assert [read(at, 4) for at in (0xB0, 0xB4)] == [0xFFFFFFFF] * 2
        assert read(0, 1) == read(2, 2) == read(0xF0, 4) == 0
        registers.transport.interrupt_queue(0)
        driver.device.config_changed()
        assert driver.vm.levels == [(16, 1), (16, 0)] * 2
        assert read(0x60, 4) == 3
        registers.transport.write(0x64, 4, 1)
        assert read(0x60, 4) == 2
        registers.transport.write(0x30, 4, 0)
        registers.transport.write(0x44, 4, 0)
        assert read(0x44, 4) == 0
        assert not driver.device.queues[0].ready
        assert driver.device.queues[1].ready
