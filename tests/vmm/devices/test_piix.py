# SPDX-License-Identifier: Apache-2.0
"""The chip set that firmware sets up: PAM registers, and where the PIIX4 places the ACPI registers."""

from __future__ import annotations

from softkvm.vmm.bus import Bus
from softkvm.vmm.devices import piix


class Block:
    """Sixteen ports."""

    def read(self, offset: int, size: int) -> int:
        return 0x40 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        pass


def test_pam_registers_begin_off_and_keep_what_is_written() -> None:
    bridge = piix.HostBridge()
    assert bridge.read(piix.PAM, 4) == 0
    bridge.write(piix.PAM, 1, 0x30)
    bridge.write(piix.PAM + 1, 4, 0xFFFF_FFFF)
    assert bridge.read(piix.PAM, 1) == 0x30
    assert bridge.read(piix.PAM + 1, 4) == 0x3333_3333


def test_the_block_is_where_pmba_says_while_it_is_enabled() -> None:
    bus, places = Bus("port", 16), list[int]()
    power = piix.PowerManagement(bus, Block(), 16, places.append)
    power.write(piix.PM_BASE, 4, 0x600)
    assert bus.read(0x608, 1) == 0xFF  # not enabled yet
    power.write(piix.PM_MISC, 1, 1)
    assert bus.read(0x608, 1) == 0x48
    power.write(piix.PM_BASE, 4, 0xB000 | 0x3F)
    assert (bus.read(0x608, 1), bus.read(0xB008, 1)) == (0xFF, 0x48)
    assert power.read(piix.PM_BASE, 4) == 0xB001
    assert places == [0x600, 0xB000]
    saved = power.save()
    power.write(piix.PM_MISC, 1, 0)
    assert bus.read(0xB008, 1) == 0xFF
    power.restore(saved)
    assert bus.read(0xB008, 1) == 0x48


def test_a_place_that_another_device_has_is_not_taken() -> None:
    bus, places = Bus("port", 16), list[int]()
    bus.add(0x604, 4, Block(), "other")
    power = piix.PowerManagement(bus, Block(), 16, places.append)
    power.write(piix.PM_MISC, 1, 1)
    power.write(piix.PM_BASE, 4, 0x600)
    assert not places
    power.write(piix.PM_BASE, 4, 0x700)
    assert places == [0x700]


def test_system_management_mode_is_said_to_be_set_up() -> None:
    power = piix.PowerManagement(Bus("port", 16), Block(), 16, lambda base: None)
    assert power.read(piix.DEVICE_ACTIVITY_B, 4) == 1 << 25
