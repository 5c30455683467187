# SPDX-License-Identifier: Apache-2.0
"""Reading Debian packages: every compression, and every kind of damage as one clear error."""

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from tests.support.debs import package, tar

from softkvm.vmm.guest.deb import DebError, read_files

KERNEL = b"kernel " * 10_000


PLAIN = tar({"./boot/config": b"c", "./boot/vmlinuz-1": KERNEL, "./etc/x": b"x"})
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_compression(tmp_path: Path, suffix: str) -> None:
    deb = package(tmp_path / "p.deb", COMPRESSIONS[suffix](PLAIN), suffix)
    assert read_files(deb, lambda name: "vmlinuz" in name, count=1) == {"boot/vmlinuz-1": KERNEL}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_truncated_packages_are_one_error(tmp_path: Path, suffix: str) -> None:
    whole = package(tmp_path / "whole.deb", COMPRESSIONS[suffix](PLAIN), suffix).read_bytes()
    for cut in (4, 40, 100, 260, len(whole) * 3 // 4, len(whole) - 40):
        deb = tmp_path / "cut.deb"
        deb.write_bytes(whole[:cut])
        try:
            found = read_files(deb, lambda name: name == "etc/x", count=1)
        except DebError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert found in ({}, {"etc/x": b"x"})


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSIONS if suffix])
def test_damaged_data_is_one_error(tmp_path: Path, suffix: str) -> None:
    deb = package(tmp_path / "p.deb", b"\xff" * 5000, suffix)
    with pytest.raises(DebError):
        read_files(deb, lambda name: True, count=1)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 zip", b"!<arch>\n", b"!<arch>\n" + b"x" * 60])
def test_other_files_are_refused(tmp_path: Path, contents: bytes) -> None:
    deb = tmp_path / "p.deb"
    deb.write_bytes(contents)
    with pytest.raises(DebError):
        read_files(deb, lambda name: True, count=1)


def test_links_and_devices_are_never_taken_for_files(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (("./boot/vmlinuz", tarfile.SYMTYPE), ("./boot/vmlinuz2", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/shadow"
            archive.addfile(info)
    deb = package(tmp_path / "p.deb", lzma.compress(out.getvalue()))
    assert read_files(deb, lambda name: True, count=9) == {}


def test_a_file_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    deb = package(tmp_path / "p.deb", lzma.compress(PLAIN))
    with pytest.raises(DebError, match="more than the limit 100"):
        read_files(deb, lambda name: "vmlinuz" in name, count=1, size_max=100)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb to make a package with")
def test_reads_what_dpkg_deb_writes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True, mode=0o755)
    (tree / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (tree / "bin").mkdir()
    (tree / "bin/busybox").write_bytes(b"box")
    subprocess.run(["dpkg-deb", "-b", tree, tmp_path / "x.deb"], check=True, capture_output=True)
    assert read_files(tmp_path / "x.deb", lambda name: name == "bin/busybox", count=1) == {"bin/busybox": b"box"}
