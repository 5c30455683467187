# SPDX-License-Identifier: Apache-2.0
"""Machines that firmware boots: SeaBIOS with GRUB and Linux from virtio disks, OVMF to its shell."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.systems import package_file

import softkvm
from softkvm.vmm.boards.pc_firmware import read
from softkvm.vmm.console import Console
from softkvm.vmm.devices.virtio_blk import parse
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

TIMEOUT_S = 240


def seabios() -> bytes:
    return read(package_file("seabios", r"usr/share/seabios/bios-256k\.bin"))


def type_slowly(console: Console, line: str) -> None:
    """Type as people do: firmware's keyboard buffer holds 15 keys."""
    for character in line + "\r":
        console.send(character)
        time.sleep(0.05)


def test_seabios_boots_grub_from_a_disk_and_that_boots_linux_from_another(tmp_path: Path) -> None:
    guest = linux_guest()
    grub = package_file("grub-rescue-pc", r"usr/lib/grub-rescue/grub-rescue-cdrom\.iso")
    with tarfile.open(tmp_path / "disk", "w", format=tarfile.USTAR_FORMAT) as disk:  # GRUB takes it for a file system
        disk.add(guest.kernel, "vmlinuz")
        disk.add(guest.initrd, "initrd")
    disks = (parse(f"{grub},ro"), parse(f"{tmp_path}/disk,ro"))
    config = Config(256 * MIB, 2, firmware=seabios(), device_specs=disks, reboot=True)
    console = Console()
    with Machine(softkvm.open(), config, console.output) as machine:
        console.attach(machine)
        machine.start()
        console.expect("SeaBIOS", TIMEOUT_S)
        console.expect("highlighted entry will be executed", TIMEOUT_S)
        console.send("c")
        console.expect("grub> ", TIMEOUT_S)
        type_slowly(console, "reboot")  # everything once more
        console.expect("highlighted entry will be executed", TIMEOUT_S)
        console.send("c")
        for line in ("linux (hd1)/vmlinuz console=ttyS0 quiet", "initrd (hd1)/initrd", "boot"):
            console.expect("grub> ", TIMEOUT_S)
            type_slowly(console, line)
        console.expect("# ", TIMEOUT_S)
        console.send("cat /proc/cmdline; nproc; cat /sys/class/dmi/id/product_name; ls /sys/block\n")
        console.expect(r"^BOOT_IMAGE=\(hd1\)/vmlinuz console=ttyS0 quiet\r?\n2\r?\nsoftkvm machine", TIMEOUT_S)
        console.expect(r"vda\s+vdb", TIMEOUT_S)
        console.send("poweroff -f\n")  # by the ACPI tables that SeaBIOS placed
        assert machine.wait(TIMEOUT_S).end is End.POWER_OFF


def test_ovmf_comes_to_its_shell_and_switches_the_machine_off() -> None:
    rom = read(package_file("ovmf", r"usr/share/ovmf/OVMF\.fd"))
    console = Console()
    with Machine(softkvm.open(), Config(128 * MIB, firmware=rom), console.output) as machine:
        console.attach(machine)
        machine.start()
        console.expect("UEFI Interactive Shell", TIMEOUT_S)
        console.expect("in 5 seconds", TIMEOUT_S)
        console.send("\x1b")
        console.expect("Shell> ", TIMEOUT_S)
        type_slowly(console, "reset -s")
        assert machine.wait(TIMEOUT_S).end is End.POWER_OFF
