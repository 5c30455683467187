# SPDX-License-Identifier: Apache-2.0
"""The newc writer, checked against the format document and, where installed, against cpio itself."""

import shutil
import subprocess
from io import BytesIO

import pytest

from softkvm.vmm.guest.cpio import CpioWriter


def archive() -> tuple[BytesIO, CpioWriter]:
    out = BytesIO()
    return out, CpioWriter(out)


def test_file_entry_has_the_documented_layout() -> None:
    out, writer = archive()
    writer.file("ab", b"hello", 0o640)
    data = out.getvalue()
    assert data[:6] == b"070701"
    fields = [int(data[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    # ino mode uid gid nlink mtime filesize major minor rmajor rminor namesize chksum
    assert fields == [1, 0o100640, 0, 0, 1, 0, 5, 0, 0, 0, 0, 3, 0]
    assert data[110:113] == b"ab\0"
    assert data[116:121] == b"hello"  # 110 + 3 rounded up to 4
    assert len(data) % 4 == 0


def test_device_entry_carries_its_numbers_and_type() -> None:
    out, writer = archive()
    writer.device("dev/console", "c", 5, 1)
    data = out.getvalue()
    assert int(data[14:22], 16) == 0o020600
    assert (int(data[6 + 72 : 6 + 80], 16), int(data[6 + 80 : 6 + 88], 16)) == (5, 1)


def test_trailer_ends_the_archive_in_whole_blocks() -> None:
    out, writer = archive()
    writer.close()
    data = out.getvalue()
    assert b"TRAILER!!!\0" in data
    assert len(data) == 512


@pytest.mark.parametrize("path", ["", "/etc", "../x", "a/../b", "a\0b"])
def test_paths_that_leave_the_archive_are_refused(path: str) -> None:
    _, writer = archive()
    with pytest.raises(ValueError, match="archive path"):
        writer.file(path, b"")


def test_unknown_device_kind_is_refused() -> None:
    _, writer = archive()
    with pytest.raises(ValueError, match="'x'"):
        writer.device("dev/x", "x", 1, 1)


def test_same_input_gives_the_same_bytes() -> None:
    results = []
    for _ in range(2):
        out, writer = archive()
        writer.directory("d")
        writer.symlink("d/l", "../f")
        writer.file("f", b"x" * 1000)
        writer.close()
        results.append(out.getvalue())
    assert results[0] == results[1]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio command to compare with")
def test_cpio_reads_it(tmp_path: object) -> None:
    out, writer = archive()
    writer.directory("d")
    writer.file("d/f", b"contents")
    writer.symlink("d/l", "f")
    writer.close()
    listing = subprocess.run(["cpio", "-t"], input=out.getvalue(), capture_output=True, check=True)
    assert listing.stdout.decode().split() == ["d", "d/f", "d/l"]
