# SPDX-License-Identifier: Apache-2.0
"""The bus of in-kernel devices."""

from __future__ import annotations

from softkvm.kvm.irq.io_bus import IoBus


class Device:
    """Remembers what it was asked."""

    def __init__(self, value: int | None = 1) -> None:
        self.value = value
        self.writes: list[tuple[int, int, int]] = []

    def io_read(self, address: int, size: int) -> int | None:
        return self.value

    def io_write(self, address: int, size: int, value: int) -> bool:
        self.writes.append((address, size, value))
        return self.value is not None


def test_an_access_goes_to_the_device_whose_range_holds_all_of_it() -> None:
    bus, device = IoBus(), Device(5)
    bus.add(0x60, 4, device)
    assert bus.read(0x60, 4) == 5
    assert bus.read(0x63, 1) == 5
    assert bus.read(0x63, 2) is None
    assert bus.read(0x5F, 1) is None
    assert bus.write(0x61, 1, 9)
    assert device.writes == [(0x61, 1, 9)]


def test_a_device_that_declines_passes_the_access_on() -> None:
    bus, first, second = IoBus(), Device(None), Device(7)
    bus.add(0, 8, first)
    bus.add(4, 8, second)
    assert bus.read(4, 4) == 7
    assert bus.write(4, 4, 1)
    assert first.writes == second.writes == [(4, 4, 1)]


def test_a_removed_device_is_not_asked_again() -> None:
    bus, device = IoBus(), Device()
    bus.add(0, 8, device)
    assert bus.read(0, 1) == 1
    bus.remove(device)
    assert bus.read(0, 1) is None
