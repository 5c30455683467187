# SPDX-License-Identifier: Apache-2.0
"""Rows 16 and 19: names and paths of any length are taken whole or refused; none is cut, none overlaps another.

The places of the threads: a path that `run` resolves (builtin-run.c), a tap device's name (virtio/net.c), the paths of
9p's requests (virtio/9p.c), where one snprintf read what it wrote; and what else of a machine is text.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import fuse, p9
from tests.support.virtio_driver import driving

from softkvm.cli.main import main
from softkvm.vmm.block.files import open_image
from softkvm.vmm.devices import ports, share, virtio_blk, virtio_net
from softkvm.vmm.devices.virtio_blk import Disk
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net.spec import host_name, tap_name
from softkvm.vmm.net.user import dhcp

LONG = 5000
"""More than PATH_MAX, 4096."""


def flat_kernel(directory: Path) -> str:
    """A kernel whose path is nearly as long as a path may be; it ends the machine at once: port 0xF4, debug exit."""
    while len(str(directory)) < 3800:
        directory /= "d" * min(240, 4000 - len(str(directory)))
    directory.mkdir(parents=True)
    path = directory / ("k" * 50)
    path.write_bytes(bytes.fromhex("b0 03 e6 f4 f4"))  # mov al, 3; out 0xf4, al; hlt
    return str(path)


# -- paths of the command line


def test_a_path_as_long_as_paths_may_be_is_resolved_whole(tmp_path: Path) -> None:
    path = flat_kernel(tmp_path)
    assert 3800 < len(path) < 4096
    assert main(["run", "--kernel", f"flat:{path}", "--console", "none"]) == 8
    assert main(["run", "--kernel", f"flat:{path}x", "--console", "none"]) == 2


def test_any_depth_is_resolved_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path needs no absolute one: the directory may be deeper than any system call's path."""
    monkeypatch.chdir(tmp_path)
    for _ in range(25):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    Path("kernel").write_bytes(bytes.fromhex("b0 03 e6 f4 f4"))
    assert main(["run", "--kernel", "flat:kernel", "--console", "none"]) == 8


OPTIONS: dict[str, Callable[[str], list[str]]] = {
    "--kernel": lambda path: ["--kernel", path],
    "--kernel flat": lambda path: ["--kernel", f"flat:{path}"],
    "--initrd": lambda path: ["--initrd", path],
    "--disk": lambda path: ["--disk", path],
    "--disk-overlay": lambda path: ["--disk-overlay", path],
    "--share": lambda path: ["--share", f"{path}:tag"],
    "--port file": lambda path: ["--port", f"name=file:{path}"],
    "--port unix": lambda path: ["--port", f"name=unix:{path}"],
    "--vsock": lambda path: ["--vsock", f"path={path}"],
    "--gdb": lambda path: ["--gdb", f"unix:{path}"],
    "--console": lambda path: ["--console", f"file:{path}"],
    "--console virtio": lambda path: ["--console", f"virtio,file:{path}"],
    "--stats": lambda path: ["--stats", path],
    "--trace": lambda path: ["--trace", path],
    "--plugin": lambda path: ["--plugin", path],
}


