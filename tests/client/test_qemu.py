# SPDX-License-Identifier: Apache-2.0
"""QEMU, unmodified, boots the default guest with ``-accel kvm`` under ``softkvm exec``."""

from __future__ import annotations

import subprocess

import pytest
from tests.client.conftest import EXEC
from tests.support.guests import linux_guest, missing

from softkvm import qemu

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

TIMEOUT_S = 300
COMMANDS = "grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/clocksource/clocksource0/current_clocksource"


def boot(*options: str) -> list[str]:
    """Boot the default guest in QEMU; returns the lines of its console."""
    program = qemu.find()
    if program is None:
        missing("qemu-system-x86_64 is not installed")
    guest = linux_guest()
    done = subprocess.run(
        [
            *EXEC, "--", str(program), "-accel", "kvm", "-m", "256", "-nodefaults", "-no-user-config", "-nographic",
            "-serial", "stdio", "-no-reboot", *options,
            "-kernel", str(guest.kernel), "-initrd", str(guest.initrd),
            "-append", f'console=ttyS0 quiet softkvm.run="{COMMANDS}"',
        ],
        check=False, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "vcpus"),
    [
        ("-M pc", 1),
        ("-M q35 -smp 2", 2),
        ("-M microvm", 1),
        ("-M q35,kernel-irqchip=split -smp 2", 2),
        ("-M pc,kernel-irqchip=off", 1),
        ("-M q35 -cpu host -smp 4", 4),
        ("-M pc -cpu max", 1),
    ],
)
def test_qemu_boots_linux(options: str, vcpus: int) -> None:
    lines = boot(*options.split())
    assert str(vcpus) in lines
    assert "softkvm: run ended with status 0" in lines
    assert not any("panic" in line or "BUG" in line for line in lines)
