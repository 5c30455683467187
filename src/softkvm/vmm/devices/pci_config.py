# SPDX-License-Identifier: Apache-2.0
"""PCI configuration mechanism #1 at ports 0xCF8 to 0xCFF, with no function behind it.

Source: PCI Local Bus Specification 3.0, section 3.2.2.3.2. A configuration read of an absent function returns all
ones and a write is dropped, which is how a guest finds that there is no host bridge and no bus. Byte accesses inside
0xCF8..0xCFB are not the mechanism's; the one to 0xCF9 is the reset control register.
"""

from typing import Any, Final

from softkvm.vmm.devices.acpi_pm import RESET_PORT, ResetRegister

PCI_CONFIG_PORT: Final = 0xCF8
PCI_CONFIG_SIZE: Final = 8

_ENABLE: Final = 1 << 31
_ADDRESS_MASK: Final = _ENABLE | 0x00FF_FFFC
_RESET_OFFSET: Final = RESET_PORT - PCI_CONFIG_PORT


class PciConfig:
    """CONFIG_ADDRESS (offset 0) and CONFIG_DATA (offset 4); ``reset`` is the register that shares their ports."""

    def __init__(self, reset: ResetRegister | None = None) -> None:
        self._reset = reset
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        """The latched address, or all ones: nothing is there."""
        if offset == 0 and size == 4:
            return self._address
        if offset == _RESET_OFFSET and size == 1 and self._reset is not None:
            return self._reset.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Latch an address; data writes are dropped."""
        if offset == 0 and size == 4:
            self._address = value & _ADDRESS_MASK
        elif offset == _RESET_OFFSET and size == 1 and self._reset is not None:
            self._reset.write(0, 1, value)

    def save(self) -> dict[str, Any]:
        """The address latch."""
        return {"address": self._address}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._address = state["address"]