@pytest.mark.parametrize("length", [255 + 1, LONG, 50_000])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_path_that_is_too_long_is_said_whole_in_one_line(
    option: str, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel").write_bytes(b"\xf4")
    # one name that no file system has, or components that each would be all right
    path = "n" * length if length < LONG else "/".join(["c" * 99] * (length // 100))
    arguments = OPTIONS[option](path)
    if "--kernel" not in arguments:
        arguments += ["--kernel", "flat:kernel" if option != "--initrd" else "kernel"]
    if "--console" not in arguments:
        arguments += ["--console", "none"]
    assert main(["run", *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("softkvm: ")
    assert path in said
    assert os.listdir(tmp_path) == ["kernel"]  # no file whose name is a part of it


# -- names of devices


def test_a_tap_devices_name_is_the_kernels_or_none() -> None:
    """IFNAMSIZ is 16 with the NUL: strncpy() filled it without one, and 16 bytes name another device than 15."""
    assert tap_name("t" * 15) == "t" * 15
    for name in ("t" * 16, "ö" * 8, "t" * LONG, "", "a/b", "a b", "..", "t\0"):
        with pytest.raises(ValueError):
            tap_name(name)
    assert "t" * 15 in str(virtio_net.parse(f"tap={'t' * 15}"))
    with pytest.raises(ConfigError, match="a name of 16 bytes, expected 1 to 15"):
        virtio_net.parse(f"tap={'t' * 16}")


def test_a_host_name_is_in_dhcps_answer_whole() -> None:
    name = ".".join(["n" * 63] * 3) + "." + "m" * 61
    assert host_name(name) == name and len(name) == 253
    for wrong in (name + "m", "n" * 64, "n" * LONG, "", "a..b", "a\0b", "-a"):
        with pytest.raises(ValueError):
            host_name(wrong)
    address = bytes(4)
    lease = dhcp.Lease(address, address, address, address, name, 1500)
    discover = struct.pack("!BBBBIHHIIII", 1, 1, 6, 0, 7, 0, 0, 0, 0, 0, 0) + bytes(16 + 64 + 128)
    discover += b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\xff"
    answer = dhcp.answer(discover, lease)
    assert answer is not None
    assert bytes([12, 253]) + name.encode() in answer.message


def test_a_disks_serial_number_is_whole_without_a_nul_behind(tmp_path: Path) -> None:
    """VIRTIO 1.3, 5.2.6: the string has 20 bytes, and a NUL only if it is shorter."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    for serial in (b"", b"s", b"s" * 19, b"s" * 20):
        with driving(Disk(open_image(str(image), read_only=True), serial=serial)) as driver:
            answer = driver.queues[0].request([struct.pack("<IIQ", 8, 0, 0)], [20, 1])
            assert answer == serial.ljust(20, b"\0") + b"\0"
    with pytest.raises(ConfigError):
        virtio_blk.parse(f"{image},serial={'s' * 21}")


def test_tags_and_ports_names_are_whole_or_refused() -> None:
    assert share.parse("/tmp:" + "t" * 36).tag == "t" * 36
    with pytest.raises(ConfigError, match="a tag of 37 bytes, expected at most 36"):
        share.parse("/tmp:" + "t" * 37)
    with pytest.raises(ConfigError, match="a tag of 38 bytes"):
        share.parse("/tmp:" + "ö" * 19)
    assert ports.parse("p" * 255 + "=pty").name == "p" * 255
    with pytest.raises(ConfigError, match="a name of 256 bytes"):
        ports.parse("p" * 256 + "=pty")


# -- paths of a guest's requests

components = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and not set(name) & set(b"/\0")
)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(components, min_size=4, max_size=12, unique=True))
def test_names_of_a_guests_requests_are_the_files_byte_for_byte(names: list[bytes]) -> None:
    """Old and new name of a rename are parts of one message; each has to come out as it went in."""
    with tempfile.TemporaryDirectory() as directory:
        top = os.fsencode(directory)
        client, other = p9.connect(Path(directory)), fuse.connect(Path(directory))
        client.mkdir(0, names[0])
        other.mkdir(fuse.ROOT, names[1])
        fid, node = client.path(names[0]), other.path(names[1])
        for name in names[2:]:
            client.symlink(fid, name, name)
        for name in names[2:]:
            client.renameat(fid, name, client.path(names[1]), name)
        assert sorted(os.listdir(top + b"/" + names[1])) == sorted(names[2:])
        for old, new in zip(names[2:], reversed(names[2:]), strict=True):
            if old != new:
                other.rename(node, old, node, new)
                break
        for name in os.listdir(top + b"/" + names[1]):
            assert other.readlink(other.path(names[1], name)) in names
        client.session.close()
        other.session.close()


def refused(function: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError, check=lambda error: error.errno == errno.ENAMETOOLONG):
        function(*arguments)


def test_names_are_refused_from_the_byte_on_that_no_file_system_takes(tmp_path: Path) -> None:
    client, other = p9.connect(tmp_path), fuse.connect(tmp_path)
    for length in (256, 4095, 4096, 4097, 65535):
        name = b"n" * length
        (tmp_path / "short").touch()
        refused(client.walk, 0, name)
        refused(client.mkdir, 0, name)
        refused(client.create, client.walk(0), name)
        refused(client.symlink, 0, name, "target")
        refused(client.mknod, 0, name, 0o100644)
        refused(client.unlinkat, 0, name)
        refused(client.renameat, 0, name, 0, "short")
        refused(client.renameat, 0, "short", 0, name)
        refused(other.lookup, fuse.ROOT, name)
        refused(other.mkdir, fuse.ROOT, name)
        refused(other.create, fuse.ROOT, name)
        refused(other.rename, fuse.ROOT, "short", fuse.ROOT, name)
        refused(other.rename, fuse.ROOT, name, fuse.ROOT, "short", 1)
        assert os.listdir(tmp_path) == ["short"]
    for length in (4095, 4096, 65535):
        if length < 4096:
            client.symlink(0, "link", "t" * length)
            assert client.readlink(client.path("link")) == b"t" * length
            assert other.readlink(other.path("link")) == b"t" * length
        else:
            refused(client.symlink, 0, "longer", "t" * length)


@pytest.mark.parametrize("has_openat2", [True, False])
def test_paths_of_any_depth_are_gone_whole(tmp_path: Path, has_openat2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files deeper than PATH_MAX are found, also by nodes whose descriptor has been given up."""
    from softkvm.vmm.share import syscalls

    monkeypatch.setattr(syscalls.open_beneath, "has_openat2", has_openat2)
    client = p9.connect(tmp_path, open_paths=16)
    fid = client.walk(0)
    fids = []
    for depth in range(60):
        client.mkdir(fid, f"{depth:03}" + "d" * 200)
        fid = client.walk(fid, f"{depth:03}" + "d" * 200)
        fids.append(fid)
    bottom = client.walk(fid)
    client.create(bottom, "file")
    client.write(bottom, 0, b"deep")
    client.renameat(fids[-2], "059" + "d" * 200, 0, "moved")
    client.renameat(0, "moved", fids[30], "031" + "e" * 200)
    for other in fids:
        assert client.getattr(other).mode & 0o170000 == 0o040000
    client.open(client.walk(fids[-1], "file"))
    assert client.contents(*(f"{depth:03}" + "d" * 200 for depth in range(31)), "031" + "e" * 200, "file") == b"deep"
    client.session.close()
