# SPDX-License-Identifier: Apache-2.0
"""Hostile images: whatever the headers say, a loader loads or says in one line why not, within bounded time."""

import contextlib
import gzip
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.machines import RecordingVcpu
from tests.vmm.boot.test_bzimage import make_bzimage
from tests.vmm.boot.test_multiboot import kludge
from tests.vmm.boot.test_pvh import make_elf

from softkvm.vmm.boot import bzimage, elf, loaders, multiboot, pvh
from softkvm.vmm.boot.image import Image
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, GuestMemory

EDGES = (0, 1, 0x7F, 0xFF, 0xFFF, 0x1000, 0xFFFF, 0x9FC00, 0x100000, 0x1FFFFFF, 0x2000000, 0x7FFFFFFF, 0x80000000)
NUMBERS = st.one_of(
    st.sampled_from((*EDGES, 0xFFFFF000, 0xFFFFFFFF, 1 << 32, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)),
    st.integers(0, (1 << 64) - 1),
)
MEMORY = 32 * MIB


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(MEMORY)
    yield ram
    ram.close()


def attempt(memory: GuestMemory, image: bytes) -> None:
    """Load *image* as the machine does."""
    vcpu = RecordingVcpu()
    module = Module(Image("module", b"module"), b"module text")
    refusal = None
    try:
        file, kind = loaders.recognize(Image("kernel", image), MEMORY)
        if kind is loaders.Kind.LINUX:
            bzimage.load(vcpu, memory, file, [module], b"line", 0xE0000)  # type: ignore[arg-type]
        elif kind is loaders.Kind.MULTIBOOT:
            multiboot.load(vcpu, memory, file, b"line", [module])  # type: ignore[arg-type]
        elif kind is loaders.Kind.ELF:
            pvh.load(vcpu, memory, file, [module], b"line", 0xE0000)  # type: ignore[arg-type]
        else:
            loaders.describe_unknown(file)
            return
    except ImageError as error:
        refusal = str(error)
    if refusal is None:
        assert vcpu.regs.rip < MEMORY, "what was loaded is entered in memory"
    else:
        assert "\n" not in refusal
        assert len(refusal) < 300


def patched(image: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    """Return *image* with (offset, size, value) written over it."""
    result = bytearray(image)
    for offset, size, value in changes:
        at = offset % max(1, len(result) - size)
        result[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(result)


def changes(low: int, high: int) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    return st.lists(st.tuples(st.integers(low, high), st.sampled_from((1, 2, 4, 8)), NUMBERS), min_size=1, max_size=4)


@settings(deadline=None, max_examples=150)
@given(changes=changes(0x1F1, 0x268), length=st.integers(0, 4096))
def test_linux_headers(memory: GuestMemory, changes: list[tuple[int, int, int]], length: int) -> None:
    attempt(memory, patched(make_bzimage(), changes))
    attempt(memory, patched(make_bzimage(), changes)[:length])


@settings(deadline=None, max_examples=150)
@given(changes=changes(4, 64 + 112 + 84), length=st.integers(0, 300))
def test_elf_headers(memory: GuestMemory, changes: list[tuple[int, int, int]], length: int) -> None:
    attempt(memory, patched(make_elf(), changes))
    attempt(memory, patched(make_elf(), changes)[:length])


@settings(deadline=None, max_examples=150)
@given(
    flags=st.integers(0, 0x1FFFF),
    addresses=st.lists(NUMBERS.map(lambda number: number & 0xFFFFFFFF), min_size=5, max_size=5),
    length=st.integers(0, 64),
)
def test_multiboot_headers(memory: GuestMemory, flags: int, addresses: list[int], length: int) -> None:
    image = bytearray(kludge())
    checksum = -(multiboot.HEADER_MAGIC + flags) & 0xFFFFFFFF
    struct.pack_into("<8I", image, 16, multiboot.HEADER_MAGIC, flags, checksum, *addresses)
    attempt(memory, bytes(image))
    attempt(memory, bytes(image[:length]))


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.tuples(st.sampled_from((1, 4)), NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=40),
    count=st.integers(0, 0xFFFF),
)
def test_elf_program_header_tables(memory: GuestMemory, rows: list[tuple[int, int, int, int, int]], count: int) -> None:
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    for number in (len(rows), count):
        fixed = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, number, 64, 0, 0)
        table = b"".join(
            struct.pack("<IIQQQQQQ", type, 7, offset, address, address, size, in_memory, 4096)
            for type, offset, address, size, in_memory in rows
        )
        attempt(memory, header + fixed + table + bytes(4096))


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200), change=changes(0, 60))
def test_compressed_files(memory: GuestMemory, data: bytes, change: list[tuple[int, int, int]]) -> None:
    attempt(memory, gzip.compress(data))
    attempt(memory, patched(gzip.compress(make_elf()), change))


@given(data=st.binary(max_size=100))
def test_notes(data: bytes) -> None:
    with contextlib.suppress(ImageError):
        elf.parse(Image("kernel", make_elf(note=data)))
