# SPDX-License-Identifier: Apache-2.0
"""PCI configuration mechanism #1 at ports 0xCF8 to 0xCFF, for the functions of bus 0.

Source: PCI Local Bus Specification 3.0, section 3.2.2.3.2. A configuration read of an absent function returns all
ones and a write is dropped, which is how a guest finds what is there. Byte accesses inside 0xCF8..0xCFB are not the
mechanism's; the one to 0xCF9 is the reset control register.

The specification leaves bits 1:0 of CONFIG_ADDRESS zero. As on QEMU's host bridge they are kept and select within the
dword: kvm-unit-tests reads the device ID with address 2 and the data port's first bytes.
"""

from typing import Any, Final

from softkvm.vmm.devices.acpi_pm import RESET_PORT, ResetRegister
from softkvm.vmm.devices.pci import Function

PCI_CONFIG_PORT: Final = 0xCF8
PCI_CONFIG_SIZE: Final = 8

_ENABLE: Final = 1 << 31
_ADDRESS_MASK: Final = _ENABLE | 0x00FF_FFFF
_DATA_OFFSET: Final = 4
_RESET_OFFSET: Final = RESET_PORT - PCI_CONFIG_PORT


class PciConfig:
    """CONFIG_ADDRESS (offset 0) and CONFIG_DATA (offset 4); ``reset`` is the register that shares their ports."""

    def __init__(self, reset: ResetRegister | None = None) -> None:
        self._reset = reset
        self._address = 0
        self._functions: dict[int, Function] = {}

    def add(self, device: int, function: int, target: Function) -> None:
        """Put *target* on bus 0; ValueError if that place is taken or does not exist."""
        place = device << 3 | function
        if not (0 <= device < 32 and 0 <= function < 8) or place in self._functions:
            raise ValueError(f"PCI function {device:02x}.{function}: expected a free one from 00.0 to 1f.7")
        self._functions[place] = target

    def free_device(self) -> int:
        """Return the lowest device number that nobody has; ValueError if all are taken."""
        for device in range(32):
            if not any(place >> 3 == device for place in self._functions):
                return device
        raise ValueError("all 32 device numbers of PCI bus 0 are taken")

    @property
    def functions(self) -> dict[tuple[int, int], Function]:
        """Every function, by its device and function number."""
        return {(place >> 3, place & 7): function for place, function in sorted(self._functions.items())}

    def _selected(self) -> Function | None:
        """The function that CONFIG_ADDRESS selects, if it is there."""
        address = self._address
        if not address & _ENABLE or address >> 16 & 0xFF:
            return None
        return self._functions.get(address >> 8 & 0xFF)

    def _register(self, offset: int) -> int:
        """The register that an access at *offset* means."""
        return self._address & 0xFF | offset & 3

    def read(self, offset: int, size: int) -> int:
        """The latched address, a register of the selected function, or all ones: nothing is there."""
        if offset == 0 and size == 4:
            return self._address
        if offset >= _DATA_OFFSET:
            selected = self._selected()
            if selected is not None:
                return selected.read(self._register(offset), size)
        if offset == _RESET_OFFSET and size == 1 and self._reset is not None:
            return self._reset.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Latch an address, or write a register of the selected function; else the write is dropped."""
        if offset == 0 and size == 4:
            self._address = value & _ADDRESS_MASK
        elif offset == _RESET_OFFSET and size == 1 and self._reset is not None:
            self._reset.write(0, 1, value)
        elif offset >= _DATA_OFFSET:
            selected = self._selected()
            if selected is not None:
                selected.write(self._register(offset), size, value)

    def save(self) -> dict[str, Any]:
        """The address latch, every function, and the register that shares the ports."""
        state: dict[str, Any] = {"address": self._address}
        if self._functions:
            state["functions"] = {place: function.save() for place, function in self._functions.items()}
        if self._reset is not None:
            state["reset"] = self._reset.save()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._address = state["address"]
        for place, function in state.get("functions", {}).items():
            self._functions[place].restore(function)
        if self._reset is not None:
            self._reset.restore(state["reset"])
