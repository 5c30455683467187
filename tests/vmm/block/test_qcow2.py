# SPDX-License-Identifier: Apache-2.0
"""qcow2 against qemu-img: what either writes the other reads, and the tables are what `qemu-img check` wants."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from softkvm.vmm.block import hostfile, qcow2, refcounts
from softkvm.vmm.block.files import QCOW2, create_qcow2, open_image
from softkvm.vmm.block.image import Image, ImageFileError
from softkvm.vmm.block.qcow2 import Qcow2Image
from softkvm.vmm.block.qcow2_header import MAGIC

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img to compare with")

SECTOR = 512


def qemu_img(*arguments: str | Path, status: tuple[int, ...] = (0,)) -> str:
    result = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode in status, result.stdout + result.stderr
    return result.stdout


def contents(path: Path, *options: str) -> bytes:
    """What qemu-img reads of an image."""
    raw = path.with_suffix(".contents")
    qemu_img("convert", "-f", "qcow2", *options, "-O", "raw", path, raw)
    return raw.read_bytes()


def read(image: Image, offset: int = 0, size: int | None = None) -> bytes:
    data = bytearray(image.size - offset if size is None else size)
    view = memoryview(data)
    third = len(data) // 3  # in pieces, as a guest's buffers are
    image.readv([view[:third], view[third : third + 1], view[third + 1 :]], offset)
    return bytes(data)


def write(image: Image, offset: int, data: bytes) -> None:
    view = memoryview(data)
    image.writev([view[:100], view[100:]], offset)


@dataclass(frozen=True)
class Shape:
    """How an image is made."""

    cluster: int = 65536
    version: int = 3
    refcount_bits: int = 16
    backing: str = ""
    snapshot: bool = False
    compressed: str = ""
    size: int = 300 * 1024


SHAPES = st.builds(
    Shape,
    cluster=st.sampled_from([512, 4096, 65536]),
    backing=st.sampled_from(["", "raw", "qcow2"]),
    snapshot=st.booleans(),
    refcount_bits=st.sampled_from([1, 2, 8, 16, 64]),
    size=st.integers(1, 600).map(lambda sectors: sectors * SECTOR),
).filter(lambda shape: not (shape.snapshot and shape.refcount_bits == 1))


def make(directory: Path, shape: Shape, pattern: bytes) -> tuple[Path, bytearray]:
    """An image of that shape, made by qemu-img, and what it holds."""
    path = directory / "disk.qcow2"
    options = f"cluster_size={shape.cluster},compat={'1.1' if shape.version == 3 else '0.10'}"
    if shape.version == 3:
        options += f",refcount_bits={shape.refcount_bits}"
    model = bytearray(shape.size)
    if shape.backing:
        base = directory / "base"
        below = pattern[: min(len(pattern), 2 * shape.size) // SECTOR * SECTOR] or bytes(SECTOR)
        (directory / "plain").write_bytes(below)
        qemu_img("convert", "-f", "raw", "-O", shape.backing, directory / "plain", base)
        model[: len(below)] = below[: shape.size]
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-F", shape.backing, "-b", "base", path, str(shape.size))
    elif shape.compressed:
        options += f",compression_type={shape.compressed}" if shape.version == 3 else ""
        model[: len(pattern)] = pattern[: shape.size]
        (directory / "plain").write_bytes(model)
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, directory / "plain", path)
    else:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(shape.size))
    if shape.snapshot:
        with open_image(str(path)) as image:
            write(image, 0, b"before the snapshot".ljust(SECTOR, b"."))
        model[:SECTOR] = b"before the snapshot".ljust(SECTOR, b".")
        qemu_img("snapshot", "-c", "kept", path)
    return path, model


@contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "zero", "unmap", "discard", "flush", "reopen"]),
        st.floats(0, 1),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=12,
)


def run(image: Image, model: bytearray, operations: list[tuple[str, float, float]], path: Path) -> Image:
    """Do *operations* to an image and to the model of what it holds."""
    for number, (what, where, much) in enumerate(operations):
        sectors = len(model) // SECTOR
        first = min(int(where * sectors), sectors - 1)
        count = max(1, int((sectors - first) * much**3))
        offset, size = first * SECTOR, count * SECTOR
        if what == "write":
            data = (b"%d:" % number * (size // 2 + 1))[:size]
            write(image, offset, data)
            model[offset : offset + size] = data
        elif what in ("zero", "unmap"):
            image.zero(offset, size, unmap=what == "unmap")
            model[offset : offset + size] = bytes(size)
        elif what == "discard":
            image.discard(offset, size)
            now = read(image, offset, size)
            assert all(new in (old, 0) for new, old in zip(now, model[offset : offset + size], strict=True))
            model[offset : offset + size] = now
        elif what == "flush":
            image.flush()
        else:
            image.close()
            image = open_image(str(path))
        assert read(image, offset, size) == bytes(model[offset : offset + size])
    return image


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=SHAPES, pattern=st.binary(min_size=1, max_size=64), operations=OPERATIONS)
def test_what_is_written_is_what_qemu_img_reads(
    shape: Shape, pattern: bytes, operations: list[tuple[str, float, float]]
) -> None:
    with directory() as here:
        path, model = make(here, shape, (pattern * 20000)[: 1 << 18])
        kept = bytes(model)
        image = run(open_image(str(path)), model, operations, path)
        assert read(image) == model
        image.close()
        qemu_img("check", path)
        assert contents(path) == model
        if shape.snapshot:
            assert contents(path, "-l", "kept") == kept


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("snapshot", [False, True])
def test_version_2_is_written_too(tmp_path: Path, version: int, snapshot: bool) -> None:
    path, model = make(tmp_path, Shape(version=version, backing="raw", snapshot=snapshot), b"below " * 30000)
    operations = [("write", 0.2, 0.5), ("zero", 0.1, 0.9), ("discard", 0.0, 1.0), ("write", 0.5, 0.1), ("reopen", 0, 0)]
    run(open_image(str(path)), model, operations, path).close()
    qemu_img("check", path)
    assert contents(path) == model


@pytest.mark.parametrize(("version", "compressed"), [(2, "zlib"), (3, "zlib"), (3, "zstd")])
def test_compressed_clusters_are_read_and_replaced(tmp_path: Path, version: int, compressed: str) -> None:
    path, model = make(
        tmp_path, Shape(version=version, compressed=compressed, size=1 << 20), os.urandom(50000) + b"pack me " * 100000
    )
    with open_image(str(path)) as image:
        assert read(image) == model
        write(image, 70000 // SECTOR * SECTOR, b"new".ljust(SECTOR, b"!"))
        model[70000 // SECTOR * SECTOR :][:SECTOR] = b""
    model[70000 // SECTOR * SECTOR : 70000 // SECTOR * SECTOR + SECTOR] = b"new".ljust(SECTOR, b"!")
    qemu_img("check", path)
    assert contents(path) == model


def test_a_refcount_table_grows(tmp_path: Path) -> None:
    """With clusters of 512 bytes one cluster of the table counts 8 MiB of the file."""
    path = tmp_path / "small.qcow2"
    create_qcow2(str(path), 32 << 20, cluster_bits=9)
    model = bytearray(32 << 20)
    with open_image(str(path)) as image:
        for at in range(0, 20 << 20, 1 << 20):
            data = bytes([at >> 20 | 1]) * (1 << 20)
            write(image, at, data)
            model[at : at + (1 << 20)] = data
    qemu_img("check", path)
    assert contents(path) == model


def test_images_of_ours_are_qemus(tmp_path: Path) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "above.qcow2"
    base.write_bytes(b"base".ljust(1 << 20, b"."))
    create_qcow2(str(path), 1 << 20, backing="base.raw", backing_format="raw")
    qemu_img("check", path)
    assert contents(path) == base.read_bytes()
    with open_image(str(path)) as image:
        write(image, 512, b"above".ljust(512))
    assert contents(path)[:1024] == b"base".ljust(512, b".") + b"above".ljust(512)
    assert base.read_bytes() == b"base".ljust(1 << 20, b".")
    with pytest.raises(FileExistsError):
        create_qcow2(str(path), 1 << 20)


def test_what_is_freed_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), 8 << 20)
    with open_image(str(path)) as image:
        for _ in range(10):
            write(image, 0, b"x" * (4 << 20))
            image.discard(0, 4 << 20)
            image.flush()
        assert path.stat().st_size < 10 << 20
    qemu_img("check", path)


# -- when the host, or we, come to an end in the middle


@dataclass
class Journal:
    """What was written to a file in which order, and where it was synced."""

    base: bytes
    writes: list[tuple[int, bytes] | None] = field(default_factory=list)

    def crash(self, at: int, random: Random) -> bytes:
        """The file after a crash behind *at* writes, of which some since the last sync are lost."""
        writes = self.writes[:at]
        synced = max((n for n, write in enumerate(writes) if write is None), default=0)
        data = bytearray(self.base)
        for number, entry in enumerate(writes):
            if entry is None or (number > synced and random.random() < 0.5):
                continue
            offset, piece = entry
            if len(data) < offset + len(piece):
                data.extend(bytes(offset + len(piece) - len(data)))
            data[offset : offset + len(piece)] = piece
        return bytes(data)


CRASHES = 8  # of each example


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # making a failure smaller would take minutes
)
@given(
    cluster_bits=st.sampled_from([9, 12, 16]),
    operations=OPERATIONS,
    random=st.randoms(use_true_random=False),
)
def test_after_a_crash_all_that_was_flushed_is_there(
    cluster_bits: int, operations: list[tuple[str, float, float]], random: Random
) -> None:
    with directory() as here, pytest.MonkeyPatch.context() as patch:
        path = here / "disk.qcow2"
        create_qcow2(str(path), 200 * 1024, cluster_bits=cluster_bits)
        journal = Journal(path.read_bytes())
        flushed: list[tuple[int, bytes]] = [(0, bytes(200 * 1024))]  # number of writes, and the disk at that flush
        later: list[list[bytes]] = [[]]  # the disk after each operation since that flush
        real_write, real_sync, real_punch = hostfile.write_whole, os.fdatasync, hostfile.punch

        def writing(fd: int, views: list[memoryview], offset: int) -> None:
            journal.writes.append((offset, b"".join(views)))
            real_write(fd, views, offset)

        def punching(fd: int, offset: int, size: int) -> bool:
            journal.writes.append((offset, bytes(size)))
            return real_punch(fd, offset, size)

        def syncing(fd: int) -> None:
            journal.writes.append(None)
            real_sync(fd)

        for module in (qcow2, refcounts):
            patch.setattr(module, "write_whole", writing)
        patch.setattr(refcounts, "punch", punching)
        patch.setattr(os, "fdatasync", syncing)
        model = bytearray(200 * 1024)
        with open_image(str(path)) as image:
            for operation in operations:
                if operation[0] == "reopen":
                    operation = ("flush", 0.0, 0.0)
                run(image, model, [operation], path)
                if operation[0] == "flush":
                    flushed.append((len(journal.writes), bytes(model)))
                    later.append([])
                else:
                    later[-1].append(bytes(model))
        patch.undo()
        syncs = [number for number, entry in enumerate(journal.writes) if entry is None]
        for at in random.sample(syncs, min(CRASHES - 2, len(syncs))) + [random.randint(0, len(journal.writes))] * 2:
            path.write_bytes(journal.crash(at, random))
            qemu_img("check", path, status=(0, 3))  # 3: clusters that nobody uses
            which = max(number for number, (count, _) in enumerate(flushed) if count <= at)
            before = flushed[which][1]
            # whatever was under way, a sector is as it was at the flush, or something has changed it since
            since = [*later[which], *(later[which + 1] if which + 1 < len(later) else [])]
            with open_image(str(path), read_only=True) as image:
                found = read(image)
            for sector in range(0, len(found), SECTOR):
                if all(disk[sector : sector + SECTOR] == before[sector : sector + SECTOR] for disk in since):
                    assert found[sector : sector + SECTOR] == before[sector : sector + SECTOR]


# -- files that are damaged, or have what we don't know


def image_bytes(tmp_path: Path, **options: Any) -> bytearray:
    path = tmp_path / "new.qcow2"
    create_qcow2(str(path), 1 << 20, **options)
    data = bytearray(path.read_bytes())
    path.unlink()
    return data


WRONG: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "version 4": (">I", 4, (4,)),
    "cluster_size": (">I", 20, (30,)),
    "encrypted": (">I", 32, (1,)),
    "an L1 table of 0 entries": (">I", 36, (0,)),
    "L1 table": (">Q", 40, (1 << 40,)),
    "its L1 table": (">Q", 40, (12345,)),
    "refcount table": (">Q", 48, (0,)),
    "refcount_table": (">I", 56, (1 << 20,)),
    "external data file": (">Q", 72, (4,)),
    "subclusters": (">Q", 72, (16,)),
    "features 0x100": (">Q", 72, (256,)),
    "marked as damaged": (">Q", 72, (2,)),
    "not closed": (">Q", 72, (1,)),
    "refcount order 7": (">I", 96, (7,)),
    "header length 20": (">I", 100, (20,)),
    "backing file's name": (
        ">QI",
        8,
        (
            1 << 40,
            10,
        ),
    ),
    "backing file": (
        ">QI",
        8,
        (
            112,
            5000,
        ),
    ),
    "disk": (">Q", 24, (1 << 62,)),
    "multiple of 512": (">Q", 24, (1000,)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path: Path, what: str) -> None:
    data = image_bytes(tmp_path)
    format, at, values = WRONG[what]
    struct.pack_into(format, data, at, *values)
    path = tmp_path / "wrong.qcow2"
    path.write_bytes(data)
    with pytest.raises(ImageFileError) as error:
        open_image(str(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert any(part in str(error.value) for part in what.split("_")), str(error.value)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 0x30020), st.binary(min_size=1, max_size=8)), max_size=6), data=st.data()
)
def test_no_damage_is_more_than_an_error(changes: list[tuple[int, bytes]], data: st.DataObject) -> None:
    with directory() as here:
        original = here / "good.qcow2"
        create_qcow2(str(original), 1 << 20)
        with open_image(str(original)) as image:
            write(image, 0, b"x" * 200000)
        contents = bytearray(original.read_bytes())
        for at, piece in changes:
            place = at % 128 if data.draw(st.booleans()) else at  # the header, or any table
            contents[place : place + len(piece)] = piece
        path = here / "damaged.qcow2"
        path.write_bytes(contents[: data.draw(st.integers(0, len(contents)))] if data.draw(st.booleans()) else contents)
        try:
            image = open_image(str(path), format=QCOW2)
        except ImageFileError:
            return
        try:
            for offset in (0, 300 * SECTOR):
                size = min(100 * SECTOR, image.size - offset)
                if size > 0:
                    read(image, offset, size)
                    write(image, offset, b"y" * size)
                    image.discard(offset, size)
            image.flush()
        except OSError:
            pass
        finally:
            try:
                image.close()
            except OSError:
                pass


def test_a_backing_file_needs_a_format_and_is_never_itself(tmp_path: Path) -> None:
    path = tmp_path / "self.qcow2"
    create_qcow2(str(path), 1 << 20, backing="self.qcow2", backing_format="qcow2")
    with pytest.raises(ImageFileError, match=r"self\.qcow2: the image is behind itself"):
        open_image(str(path))
    other = tmp_path / "other.qcow2"
    create_qcow2(str(other), 1 << 20, backing="/etc/passwd", backing_format="")
    with pytest.raises(ImageFileError, match="has no format in the image's header"):
        open_image(str(other))
    missing = tmp_path / "missing.qcow2"
    create_qcow2(str(missing), 1 << 20, backing="gone", backing_format="raw")
    with pytest.raises(ImageFileError, match=r"its backing file .*gone: No such file"):
        open_image(str(missing))


def test_chains_are_not_endless(tmp_path: Path) -> None:
    for number in range(70):
        create_qcow2(str(tmp_path / f"{number}"), 4096, cluster_bits=9, backing=f"{number + 1}", backing_format="qcow2")
    create_qcow2(str(tmp_path / "70"), 4096, cluster_bits=9)
    with pytest.raises(ImageFileError, match="at most 64"):
        open_image(str(tmp_path / "0"))
    with open_image(str(tmp_path / "20")) as image:
        assert isinstance(image, Qcow2Image)
        assert read(image) == bytes(4096)
        write(image, 512, b"z" * 512)
        assert read(image)[512:1024] == b"z" * 512


def test_the_magic_is_the_formats() -> None:
    assert MAGIC == b"QFI\xfb"
