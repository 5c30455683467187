# SPDX-License-Identifier: Apache-2.0
"""Images: sizes before contents, limits on what has no size, time."""

import gzip
import os
import threading
import time
from pathlib import Path

import pytest

from softkvm.vmm.boot.image import Deadline, Image
from softkvm.vmm.errors import ImageError, LoadTimeout


def test_file_is_read_where_it_is_asked_for_and_never_before(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(5 << 30)
        file.write(b"here")
    with Image.open(path, "kernel", 1 << 20) as image:
        assert image.size == 1 << 40
        assert image.read(5 << 30, 4) == b"here"
        target = bytearray(4)
        image.copy_to(memoryview(target), 5 << 30)
        assert target == b"here"


def test_reads_end_where_the_image_ends() -> None:
    image = Image("kernel", b"0123456789")
    assert image.read(8, 100) == b"89"
    assert image.read(100, 100) == b""
    with pytest.raises(ImageError, match="kernel is truncated: 10 bytes, expected 12"):
        image.copy_to(memoryview(bytearray(4)), 8)


def test_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(bytes(8192))
    with Image.open(path, "kernel", 1 << 20) as image:
        os.truncate(path, 4096)
        with pytest.raises(ImageError, match="kernel shrank to 4096 bytes"):
            image.copy_to(memoryview(bytearray(8192)), 0)


def test_pipe_is_read_to_its_end() -> None:
    read, write = os.pipe()

    def writer() -> None:
        os.write(write, b"kernel")
        time.sleep(0.05)
        os.close(write)

    try:
        threading.Thread(target=writer).start()
        with Image.open(Path(f"/dev/fd/{read}"), "kernel", 100) as image:
            assert image.read(0, 100) == b"kernel"
    finally:
        os.close(read)


def test_pipe_with_more_than_fits_is_refused() -> None:
    read, write = os.pipe()
    try:
        os.write(write, bytes(101))
        with pytest.raises(ImageError, match="has more than 100 bytes"):
            Image.open(Path(f"/dev/fd/{read}"), "kernel", 100)
    finally:
        os.close(read)
        os.close(write)


def test_named_pipe_that_nobody_writes_ends_with_the_deadline(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(LoadTimeout, match=r"loading took longer than 0.1 s"):
        Image.open(tmp_path / "fifo", "kernel", 100, Deadline(0.1))


def test_file_without_a_size_is_read() -> None:
    with Image.open(Path("/proc/self/status"), "kernel", 1 << 20) as image:
        assert image.read(0, 5) == b"Name:"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "kernel /dev/zero: is a device, expected a file"),
        ("/", "kernel /: Is a directory"),
        ("/nowhere/k", "kernel /nowhere/k: No such file or directory"),
        ("a\0b", "embedded null"),
    ],
)
def test_what_is_no_file_is_refused(path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Image.open(Path(path), "kernel", 100)


def test_copy_looks_at_the_clock() -> None:
    deadline = Deadline(1e-9)
    time.sleep(0.001)
    with pytest.raises(LoadTimeout):
        Image("kernel", bytes(10)).copy_to(memoryview(bytearray(10)), 0, deadline)


def test_compressed_image_is_expanded() -> None:
    image = Image("kernel", gzip.compress(b"contents" * 1000))
    assert image.expanded(8000).read(0, 8000) == b"contents" * 1000
    plain = Image("kernel", b"plain")
    assert plain.expanded(1) is plain


def test_compressed_image_is_bounded_by_the_limit_not_by_what_it_claims() -> None:
    bomb = gzip.compress(bytes(64 << 20))
    with pytest.raises(ImageError, match="has more than 1048576 bytes"):
        Image("kernel", bomb).expanded(1 << 20)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"x" * 1000)[:-20], "truncated gzip file"),
        (b"\x1f\x8b", "truncated gzip file of 2 bytes"),
        (b"\x1f\x8b" + bytes(100), "damaged gzip file"),
        (gzip.compress(b"x" * 1000)[:-8] + bytes(8), "damaged gzip file"),
    ],
)
def test_bad_compressed_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Image("kernel", data).expanded(1 << 20)


def test_sources_are_contents_or_paths(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"file")
    assert Image.of(b"bytes", "kernel", 10).read(0, 5) == b"bytes"
    with Image.of(tmp_path / "k", "kernel", 10) as image:
        assert image.read(0, 5) == b"file"
    with pytest.raises(TypeError, match=r"^kernel is of type str: expected bytes or a pathlib.Path$"):
        Image.of("bzImage", "kernel", 10)  # type: ignore[arg-type]
