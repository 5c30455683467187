# SPDX-License-Identifier: Apache-2.0
"""The test device of kvm-unit-tests' PC platform: what a test program needs to provoke exits and interrupts.

=============  =======================================================================================
port           what it does
=============  =======================================================================================
0xE0 to 0xE3   four bytes that read back what was written, in accesses of every size
0xE4 to 0xE7   flush: the guest page whose address is written leaves KVM's page tables until it is next used
0xE8 to 0xEB   the same four bytes as at 0xE0, answered byte by byte
0xF1           debug console: bytes go to the machine's console
0x2000 + n     the level of interrupt line n (n < 24)
memory
0xFF000000     64 KiB of memory that is a device: every access is an exit
=============  =======================================================================================

Source: the behaviour of QEMU's ``pc-testdev`` as kvm-unit-tests use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.bus import Bus

LATCH_PORT: Final = 0xE0
FLUSH_PORT: Final = 0xE4
LATCH_BYTE_PORT: Final = 0xE8
CONSOLE_PORT: Final = 0xF1
IRQ_PORT: Final = 0x2000
IRQ_LINES: Final = 24
MEMORY_ADDRESS: Final = 0xFF000000
MEMORY_SIZE: Final = 0x10000
_LATCH_SIZE: Final = 4
_PAGE_MASK: Final = 0xFFF


class Latch:
    """Bytes that read back what was written to them."""

    def __init__(self, data: bytearray) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> int:
        """The bytes from *offset*."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep *value* at *offset*."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")


class Flush:
    """Calls ``flush(gpa)`` with the address of the page that a write names."""

    def __init__(self, flush: Callable[[int], object] | None) -> None:
        self._flush = flush

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Flush the page that holds *value*."""
        if self._flush is not None:
            self._flush(value & ~_PAGE_MASK)


class IrqLines:
    """Sets interrupt line *offset* to the value written: ``set_irq(line, level)``."""

    def __init__(self, set_irq: Callable[[int, int], object]) -> None:
        self._set_irq = set_irq

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Any value but zero raises the line."""
        self._set_irq(offset, int(value != 0))


class DebugConsole:
    """A port whose bytes go to ``output``."""

    def __init__(self, output: Callable[[bytes], object]) -> None:
        self._output = output

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Print one byte."""
        self._output(bytes([value & 0xFF]))


class TestDevice:
    """All of it, on the machine's buses.

    *set_irq* drives a line of the interrupt chips, *flush* drops the mapping of a guest page, *output* is the console.
    """

    __test__ = False  # pytest: not a test class

    def __init__(
        self,
        set_irq: Callable[[int, int], object],
        flush: Callable[[int], object] | None = None,
        output: Callable[[bytes], object] | None = None,
    ) -> None:
        self._latch = bytearray(_LATCH_SIZE)
        self._memory = bytearray(MEMORY_SIZE)
        self._set_irq = set_irq
        self._flush = flush
        self._output = output

    def attach(self, pio: Bus, mmio: Bus) -> None:
        """Register every range."""
        latch = Latch(self._latch)
        pio.add(LATCH_PORT, _LATCH_SIZE, latch, "testdev latch")
        pio.add(FLUSH_PORT, 4, Flush(self._flush), "testdev flush")
        pio.add(LATCH_BYTE_PORT, _LATCH_SIZE, latch, "testdev latch, byte by byte")
        if self._output is not None:
            pio.add(CONSOLE_PORT, 1, DebugConsole(self._output), "debug console")
        pio.add(IRQ_PORT, IRQ_LINES, IrqLines(self._set_irq), "testdev irq lines")
        mmio.add(MEMORY_ADDRESS, MEMORY_SIZE, Latch(self._memory), "testdev memory")

    def save(self) -> dict[str, Any]:
        """The latch and the memory."""
        return {"latch": bytes(self._latch), "memory": bytes(self._memory)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._latch[:] = state["latch"]
        self._memory[:] = state["memory"]
