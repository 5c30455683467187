# SPDX-License-Identifier: Apache-2.0
"""The distribution's gdb, in batch mode, on whole guests."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tests.support.guests import booted, demo_image, linux_guest
from tests.support.machines import KVMS, open_soft
from tests.support.stub import gdb, stub

from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.outcome import End


@pytest.mark.parametrize("kind", list(KVMS))
@pytest.mark.parametrize("where", ["tcp::0,wait", "unix"])
def test_a_guest_is_debugged_from_its_first_instruction_on(kind: str, where: str, tmp_path: object) -> None:
    where = f"unix:{tmp_path}/gdb,wait" if where == "unix" else where
    console = Console()
    with KVMS[kind]() as kvm, Machine(kvm, Config(64 << 20, 2), console.output) as machine:
        console.attach(machine)
        machine.load(demo_image())
        with stub(machine, where) as server:
            machine.start()
            told = gdb(
                f"target remote {server.target}",
                "print $cr0",
                "hbreak guest_main",
                "continue",
                "info threads",
                "backtrace",
                "print $efer",
                "stepi",
                "x/i $rip",
                "print/x $ymm0h" if kind == "device" else "print/x $xmm0",
                "delete",
                "hbreak show_time",
                "continue",
                "print processors_running",
                "monitor info vcpus",
                "detach",
                program=demo_image(),
            )
        assert "_start ()" in told
        assert "$1 = [ PE ET ]" in told
        assert re.search(r"hit Breakpoint 1, \S+ in guest_main \(\)", told)
        assert 'Thread 1 "vCPU 0" (vCPU 0: running' in told
        assert 'Thread 2 "vCPU 1" (vCPU 1: not started yet' in told
        assert "in start64 ()" in told
        assert "$2 = [ LME LMA ]" in told
        assert "<guest_main+1>" in told
        assert re.search(r"hit Breakpoint 2, \S+ in show_time \(\)", told)
        assert "* vCPU 0: running" in told
        console.expect("help lists the commands", timeout_s=60)


def test_software_breakpoints_watchpoints_and_calls_work_on_symbols() -> None:
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(64 << 20, 2), console.output) as machine:
        console.attach(machine)
        machine.load(demo_image())
        with stub(machine) as server:
            machine.start()
            told = gdb(
                f"target remote {server.target}",
                "break *guest_main",
                "continue",
                "watch *(unsigned *)&processors_running",
                "continue",
                "continue",
                "info breakpoints",
                "delete",
                "break show_memory",
                "continue",
                "finish",
                "x/2xb show_memory",
                "set var *(unsigned *)&processors_running = 7",
                "detach",
                program=demo_image(),
            )
        values = [int(value) for value in re.findall(r"New value = (\d+)", told)]
        assert values == [1, 2] or values == sorted(values) != [], told
        assert re.search(r"hit Breakpoint 3, \S+ in show_memory", told), told
        assert "in guest_main ()" in told
        console.expect("help lists the commands", timeout_s=60)
        assert machine.memory.read(0x100000, 4096).count(b"\xcc") < 100
        console.send("cpu\n")
        console.expect("vcpus       7 of 2 running", timeout_s=30)


def test_the_guests_end_is_told_and_gdb_may_kill_it() -> None:
    with open_soft() as kvm, Machine(kvm, Config(64 << 20, 1)) as machine:
        machine.load(demo_image())
        with stub(machine) as server:
            machine.start()
            told = gdb(
                f"target remote {server.target}",
                "hbreak *guest_main",
                "continue",
                "monitor reset",
                "maint flush register-cache",
                "print $rip",
                "continue",
                "print $rip",
                "monitor quit",
                "continue",
                program=demo_image(),
            )
            rips = re.findall(r"\$\d = .* (0x[0-9a-f]+) <(\w+)>", told)
            assert rips == [("0x100000", "_start"), (rips[1][0], "guest_main")], told
            assert "exited" in told
        assert machine.wait(10).end is End.STOPPED
        assert machine.boots == 2
    with open_soft() as kvm, Machine(kvm, Config(64 << 20, 1)) as machine:
        machine.load(demo_image())
        with stub(machine) as server:
            machine.start()
            assert "killed" in gdb(f"target remote {server.target}", "kill")
        assert machine.wait(10).end is End.STOPPED


@pytest.fixture
def linux() -> Iterator[tuple[Machine, Console]]:
    guest = linux_guest()
    with booted(open_soft(), guest.kernel, guest.initrd, guest.command_line, vcpus=2) as (machine, console):
        console.expect("# ", timeout_s=120)
        yield machine, console


def kernel_symbol(console: Console, name: str) -> int:
    """The address of a symbol of the running kernel, as it says itself."""
    console.send(f"grep ' {name}$' /proc/kallsyms\n")
    return int(console.expect(rf"^([0-9a-f]{{16}}) \w {name}\r?$", timeout_s=30)[1], 16)


@pytest.mark.guest
def test_a_running_linux_is_attached_to_and_goes_on(linux: tuple[Machine, Console]) -> None:
    machine, console = linux
    openat, level, uts = (kernel_symbol(console, name) for name in ("do_sys_openat2", "console_printk", "init_uts_ns"))
    console.send("while :; do dmesg -n 4; dmesg -n 5; cat /etc/hostname > /dev/null; done &\n")
    console.expect("# ", timeout_s=30)
    with stub(machine, "tcp::0") as server:
        told = gdb(
            f"target remote {server.target}",
            "info threads",
            f"break *{openat:#x}",
            "continue",
            "x/s $rsi",
            "stepi",
            "stepi",
            "print $rip",
            "delete",
            f"watch *(int *){level:#x}",
            "continue",
            "continue",
            "delete",
            f"hbreak *{openat:#x}",
            "continue",
            "delete",
            f"find {uts:#x}, +256, 'L', 'i', 'n', 'u', 'x'",
            "monitor info registers",
            "detach",
        )
    assert told.count("Thread ") >= 4
    assert re.search(rf"hit Breakpoint 1, 0x0*{openat:x} in", told), told
    rip = int(re.search(r"\$1 = \(void \(\*\)\(\)\) (0x[0-9a-f]+)", told)[1], 16)  # type: ignore[index]
    assert 0 < rip - openat < 64, told
    changes = [(int(old), int(new)) for old, new in re.findall(r"Old value = (\d)\nNew value = (\d)", told)]
    assert sorted(changes) in ([(4, 5), (5, 4)], [(4, 5), (7, 4)]), told
    assert re.search(rf"hit Breakpoint 3, 0x0*{openat:x} in", told), told
    assert "1 pattern found" in told
    console.send("kill $!; echo alive $((6 * 7))\n")
    console.expect("^alive 42", timeout_s=60)
    assert "lockup" not in console.text
