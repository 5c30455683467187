# SPDX-License-Identifier: Apache-2.0
"""The ELF kernel inside a kernel image, in every format that Linux's build has and we expand."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.vmm.boot.test_bzimage import make_bzimage

from softkvm.vmm.boot import payload
from softkvm.vmm.boot.image import Image
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB

ELF = b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 4096


def lz4_legacy(data: bytes) -> bytes:
    """As `lz4 -l` writes it (lz4_Frame_format.md, "Legacy frame")."""
    blocks = [data[at : at + 8 * MIB] for at in range(0, len(data), 8 * MIB)]
    packed = [lz4.block.compress(block, store_size=False) for block in blocks]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in packed)


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zstd": zstandard.ZstdCompressor().compress,
    "lz4": lz4_legacy,
}


def image_of(data: bytes, *, length: int | None = None, version: int = 0x20F) -> Image:
    """Return a kernel image whose payload is *data*."""
    image = bytearray(make_bzimage())
    start = 5 * 512 + 0x300
    image[0x1F1] = 4
    image[0x206:0x208] = version.to_bytes(2, "little")
    struct.pack_into("<I", image, 0x1F4, 0)
    struct.pack_into("<II", image, 0x248, 0x300, len(data) if length is None else length)
    return Image("kernel", bytes(image[:start]).ljust(start, b"\0") + data)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [len(ELF), 9 * MIB])
def test_every_format_is_expanded(name: str, size: int) -> None:
    elf = ELF.ljust(size, b"\x5a")
    data = FORMATS[name](elf) + (b"" if name == "gzip" else struct.pack("<I", size))
    found = payload.vmlinux(image_of(data), 64 * MIB)
    assert found.read(0, found.size) == elf


@pytest.mark.parametrize("name", FORMATS)
def test_what_expands_to_more_than_memory_is_refused(name: str) -> None:
    data = FORMATS[name](ELF.ljust(20 * MIB, b"\0"))
    with pytest.raises(ImageError, match=f"more than {16 * MIB} bytes"):
        payload.vmlinux(image_of(data + bytes(4)), 16 * MIB)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_one_is_refused_with_one_line(name: str) -> None:
    data = bytearray(FORMATS[name](ELF))
    for at in range(16, len(data), 37):
        data[at] ^= 0x55
    with pytest.raises(ImageError) as refused:
        payload.vmlinux(image_of(bytes(data) + bytes(4)), 64 * MIB)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (image_of(b"\x89LZO\0\r\n\x1a\n" + bytes(100)), "not known: it begins 89 4c 5a 4f"),
        (image_of(gzip.compress(b"no ELF file")), "expands to is none"),
        (image_of(gzip.compress(ELF), length=1 << 30), "truncated"),
        (image_of(gzip.compress(ELF), length=0), "truncated"),
        (image_of(gzip.compress(ELF), version=0x207), "expected 2.08"),
    ],
)
def test_what_holds_none_says_so(image: Image, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        payload.vmlinux(image, 64 * MIB)


@given(st.sampled_from(sorted(FORMATS)), st.binary(max_size=64), st.integers(0, 80))
def test_whatever_stands_behind_the_magic_number_is_an_error_or_an_elf_file(name: str, data: bytes, cut: int) -> None:
    head = FORMATS[name](b"\x7fELF" + data)
    try:
        found = payload.vmlinux(image_of(head[:cut] + data or b"\0"), 1 * MIB)
    except ImageError:
        return
    assert found.read(0, 4) == b"\x7fELF"
