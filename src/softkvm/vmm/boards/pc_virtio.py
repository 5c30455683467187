# SPDX-License-Identifier: Apache-2.0
"""Virtio devices on a PC: their places on PCI and in memory, their interrupt lines, and what ACPI says of them.

PCI functions signal by MSI-X; without, INTA# of each is wired to one of two ISA lines, which both interrupt chips have.
virtio-mmio devices have lines of the IOAPIC alone, edge-triggered, and share them when there are more.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from softkvm import api
from softkvm.abi.sizes import Size
from softkvm.vmm.boot import layout
from softkvm.vmm.boot.dsdt import Devices, VirtioMmio
from softkvm.vmm.devices import pci_msix
from softkvm.vmm.devices.pci_config import PciConfig
from softkvm.vmm.devices.spec import MMIO, Placement
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.virtio import mmio, pci
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.transport import Options, Transport
from softkvm.vmm.virtio.worker import Worker

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

INTX_LINES: Final = (10, 11)
MMIO_LINES: Final = range(16, 24)
PCI_STRIDE: Final = 0x8000  # what one function's registers take, a power of two
_PCI_DEVICES: Final = Size("virtio-pci devices", 31, ConfigError, effect="ConfigError", where=__name__)
_MMIO_DEVICES: Final = Size(
    "virtio-mmio devices",
    (layout.VIRTIO_MMIO_END - layout.VIRTIO_MMIO) // mmio.SIZE,
    ConfigError,
    effect="ConfigError",
    where=__name__,
)


class SharedLine:
    """A level-triggered interrupt line that is up while any of its sources is."""

    def __init__(self, vm: api.Vm, gsi: int) -> None:
        self._vm = vm
        self.gsi = gsi
        self._up: set[int] = set()
        self._sources = itertools.count()
        self._lock = threading.Lock()

    def source(self) -> Callable[[int], None]:
        """Return what drives a new source."""
        key = next(self._sources)

        def set_level(level: int) -> None:
            with self._lock:
                before = bool(self._up)
                (self._up.add if level else self._up.discard)(key)
                if bool(self._up) != before:
                    self._vm.irq_line(self.gsi, level)

        return set_level


class PcVirtio:
    """All virtio devices of a machine, in the order in which they were added."""

    def __init__(self, machine: Machine, pci_config: PciConfig, memory: GuestMemory) -> None:
        self._machine = machine
        self._pci_config = pci_config
        self._memory = memory
        self._lines = [SharedLine(machine.vm, gsi) for gsi in INTX_LINES]
        self._pci_lines: list[tuple[int, int]] = []
        self._mmio: list[VirtioMmio] = []
        self._msix: dict[str, Any] = {}  # as built
        self.transports: dict[str, Transport] = {}
        """By the device's name."""

    def add(self, device: VirtioDevice, placement: Placement | None = None, worker: Worker | None = None) -> Transport:
        """Make *device* a part of the machine; its functions are called on *worker*, by default one that many share."""
        placement = placement or Placement()
        name = placement.name or self._free_name(device.name)
        if name in self.transports:
            raise ConfigError(f"two devices are called {name}")
        device.name = name
        worker = worker or self._machine.workers.shared()
        options = Options(packed=placement.packed)
        add = self._add_mmio if placement.transport == MMIO else self._add_pci
        transport = self.transports[name] = add(device, worker, options)
        if isinstance(transport, pci.PciTransport):
            self._msix[name] = transport.msix.save()
        return transport

    def _free_name(self, kind: str) -> str:
        return next(name for name in (f"{kind}{number}" for number in range(1 << 16)) if name not in self.transports)

    def _add_pci(self, device: VirtioDevice, worker: Worker, options: Options) -> Transport:
        _PCI_DEVICES.check(len(self._pci_lines) + 1)
        slot = self._pci_config.free_device()
        address = layout.PCI_DEVICES + slot * PCI_STRIDE
        line = self._lines[slot % len(self._lines)]
        transport = pci.PciTransport(
            device,
            self._memory,
            self._machine.vm,
            worker,
            options,
            address=address,
            msix_address=address + PCI_STRIDE - pci_msix.BAR_SIZE,
            line=line.gsi,
            set_irq=line.source(),
        )
        transport.function.connect(self._machine.pio, self._machine.mmio)
        self._pci_config.add(slot, 0, transport.function)
        self._pci_lines.append((slot, line.gsi))
        return transport

    def _add_mmio(self, device: VirtioDevice, worker: Worker, options: Options) -> Transport:
        number = _MMIO_DEVICES.check(len(self._mmio) + 1) - 1
        place = VirtioMmio(layout.VIRTIO_MMIO + number * mmio.SIZE, mmio.SIZE, MMIO_LINES[number % len(MMIO_LINES)])
        irq_line = self._machine.vm.irq_line

        def pulse() -> None:
            irq_line(place.gsi, 1)
            irq_line(place.gsi, 0)

        transport = mmio.MmioTransport(
            device, self._memory, self._machine.vm, worker, options, address=place.address, pulse=pulse
        )
        self._machine.mmio.add(place.address, place.size, transport, f"virtio-mmio {device.name}")
        self._mmio.append(place)
        return transport

    def described(self, *, hpet: bool) -> Devices:
        """Return what ACPI has to say of the machine's devices."""
        return Devices(hpet, self._pci_lines, self._mmio)

    def reset(self) -> None:
        """Reset every device, and its interrupts' messages; its configuration space is the bus's to reset."""
        for name, transport in self.transports.items():
            transport.reset()
            if isinstance(transport, pci.PciTransport):
                transport.msix.restore(self._msix[name])

    def save(self) -> dict[str, Any]:
        """Every device, by its name; the workers are paused."""
        return {name: transport.save() for name, transport in self.transports.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; ValueError if it is of other devices."""
        if set(state) != set(self.transports):
            raise ValueError(f"the saved state has devices {sorted(state)}, expected {sorted(self.transports)}")
        for name, transport in self.transports.items():
            transport.restore(state[name])

    def close(self) -> None:
        """Give back all devices, the last first."""
        for transport in reversed(self.transports.values()):
            transport.close()
