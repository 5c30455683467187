# SPDX-License-Identifier: Apache-2.0
"""QEMU's gdb stub with ``-accel kvm``: breakpoints, steps and watchpoints are KVM_SET_GUEST_DEBUG's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.gdb import Debugger, Stop
from tests.support.qemu import PROMPT, Machine, default_guest, machine

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

COUNT = 0x500  # in memory that a PC's BIOS leaves alone
#: A boot sector, at 0x7c00: counts up a word in memory, and adds all its values.
BOOT_SECTOR = bytes.fromhex(
    "31c0"  # 7c00 xor ax, ax
    "8ed8"  # 7c02 mov ds, ax
    "31db"  # 7c04 xor bx, bx
    "ff060005"  # 7c06 inc word [0x500]
    "a10005"  # 7c0a mov ax, [0x500]
    "01c3"  # 7c0d add bx, ax
    "ebf5"  # 7c0f jmp 0x7c06
)
INC, LOAD, ADD, JUMP = 0x7C06, 0x7C0A, 0x7C0D, 0x7C0F


def stub(directory: Path) -> list[str]:
    """Options for a stub at a socket in *directory*."""
    return ["-chardev", f"socket,path={directory}/gdb,server=on,wait=off,id=gdb", "-gdb", "chardev:gdb"]


@contextmanager
def debugger_of(guest: Machine, directory: Path) -> Iterator[Debugger]:
    """A debugger at the stub; a machine that runs stops for it."""
    with guest.connect(directory / "gdb") as connection:
        yield Debugger(connection)


def count(debugger: Debugger) -> int:
    return int.from_bytes(debugger.read(COUNT, 2), "little")


def test_breakpoints_steps_and_watchpoints_in_a_boot_sector(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes((BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    options = [*stub(tmp_path), "-S", "-M", "pc", "-m", "32", "-drive", f"file={disk},format=raw,if=ide"]
    with machine(tmp_path, *options) as guest, debugger_of(guest, tmp_path) as debugger:
        registers = debugger.registers()
        assert (registers["rip"], registers["cs"], registers["eflags"]) == (0xFFF0, 0xF000, 2), "the reset vector"

        debugger.set(Stop.HARDWARE_BREAKPOINT, INC)
        assert debugger.go_on().startswith("T05")
        registers = debugger.registers()
        assert [registers[name] for name in ("rip", "rbx", "cs", "ds")] == [INC, 0, 0, 0]
        assert debugger.read(0x7C00, len(BOOT_SECTOR)) == BOOT_SECTOR
        debugger.clear(Stop.HARDWARE_BREAKPOINT, INC)

        debugger.write(COUNT, b"\x34\x12")
        debugger.set_register("rbx", 0x1000)
        for stands in (LOAD, ADD, JUMP, INC):
            assert debugger.step().startswith("T05")
            assert debugger.registers()["rip"] == stands
        registers = debugger.registers()
        assert (count(debugger), registers["rax"], registers["rbx"]) == (0x1235, 0x1235, 0x2235)

        debugger.set(Stop.SOFTWARE_BREAKPOINT, ADD)
        assert debugger.go_on().startswith("T05")
        for n in (1, 2, 3):
            assert (debugger.registers()["rip"], count(debugger)) == (ADD, 0x1235 + n)
            assert debugger.go_on_from(Stop.SOFTWARE_BREAKPOINT, ADD).startswith("T05")
        debugger.clear(Stop.SOFTWARE_BREAKPOINT, ADD)
        assert debugger.read(ADD, 2) == b"\x01\xc3"

        debugger.set(Stop.WRITE, COUNT, 2)
        for n in (5, 6):
            assert f"watch:{COUNT:016x}" in (stop := debugger.go_on()), stop
            assert (debugger.registers()["rip"], count(debugger)) == (LOAD, 0x1235 + n), "behind the instruction"
        debugger.clear(Stop.WRITE, COUNT, 2)

        debugger.set(Stop.ACCESS, COUNT, 2)
        for stands in (ADD, LOAD, ADD):
            assert f"awatch:{COUNT:016x}" in (stop := debugger.go_on()), stop
            assert debugger.registers()["rip"] == stands
        debugger.clear(Stop.ACCESS, COUNT, 2)

        debugger.detach()
        assert guest.do("query-status")["status"] == "running"
        guest.quit()


def test_breakpoints_in_linux_with_two_cpus(tmp_path: Path) -> None:
    with machine(tmp_path, *stub(tmp_path), "-M", "q35", "-m", "128", "-smp", "2", *default_guest("nokaslr")) as guest:
        guest.expect(PROMPT)
        symbols = guest.shell("grep -E ' (__x64_sys_sethostname|jiffies_64)$' /proc/kallsyms")
        address = {name: int(at, 16) for at, _, name in map(str.split, symbols.splitlines())}
        entry, jiffies = address["__x64_sys_sethostname"], address["jiffies_64"]
        with debugger_of(guest, tmp_path) as debugger:
            assert len(debugger.threads()) == 2
            for processor, kind in ((1, Stop.SOFTWARE_BREAKPOINT), (2, Stop.HARDWARE_BREAKPOINT)):
                debugger.set(kind, entry)
                guest.type(f"taskset {processor} hostname softkvm; echo on {processor}")
                stop = debugger.go_on()
                assert f"thread:{processor:02x}" in stop, stop
                assert debugger.registers()["rip"] == entry
                debugger.clear(kind, entry)
                assert debugger.step().startswith("T05")
                assert entry < debugger.registers()["rip"] <= entry + 15
            ticks = debugger.read(jiffies, 8)
            debugger.set(Stop.WRITE, jiffies, 8)
            assert f"watch:{jiffies:016x}" in debugger.go_on()
            assert debugger.read(jiffies, 8) != ticks
            debugger.clear(Stop.WRITE, jiffies, 8)
            debugger.detach()
        guest.expect(rb"on 2\r\n")
        guest.quit()
