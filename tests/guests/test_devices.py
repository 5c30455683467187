# SPDX-License-Identifier: Apache-2.0
"""What an unmodified Linux makes of the default machine's devices: found as a PC's, and working with its drivers."""

import re
from datetime import UTC, datetime

import pytest
from tests.support.guests import booted, linux_guest
from tests.support.machines import open_soft

from softkvm.vmm.outcome import End, Outcome

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

BOOT_S = 240
ALARM = "/sys/class/rtc/rtc0/wakealarm"
NOW = "/sys/class/rtc/rtc0/since_epoch"
COMPLAINTS = re.compile(r"(?i)error|fail|conflict|unable|bogus|\bbug\b|invalid\b|can't|cannot|not found")
HARMLESS = re.compile(
    r"DMI not present|No PS/2 controller found|_OSC|report a bug|invalidation|TSC calibration|calibrate against PIT"
)


def run(commands: str, options: str = "", vcpus: int = 1) -> tuple[Outcome, str]:
    """Let the default guest run *commands*; how it ended, and its console."""
    guest = linux_guest()
    line = f'{guest.command_line} {options} softkvm.run="{commands}"'
    with booted(open_soft(), guest.kernel, guest.initrd, line, vcpus=vcpus) as (machine, console):
        return machine.wait(BOOT_S), console.text


@pytest.fixture(scope="module")
def default() -> str:
    outcome, text = run("cat /proc/iomem /proc/interrupts; ls /sys/bus/pci/devices; cat /sys/power/mem_sleep", vcpus=2)
    assert outcome.end is End.POWER_OFF, text
    return text


@pytest.mark.parametrize(
    "line",
    [
        r"hpet0: at MMIO 0xfed00000, IRQs 2, 8, 0",
        r"hpet0: 3 comparators, 64-bit 100.000000 MHz counter",
        r"ACPI: PCI Root Bridge \[PCI0\] \(domain 0000 \[bus 00-ff\]\)",
        r"pci_bus 0000:00: root bus resource \[io  0x0000-0x0cf7 window\]",
        r"pci_bus 0000:00: root bus resource \[io  0x0d00-0xffff window\]",
        r"pci_bus 0000:00: root bus resource \[mem 0xc0000000-0xfebfffff window\]",
        r"pci 0000:00:00.0: \[8086:1237\] type 00 class 0x060000",
        r"rtc_cmos \S+: alarms up to one day, y3k, 114 bytes nvram, hpet irqs",
        r"ttyS0 at I/O 0x3f8 \(irq = 4, base_baud = 115200\) is a 16550A",
        r"ACPI: PM: \(supports S0 S3 S5\)",
        r"c0000000-febfffff : PCI Bus 0000:00",
        r"fed00000-fed003ff : HPET 0",
        r"^0000:00:00.0",
        r"IO-APIC +2-edge +timer",
        r"s2idle \[deep\]",
    ],
)
def test_linux_finds(default: str, line: str) -> None:
    assert re.search(line, default, re.MULTILINE), default


def test_linux_has_no_complaints(default: str) -> None:
    kernel = [line for line in default.splitlines() if line.startswith("[")]
    complaints = [line for line in kernel if COMPLAINTS.search(line) and not HARMLESS.search(line)]
    assert not complaints


@pytest.mark.parametrize("options", ["clocksource=hpet nolapic", "notsc no-kvmclock"])
def test_linux_boots_without_some_of_it(options: str) -> None:
    outcome, text = run("sleep 1; echo slept", options)
    assert outcome.end is End.POWER_OFF, text
    assert re.search("^slept", text, re.MULTILINE), text
    assert not re.search(r"BUG:|Oops|WARNING: CPU|Call Trace|rcu.*stall|soft lockup|nobody cared", text), text


def test_linux_without_acpi_halts_and_that_ends_the_machine() -> None:
    outcome, text = run("true", "acpi=off", vcpus=2)
    assert outcome.end is End.HALTED, text
    assert "System halted" in text


@pytest.mark.parametrize("options", ["", "nohpet noapic"])
def test_date_that_linux_sets_is_the_clocks(options: str) -> None:
    """The alarm comes by the HPET in the clock's place, or by the clock itself."""
    outcome, text = run(
        "date -s '2027-02-28 23:59:50'; hwclock -w -u; sleep 1; cat /proc/driver/rtc; "
        f"at=$(($(cat {NOW}) + 3)); echo alarm $at; echo $at > {ALARM}; until [ -z $(cat {ALARM}) ]; do sleep 1; done; "
        f"echo came $(cat {NOW})",
        options,
    )
    assert outcome.end is End.POWER_OFF, text
    shown = re.search(r"rtc_time\s*: (\S+)\s+rtc_date\s*: (\S+)", text)
    assert shown, text
    start = datetime(2027, 2, 28, 23, 59, 50, tzinfo=UTC)
    passed = datetime.fromisoformat(f"{shown[2]}T{shown[1]}+00:00") - start
    assert 0 <= passed.total_seconds() < 60, text
    alarm, came = (int(re.search(rf"^{word} (\d+)", text, re.MULTILINE)[1]) for word in ("alarm", "came"))  # type: ignore[index]
    assert start.timestamp() < alarm <= came, text


def test_linux_suspends_to_ram_and_its_alarm_wakes_it() -> None:
    """The alarm is far enough away for a busy host, where suspending takes longer than its few milliseconds."""
    outcome, text = run(f"echo +8 > {ALARM}; echo mem > /sys/power/state; nproc", vcpus=2)
    assert outcome.end is End.POWER_OFF, text
    assert "Preparing to enter system sleep state S3" in text
    assert "Waking up from system sleep state S3" in text
    assert re.search("^2\\s*$", text, re.MULTILINE), text
