# SPDX-License-Identifier: Apache-2.0
"""QEMU's firmware with ``-accel kvm``: SeaBIOS with GRUB and with iPXE, and OVMF, on the way to Linux."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.qemu import PROMPT, TIMEOUT_S, Machine, machine
from tests.support.systems import package_file

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

GRUB_PROMPT = rb"\ngrub> "


def test_seabios_boots_grub_which_boots_linux(tmp_path: Path) -> None:
    """Real mode: El Torito, disks by INT 13h, console and keyboard by INT 10h and INT 16h."""
    guest = linux_guest()
    grub = package_file("grub-rescue-pc", r"usr/lib/grub-rescue/grub-rescue-cdrom\.iso")
    with tarfile.open(tmp_path / "disk", "w", format=tarfile.USTAR_FORMAT) as disk:  # GRUB takes it for a file system
        disk.add(guest.kernel, "vmlinuz")
        disk.add(guest.initrd, "initrd")
    disks = ["-cdrom", str(grub), "-drive", f"file={tmp_path}/disk,format=raw,if=virtio", "-boot", "d"]
    with machine(tmp_path, "-M", "pc,graphics=off", "-m", "256", *disks) as computer:
        computer.expect(b"SeaBIOS")
        computer.expect(b"highlighted entry will be executed")
        computer.serial.sendall(b"c")
        for line in ("linux (hd0)/vmlinuz console=ttyS0 quiet", "initrd (hd0)/initrd", "boot"):
            computer.expect(GRUB_PROMPT)
            computer.type_to_firmware(line)
        computer.expect(PROMPT)
        assert computer.shell("cat /proc/cmdline") == "BOOT_IMAGE=(hd0)/vmlinuz console=ttyS0 quiet\n"
        computer.quit()


def test_seabios_starts_ipxe_which_boots_from_the_network(tmp_path: Path) -> None:
    """An option ROM, which has an address and a script from the network, and then its prompt."""
    rom = package_file("ipxe-qemu", r"usr/lib/ipxe/qemu/efi-virtio\.rom")
    (tmp_path / "script").write_text("#!ipxe\necho the script of ${net0/ip}\nshell\n")
    shutil.copy(rom, tmp_path / "efi-virtio.rom")  # by its name: QEMU gives the device's ID to its own ROMs only
    network = ["-netdev", f"user,id=net,tftp={tmp_path},bootfile=script", "-L", str(tmp_path)]
    network += ["-device", "virtio-net-pci,netdev=net", "-boot", "n"]
    with machine(tmp_path, "-M", "pc,graphics=off", "-m", "64", *network) as computer:
        computer.expect(rb"the script of 10\.0\.2\.15\r\n")
        computer.expect(b"iPXE> ")
        computer.type_to_firmware("echo sum ${builtin/version}")
        computer.expect(rb"sum 1\.\S+\r\n")
        computer.quit()


def _shell_boots(computer: Machine) -> bool:
    """Whether OVMF's shell has got as far as Linux's prompt.

    On a busy host QEMU's serial port may stand still for longer than the firmware waits: then it starts no shell, or
    that ends in the middle of a line.
    """
    if computer.expect(b"any other key to continue|No bootable option")[0].startswith(b"No"):
        return False
    computer.type("")
    return not computer.expect(b"(?s)No bootable option|Device Error|by the shell's script.*?" + PROMPT)[0].endswith(
        (b"option", b"Error")
    )


def test_ovmf_starts_its_shell_which_boots_linux(tmp_path: Path) -> None:
    """Two processors, started by the firmware first, and by Linux again; variables in flash memory."""
    guest = linux_guest()
    flash = shutil.copy(package_file("ovmf", r"usr/share/ovmf/OVMF\.fd"), tmp_path / "flash")
    system = tmp_path / "system"
    system.mkdir()
    shutil.copy(guest.kernel, system / "linux.efi")
    shutil.copy(guest.initrd, system / "initrd")
    line = r"linux.efi initrd=\initrd console=ttyS0 quiet"
    (system / "startup.nsh").write_text(f"@echo -off\r\necho by the shell's script\r\nfs0:\r\n{line}\r\n")
    disks = ["-drive", f"file={flash},format=raw,if=pflash"]
    disks += ["-drive", f"file=fat:{system},format=raw,if=virtio,read-only=on"]
    with machine(tmp_path, "-M", "q35", "-m", "256", "-smp", "2", *disks) as computer:
        while not _shell_boots(computer):
            computer.do("system_reset")
        assert (
            computer.shell("nproc; ls /sys/firmware/efi/fw_platform_size") == "2\n/sys/firmware/efi/fw_platform_size\n"
        )
        computer.type("poweroff -f")
        assert computer.process.wait(TIMEOUT_S) == 0, "powered off by way of the firmware"
