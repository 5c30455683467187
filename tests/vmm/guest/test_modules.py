# SPDX-License-Identifier: Apache-2.0
"""The drivers out of a kernel's package: what is needed comes along, and modprobe(8) finds it."""

import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from tests.support.debs import package, tar

from softkvm.vmm.guest.deb import DebError
from softkvm.vmm.guest.modules import archive, module_name, read_modules

TOP = "lib/modules/6.1.0-9"


def module(**fields: str | list[str]) -> bytes:
    """A relocatable ELF file with nothing but a .modinfo section."""
    entries = [
        (key, value) for key, values in fields.items() for value in ([values] if isinstance(values, str) else values)
    ]
    info = b"".join(f"{key}={value}\0".encode() for key, value in entries)
    names = b"\0.modinfo\0.shstrtab\0"
    header = 64
    sections = [
        struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, header, len(info), 0, 0, 1, 0),
        struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, header + len(info), len(names), 0, 0, 1, 0),
    ]
    identity = b"\x7fELF\2\1\1" + bytes(9)
    elf = struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, header + len(info) + len(names), 0, 64, 0, 0, 64, 3, 2)
    return identity + elf + info + names + b"".join(sections)


FILES = {
    f"./{TOP}/kernel/drivers/virtio/virtio_pci.ko": module(
        depends="virtio,virtio_ring,odd-bus", alias="pci:v00001AF4d*"
    ),
    f"./{TOP}/kernel/drivers/virtio/virtio.ko": module(depends="virtio_ring", alias=[]),
    f"./{TOP}/kernel/drivers/virtio/virtio_ring.ko.xz": lzma.compress(module(depends="")),
    f"./{TOP}/kernel/drivers/odd/odd-bus.ko": module(depends=""),
    f"./{TOP}/kernel/drivers/odd/unrelated.ko": module(depends=""),
    f"./{TOP}/kernel/drivers/char/hw_random/virtio-rng.ko": module(depends="virtio", alias="virtio:d00000004v*"),
}


def kernel(tmp_path: Path, files: dict[str, bytes]) -> Path:
    return package(tmp_path / "kernel.deb", lzma.compress(tar(files)))


def test_what_a_driver_needs_comes_before_it(tmp_path: Path) -> None:
    modules = read_modules(kernel(tmp_path, FILES), ("virtio_pci", "virtio_rng", "not_in_this_kernel"))
    assert [found.name for found in modules] == ["virtio_ring", "virtio", "odd_bus", "virtio_pci", "virtio_rng"]
    assert all(found.data[:4] == b"\x7fELF" for found in modules)
    assert {found.release for found in modules} == {"6.1.0-9"}


def test_names_are_modprobes() -> None:
    assert module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz") == "virtio_rng"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio to unpack with")
def test_modprobes_files_name_all_that_is_needed(tmp_path: Path) -> None:
    data = archive(read_modules(kernel(tmp_path, FILES), ("virtio_pci", "virtio_rng")))
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path, check=True)
    top = tmp_path / TOP
    needs = dict(line.split(":") for line in (top / "modules.dep").read_text().splitlines())
    assert needs["kernel/drivers/virtio/virtio_ring.ko"] == ""
    last = needs["kernel/drivers/virtio/virtio_pci.ko"].split()
    assert sorted(last) == [
        "kernel/drivers/odd/odd-bus.ko",
        "kernel/drivers/virtio/virtio.ko",
        "kernel/drivers/virtio/virtio_ring.ko",
    ]
    assert last.index("kernel/drivers/virtio/virtio.ko") < last.index("kernel/drivers/virtio/virtio_ring.ko")
    assert all((top / path).exists() for path in needs)
    assert "alias virtio:d00000004v* virtio_rng\n" in (top / "modules.alias").read_text()


def test_a_kernel_without_any_is_no_archive(tmp_path: Path) -> None:
    assert archive(read_modules(kernel(tmp_path, {"./boot/vmlinuz-6.1": b""}))) == b""


@pytest.mark.parametrize("data", [b"no ELF file", b"\x7fELF\2\1\1" + bytes(20)])
def test_a_damaged_module_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DebError, match=r"virtio\.ko is damaged"):
        read_modules(kernel(tmp_path, {f"./{TOP}/kernel/drivers/virtio/virtio.ko": data}), ("virtio",))
    with pytest.raises(DebError, match=r"virtio\.ko\.xz is damaged"):
        read_modules(kernel(tmp_path, {f"./{TOP}/kernel/drivers/virtio/virtio.ko.xz": data}), ("virtio",))
