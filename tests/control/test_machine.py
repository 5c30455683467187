# SPDX-License-Identifier: Apache-2.0
"""A machine under control: what may be asked of it, what it is told to do, and that no message harms it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.machines import KVMS, open_soft

from softkvm import api
from softkvm.cli.net import lines as net_lines
from softkvm.control import dump as dumps
from softkvm.control.console import ConsoleHub
from softkvm.control.machine import MachineControl, NotControlled
from softkvm.live import place
from softkvm.live.asker import Asker, LiveError, processes
from softkvm.live.names import process_of
from softkvm.vmm.devices.virtio_balloon import BalloonSpec
from softkvm.vmm.devices.virtio_net import parse as parse_net
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

COUNT = bytes.fromhex("66 ff06 0001 ebf9")  # inc dword [0x100]; jmp
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")  # what comes on COM1 goes out again
CONTROL_MD = Path(__file__).resolve().parents[2] / "docs" / "control.md"
FAR_S = 30


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv(place.SWITCH, raising=False)
    return tmp_path / "softkvm"


MakeMachine = Callable[..., tuple[Machine, MachineControl]]


@pytest.fixture(params=sorted(KVMS))
def make(request: pytest.FixtureRequest) -> Iterator[MakeMachine]:
    kvm: api.Kvm = KVMS[request.param]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(kvm)

        def make_machine(
            code: bytes = COUNT, name: str | None = "one", **config: Any
        ) -> tuple[Machine, MachineControl]:
            hub = stack.enter_context(ConsoleHub())
            machine = stack.enter_context(Machine(kvm, Config(32 * MIB, **config), hub.output))
            machine.load(code, raw=True)
            control = stack.enter_context(MachineControl(machine, name, hub))
            machine.start()
            return machine, control

        yield make_machine


@contextlib.contextmanager
def asking() -> Iterator[Asker]:
    with Asker(os.getpid()) as asker:
        yield asker


def counter(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(0x10100, 4), "little")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FAR_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_machine_has_a_name_until_it_is_closed(make: MakeMachine, runtime: Path) -> None:
    _, control = make(vcpus=2)
    assert process_of("one") == os.getpid()
    with asking() as asker:
        (told,) = asker.ask("machines")["machines"]
        for again in (asker.ask("status", machine="one"), asker.ask("status")):
            assert {**again, "uptime_s": 0} == {**told, "uptime_s": 0}
    assert told["name"] == "one"
    assert told["state"] == "running"
    assert (told["vcpus"], told["memory_bytes"], told["boots"], told["end"]) == (2, 32 * MIB, 1, None)
    control.close()
    control.close()
    assert process_of("one") is None
    assert processes() == []
    assert list(runtime.iterdir()) == []


def test_several_machines_of_a_process_are_told_apart(make: MakeMachine) -> None:
    make(name="one")
    second, _ = make(name="two")
    with asking() as asker:
        asker.ask("pause", machine="two")
        assert second.paused
        with pytest.raises(LiveError, match=r"which machine: expected one of one, two$"):
            asker.ask("pause")
        with pytest.raises(LiveError, match=r"three: expected one of one, two$"):
            asker.ask("pause", machine="three")
    with pytest.raises(NotControlled, match="has a machine of this name"):
        MachineControl(second, "two")
    _, third = make(name=None)
    _, fourth = make(name=None)
    assert (third.name, fourth.name) == (f"guest-{os.getpid()}", f"guest-{os.getpid()}-2")


@pytest.mark.parametrize("name", ["", "a/b", "x" * 65, "x" * 5000, "123", "é"])
def test_bad_names_are_refused_and_nothing_is_left(make: MakeMachine, runtime: Path, name: str) -> None:
    with pytest.raises(NotControlled, match=r"expected up to 64 letters|^machines"):
        make(name=name or "-")
    assert not [path for path in runtime.iterdir() if path.suffix in (".machine", ".sock")]


def test_where_nobody_can_ask_a_name_is_an_error(make: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.SWITCH, "0")
    make(name=None)
    with pytest.raises(NotControlled, match="there is no socket"):
        make(name="one")


def test_pause_and_resume(make: MakeMachine) -> None:
    machine, _ = make()
    with asking() as asker:
        assert asker.ask("pause", machine="one")["state"] == "paused"
        before = counter(machine)
        assert asker.ask("pause")["state"] == "paused"
        time.sleep(0.02)
        assert counter(machine) == before
        with pytest.raises(LiveError, match="resume it first"):
            asker.ask("power_button")
        assert asker.ask("resume")["state"] == "running"
    wait_for(lambda: counter(machine) != before)


def test_a_pause_that_takes_long_holds_nobody_up(make: MakeMachine) -> None:
    """The vCPU is in a device for as long as that likes."""
    import threading

    go = threading.Event()

    class Port:
        def read(self, offset: int, size: int) -> int:
            return 0 if go.wait(FAR_S) else 1

        def write(self, offset: int, size: int, value: int) -> None: ...

    make(
        bytes.fromhex("ba0050 ec ebfd"),
        devices=lambda machine: machine.pio.add(0x5000, 1, Port(), "port"),
    )
    failed: list[str] = []

    def pause() -> None:
        with asking() as asker, pytest.raises(LiveError) as refused:
            asker.ask("pause", timeout_s=0.3)
        failed.append(str(refused.value))

    thread = threading.Thread(target=pause)
    thread.start()
    with asking() as asker:
        assert asker.ask("status")["state"] == "running"
    thread.join(FAR_S)
    assert "a vCPU is busy outside of the guest for longer than 0.3 s" in failed[0]
    go.set()


def test_events_are_told_to_those_who_want_them(make: MakeMachine) -> None:
    machine, _ = make(reboot=True)
    with asking() as asker, asking() as other:
        asker.ask("events")
        asker.ask("events")
        other.ask("pause")
        other.ask("resume")
        other.ask("reset")
        other.ask("power_button")
        told: list[dict[str, Any]] = []
        while len(told) < 4:
            event = asker.next(FAR_S)
            assert event is not None
            told.append(event)
        assert sorted(event["event"] for event in told) == ["paused", "power button", "reset", "resumed"]
        assert next(event for event in told if event["event"] == "reset")["by"] == "by command"
        assert {event["machine"] for event in told} == {"one"}
        wait_for(lambda: machine.boots == 2)
        other.ask("end")
        event = asker.next(FAR_S)
        assert event is not None
        assert (event["event"], event["end"], event["detail"]) == ("ended", "stopped", "by command")
    assert machine.wait(FAR_S).end is End.STOPPED
    with asking() as asker:
        assert asker.ask("status")["state"] == "ended"
        for what in ("pause", "reset", "nmi"):
            with pytest.raises(LiveError, match="the machine has ended"):
                asker.ask(what)


def test_registers_code_and_stack_of_every_vcpu(make: MakeMachine) -> None:
    machine, _ = make(vcpus=2)
    wait_for(lambda: counter(machine) > 0)
    with asking() as asker:
        cpus = asker.ask("dump")["cpus"]
    assert not machine.standstill.held
    first, second = cpus
    assert first["mode"] == "real mode"
    assert first["segments"]["cs"]["base"] == 0x10000
    assert first["code"]["address"] + first["code"]["at"] == 0x10000 + first["registers"]["rip"]
    assert COUNT.hex() in first["code"]["bytes"]
    assert len(bytes.fromhex(first["stack"]["bytes"])) == dumps.STACK_SIZE
    assert second["id"] == 1
    assert second["registers"]["rip"] == 0xFFF0
    text = "\n".join(dumps.lines(first) + dumps.lines(second))
    assert "vCPU 0: real mode" in text
    assert f"<{COUNT[first['registers']['rip']]:02x}>" in text


def test_an_nmi_reaches_a_vcpu(make: MakeMachine) -> None:
    # The vector table is at 0: the handler of vector 2 stores to 0x10200
    machine, _ = make(bytes.fromhex("fb f4 ebfd"))  # sti; hlt
    machine.pause()
    machine.memory.write(0x20000, bytes.fromhex("2ec606000142 cf"))  # mov byte [cs:0x100],0x42; iret
    machine.memory.write(2 * 4, bytes.fromhex("00000020"))
    machine.resume()
    with asking() as asker:
        asker.ask("nmi")
        wait_for(lambda: machine.memory.read(0x20100, 1) == b"\x42")
        machine.memory.write(0x20100, b"\0")
        asker.ask("nmi", vcpu=0)
        wait_for(lambda: machine.memory.read(0x20100, 1) == b"\x42")
        for bad in (1, -1, "0", 0.5, True, 1 << 70):
            with pytest.raises(LiveError, match="vcpu: expected a number from 0 to 0"):
                asker.ask("nmi", vcpu=bad)


def test_a_sysrq_is_a_break_and_a_key(make: MakeMachine) -> None:
    machine, _ = make()
    with asking() as asker:
        asker.ask("sysrq", key="h")
        assert machine.board.serial.pending_input == 2
        for bad in ("", "ab", "\n", "é", 3, None):
            with pytest.raises(LiveError, match="key: expected one character"):
                asker.ask("sysrq", key=bad)


def test_a_console_leads_there_and_back(make: MakeMachine) -> None:
    make(ECHO)
    ours, theirs = socket.socketpair()
    ours.settimeout(FAR_S)
    with ours, asking() as asker:
        assert asker.ask("console", theirs.fileno())["terminals"] == 1
        theirs.close()
        ours.sendall(b"hello")
        found = b""
        while found != b"hello":
            found += ours.recv(100)


def test_what_is_no_socket_is_no_terminal(make: MakeMachine) -> None:
    make()
    before = len(os.listdir("/proc/self/fd"))
    with asking() as asker:
        with pytest.raises(LiveError, match="lacks the descriptor"):
            asker.ask("console")
        with tempfile.TemporaryFile() as file, pytest.raises(LiveError, match="no socket"):
            asker.ask("console", file.fileno())
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wrong,
            pytest.raises(LiveError, match="no UNIX stream"),
        ):
            asker.ask("console", wrong.fileno())
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_machine_without_a_balloon_says_so(make: MakeMachine) -> None:
    make()
    with asking() as asker, pytest.raises(LiveError, match="the machine has no balloon"):
        asker.ask("balloon", target_bytes=0)


def test_networks_are_told_and_cables_pulled(make: MakeMachine) -> None:
    specs = (parse_net("user,hostfwd=tcp::0-:22,id=lan"), parse_net("user,net=10.0.3.0/24"))
    make(device_specs=specs)
    with asking() as asker:
        lan, net0 = asker.ask("net")["net"]
        assert (lan["name"], lan["link"], net0["name"]) == ("lan", "up", "net0")
        assert lan["net"]["forwards"][0]["guest_port"] == 22 and net0["net"]["network"] == "10.0.3.0/24"
        (told,) = asker.ask("net", device="lan", link="down")["net"]
        assert told["link"] == "down"
        assert [device["link"] for device in asker.ask("net")["net"]] == ["down", "up"]
        assert asker.ask("net", device="lan", link="up")["net"][0]["link"] == "up"
        for more in ({"device": "wan"}, {"link": "up"}, {"device": "lan", "link": 1}, {"device": ["lan"]}):
            with pytest.raises(LiveError):
                asker.ask("net", **more)
    said = "\n".join(line for device in (lan, net0) for line in net_lines(device))
    assert f"tcp {lan['net']['forwards'][0]['host']} -> guest's port 22" in said
    assert "net0  52:54:00:12:34:57  link up  user 10.0.3.0/24" in said


def test_a_machine_without_a_network_says_so(make: MakeMachine) -> None:
    make()
    with asking() as asker, pytest.raises(LiveError, match="no such network device"):
        asker.ask("net")


def test_a_balloon_is_sized_and_says_why_it_cannot_be_asked(make: MakeMachine) -> None:
    machine, _ = make(device_specs=(BalloonSpec(hinting=True),))
    with asking() as asker:
        found = asker.ask("balloon", target_bytes=8 * MIB)["balloon"]
        assert (found["target_bytes"], found["size_bytes"], found["inflated"]) == (8 * MIB, 0, 0)
        for more, wrong in (
            ({"target_bytes": 33 * MIB}, "expected a multiple of 4096 up to the guest's"),
            ({"target_bytes": "8M"}, "target_bytes: expected a number"),
            ({"reclaim": True}, "no driver that tells of free pages"),
        ):
            with pytest.raises(LiveError, match=wrong):
                asker.ask("balloon", **more)
        assert machine.devices[0].target == 8 * MIB


def test_the_number_of_a_question_comes_back(make: MakeMachine) -> None:
    make()
    with asking() as asker:
        assert asker.ask("status", id=[1, "x"])["id"] == [1, "x"]
        assert asker.ask("pause", id=7)["id"] == 7
        assert asker.ask("version", id=None)["id"] is None


def test_the_example_of_the_documentation(make: MakeMachine, runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(name="web")
    (example,) = re.findall(r"```python\n(.*?)```", CONTROL_MD.read_text(), re.DOTALL)
    exec(compile(example, "docs/control.md", "exec"), {})
    assert capsys.readouterr().out == "running\n"


def test_the_documentation_has_every_question(make: MakeMachine) -> None:
    _, control = make()
    text = CONTROL_MD.read_text()
    assert [name for name in control.asks if f"`{name}`" not in text] == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
names_of_asks = st.sampled_from(
    [
        "status",
        "resume",
        "power_button",
        "events",
        "dump",
        "nmi",
        "sysrq",
        "console",
        "balloon",
        "net",
        "machines",
        "version",
    ]
)
questions = st.dictionaries(
    st.sampled_from(["timeout_s", "vcpu", "key", "past", "target_bytes", "device", "link", "id"]), json_values
)


def test_no_message_harms_the_machine() -> None:
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(ConsoleHub())
        machine = stack.enter_context(
            Machine(stack.enter_context(open_soft()), Config(32 * MIB, end_when_halted=False), hub.output)
        )
        machine.load(bytes.fromhex("f4 ebfd"), raw=True)
        stack.enter_context(MachineControl(machine, "one", hub))
        machine.pause()
        machine.start()
        path = place.socket_of(os.getpid())

        @given(names_of_asks | json_values, questions, json_values)
        @settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
        def hostile(ask: Any, more: dict[str, Any], name: Any) -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.settimeout(FAR_S)
                channel.connect(str(path))
                channel.sendall(json.dumps({**more, "ask": ask, "machine": name}).encode() + b"\n")
                with channel.makefile() as answers:
                    assert isinstance(json.loads(answers.readline()), dict)
            with asking() as asker:
                assert asker.ask("status", machine="one")["state"] in ("paused", "running")

        hostile()
