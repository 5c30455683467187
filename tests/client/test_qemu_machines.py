# SPDX-License-Identifier: Apache-2.0
"""QEMU's machines with ``-accel kvm``: their boot, and what can be done to a machine that runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tests.support.guests import missing
from tests.support.qemu import PROMPT, Machine, default_guest, machine, run, wait_for

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

COMMANDS = "grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
#: What QEMU says of kernel-irqchip=off on any host.
IRQCHIP_WARNINGS = [
    "warning: Userspace local APIC is deprecated for KVM.",
    "warning: Do not use kernel-irqchip except for the -M isapc machine type.",
]
MORE_CPUS = re.compile(
    r"Number of (?:SMP|hotpluggable) cpus requested \(\d\) exceeds the recommended cpus supported by KVM"
)


@pytest.mark.parametrize(
    ("options", "vcpus", "warnings"),
    [
        ("-M pc", 1, []),
        ("-M q35 -smp 2", 2, []),
        ("-M microvm", 1, []),
        ("-M q35,kernel-irqchip=split -smp 2", 2, []),
        ("-M pc,kernel-irqchip=off", 1, IRQCHIP_WARNINGS),
        ("-M q35 -cpu host -smp 4", 4, []),
        ("-M pc -cpu max", 1, []),
    ],
)
def test_linux_boots(options: str, vcpus: int, warnings: list[str]) -> None:
    done = run("-m", "256", *options.split(), *default_guest(f'softkvm.run="{COMMANDS}"'))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr + done.stdout
    assert str(vcpus) in lines
    assert "kvm-clock" in lines
    assert "softkvm: run ended with status 0" in lines
    assert not any("panic" in line or "BUG" in line for line in lines)
    said = [line.partition(": ")[2] for line in done.stderr.splitlines()]
    assert [line for line in said if not MORE_CPUS.search(line)] == warnings


def test_a_machine_is_migrated_to_a_file_and_back(tmp_path: Path) -> None:
    state = tmp_path / "state"
    options = ["-M", "q35", "-m", "128", "-smp", "2", *default_guest()]
    with machine(tmp_path / "one", *options) as before:
        before.expect(PROMPT)
        before.shell("x=4711")
        before.migrate(state)
        before.quit()
    with machine(tmp_path / "two", *options, "-incoming", f"exec:cat {state}") as after:
        wait_for(lambda: bool(after.do("query-status")["status"] == "running"))
        assert after.shell("sleep 1; echo still $((x + 2))") == "still 4713\n"
        after.quit()


def test_loadvm_takes_a_machine_back(tmp_path: Path) -> None:
    image = tmp_path / "image"
    try:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    except FileNotFoundError:
        missing("qemu-img is not installed")
    options = ["-M", "q35", "-m", "128", "-smp", "2", "-drive", f"if=none,file={image}", *default_guest()]
    with machine(tmp_path, *options) as guest:
        guest.expect(PROMPT)
        guest.shell("echo early > /tmp/when")
        assert guest.human("savevm early") == ""
        for _ in range(5):
            assert guest.shell("cat /tmp/when; echo late > /tmp/when; sleep 0.1; cat /tmp/when") == "early\nlate\n"
            assert guest.human("loadvm early") == ""
        assert "early" in guest.human("info snapshots")
        guest.quit()


def interrupts(guest: Machine, name: str) -> int:
    line = guest.shell(f"grep {name}: /proc/interrupts")
    return sum(map(int, re.findall(r"\s(\d+)(?=\s)", line)))


def test_a_machine_is_paused_interrupted_and_reset(tmp_path: Path) -> None:
    with machine(tmp_path, "-M", "q35", "-m", "128", "-smp", "2", *default_guest()) as guest:
        guest.expect(PROMPT)
        registers = guest.human("info registers -a")
        assert len(re.findall(r"^RIP=[0-9a-f]{16} ", registers, re.MULTILINE)) == 2
        assert "CR0=80050033" in registers

        before = guest.shell("cat /proc/uptime")
        guest.do("stop")
        assert guest.do("query-status")["status"] == "paused"
        guest.human("info registers")
        guest.do("cont")
        assert float(before.split()[0]) < float(guest.shell("cat /proc/uptime").split()[0])

        nmis = interrupts(guest, "NMI")
        guest.do("inject-nmi")
        wait_for(lambda: interrupts(guest, "NMI") >= nmis + 1)
        assert "NMI received for unknown reason" in guest.shell("dmesg | tail -n 4")

        guest.shell("echo of this boot > /tmp/mark")
        guest.do("system_reset")
        guest.wait_for_event("RESET")
        guest.expect(b"init reached(?s:.*)" + PROMPT)
        assert guest.shell("ls /tmp; nproc") == "2\n"
        guest.type("reboot -f")
        guest.wait_for_event("RESET")
        guest.expect(b"init reached(?s:.*)" + PROMPT)
        assert guest.shell("nproc") == "2\n"
        guest.quit()


@pytest.mark.parametrize("board", ["pc", "q35"])
def test_a_cpu_is_plugged_and_unplugged(tmp_path: Path, board: str) -> None:
    with machine(tmp_path, "-M", board, "-m", "128", "-smp", "1,maxcpus=2", *default_guest()) as guest:
        guest.expect(PROMPT)
        assert guest.shell("nproc; cat /sys/devices/system/cpu/present") == "1\n0\n"
        (place,) = (cpu for cpu in guest.do("query-hotpluggable-cpus") if "qom-path" not in cpu)
        guest.do("device_add", driver=place["type"], id="second", **place["props"])
        wait_for(lambda: guest.shell("cat /sys/devices/system/cpu/present") == "0-1\n")
        guest.shell("echo 1 > /sys/devices/system/cpu/cpu1/online")
        assert guest.shell("nproc; taskset 2 sh -c 'awk \"{ print \\$39 }\" /proc/self/stat'") == "2\n1\n"
        guest.do("device_del", id="second")
        guest.wait_for_event("DEVICE_DELETED")
        assert guest.shell("nproc; cat /sys/devices/system/cpu/present") == "1\n0\n"
        assert len(guest.do("query-cpus-fast")) == 1
        guest.quit()
