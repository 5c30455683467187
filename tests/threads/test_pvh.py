# SPDX-License-Identifier: Apache-2.0
"""PVH entry without Xen (row 8): Linux starts by the note of the ELF kernel inside its image, with hvm_start_info."""

from __future__ import annotations

import pytest
from tests.support.guests import linux_guest

import softkvm
from softkvm.vmm.boot.bzimage import Entry
from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End


@pytest.mark.guest
@pytest.mark.network
def test_an_unmodified_kernel_starts_by_the_entry_inside_of_its_image() -> None:
    guest = linux_guest()
    show = "cat /proc/cmdline; head -c 6 /sys/kernel/boot_params/version"
    line = f'console=ttyS0 quiet one=1 softkvm.run="{show}"'
    console = Console()
    with Machine(softkvm.open(), Config(192 * MIB, 2), console.output) as machine:
        console.attach(machine)
        machine.load(guest.kernel.read_bytes(), guest.initrd.read_bytes(), line, entry=Entry.PVH)
        machine.start()
        assert machine.wait(240).end is End.POWER_OFF
    assert " quiet one=1 " in console.text  # the command line of hvm_start_info, and its module: init ran
    # What the kernel's PVH code (arch/x86/platform/pvh/enlighten.c) says of the protocol that it came without.
    assert "0x020c" in console.text
