# SPDX-License-Identifier: Apache-2.0
"""Raw images, the layer that keeps an image as it is, and who may use a file at once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softkvm.vmm.block.files import open_image, open_overlay
from softkvm.vmm.block.image import Image, ImageFileError
from softkvm.vmm.block.overlay import CHUNK

SECTOR = 512


def read(image: Image, offset: int, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    image.readv([view[: size // 2], view[size // 2 :]], offset)
    return bytes(data)


def test_data_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * 16)
    with open_image(str(path)) as image:
        assert image.size == 4096
        assert read(image, 512, 1024) == (bytes(range(256)) * 16)[512:1536]
        image.writev([memoryview(b"ab" * 128), memoryview(b"cd" * 128)], 1024)
        image.flush()
        image.zero(0, 512, unmap=True)
        image.zero(512, 512, unmap=False)
    assert path.read_bytes()[:1536] == bytes(1024) + b"ab" * 128 + b"cd" * 128


def test_many_segments_are_more_than_one_call_takes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(b"%05d" % n + b"." * 507 for n in range(3000)))
    with open_image(str(path)) as image:
        data = bytearray(3000 * SECTOR)
        views = [memoryview(data)[at : at + SECTOR] for at in range(0, len(data), SECTOR)]
        image.readv(views, 0)
        assert data == path.read_bytes()
        image.writev(list(reversed(views)), 0)
    assert path.read_bytes()[:5] == b"02999"


def test_the_last_sector_may_be_there_in_part(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 700)
    with open_image(str(path)) as image:
        assert image.size == 1024
        assert read(image, 512, 512) == b"x" * 188 + bytes(324)


def test_a_file_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 8192)
    with open_image(str(path)) as image:
        os.truncate(path, 1024)
        assert read(image, 0, 1024) == b"x" * 1024
        with pytest.raises(OSError, match="the file ends at 1024"):
            read(image, 0, 4096)


def test_a_guest_cannot_make_another_format_of_a_raw_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with open_image(str(path)) as image:
        with pytest.raises(PermissionError, match="guessed as raw"):
            image.writev([memoryview(b"Q"), memoryview(b"FI\xfb" + bytes(508))], 0)
        image.writev([memoryview(b"QFI\xfb".ljust(512))], 512)
    with open_image(str(path), format="raw") as image:
        image.writev([memoryview(b"QFI\xfb".ljust(512))], 0)
    assert path.read_bytes()[:4] == b"QFI\xfb"


@pytest.mark.parametrize(
    ("name", "wrong"), [("gone", "No such file"), (".", "Is a directory|neither a file"), ("pipe", "neither a file")]
)
def test_what_is_no_disk_is_refused(tmp_path: Path, name: str, wrong: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageFileError, match=wrong):
        open_image(str(tmp_path / name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write any file")
def test_a_file_that_may_not_be_written_says_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    path.chmod(0o400)
    with pytest.raises(ImageFileError, match="ro or overlay"):
        open_image(str(path))
    open_image(str(path), read_only=True).close()


# -- locks


def test_one_writes_or_several_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    name = str(path)
    with open_image(name), pytest.raises(ImageFileError, match="another process uses the image"):
        open_image(name)
    with open_image(name), pytest.raises(ImageFileError, match="and writes to it"):
        open_image(name, read_only=True)
    with open_image(name, read_only=True), open_image(name, read_only=True), pytest.raises(ImageFileError):
        open_image(name)
    open_image(name).close()


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="no qemu-io to compete with")
def test_qemu_keeps_out_of_an_image_in_use_and_we_of_its(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    command = ["qemu-io", "-f", "raw", str(path)]
    with open_image(str(path)):
        result = subprocess.run([*command, "-c", "read 0 512"], capture_output=True, text=True, timeout=60, check=False)
        assert "lock" in result.stderr
    with open_image(str(path), read_only=True):
        subprocess.run([*command, "-r", "-c", "read 0 512"], capture_output=True, timeout=60, check=True)
        result = subprocess.run(
            [*command, "-c", "write 0 512"], capture_output=True, text=True, timeout=60, check=False
        )
        assert "lock" in result.stderr
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("read 0 512\n")
        process.stdin.flush()
        while "read 512/512" not in process.stdout.readline():
            pass
        for read_only in (False, True):
            with pytest.raises(ImageFileError, match="another process uses"):
                open_image(str(path), read_only=read_only)
    finally:
        process.communicate("quit\n", timeout=60)


# -- the layer


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    operations=st.lists(
        st.tuples(st.sampled_from(["write", "zero", "discard"]), st.integers(0, 59), st.integers(1, 40)), max_size=10
    ),
)
def test_an_image_under_a_layer_stays_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, size: int, operations: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("overlay") / "disk"
    model = bytearray(b"".join(bytes([n + 1]) * SECTOR for n in range(size)))
    path.write_bytes(model)
    before = bytes(model)
    with open_overlay(str(path)) as image:
        for number, (what, first, count) in enumerate(operations):
            if first >= size:
                continue
            offset, length = first * SECTOR, min(count, size - first) * SECTOR
            if what == "write":
                image.writev([memoryview(bytes([100 + number]) * length)], offset)
                model[offset : offset + length] = bytes([100 + number]) * length
            elif what == "zero":
                image.zero(offset, length, unmap=True)
                model[offset : offset + length] = bytes(length)
            else:
                image.discard(offset, length)
                now = read(image, offset, length)
                assert all(new in (0, old) for new, old in zip(now, model[offset : offset + length], strict=True))
                model[offset : offset + length] = now
            assert read(image, 0, size * SECTOR) == model
        image.flush()
        saved = image.save()
        with open_overlay(str(path)) as other:
            other.writev([memoryview(b"gone" * 128)], 0)
            other.restore(saved)
            assert read(other, 0, size * SECTOR) == model
            assert other.files() == [str(path)]
        with open_image(str(path), read_only=True):
            pass  # others may read it
    assert path.read_bytes() == before


def test_a_layer_gives_room_back(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    with open_overlay(str(path)) as image:
        image.writev([memoryview(b"x" * (1 << 20))], 0)
        file = image._file  # type: ignore[attr-defined]
        before = os.fstat(file.fileno()).st_blocks
        image.discard(0, 1 << 20)
        if os.fstat(file.fileno()).st_blocks == before:
            pytest.skip("the file system has no holes")
        assert read(image, 0, CHUNK) == bytes(CHUNK)


def test_a_full_disk_is_the_hosts_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with open_image(str(path)) as image:

        def full(*arguments: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(OSError, match="No space left"):
            image.writev([memoryview(bytes(512))], 0)
