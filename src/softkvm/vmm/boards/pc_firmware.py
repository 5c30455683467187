# SPDX-License-Identifier: Apache-2.0
"""A PC that firmware boots: SeaBIOS or OVMF in a ROM below 4 GiB, and all that it wants to know, through fw_cfg.

The chip set shows itself as QEMU's ``pc``. The ROM's last 128 KiB lie below 1 MiB, too, in RAM, where the firmware has
its data later. Flash is not written: OVMF keeps its variables in memory, until the machine ends.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.vmm.boot import acpi, layout, smbios, table_loader
from softkvm.vmm.devices import acpi_pm, fw_cfg, piix, serial
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import HOLE_END, KIB, MIB, PAGE_SIZE
from softkvm.vmm.virtio import ids
from softkvm.vmm.virtio.pci import PciTransport

if TYPE_CHECKING:
    from softkvm.vmm.boards.pc import Pc

ROM_SLOT: Final = 3
LOW_ROM: Final = 128 * KIB
MAX_ROM: Final = 8 * MIB  # below the local APIC's page and KVM's own, from 0xFF800000 on
_ROM: Final = Size("bytes of a firmware", MAX_ROM, ImageError, least=64 * KIB, effect="ImageError", where=__name__)

E820_FILE: Final = "etc/e820"
SERIAL_FILE: Final = "etc/sercon-port"
BOOT_ORDER_FILE: Final = "bootorder"


def read(path: Path) -> bytes:
    """Return a firmware's contents; ImageError for a file that can be none, or that cannot be read."""
    try:
        with path.open("rb") as file:
            rom = file.read(MAX_ROM + 1)
    except OSError as error:
        raise ImageError(f"firmware {path}: {error.strerror}") from None
    if not _ROM.allows(len(rom)) or len(rom) % PAGE_SIZE:
        size = f"{len(rom)} bytes" if len(rom) <= MAX_ROM else f"more than {MAX_ROM} bytes"
        raise ImageError(f"firmware {path}: {size}; expected a multiple of {PAGE_SIZE} from 64 KiB to 8 MiB")
    return rom


class Firmware:
    """*rom* on *board*, before its virtio devices are there."""

    def __init__(self, board: Pc, rom: bytes) -> None:
        self._board = board
        self._rom = rom
        self._map = mmap.mmap(-1, len(rom))
        self._map[:] = rom
        machine = board.machine
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        machine.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=ROM_SLOT,
                flags=abi.KVM_MEM_READONLY,
                guest_phys_addr=HOLE_END - len(rom),
                memory_size=len(rom),
                userspace_addr=address,
            ),
            self._map,
        )
        self._pm_base = acpi_pm.PM_BASE_PORT
        machine.pio.remove(acpi_pm.PM_BASE_PORT)  # the firmware places it
        self.power = piix.PowerManagement(machine.pio, board.acpi_pm, acpi_pm.PM_BLOCK_SIZE, self._pm_moved)
        board.pci_config.add(1, 0, piix.IsaBridge())
        board.pci_config.add(1, 3, self.power)

    def _pm_moved(self, base: int) -> None:
        self._pm_base = base

    def start(self) -> None:
        """Put everything where it is when a machine is switched on."""
        board, machine = self._board, self._board.machine
        low = self._rom[-LOW_ROM:]
        board.memory.write(layout.HIGH_MEMORY - len(low), low)
        config = machine.config
        items = fw_cfg.machine_items(config.memory_size, config.vcpus, config.vcpus - 1, dma=True)
        device = fw_cfg.FwCfg(items, self._files())
        dma = fw_cfg.FwCfgDma(device, board.memory)
        for port, size, part, name in (
            (fw_cfg.FW_CFG_PORT, fw_cfg.FW_CFG_SIZE, device, "fw_cfg"),
            (fw_cfg.DMA_PORT, fw_cfg.DMA_SIZE, dma, "fw_cfg_dma"),
        ):
            if name in board.devices:
                machine.pio.remove(port)
            machine.pio.add(port, size, part, name)
            board.devices[name] = part

    def _files(self) -> dict[str, fw_cfg.Contents]:
        board, config = self._board, self._board.machine.config
        tables: dict[str, bytes] = {}

        def table(name: str) -> bytes:
            # Made when the first is read: by then the firmware has placed the power-management block.
            if not tables:
                devices = board.virtio.described(hpet=config.hpet)._replace(
                    firmware=True, pci_memory=max(board.memory.end_below_4g, 0x80000000)
                )
                built = acpi.build(0, range(config.vcpus), devices, room=MIB, pm_base=self._pm_base)
                tables.update(table_loader.files(built))
            return tables[name]

        names = (table_loader.FILE, table_loader.TABLES_FILE, table_loader.RSDP_FILE)
        return {
            E820_FILE: b"".join(
                struct.pack("<QQI", ram.start, ram.end - ram.start, layout.E820_RAM) for ram in board.memory.ranges
            ),
            SERIAL_FILE: serial.COM1_PORT.to_bytes(2, "little"),
            BOOT_ORDER_FILE: self._boot_order,
            **smbios.files(config.vcpus, config.memory_size, board.memory.ranges),
            **{name: functools.partial(table, name) for name in names},
        }

    def _boot_order(self) -> bytes:
        """Return the disks' Open Firmware paths, in the order in which they were given."""
        paths = [
            f"/pci@i0cf8/scsi@{device:x}/disk@0,0"
            for (device, _), function in self._board.pci_config.functions.items()
            for transport in self._board.virtio.transports.values()
            if isinstance(transport, PciTransport)
            and transport.function is function
            and transport.device.type == ids.VIRTIO_ID_BLOCK
        ]
        return "\n".join(paths).encode() + b"\0"
