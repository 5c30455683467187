# SPDX-License-Identifier: Apache-2.0
"""Shared directories as virtio devices (VIRTIO 1.3, 5.11 and 5.14), and the option that names them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from tests.support import fuse, p9
from tests.support.machines import open_soft
from tests.support.virtio_driver import NEEDS_RESET, driving

from softkvm.vmm.devices.share import ShareSpec, parse
from softkvm.vmm.devices.virtio_9p import P9
from softkvm.vmm.devices.virtio_fs import Fs
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.share.share import Share

TRANSPORTS = pytest.mark.parametrize("transport", ["pci", "mmio"])
PACKED = pytest.mark.parametrize("packed", [False, True])


@TRANSPORTS
@PACKED
def test_9p_requests_are_answered(tmp_path: Path, transport: str, packed: bool) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    with driving(P9(Share(tmp_path), "größe"), transport=transport, packed=packed) as driver:
        size = driver.registers.config(0, 2)
        assert bytes(driver.registers.config(2 + at, 1) for at in range(size)).decode() == "größe"
        queue = driver.queues[0]
        queue.indirect = True
        version = p9.message(100, struct.pack("<I", 65536) + p9.s("9P2000.L"), 0xFFFF)
        assert queue.request([version], [64])[4] == 101
        attach = p9.message(104, struct.pack("<II", 0, p9.NOFID) + p9.s("") + p9.s("") + struct.pack("<I", 0))
        assert queue.request([attach], [64])[4] == 105
        assert queue.request([p9.message(110, struct.pack("<IIH", 0, 1, 1) + p9.s("file"))], [64])[4] == 111
        assert queue.request([p9.message(12, struct.pack("<II", 1, 0))], [64])[4] == 13
        read = p9.message(116, struct.pack("<IQI", 1, 5, 10000))
        answer = queue.request([read], [11, 4096, 4096, 4096])
        assert answer[11:] == (bytes(range(256)) * 64)[5:10005]
        driver.wait_interrupt()


@TRANSPORTS
@PACKED
def test_virtio_fs_requests_are_answered(tmp_path: Path, transport: str, packed: bool) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    with driving(Fs(Share(tmp_path), "t" * 36), transport=transport, packed=packed) as driver:
        assert bytes(driver.registers.config(at, 1) for at in range(36)) == b"t" * 36
        assert driver.registers.config(36, 4) == 1
        queue = driver.queues[1]
        init = fuse.header(26, 0, 16) + struct.pack("<IIII", 7, 38, 0, 0xFFFFFFFF)
        assert len(queue.request([init], [80])) == 80
        found = queue.request([fuse.header(1, 1, 5) + b"file\0"], [16, 128])
        (node,) = struct.unpack_from("<Q", found, 16)
        (handle,) = struct.unpack_from("<Q", queue.request([fuse.header(14, node, 8), bytes(8)], [16, 16]), 16)
        read = struct.pack("<QQIIQII", handle, 5, 10000, 0, 0, 0, 0)
        answer = queue.request([fuse.header(15, node, 40), read], [16, 4096, 4096, 4096])
        assert answer[16:] == (bytes(range(256)) * 64)[5:10005]
        forget = driver.queues[0].add([fuse.header(2, node, 8) + struct.pack("<Q", 1)])
        driver.queues[0].notify()
        assert driver.queues[0].wait(forget).written == 0


@pytest.mark.parametrize("kind", [P9, Fs])
def test_a_request_that_cannot_be_answered_needs_a_reset(tmp_path: Path, kind: type[P9] | type[Fs]) -> None:
    with driving(kind(Share(tmp_path), "tag")) as driver:
        queue = driver.queues[-1]
        queue.add([b"short"], [64])
        queue.notify()
        driver.wait_until(lambda: driver.registers.status() & NEEDS_RESET)
        driver.start()
        assert not driver.registers.status() & NEEDS_RESET


@pytest.mark.parametrize("kind", [P9, Fs])
def test_a_reset_closes_what_was_open(tmp_path: Path, kind: type[P9] | type[Fs]) -> None:
    (tmp_path / "file").touch()
    share = Share(tmp_path)
    device = kind(share, "tag")
    with driving(device) as driver:
        share.open(share.look_up(share.root, b"file")[0], os.O_RDONLY)
        held = len(os.listdir("/proc/self/fd"))
        if isinstance(device, P9):
            client = p9.Client(device.session)
            client.open(client.path("file"))
        else:
            other = fuse.Client(device.session)
            other.open(other.path("file"))
        assert len(os.listdir("/proc/self/fd")) == held + 1
        driver.start()
        assert len(os.listdir("/proc/self/fd")) == held


def test_a_share_is_a_directory_with_a_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(str(tmp_path)) == ShareSpec(str(tmp_path), tmp_path.name)
    assert parse(".").tag == tmp_path.name
    assert parse("x:tag,ro,fs=9p,owner=host,id=files") == ShareSpec(
        str(tmp_path / "x"), "tag", True, "9p", "host", parse("x:t,id=files").placement
    )
    # a colon, a comma and blanks in names
    assert (parse("a:b:tag").directory, parse("a:b:tag").tag) == (str(tmp_path / "a:b"), "tag")
    assert parse("a:b/c").directory == str(tmp_path / "a:b/c")
    assert parse("my files,, all:my tag,ro").directory == str(tmp_path / "my files, all")
    assert parse("my files,, all:my tag,ro").tag == "my tag"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "expected DIR"),
        ("/", "the root directory needs a tag"),
        ("/tmp:..", "expected a name"),
        ("/tmp:a\tb", "expected a name"),
        ("/tmp:" + "t" * 37, "a tag of 37 bytes, expected at most 36"),
        ("/tmp/" + "d" * 200, "a tag of 200 bytes"),
        ("/tmp,fs=nfs", "expected any, 9p or virtiofs"),
        ("/tmp,owner=me", "expected root or host"),
        ("/tmp,rw", "unknown: rw"),
    ],
)
def test_what_is_no_share_is_said(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        parse(text)


def test_a_machine_refuses_shares_that_it_cannot_have(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for specs, wrong in (
        ((parse(f"{tmp_path}/none:t"),), "No such file"),
        ((parse(f"{tmp_path}/file:t"),), "Not a directory"),
        ((parse("/" + "x" * 300 + ":t"),), "File name too long"),
        ((parse("/" + "x/" * 3000 + ":t"),), "File name too long"),
        ((parse(f"{tmp_path}:t"), parse(f"{tmp_path}:t,ro")), "another share has the tag t"),
    ):
        with open_soft() as kvm, pytest.raises(ConfigError, match=wrong):
            Machine(kvm, Config(64 << 20, device_specs=specs))


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("", {"fs0", "9p0"}),
        (",fs=9p", {"9p0"}),
        (",fs=virtiofs,id=x", {"x"}),
        (",id=x", {"x-fs", "x-9p"}),
    ],
)
def test_a_share_is_there_as_both_file_systems_unless_one_is_chosen(
    tmp_path: Path, option: str, names: set[str]
) -> None:
    config = Config(64 << 20, device_specs=(parse(f"{tmp_path}:t{option}"),))
    with open_soft() as kvm, Machine(kvm, config) as machine:
        assert set(machine.board.virtio.transports) == names
