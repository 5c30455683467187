# SPDX-License-Identifier: Apache-2.0
"""QMP: greeting, negotiation, commands and events as QEMU's specification has them, and bad input."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.machines import open_soft

from softkvm.control.qmp import QmpServer, value_end
from softkvm.vmm.devices import virtio_balloon
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End, Outcome

FAR_S = 30


class Client:
    """A QMP client."""

    def __init__(self, path: Path) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.channel.settimeout(FAR_S)
        self.channel.connect(str(path))
        self.lines = self.channel.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.greeting = self.next()

    def next(self) -> dict[str, Any]:
        line = self.lines.readline()
        assert line.endswith(b"\r\n"), line
        message: dict[str, Any] = json.loads(line)
        return message

    def send(self, text: bytes) -> dict[str, Any]:
        self.channel.sendall(text)
        while "event" in (message := self.next()):
            self.events.append(message)
        return message

    def execute(self, name: str, **arguments: Any) -> Any:
        answer = self.send(json.dumps({"execute": name, "arguments": arguments}).encode())
        return answer["return"] if "return" in answer else answer["error"]

    def event(self) -> dict[str, Any]:
        return self.events.pop(0) if self.events else self.next()

    def close(self) -> None:
        self.lines.close()
        self.channel.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    config = Config(32 * MIB, 2, reboot=True, end_when_halted=False, device_specs=(virtio_balloon.parse(""),))
    with open_soft() as kvm, Machine(kvm, config) as machine:
        machine.load(bytes.fromhex("fa f4 ebfd"), raw=True)
        yield machine


@pytest.fixture
def server(machine: Machine, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "qmp"
    with QmpServer(machine, str(path), "one"):
        yield path


@pytest.fixture
def client(server: Path) -> Iterator[Client]:
    client = Client(server)
    assert client.execute("qmp_capabilities") == {}
    yield client
    client.close()


def test_greeting_and_negotiation(server: Path) -> None:
    assert stat.S_IMODE(server.stat().st_mode) == 0o600
    client = Client(server)
    assert set(client.greeting["QMP"]) == {"version", "capabilities"}
    assert client.greeting["QMP"]["version"]["package"].startswith("softkvm")
    assert client.execute("query-status")["class"] == "CommandNotFound"
    assert client.execute("qmp_capabilities") == {}
    assert client.execute("qmp_capabilities")["class"] == "CommandNotFound"
    assert client.execute("query-status") == {"status": "prelaunch", "running": False}
    client.close()


def test_a_life(machine: Machine, client: Client) -> None:
    machine.start()
    assert client.execute("query-status") == {"status": "running", "running": True}
    assert client.execute("stop") == {}
    assert client.execute("query-status") == {"status": "paused", "running": False}
    assert machine.paused
    assert client.execute("cont") == {}
    assert client.execute("system_powerdown") == {}
    assert client.execute("system_reset") == {}
    assert client.execute("inject-nmi") == {}
    deadline = time.monotonic() + FAR_S
    while machine.boots != 2:
        assert time.monotonic() < deadline
    assert client.execute("quit") == {}
    names: list[str] = []
    while not names or names[-1] != "SHUTDOWN":
        event = client.event()
        assert set(event) == {"event", "data", "timestamp"}
        assert set(event["timestamp"]) == {"seconds", "microseconds"}
        names.append(event["event"])
    assert sorted(names) == ["POWERDOWN", "RESET", "RESUME", "SHUTDOWN", "STOP"]
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert machine.wait(FAR_S) == Outcome(End.STOPPED, "quit by QMP")
    assert client.execute("query-status") == {"status": "shutdown", "running": False}
    for name in ("stop", "cont", "system_reset", "inject-nmi"):
        assert "the machine has ended" in client.execute(name)["desc"]


def test_what_it_says_of_the_machine(machine: Machine, client: Client) -> None:
    machine.start()
    cpus = client.execute("query-cpus-fast")
    assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]
    assert all(cpu["thread-id"] == thread.thread.native_id for cpu, thread in zip(cpus, machine.vcpus, strict=True))
    assert client.execute("query-name") == {"name": "one"}
    assert client.execute("query-kvm")["enabled"] is True
    assert client.execute("query-memory-size-summary")["base-memory"] == 32 * MIB
    assert client.execute("query-version")["qemu"]["major"] > 0
    commands = {command["name"] for command in client.execute("query-commands")}
    assert {"qmp_capabilities", "stop", "cont", "quit", "query-status", "balloon"} <= commands
    assert {"name": "SHUTDOWN"} in client.execute("query-events")


def test_the_balloon_counts_what_the_guest_has(machine: Machine, client: Client) -> None:
    assert client.execute("balloon", value=24 * MIB) == {}
    (transport,) = machine.board.virtio.transports.values()
    assert transport.device.target == 8 * MIB  # type: ignore[attr-defined]
    assert client.execute("query-balloon") == {"actual": 32 * MIB}
    wrong: list[Any] = ["1", 1.5, None, True, [], -1, 0]
    for bad in wrong:
        assert client.execute("balloon", value=bad)["class"] == "GenericError"
    assert "missing" in client.execute("balloon")["desc"]
    assert "'x' is unexpected" in client.execute("balloon", x=1)["desc"]


def test_a_power_off_is_the_guests(machine: Machine, client: Client) -> None:
    machine.start()
    machine.end(Outcome(End.POWER_OFF))
    assert client.event()["data"] == {"guest": True, "reason": "guest-shutdown"}


def test_the_last_event_arrives_before_the_end(machine: Machine, tmp_path: Path) -> None:
    with QmpServer(machine, str(tmp_path / "q")):
        client = Client(tmp_path / "q")
        client.execute("qmp_capabilities")
        machine.start()
        machine.end(Outcome(End.PANIC))
    assert [client.event()["event"] for _ in range(2)] == ["GUEST_PANICKED", "SHUTDOWN"]
    assert client.lines.readline() == b""
    assert not (tmp_path / "q").exists()
    client.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"nonsense\n", "Invalid JSON syntax"),
        (b"[]", "must be a JSON object"),
        (b"{}", "lacks member 'execute'"),
        (b'{"execute": 3}', "'execute' must be a string"),
        (b'{"execute": "stop", "arguments": 3}', "'arguments' must be an object"),
        (b'{"execute": "stop", "more": 3}', "'more' is unexpected"),
        (b'{"execute": "no-such-command"}', "The command no-such-command has not been found"),
        (b"[" * 2000 + b"]" * 2000, "Invalid JSON syntax"),
    ],
)
def test_bad_commands(client: Client, text: bytes, words: str) -> None:
    answer = client.send(text)
    assert words in answer["error"]["desc"]
    assert client.send(b'{"execute": "query-status", "id": [7]}')["id"] == [7]


def test_commands_need_no_line_ends(client: Client) -> None:
    client.channel.sendall(b'{"execute": "query-name", "id": "}{"} {"execute":\n"query-kvm",\n"id": 2}{"execute"')
    assert client.next()["id"] == "}{"
    assert client.next()["id"] == 2
    assert client.send(b': "query-status", "id": 3}')["id"] == 3


def test_who_sends_without_an_end_is_disconnected(server: Path) -> None:
    client = Client(server)
    with pytest.raises(OSError):
        while True:
            client.channel.sendall(b'{"' + b"x" * 4096)
    client.close()
    Client(server).close()


def test_connections_are_bounded(server: Path) -> None:
    clients = [Client(server) for _ in range(8)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ninth:
        ninth.settimeout(FAR_S)
        ninth.connect(str(server))
        with contextlib.suppress(ConnectionError):
            assert ninth.recv(1) == b""
    for client in clients:
        client.close()


def test_places_for_the_socket(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(FileExistsError):
            QmpServer(machine, str(taken))
    with pytest.raises(FileNotFoundError):
        QmpServer(machine, str(tmp_path / "no" / "such"))
    with QmpServer(machine, str(tmp_path / "q")), pytest.raises(FileExistsError):
        QmpServer(machine, str(tmp_path / "q"))
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "q"))
    dead.close()
    with QmpServer(machine, str(tmp_path / "q")):
        Client(tmp_path / "q").close()
    deep = tmp_path
    while len(str(deep)) < 200:
        deep /= "directory"
    deep.mkdir(parents=True)
    with QmpServer(machine, str(deep / "q")):
        assert (deep / "q").exists()


@given(st.binary(max_size=200))
def test_where_a_value_ends(data: bytes) -> None:
    end = value_end(data)
    assert 0 <= end <= len(data)
    whole = json.dumps({"a": data.decode("latin-1"), "b": [{}, "]}"]}).encode()
    assert value_end(whole + data) == len(whole)
    assert value_end(whole[:-1]) == 0


PIECES = [b'{"execute": "query-status"}', b"\n", b'"', b"{"]


@given(st.lists(st.binary(max_size=60) | st.sampled_from(PIECES), max_size=8))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_leave_it_serving(machine: Machine, server: Path, data: list[bytes]) -> None:
    client = Client(server)
    with contextlib.suppress(OSError):
        client.channel.sendall(b"".join(data))
        client.channel.shutdown(socket.SHUT_WR)
        while client.channel.recv(4096):
            pass
    client.close()
    again = Client(server)
    assert again.execute("qmp_capabilities") == {}
    again.close()
