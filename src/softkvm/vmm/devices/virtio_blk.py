# SPDX-License-Identifier: Apache-2.0
"""The block device: a disk whose contents are an image (VIRTIO 1.3, section 5.2).

Requests are carried out on the worker of their queue, one after the other, between the image and the driver's memory
without a copy. What the host's file says no to (a full disk, a file that ends early) is the request's status, never
the machine's end.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.block.files import AUTO, FORMATS, open_image, open_overlay
from softkvm.vmm.block.image import SECTOR, Image, ImageFileError, total
from softkvm.vmm.devices.spec import Placement, Words
from softkvm.vmm.errors import ConfigError, complain
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_BLOCK, bit
from softkvm.vmm.virtio.queue import Chain, QueueError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

VIRTIO_BLK_F_SEG_MAX: Final = 2
VIRTIO_BLK_F_RO: Final = 5
VIRTIO_BLK_F_BLK_SIZE: Final = 6
VIRTIO_BLK_F_FLUSH: Final = 9
VIRTIO_BLK_F_TOPOLOGY: Final = 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 11
VIRTIO_BLK_F_MQ: Final = 12
VIRTIO_BLK_F_DISCARD: Final = 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 14

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

SHOWN_S: Final = 0.0005
"""How long the driver may not see what has been done, while more is done of the same batch: files may be slow."""

TAKE_BACK_S: Final = 5.0
"""How long another process, to which a machine has not gone after all, may take to let go of the image."""

QUEUE_SIZE: Final = 256
SEGMENTS: Final = QUEUE_SIZE - 2
PCI_CLASS: Final = 0x010000
WRITEBACK_AT: Final = 32

QUEUES: Final = Size("queues of a disk", 16, ConfigError, least=1, effect="ConfigError", where=__name__)
SERIAL: Final = Size("bytes of a disk's serial number", 20, ConfigError, effect="ConfigError", where=__name__)
RANGES: Final = Size(
    "ranges of a discard or write zeroes request", 64, QueueError, element=16, least=1, giver="guest",
    effect="the request fails", where=__name__,
)  # fmt: skip
DISCARD_SECTORS: Final = Size(
    "sectors of a discard", (1 << 30) // SECTOR, QueueError, giver="guest", effect="the request fails", where=__name__
)
ZERO_SECTORS: Final = Size(
    "sectors of a write zeroes request",
    (64 << 20) // SECTOR,
    QueueError,
    giver="guest",
    effect="the request fails",
    where=__name__,
)

_HEADER: Final = struct.Struct("<IIQ")
_RANGE: Final = struct.Struct("<QII")
_UNMAP: Final = 1
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")


@dataclass(slots=True)
class DiskStats:
    """What a disk has done."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    discards: int = 0
    errors: int = 0


