# SPDX-License-Identifier: Apache-2.0
"""``softkvm.Machine``: what scripts do with a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.guests import demo_image, linux_guest
from tests.support.stub import gdb, stub

import softkvm
from softkvm import abi
from softkvm.machine import (
    BreakpointError,
    Cause,
    CommandFailed,
    CommandTimeout,
    Completed,
    ConfigError,
    End,
    KernelError,
    Machine,
    MemoryFault,
    StateError,
    Stop,
    Vcpu,
)
from softkvm.script.by_agent import AgentRunner
from softkvm.script.shell import Shell
from softkvm.vmm.errors import SnapshotError


class Typed:
    """Commands typed at the shell on the console, as for a guest without an agent."""

    def __init__(self, machine: Machine) -> None:
        self._shell = Shell(machine.console)

    def run(self, command: str, timeout_s: float = 60.0, input: bytes = b"") -> Completed:
        return self._shell.run(command, timeout_s, input)


@pytest.fixture(scope="module")
def linux(softkvm_snapshots: Callable[[dict[str, Any]], Path]) -> Iterator[Machine]:
    linux_guest()  # skips where there is none
    with Machine.restored(softkvm_snapshots({"vcpus": 2})) as machine:
        machine.start()
        Typed(machine).run("true")  # threads that input starts are there before the first test
        machine.run("mkdir -p /tmp/d; for n in 1 2 3 4 5; do echo $n > /tmp/d/f$n; done", check=True)
        yield machine


@pytest.fixture
def going(linux: Machine) -> Iterator[Machine]:
    """The guest, without breakpoints afterwards and running."""
    yield linux
    linux.detach()
    linux.resume()


# -- without a whole guest


def test_a_machine_is_what_its_arguments_say(tmp_path: Path) -> None:
    seen: list[bytes] = []
    with Machine(demo_image(), vcpus=2, memory=64, command_line="", devices=["rng"], output=seen.append) as machine:
        assert repr(machine) == "<Machine: 2 vCPUs, 64 MiB, not started>"
        assert machine.vcpus[0].registers["rip"] == 0x100000, "it stands before it has been started"
        machine.start()
        assert machine.expect(r"vcpus\s+(\d) of 2 running").endswith("2 of 2 running")
        machine.expect("^> ")
        machine.send("help\n")
        machine.expect("the clocks")
        with pytest.raises(StateError, match="the machine runs"):
            machine.vcpus[0].registers["rip"]
        with pytest.raises(KernelError):
            machine.kernel  # noqa: B018
        assert machine.statistics()["vcpus"][0]["exits"]["KVM_EXIT_IO"]["count"] > 100
        assert machine.instructions is not None and machine.instructions > 10_000
        machine.reset()
        machine.expect("help lists the commands", timeout_s=30)
        machine.send("poweroff\n")
        assert machine.wait(30).end in (End.POWER_OFF, End.TIMEOUT)
    assert b"help lists" in b"".join(seen)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"devices": ["floppy"]}, "device 'floppy': expected one of"),
        ({"devices": ["rng nonsense=1"]}, "nonsense"),
        ({"vcpus": 0}, "0 vCPUs"),
        ({"memory": 1}, "memory of 1 MiB"),
        ({"kernel": None, "initrd": "x"}, "go with a kernel"),
    ],
)
def test_what_no_machine_can_be_is_one_line(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Machine(**{"kernel": demo_image(), **arguments})  # type: ignore[arg-type]


def test_memory_and_registers_are_set_and_code_is_stepped() -> None:
    with Machine(demo_image(), memory=64) as machine:
        machine.write_physical(0x9000, bytes.fromhex("b805000000 40 40 ebfe"))  # mov eax,5; inc eax (twice); jmp .
        machine.pause()
        machine.start()
        first = machine.vcpus[0]
        first.registers["rip"] = 0x9000
        assert machine.read(0x9000, 2) == machine.read_physical(0x9000, 2) == b"\xb8\x05"
        assert first.step() == Stop(Cause.STEP, 0, 0x9005)
        assert first.registers["rax"] == 5
        first.step(2)
        assert (first.registers["rax"], first.registers["rip"]) == (7, 0x9007)
        first.registers["rax"] = 41
        first.registers["rip"] = 0x9005
        first.step()
        assert first.registers["rax"] == 42
        assert first.registers.read_all()["rax"] == 42
        with pytest.raises(KeyError):
            first.registers["eax"]
        with pytest.raises(MemoryFault):
            machine.read(0xFEC00000, 4)
        with pytest.raises(MemoryFault):
            machine.write(0xFEC00000, b"x")


def test_breakpoints_are_hit_called_and_counted() -> None:
    with Machine(demo_image(), memory=64) as machine:
        # 9000: xor eax,eax; 9002: inc eax; 9003: mov [8000],eax; 9008: cmp eax,100; 900b: jne 9002; 900d: jmp .
        machine.write_physical(0x9000, bytes.fromhex("31c0 40 a300800000 83f864 75f5 ebfe"))
        machine.vcpus[0].registers["rip"] = 0x9000
        seen: list[int] = []

        def note(stop: Stop) -> bool:
            assert machine.standing
            seen.append(machine.vcpus[stop.vcpu].registers["rax"])
            with pytest.raises(StateError, match="a callback cannot go on"):
                machine.resume()
            return len(seen) == 5

        breakpoint = machine.breakpoint(0x9003, note)
        watchpoint = machine.watchpoint(0x8000, 4)
        machine.start()
        values = []
        for _ in range(4):
            stop = machine.go(20)
            assert stop is not None and stop.cause is Cause.WATCHPOINT and stop.address == 0x9008
            values.append(machine.read_physical(0x8000, 4)[0])
        assert (seen, values) == ([1, 2, 3, 4], [1, 2, 3, 4])
        stop = machine.go(20)
        assert stop is not None and (stop.cause, stop.address) == (Cause.SOFTWARE, 0x9003), "the function says so"
        assert machine.paused
        watchpoint.remove()
        breakpoint.remove()
        with machine.breakpoint(0x900D, hardware=True) as last:
            assert machine.go(20) == Stop(Cause.HARDWARE, 0, 0x900D, last.point)
        assert (breakpoint.hits, watchpoint.hits, last.hits) == (5, 4, 1)
        assert machine.read_physical(0x9003, 1) == b"\xa3"
        machine.resume()
        assert not machine.paused


def test_a_read_is_told_from_a_write() -> None:
    with Machine(demo_image(), memory=64) as machine:
        # mov eax,[8000]; inc eax; mov [8000],eax; jmp 9000
        machine.write_physical(0x9000, bytes.fromhex("a100800000 40 a300800000 ebf3"))
        machine.vcpus[0].registers["rip"] = 0x9000
        places: dict[str, list[int]] = {"r": [], "rw": []}

        def noting(found: list[int]) -> Callable[[Stop], bool]:
            def note(stop: Stop) -> bool:
                found.append(stop.address)
                return len(found) > 5

            return note

        for access, found in places.items():
            machine.watchpoint(0x8000, 4, access, noting(found))
        machine.start()
        machine.go(20)
        machine.go(20)
        assert set(places["r"]) == {0x9005}
        assert set(places["rw"]) == {0x9005, 0x900B}


def test_what_a_function_raises_reaches_who_waits() -> None:
    with Machine(demo_image(), memory=64) as machine:
        machine.breakpoint(0x100000, lambda stop: 1 // 0)
        machine.start()
        with pytest.raises(ZeroDivisionError):
            machine.go(20)
        assert machine.paused
        machine.resume()
        machine.expect("help lists the commands", timeout_s=30)


def test_who_waits_for_a_guest_that_has_stopped_is_told() -> None:
    with Machine(demo_image(), memory=64) as machine:
        machine.breakpoint(0x100000)
        machine.start()
        with pytest.raises(StateError, match="software breakpoint"):
            machine.expect("never")


def test_debug_registers_run_out() -> None:
    with Machine(demo_image(), memory=64) as machine:
        for n in range(4):
            machine.breakpoint(0x200000 + n, hardware=True)
        with pytest.raises(BreakpointError, match="0 of 4 are free"):
            machine.watchpoint(0x8000)
        with pytest.raises(ConfigError, match="access="):
            machine.watchpoint(0x8000, 4, "x")


def test_exits_are_seen_answered_and_let_alone_again() -> None:
    with Machine(demo_image(), memory=64) as machine:
        seen: list[tuple[int, int]] = []

        def hook(vcpu: Vcpu, run: abi.kvm_run) -> bool:
            if run.io.port == 0x70 and run.io.direction == abi.KVM_EXIT_IO_OUT:
                seen.append((vcpu.index, vcpu.registers["rip"]))
            return False

        end = machine.on_exit("KVM_EXIT_IO", hook)
        machine.start()
        machine.expect("help lists the commands", timeout_s=30)
        assert seen and {index for index, _ in seen} == {0} and all(0x100000 < rip < 0x200000 for _, rip in seen)
        end()
        count = len(seen)
        machine.send("time\n")
        machine.expect("real-time clock", timeout_s=30)
        assert len(seen) == count
        with pytest.raises(ConfigError, match="reason="):
            machine.on_exit("KVM_EXIT_NONSENSE", hook)
        with pytest.raises(ConfigError, match="reason="):
            machine.on_exit(1000, hook)


def test_an_exit_that_a_hook_answers_is_not_the_machines() -> None:
    with Machine(demo_image(), memory=64) as machine:
        # mov dx,3fd; in al,dx; jmp .: the hook says what is read
        machine.write_physical(0x9000, bytes.fromhex("66bafd03 ec ebfe"))
        machine.vcpus[0].registers["rip"] = 0x9000

        def hook(vcpu: Vcpu, run: abi.kvm_run) -> bool:
            vcpu.kvm.shared[run.io.data_offset] = 0x5A
            return True

        machine.on_exit("KVM_EXIT_IO", hook)
        machine.start()
        time.sleep(0.2)
        machine.pause()
        assert machine.vcpus[0].registers["rax"] & 0xFF == 0x5A


def test_gdb_and_a_script_do_not_debug_at_once() -> None:
    with Machine(demo_image(), memory=64) as machine, stub(machine.vmm) as server:
        with pytest.raises(StateError, match="has a debugger already"):
            machine.breakpoint(0x100000)
        machine.start()
        assert "detached" in gdb(f"target remote {server.target}", "detach")
        machine.expect("help lists the commands", timeout_s=30)


def test_the_end_is_a_stop() -> None:
    with Machine(demo_image(), memory=64) as machine:
        machine.write_physical(0x9000, bytes.fromhex("b02a e6f4 ebfe"))  # out f4,2a
        machine.vcpus[0].registers["rip"] = 0x9000
        machine.start()
        stop = machine.go(20)
        assert stop is not None and stop.cause is Cause.END
        assert machine.outcome is not None and machine.outcome.end is End.DEBUG_EXIT


def test_an_open_kvm_stays_the_callers() -> None:
    with softkvm.open() as kvm:
        with Machine(demo_image(), memory=64, kvm=kvm):
            pass
        assert kvm.get_api_version() == 12
    with pytest.raises(TypeError, match="expected an open KVM"):
        Machine(demo_image(), kvm=3)  # type: ignore[arg-type]


# -- with the default guest


@pytest.mark.guest
@pytest.mark.parametrize("way", ["agent", "shell"])
def test_commands_have_output_status_and_input(linux: Machine, way: str) -> None:
    run = linux.run if way == "agent" else Typed(linux).run
    completed = run("echo out; echo err >&2; exit 3")
    assert (completed.status, completed.output) == (3, "out\nerr\n")
    assert run("printf 'no newline'").output == "no newline"
    assert (
        run("cat", input=b"\x01\x02\xff\n" * 300).output.encode("utf-8", "surrogateescape") == b"\x01\x02\xff\n" * 300
    )
    assert run(f"echo '{'x' * 5000}' | wc -c").output == "5001\n"
    assert run('echo "it\'s $((1 + 1)) `echo q`"\nexit 0').output == "it's 2 q\n"
    assert run("kill -9 $$").status == 137
    with pytest.raises(CommandTimeout, match=r"'echo begun; sleep 3' takes longer than 0.5 s"):
        run("echo begun; sleep 3", timeout_s=0.5)
    if way == "shell":
        linux.expect(r"@0@[0-9a-f]{16}", timeout_s=60)


@pytest.mark.guest
def test_a_command_may_have_to_succeed(linux: Machine) -> None:
    assert isinstance(linux._find_runner(), AgentRunner)
    with pytest.raises(CommandFailed, match=r"(?s)'false' ended with status 1"):
        linux.run("false", check=True)
    with pytest.raises(ValueError, match="NUL"):
        linux.run("echo \0")
    linux.agent.put("/tmp/file", b"contents")
    assert linux.run("cat /tmp/file").output == "contents"


@pytest.mark.guest
def test_who_waits_for_a_command_of_a_guest_that_stops_is_told(going: Machine) -> None:
    with going.breakpoint("__do_sys_newuname"), pytest.raises(StateError, match="has stopped"):
        going.run("uname -r")


@pytest.mark.guest
def test_breakpoints_at_symbols_miss_nothing_and_find_nothing_twice(going: Machine) -> None:
    seen: list[str] = []

    def opened(stop: Stop) -> None:
        vcpu = going.vcpus[stop.vcpu]
        try:
            seen.append(vcpu.string(vcpu.registers["rsi"]))
        except MemoryFault:  # a page that its program has not touched yet
            seen.append("")

    with going.breakpoint("do_sys_openat2", opened) as breakpoint:
        assert going.run("cd /tmp/d; cat f1 f2 f3 f4 f5; cat f1 f5 & cat f2 & wait").status == 0
    names = [name for name in seen if name.startswith("f")]
    assert sorted(names) == sorted(["f1", "f2", "f3", "f4", "f5", "f1", "f5", "f2"])
    assert breakpoint.hits == len(seen)
    assert going.run("echo goes on").output == "goes on\n"


@pytest.mark.guest
def test_a_stop_in_the_kernel_is_looked_at(going: Machine) -> None:
    kernel = going.kernel
    with going.breakpoint("__do_sys_newuname"):
        going.send("uname -r\n")
        stop = going.wait_for_stop(60)
        assert stop is not None and kernel.symbolize(stop.address) == "__do_sys_newuname+0x0"
        chain = [frame.text.partition("+")[0] for frame in going.vcpus[stop.vcpu].backtrace()]
        assert chain[:3] == ["__do_sys_newuname", "do_syscall_64", "entry_SYSCALL_64_after_hwframe"]
        assert kernel.current(stop.vcpu).comm.string_() in ("uname", "sh", "busybox")
        assert "call chain:" in going.describe()
        assert going.vcpus[stop.vcpu].step().cause is Cause.STEP
    going.resume()
    going.expect(kernel.release, timeout_s=60)


@pytest.mark.guest
def test_a_variable_of_the_kernels_is_watched(going: Machine) -> None:
    level = going.kernel.variable("console_printk").address_
    before = int(going.kernel["console_printk"][0])
    with going.watchpoint(level, 4) as watchpoint:
        going.send("dmesg -n 3\n")
        stop = going.wait_for_stop(60)
        assert stop is not None and stop.cause is Cause.WATCHPOINT
        assert int(going.kernel["console_printk"][0]) == 3 != before
        going.resume()
        going.expect("# ", timeout_s=60)
    assert watchpoint.hits == 1
    going.kernel.write(level, before.to_bytes(4, "little"))
    assert going.run("cut -f1 /proc/sys/kernel/printk").output == f"{before}\n"


@pytest.mark.guest
def test_drgn_sees_the_kernel_with_its_types(going: Machine) -> None:
    drgn = pytest.importorskip("drgn")
    from drgn.helpers.linux.list import list_for_each_entry
    from drgn.helpers.linux.pid import find_task
    from drgn.helpers.linux.sched import task_state_to_char

    program = softkvm.drgn(going)
    assert program["init_task"].comm.string_() == b"swapper/0"
    assert program["init_uts_ns"].name.release.string_().decode() == going.kernel.release
    tasks = list_for_each_entry("struct task_struct", program["init_task"].tasks.address_of_(), "tasks")
    assert {int(task.pid) for task in tasks} >= {1, 2}
    assert find_task(program, 1).comm.string_() == b"init"
    assert task_state_to_char(find_task(program, 1)) in ("S", "R", "D")
    assert program.type("struct list_head").size == 16
    assert program.type("struct task_struct").member("comm").type.length == 16
    assert program.type("size_t").type_name() == "size_t"
    assert program.type("unsigned long").size == 8
    assert program["PIDTYPE_PID"].value_() == 0
    assert program.symbol("schedule").address == going.kernel.symbol("schedule")
    assert program.symbol(going.kernel.symbol("schedule") + 1).name == "schedule"
    assert program["do_sys_openat2"].type_.kind is drgn.TypeKind.FUNCTION
    assert program["init_task"].in_execve.bit_field_size_ == 1
    enum = program.type("enum pid_type")
    assert [value.name for value in enum.enumerators][:2] == ["PIDTYPE_PID", "PIDTYPE_TGID"]
    with pytest.raises(LookupError):
        program.type("struct there_is_none")
    with pytest.raises(KeyError):
        program["there_is_none"]
    with pytest.raises(drgn.FaultError):
        program.read(0, 8)


@pytest.mark.guest
def test_a_machine_is_saved_and_restored_and_others_begin_from_it(going: Machine, tmp_path: Path) -> None:
    going.run("echo before > /tmp/state", check=True)
    with going.breakpoint("__do_sys_newuname"):
        going.save(tmp_path / "saved")
        assert going.read_physical(0, 1) is not None
    going.run("echo after > /tmp/state", check=True)
    with Machine.restored(tmp_path / "saved") as other:
        other.start()
        assert other.run("cat /tmp/state; uname -s").output == "before\nLinux\n", "without the breakpoint"
        assert other.kernel.release == going.kernel.release
        other.run("echo after > /tmp/state", check=True)
        text = other.console.text
        other.restore(tmp_path / "saved")
        assert other.run("cat /tmp/state").output == "before\n"
        assert other.console.text.startswith(text)
        with pytest.raises(SnapshotError):
            other.restore(tmp_path / "nowhere")
        assert other.run("echo still there").output == "still there\n"
    assert going.run("cat /tmp/state").output == "after\n"
