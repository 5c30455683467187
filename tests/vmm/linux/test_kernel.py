# SPDX-License-Identifier: Apache-2.0
"""The distribution's kernel, looked at from outside, beside what it says itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tests.support.guests import booted, linux_guest
from tests.support.machines import open_soft

from softkvm.control.dump import dump, lines
from softkvm.vmm.console import Console
from softkvm.vmm.debug.report import machine_text
from softkvm.vmm.debug.virtual import MemoryFault
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.linux.kernel import Kernel
from softkvm.vmm.linux.orc import Unwinder
from softkvm.vmm.machine import Machine

pytestmark = pytest.mark.guest

Linux = tuple[Machine, Console, Kernel]


@pytest.fixture(scope="module")
def linux() -> Iterator[Linux]:
    guest = linux_guest()
    with booted(open_soft(), guest.kernel, guest.initrd, guest.command_line, vcpus=2) as (machine, console):
        console.expect("# ", timeout_s=120)
        output(console, "true")  # what is there from the first input on is there before the first test
        yield machine, console, Kernel(machine.memory)


def output(console: Console, command: str) -> str:
    """What a command prints."""
    console.send(f"echo @$((1))@; {command}; echo @$((2))@\n")
    return console.expect(r"(?s)@1@\r?\n(.*?)@2@", timeout_s=60)[1].replace("\r", "")


def test_symbols_are_those_that_the_kernel_lists(linux: Linux) -> None:
    _, console, kernel = linux
    text = output(console, "awk 'NR % 977 == 1; /]/ {m++} END {print NR, m + 0}' /proc/kallsyms")
    *rows, counts = text.split("\n")[:-1]
    lines, of_modules = counts.split()
    assert len(kernel.symbols) == int(lines) - int(of_modules)
    listed = [row.split() for row in rows if not row.endswith("]")]
    assert len(listed) > 80
    by_name = [(int(address, 16), kind, name) for address, kind, name in listed]
    read = {
        (symbol.address, symbol.type, symbol.name) for _, _, name in by_name for symbol in kernel.symbols.named(name)
    }
    assert [row for row in by_name if row not in read] == []
    name = next(name for _, _, name in by_name if len(kernel.symbols.named(name)) == 1)
    assert kernel.symbolize(kernel.symbol(name)).endswith("+0x0")


def test_symbols_of_modules_are_found(linux: Linux) -> None:
    _, console, kernel = linux
    names = output(console, "cut -d' ' -f1 /proc/modules").split()
    assert sorted(module.member_("name").string_() for module in kernel.modules()) == sorted(names)
    if names:
        text = output(console, f"grep '\\[{names[0]}\\]' /proc/kallsyms | head -n 20")
        wanted = {(int(row.split()[0], 16), row.split()[2]) for row in text.splitlines()}
        found = {(s.address, s.name) for s in kernel.module_symbols() if s.module == names[0]}
        assert len(wanted & found) >= len(wanted) * 0.8


def test_variables_have_members(linux: Linux) -> None:
    _, console, kernel = linux
    assert kernel.release == output(console, "uname -r").strip()
    uts = kernel["init_uts_ns"].member_("name")
    assert uts.nodename.string_() == output(console, "hostname").strip() == "softkvm"
    assert kernel["saved_command_line"].string_() == output(console, "cat /proc/cmdline").strip()
    assert str(kernel["system_state"]) == "SYSTEM_RUNNING"
    assert int(kernel["nr_cpu_ids"]) == 2
    assert [int(kernel.per_cpu("cpu_number", n)) for n in range(2)] == [0, 1]
    first = kernel["init_task"]
    assert first.comm.string_() == "swapper/0"
    assert first.tasks.container_of_("struct task_struct", "tasks").address_ == first.address_
    assert first.signal.nr_threads == 1
    with pytest.raises(AttributeError, match="struct task_struct has no member 'nonsense'"):
        first.nonsense  # noqa: B018
    with pytest.raises(KernelError, match="no symbol 'nonsense'"):
        kernel.variable("nonsense", "int")
    with pytest.raises(KernelError, match="name it"):
        kernel["nonsense"]
    with pytest.raises(MemoryFault):
        kernel.object("struct task_struct", 0xFFFF_8000_0000_0000 - 4096).comm.string_()


def test_tasks_are_those_that_ps_lists(linux: Linux) -> None:
    machine, console, kernel = linux
    listed = {int(row.split()[0]) for row in output(console, "ps -o pid,comm").splitlines()[1:]}
    machine.pause()
    try:
        found = {int(task.pid): task.comm.string_() for task in kernel.tasks()}
        current = [kernel.current(n).comm.string_() for n in range(2)]
    finally:
        machine.resume()
    assert found[0] == "swapper/0" and found[1] == "init" and found[2] == "kthreadd"
    assert listed - set(found) <= {max(listed)}, "but ps itself"
    assert all(current)


def test_what_is_written_is_the_kernels(linux: Linux) -> None:
    _, console, kernel = linux
    place = kernel["init_uts_ns"].member_("name").domainname.address_
    kernel.write(place, b"written.from.outside\0")
    assert output(console, "cat /proc/sys/kernel/domainname").strip() == "written.from.outside"


def test_the_log_is_what_dmesg_shows(linux: Linux) -> None:
    _, console, kernel = linux
    shown = [re.sub(r"^\[ *", "[", line) for line in output(console, "dmesg").splitlines()]
    read = [re.sub(r"^\[ *", "[", line) for line in kernel.log().splitlines()]
    assert len(shown) > 100
    assert read[: len(shown)] == shown or read[-len(shown) :] == shown


def test_a_sleeping_tasks_call_chain_is_the_one_that_proc_shows(linux: Linux) -> None:
    machine, console, kernel = linux
    unwinder = Unwinder(kernel)
    seen = 0
    for pid in (1, 2, 3):
        shown = re.findall(r"\] (?:\? )?(\w+)\+(0x[0-9a-f]+)", output(console, f"cat /proc/{pid}/stack"))
        with machine.pausing.still():
            task = next(task for task in kernel.tasks() if int(task.pid) == pid)
            chain = [frame.text.partition(" ")[0] for frame in unwinder.of_task(task)]
        found = [tuple(text.split("+")) for text in chain if "+" in text]
        while found and found[0][0] in ("__schedule", "schedule", "schedule_timeout", "schedule_preempt_disabled"):
            del found[0]  # /proc leaves out the scheduler's own
        assert found == shown, pid
        seen += len(shown)
    assert seen > 5


def test_a_machine_that_stands_is_described_with_symbols(linux: Linux) -> None:
    machine, console, kernel = linux
    output(console, "true")  # and then it is idle, in the kernel
    text = machine_text(machine)
    dumped = dump(machine)
    assert [cpu["task"].partition(" ")[0] for cpu in dumped if cpu["calls"]] != []
    assert all(
        re.fullmatch(r"\w+\+0x[0-9a-f]+|0x[0-9a-f]+ \(user\)", call["text"]) for cpu in dumped for call in cpu["calls"]
    )
    assert any(line.startswith("  call ffff") for cpu in dumped for line in lines(cpu))
    assert f"Linux {kernel.release}" in text
    assert "vCPU 0: " in text and "vCPU 1: " in text
    assert re.search(r"^rip +[0-9a-f]{16}  rsp ", text, re.MULTILINE)
    assert re.search(r"^code at 0x[0-9a-f]+.*:\n  (?:(?:[0-9a-f]{2}|\?\?) )+<[0-9a-f]{2}> ", text, re.MULTILINE)
    assert re.search(r"call chain:\n  [0-9a-f]{16}  \w+\+0x", text)
    assert re.search(r"^  ffff[0-9a-f]{12}  [0-9a-f]{16}  \w+\+0x", text, re.MULTILINE), "words of the stack have names"


def test_a_machine_without_a_kernel_is_described_without_symbols() -> None:
    from tests.support.stub import tiny_machine

    with tiny_machine(open_soft(), "90ebfd") as machine:
        text = machine_text(machine)
    assert "no symbols: no vmcoreinfo" in text
    assert "code at 0x1000:\n  00 " in text and "<90> eb fd 00" in text
