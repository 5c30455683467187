# SPDX-License-Identifier: Apache-2.0
"""The ELF kernel that a Linux kernel image (bzImage) holds compressed.

Source: ``Documentation/arch/x86/boot.rst`` (payload_offset, payload_length: protocol 2.08) and Linux's
``scripts/Makefile.lib`` (how each format is written, and that all but gzip's are followed by the size expanded).
"""

from __future__ import annotations

import bz2
import lzma
import struct
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.boot import elf
from softkvm.vmm.boot.bzimage import parse_header
from softkvm.vmm.boot.image import GZIP_MAGIC, Deadline, Image
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MAX_SIZE, MIB

PAYLOAD_OFFSET: Final = 0x248
PAYLOAD_VERSION: Final = 0x208
LZ4_BLOCK: Final = 8 * MIB  # what a block of the legacy format expands to at most
SIZE: Final = 4  # bytes of the size expanded, at the end
_CHUNK: Final = 4 * MIB
_KERNEL: Final = Size(
    "bytes of the kernel that a kernel image holds", MAX_SIZE, None, giver="file", effect="ImageError", where=__name__
)


class _Stream(Protocol):
    """What bz2 and lzma have."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _expanded(stream: _Stream, data: bytes) -> Iterator[bytes]:
    while not stream.eof:
        yield stream.decompress(data, _CHUNK)
        data = b""
        if stream.needs_input and not stream.eof:
            raise EOFError("it ends early")


def _bzip2(data: bytes) -> Iterator[bytes]:
    return _expanded(bz2.BZ2Decompressor(), data)


def _lzma(data: bytes) -> Iterator[bytes]:
    return _expanded(lzma.LZMADecompressor(), data)  # .xz and .lzma


def _zstd(data: bytes) -> Iterator[bytes]:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(data[:-SIZE]) as reader:
            while part := reader.read(_CHUNK):
                yield part
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _lz4(data: bytes) -> Iterator[bytes]:
    """The legacy format: a magic number, then blocks behind their sizes."""
    import lz4.block

    at = 4
    while at + SIZE < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        try:
            part = lz4.block.decompress(data[at + 4 : at + 4 + size], uncompressed_size=LZ4_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from None
        at += 4 + size
        yield part


_FORMATS: Final[tuple[tuple[bytes, Callable[[bytes], Iterator[bytes]]], ...]] = (
    (b"BZh", _bzip2),
    (b"\xfd7zXZ\0", _lzma),
    (b"\x5d\0\0", _lzma),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x02\x21\x4c\x18", _lz4),
)


def vmlinux(image: Image, limit: int, deadline: Deadline | None = None) -> Image:
    """Return the ELF kernel in *image*; ImageError if there is none, or it has more than *limit* bytes."""
    header = parse_header(image)
    if header.version < PAYLOAD_VERSION:
        raise ImageError(f"kernel of boot protocol {header.protocol} does not say where its ELF file is: expected 2.08")
    offset, length = struct.unpack("<II", image.read(PAYLOAD_OFFSET, 8))
    data = image.read(header.setup_size + offset, length)
    if len(data) < length or not length:
        raise ImageError(f"kernel is truncated: its ELF file of {length} bytes ends behind the image's end")
    if data.startswith(GZIP_MAGIC):
        return _checked(Image(image.name, data).expanded(limit, deadline))
    expand = next((expand for magic, expand in _FORMATS if data.startswith(magic)), None)
    if expand is None:
        raise ImageError(
            f"kernel's ELF file is compressed in a format that is not known: it begins {data[:8].hex(' ')}"
        )
    result = bytearray()
    try:
        for part in expand(data):
            if deadline is not None:
                deadline.check()
            result += part
            if not _KERNEL.allows(len(result), room=limit):
                raise ImageError(f"kernel is compressed and has more than {limit} bytes")
    except ImageError:
        raise
    except (lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise ImageError(f"kernel's ELF file is damaged: {error}") from None
    return _checked(Image(image.name, result))


def _checked(found: Image) -> Image:
    if not elf.is_elf(found):
        raise ImageError("kernel's ELF file is damaged: what it expands to is none")
    return found