class Disk(VirtioDevice):
    """A disk with the contents of *image*, which it closes."""

    type = VIRTIO_ID_BLOCK
    name = "disk"
    pci_class = PCI_CLASS

    def __init__(self, image: Image, *, serial: bytes = b"", queues: int = 1, block_size: int = SECTOR) -> None:
        super().__init__()
        self.image = image
        self.stats = DiskStats()
        self.serial = serial
        SERIAL.check(len(serial))
        if image.size % block_size:
            raise ImageFileError(f"{image.name}: {image.size} bytes, expected a multiple of its blocks' {block_size}")
        self.queue_sizes = (QUEUE_SIZE,) * QUEUES.check(queues)
        self.features = bit(
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            *([VIRTIO_BLK_F_MQ] if queues > 1 else []),
            *([VIRTIO_BLK_F_RO] if image.read_only else [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]),
        )
        self._block_size = block_size
        self._writeback = True
        self._complained = 0
        self._gone = False
        self._handlers: dict[int, Callable[[Chain, list[memoryview], int], int]] = {
            T_IN: self._read,
            T_OUT: self._write,
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
            T_DISCARD: self._discard,
            T_WRITE_ZEROES: self._write_zeroes,
        }
        self._configure()

    def _configure(self) -> None:
        """The configuration space (5.2.4)."""
        self._sectors = self.image.size // SECTOR
        aligned = self._block_size // SECTOR
        self.config = _CONFIG.pack(
            self._sectors, 0, SEGMENTS,
            0, 0, 0, self._block_size,
            (4096 // self._block_size).bit_length() - 1, 0, 4096 // self._block_size, 0,
            int(self._writeback), 0, len(self.queue_sizes),
            DISCARD_SECTORS.most, RANGES.most, aligned,
            ZERO_SECTORS.most, RANGES.most, 1,
        )  # fmt: skip

    def activate(self) -> None:
        """A driver that knows neither flushes nor the cache's mode gets a disk that has no cache (5.2.5.2)."""
        if not self.negotiated(VIRTIO_BLK_F_CONFIG_WCE):
            self._set_writeback(self.negotiated(VIRTIO_BLK_F_FLUSH))

    def reset(self) -> None:
        """The cache's mode is the driver's."""
        self._set_writeback(True)

    def write_config(self, offset: int, data: bytes) -> None:
        """``writeback``, where it was negotiated."""
        if offset == WRITEBACK_AT and len(data) == 1 and self.negotiated(VIRTIO_BLK_F_CONFIG_WCE):
            self._set_writeback(bool(data[0] & 1))

    def _set_writeback(self, on: bool) -> None:
        if on != self._writeback:
            self._writeback = on
            self._configure()
            if not on and not self.image.read_only:
                self.image.flush()

    # -- requests

    def notified(self, index: int) -> None:
        """Carry out what is there."""
        queue = self.queues[index]
        handlers, clock = self._handlers, time.monotonic
        shown = clock()
        for chain in queue.drain():
            writable = chain.writable
            if not writable:
                raise QueueError(f"queue {index}: a request without room for its status")
            last = writable[-1]
            status = last[-1:]
            data = writable[:-1] if len(last) == 1 else [*writable[:-1], last[:-1]]
            header = chain.read(16)
            if len(header) != 16:
                raise QueueError(f"queue {index}: a request of {len(header)} bytes")
            kind, _, sector = _HEADER.unpack(header)
            handler = handlers.get(kind)
            if handler is None:
                status[0] = S_UNSUPP
                queue.push(chain, chain.writable_size)
                continue
            if self._gone:
                status[0] = S_IOERR
                queue.push(chain, chain.writable_size)
                continue
            try:
                status[0] = handler(chain, data, sector)
            except OSError as error:
                self._failed(kind, sector, error)
                status[0] = S_IOERR
            queue.push(chain, chain.writable_size)
            now = clock()
            if now - shown > SHOWN_S:
                queue.flush()
                shown = now

    def _failed(self, kind: int, sector: int, error: OSError) -> None:
        """Say so, the first time of each kind of error."""
        self.stats.errors += 1
        code = error.errno or errno.EIO
        if not self._complained >> code & 1:
            self._complained |= 1 << code
            complain(f"{self.name}: {self.image.name}: {error.strerror}: request {kind} at sector {sector} fails")

    def _inside(self, sector: int, size: int) -> bool:
        return not size % SECTOR and sector + size // SECTOR <= self._sectors

    def _read(self, chain: Chain, data: list[memoryview], sector: int) -> int:
        size = total(data)
        if not self._inside(sector, size):
            return S_IOERR
        self.image.readv(data, sector * SECTOR)
        self.stats.reads += 1
        self.stats.read_bytes += size
        return S_OK

    def _write(self, chain: Chain, data: list[memoryview], sector: int) -> int:
        data = chain.rest()
        size = total(data)
        if self.image.read_only or not self._inside(sector, size):
            return S_IOERR
        self.image.writev(data, sector * SECTOR)
        if not self._writeback:
            self.image.flush()
        self.stats.writes += 1
        self.stats.written_bytes += size
        return S_OK

    def _flush(self, chain: Chain, data: list[memoryview], sector: int) -> int:
        if not self.image.read_only:
            self.image.flush()
        self.stats.flushes += 1
        return S_OK

    def _get_id(self, chain: Chain, data: list[memoryview], sector: int) -> int:
        """The serial number; without a NUL if it has all 20 bytes (5.2.6)."""
        serial = self.serial.ljust(SERIAL.most, b"\0")
        if total(data) < len(serial):
            return S_IOERR
        chain.write(serial)
        return S_OK

    def _ranges(self, chain: Chain, limit: Size) -> list[tuple[int, int, int]] | None:
        """The ranges of a request as offset, size, flags; None if one cannot be."""
        text = chain.read(RANGES.most * _RANGE.size + 1)
        if not text or len(text) % _RANGE.size or not RANGES.allows(len(text) // _RANGE.size):
            return None
        found = []
        for sector, count, flags in _RANGE.iter_unpack(text):
            if not limit.allows(count) or sector + count > self._sectors:
                return None
            found.append((sector * SECTOR, count * SECTOR, flags))
        return found

    def _discard(self, chain: Chain, data: list[memoryview], sector: int) -> int:
        if self.image.read_only:
            return S_IOERR
        ranges = self._ranges(chain, DISCARD_SECTORS)
        if ranges is None:
            return S_IOERR
        if any(flags for _, _, flags in ranges):  # unmap is 0 in a discard (5.2.6.1)
            return S_UNSUPP
        for offset, size, _ in ranges:
            self.image.discard(offset, size)
        self.stats.discards += 1
        return S_OK

    def _write_zeroes(self, chain: Chain, data: list[memoryview], sector: int) -> int:
        if self.image.read_only:
            return S_IOERR
        ranges = self._ranges(chain, ZERO_SECTORS)
        if ranges is None:
            return S_IOERR
        if any(flags & ~_UNMAP for _, _, flags in ranges):
            return S_UNSUPP
        for offset, size, flags in ranges:
            self.image.zero(offset, size, unmap=bool(flags & _UNMAP))
        if not self._writeback:
            self.image.flush()
        self.stats.writes += 1
        return S_OK

    # -- life

    def save(self) -> dict[str, Any]:
        """The cache's mode; what the image has not written is written."""
        if not self.image.read_only:
            self.image.flush()
        return {"writeback": self._writeback, "size": self.image.size, "image": self.image.save()}

    def files(self) -> list[str]:
        """The image's."""
        return self.image.files()

    def let_go_of_files(self) -> None:
        """Let another process have the image."""
        self.image.let_go()

    def take_files_back(self) -> None:
        """Have it again, or fail each request."""
        deadline = time.monotonic() + TAKE_BACK_S
        while True:
            try:
                self.image.take_back()
                return
            except (OSError, ImageFileError) as error:
                if time.monotonic() > deadline:
                    complain(f"{self.name}: {error}: the disk is gone")
                    self._gone = True
                    return
            time.sleep(0.01)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; ValueError if the disk has another size."""
        if state["size"] != self.image.size:
            raise ValueError(f"{self.name}: {self.image.size} bytes, and {state['size']} when it was saved")
        self.image.restore(state["image"])
        self._set_writeback(bool(state["writeback"]))

    def close(self) -> None:
        """Close the image."""
        try:
            self.image.close()
        except OSError as error:
            complain(f"{self.name}: {self.image.name}: {error.strerror}: the last writes may be lost")


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """``--disk``."""

    file: str
    read_only: bool = False
    overlay: bool = False
    format: str = AUTO
    serial: str = ""
    queues: int = 1
    block_size: int = SECTOR
    placement: Placement = field(default_factory=Placement)

    def attach(self, machine: Machine) -> Disk:
        """Open the image and make the device."""
        if self.overlay and not self.read_only:
            image = open_overlay(self.file, format=self.format)
        else:
            image = open_image(self.file, read_only=self.read_only, format=self.format)
        try:
            disk = Disk(image, serial=os.fsencode(self.serial), queues=self.queues, block_size=self.block_size)
            workers = [machine.workers.own(f"disk {number}") for number in range(self.queues)]
            disk.queue_workers = workers
            self.placement.add(machine, disk, workers[0])
        except BaseException:
            image.close()
            raise
        return disk


def parse(text: str) -> DiskSpec:
    """Read ``--disk``'s text: FILE[,ro][,overlay][,format=…][,serial=…][,queues=…][,block-size=…]."""
    return _parse("--disk", text)


def parse_overlay(text: str) -> DiskSpec:
    """Read ``--disk-overlay``'s text, which is ``--disk``'s with ``overlay``."""
    return _parse("--disk-overlay", text, overlay=True)


def _parse(option: str, text: str, *, overlay: bool = False) -> DiskSpec:
    words = Words.of(option, text)
    if not words.first:
        raise words.error("expected a file's name")
    serial = words.value("serial")
    if not SERIAL.allows(len(os.fsencode(serial))) or not serial.isascii() or not (serial.isprintable() or not serial):
        raise words.error(f"serial={serial}, expected up to {SERIAL.most} printable ASCII characters")
    spec = DiskSpec(
        words.first,
        read_only=words.flag("ro"),
        overlay=words.flag("overlay") or overlay,
        format=words.choice("format", FORMATS, AUTO),
        serial=serial,
        queues=words.number("queues", 1, QUEUES.most, 1),
        block_size=int(words.choice("block-size", ("512", "4096"), "512")),
        placement=words.placement(),
    )
    words.end()
    if spec.read_only and spec.overlay:
        raise words.error("ro and overlay, expected one of them")
    return spec
