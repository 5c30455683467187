# SPDX-License-Identifier: Apache-2.0
"""Linux's own clients use shared directories in every way that files are used: virtio-fs and 9p."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from tests.support.guests import linux_guest, missing
from tests.support.machines import open_soft
from tests.support.systems import kept_directory

from softkvm.vmm.console import Console
from softkvm.vmm.devices.share import parse
from softkvm.vmm.guest import Guest, GuestUnavailable, default
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

PARTS = ("tree", "big", "names", "mapping", "fsx", "renames", "unlinked", "append", "locks", "changing", "attributes")


def guest_with_9p() -> Guest:
    """The default guest's initramfs with Debian's general kernel: the one for clouds has no 9p."""
    try:
        with mock.patch.object(default, "KERNEL_PACKAGES", ("linux-image-amd64",)):
            return default.prepare(directory=kept_directory() / "generic")
    except GuestUnavailable as error:
        missing(str(error))
        raise AssertionError from error


@pytest.mark.parametrize("file_system", ["virtiofs", "9p"])
def test_linux_uses_a_shared_directory_as_its_own(tmp_path: Path, file_system: str) -> None:
    guest = linux_guest() if file_system == "virtiofs" else guest_with_9p()
    share, other = tmp_path / "share", tmp_path / "read only"
    share.mkdir()
    other.mkdir()
    (share / "big").write_bytes(os.urandom(5_000_000))
    (other / "file").write_text("from the host\n")
    probe = Path(__file__).with_name("share_probe.c")
    try:
        subprocess.run(["gcc", "-O1", "-static", "-o", share / "probe", probe], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        missing(f"no gcc, or no static C library: {error}")
    specs = (parse(f"{share}:s,fs={file_system}"), parse(f"{other}:other one,ro,fs={file_system}"))
    work = "cd /mnt/s && ./probe; cat /mnt/*one/file; touch /mnt/*one/file; rm /mnt/*one/file; cd; umount /mnt/s"
    mounts = "softkvm.share=s softkvm.share=other%20one"
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(device_specs=specs), console.output) as machine:
        machine.load(guest.kernel, guest.initrd, f'{guest.command_line} quiet {mounts} softkvm.run="{work}"')
        assert machine.run(timeout_s=400).end is End.POWER_OFF
    output = console.text.replace("\r", "")
    assert [line for line in output.splitlines() if line.startswith(("ok ", "failed "))] == [
        f"ok {part}" for part in PARTS
    ], output
    assert (share / "copy").read_bytes() == (share / "big").read_bytes()
    assert (share / "fsx").read_bytes() == (share / "fsx.good").read_bytes()
    assert (share / "log").read_bytes() == b"line\n" * 20
    assert os.readlink(share / "up").startswith("../../../..")
    assert "from the host\n" in output and output.count("Read-only file system") == 2, output
    assert (other / "file").read_text() == "from the host\n"
