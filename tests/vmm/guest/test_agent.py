# SPDX-License-Identifier: Apache-2.0
"""The default guest's agent, here as a process of this host, and the host's side of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.guests import missing

from softkvm.vmm.guest.agent import WINDOW, Agent, AgentError, Done, GuestOSError, Message, Session

FAR_S = 30.0
AGENT = Path(str(resources.files("softkvm.vmm.guest") / "data" / "agent"))


class Host:
    """Starts the agent for each connection."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def connect(self, port: int, *, timeout_s: float, retry: bool = False) -> socket.socket:
        if not AGENT.exists():
            missing("the guest's agent is not built: make guests")
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen([AGENT, f"={theirs.fileno()}"], pass_fds=[theirs.fileno()])
        self.processes.append(process)
        return ours


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    for process in host.processes:
        process.wait(FAR_S)


@pytest.fixture
def agent(host: Host) -> Agent:
    return Agent(host.connect)


def test_it_answers(agent: Agent) -> None:
    assert agent.wait(FAR_S) == 1


def test_output_errors_and_status_are_apart(agent: Agent) -> None:
    assert agent.run(["sh", "-c", "echo out; echo err >&2; exit 7"]) == Done(7, 0, b"out\n", b"err\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_that_ends_a_program_is_told(agent: Agent, number: int) -> None:
    assert agent.run(["sh", "-c", f"kill -{int(number)} $$"]) == Done(128 + number, number)


def test_input_arrives_whole_and_ends(agent: Agent) -> None:
    data = os.urandom(10 * WINDOW + 17)
    assert agent.run(["cat"], data, timeout_s=FAR_S) == Done(0, 0, data)
    assert agent.run(["wc", "-c"]).stdout == b"0\n"


def test_a_program_that_reads_nothing_is_no_obstacle(agent: Agent) -> None:
    assert agent.run(["true"], b"x" * (1 << 20), timeout_s=FAR_S).status == 0
    assert (
        agent.run(["sh", "-c", "exec <&-; sleep 0.1; echo done"], b"x" * (1 << 20), timeout_s=FAR_S).stdout == b"done\n"
    )


def test_environment_and_directory(agent: Agent, tmp_path: Path) -> None:
    done = agent.run(["sh", "-c", 'pwd; echo "$A"; echo $HOME'], b"", {"A": "b c=d"}, str(tmp_path))
    assert done.stdout == f"{tmp_path}\nb c=d\n/root\n".encode()


@pytest.mark.parametrize(
    ("arguments", "directory", "code"),
    [
        (["no-such-program"], "", 2),
        (["/no/such/program"], "", 2),
        (["/etc/passwd"], "", 13),
        (["/"], "", 13),
        (["true"], "/no/such/directory", 2),
        (["x" * 5000], "", 36),
    ],
)
def test_what_cannot_be_started_is_told(agent: Agent, arguments: list[str], directory: str, code: int) -> None:
    with pytest.raises(GuestOSError) as refused:
        agent.start(arguments, directory=directory)
    assert refused.value.errno == code or (code == 36 and refused.value.errno == 2)


def test_arguments_of_any_kind(agent: Agent) -> None:
    arguments: list[str | bytes] = ["a b", "", "'\"$", "ü", b"\xff\xfe", "-n", "\n"]
    done = agent.run(["printf", "%s|", *arguments])
    assert done.stdout == b"a b||'\"$|\xc3\xbc|\xff\xfe|-n|\n|"
    with pytest.raises(ValueError, match="NUL"):
        agent.run(["echo", "a\0b"])
    with pytest.raises(ValueError, match="program's name"):
        agent.run([])
    with pytest.raises(AgentError, match="bytes of arguments: expected up to"):
        agent.run(["echo", "x" * WINDOW])
    with pytest.raises(GuestOSError, match="Argument list too long"):
        agent.run(["echo", *[""] * 5000])


def collect(session: Session) -> tuple[Done, bytes]:
    output = bytearray()
    return session.serve(output.extend, output.extend, FAR_S), bytes(output)


def test_signals_reach_the_whole_group(agent: Agent) -> None:
    started = threading.Event()
    with agent.start(["sh", "-c", "trap 'echo caught; exit 3' INT; echo ready; sleep 60 & wait"]) as session:
        output = bytearray()

        def take(data: bytes) -> None:
            output.extend(data)
            if b"ready" in output and not started.is_set():
                started.set()
                session.send_signal(signal.SIGINT)

        done = session.serve(take, take, FAR_S)
    assert (done.status, bytes(output)) == (3, b"ready\ncaught\n")


def test_a_signal_does_not_wait_behind_input(agent: Agent) -> None:
    with agent.start(["sleep", "60"]) as session:
        feeder = threading.Thread(target=session.write, args=(b"x" * (1 << 20),))
        feeder.start()
        time.sleep(0.05)
        session.send_signal(signal.SIGTERM)
        done, _ = collect(session)
        assert done.signal == signal.SIGTERM
        feeder.join(FAR_S)
        assert not feeder.is_alive()


def test_a_terminal_has_a_size_and_passes_keys(agent: Agent) -> None:
    script = "stty size; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.02; done"
    with agent.start(["sh", "-c", script], terminal=(24, 80)) as session:
        output = bytearray()
        resized = threading.Event()

        def take(data: bytes) -> None:
            output.extend(data)
            if b"ready" in output and not resized.is_set():
                resized.set()
                session.resize(33, 101)

        done = session.serve(take, take, FAR_S)
    assert done.status == 5
    assert bytes(output) == b"24 80\r\nready\r\n33 101\r\n"
    with agent.start(["cat"], terminal=(24, 80)) as session:
        session.write(b"hello\n")
        session.end_input()
        done, text = collect(session)
    assert (done.status, text) == (0, b"hello\r\nhello\r\n")
    with agent.start(["sleep", "60"], terminal=(24, 80)) as session:
        session.write(b"\x03")
        assert collect(session)[0].signal == signal.SIGINT


def test_output_of_those_left_behind_is_not_waited_for(agent: Agent) -> None:
    started = time.monotonic()
    done = agent.run(["sh", "-c", "sleep 60 & echo $!"], timeout_s=FAR_S)
    assert time.monotonic() - started < FAR_S
    os.kill(int(done.stdout), signal.SIGKILL)


def test_a_program_ends_with_its_connection(agent: Agent, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    session = agent.start(["sh", "-c", f"trap 'echo hup > {mark}; exit' HUP; echo ready; sleep 60 & wait"])
    with contextlib.suppress(TimeoutError, AgentError):
        session.serve(lambda data: session.close(), lambda data: None, 1.0)
    deadline = time.monotonic() + FAR_S
    while not mark.exists():
        assert time.monotonic() < deadline


def test_a_timeout_ends_the_program(agent: Agent) -> None:
    with pytest.raises(TimeoutError):
        agent.run(["sleep", "60"], timeout_s=0.2)


def test_files_go_in_and_out(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"", b"x", os.urandom(300_000)):
        agent.put(str(path), data, 0o750)
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o7777 == 0o750
        assert agent.get(str(path)) == data
    assert list(tmp_path.iterdir()) == [path]
    for refused, code in ((str(tmp_path / "no" / "file"), 2), (str(tmp_path), 21), ("x" * 5000, 36)):
        with pytest.raises(GuestOSError) as error:
            agent.put(refused, b"x" * 300_000)
        assert error.value.errno == code
    with pytest.raises(GuestOSError, match="Is a directory"):
        agent.get(str(tmp_path))
    with pytest.raises(GuestOSError, match="No such file"):
        agent.get(str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_whole_does_not_appear(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with host.connect(1, timeout_s=1) as channel:
        channel.sendall(struct.pack("<B3xI", Message.PUT, 4 + len(bytes(path)) + 1) + bytes(4) + bytes(path) + b"\0")
        channel.sendall(struct.pack("<B3xI", Message.DATA, 100) + b"half of it")
    host.processes[0].wait(FAR_S)
    assert list(tmp_path.iterdir()) == []


def test_many_at_once(agent: Agent) -> None:
    found: dict[int, bytes] = {}

    def work(number: int) -> None:
        found[number] = agent.run(["sh", "-c", f"cat; echo {number}"], b"x" * 100_000, timeout_s=FAR_S).stdout[-5:]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FAR_S)
    assert found == {number: f"xxx{number}\n".encode() for number in range(10)}


def test_more_input_than_the_window_is_refused(host: Host) -> None:
    session = Agent(host.connect).start(["sleep", "60"])
    session._messages.send(Message.STDIN, b"x" * WINDOW)
    for _ in range(3):  # a pipe takes some
        with contextlib.suppress(AgentError):
            session._messages.send(Message.STDIN, b"x" * WINDOW)
    with pytest.raises(GuestOSError, match="Protocol error"):
        session.serve(lambda data: None, lambda data: None, FAR_S)
    session.close()


HEADER = struct.Struct("<B3xI")
messages = st.tuples(st.integers(0, 255), st.binary(max_size=80)).map(lambda m: HEADER.pack(m[0], len(m[1])) + m[1])


@given(st.lists(st.binary(max_size=40) | messages, max_size=6))
@settings(deadline=None, max_examples=60)
def test_hostile_messages_end_the_connection_and_nothing_else(data: list[bytes]) -> None:
    host = Host()
    harmless = {Message.POWER_OFF, Message.PUT, Message.EXEC, Message.GET}
    data = [piece for piece in data if not piece or piece[0] not in harmless]
    with host.connect(1, timeout_s=1) as channel:
        channel.settimeout(FAR_S)
        with contextlib.suppress(OSError):
            channel.sendall(b"".join(data))
            channel.shutdown(socket.SHUT_WR)
            while channel.recv(4096):
                pass
    assert host.processes[0].wait(FAR_S) in (0, 1)


@given(st.binary(max_size=60), st.sampled_from([Message.EXEC, Message.GET]))
@settings(deadline=None, max_examples=60)
def test_damaged_requests_are_refused(data: bytes, message: Message) -> None:
    host = Host()
    with host.connect(1, timeout_s=1) as channel:
        channel.settimeout(FAR_S)
        with contextlib.suppress(OSError):
            channel.sendall(HEADER.pack(message, len(data)) + data)
            channel.shutdown(socket.SHUT_WR)
            while channel.recv(4096):
                pass
    assert host.processes[0].wait(FAR_S) in (0, 1)


class Script:
    """An agent that says what it is told to."""

    def __init__(self, *said: bytes) -> None:
        self._said = b"".join(said)

    def connect(self, port: int, **more: Any) -> Script:
        return self

    def sendall(self, data: bytes) -> None: ...

    def settimeout(self, seconds: float | None) -> None: ...

    def close(self) -> None: ...

    def recv(self, size: int) -> bytes:
        data, self._said = self._said[:size], self._said[size:]
        return data


def say(type: int, data: bytes = b"") -> bytes:
    return HEADER.pack(type, len(data)) + data


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "has gone"),
        (say(Message.STARTED, b"abc"), "3 bytes: expected 4"),
        (say(Message.HELLO, b"abcd"), "sends HELLO: expected STARTED"),
        (say(77), "message 77, which is none"),
        (HEADER.pack(Message.STARTED, 1 << 31), "bytes at once: expected up to 65536"),
        (say(Message.STARTED, bytes(4)) + say(Message.DONE), "sends DONE of a program that runs"),
        (say(Message.STARTED, bytes(4)) + say(Message.EXITED, b"x"), "1 bytes: expected 8"),
        (say(Message.STARTED, bytes(4)) + say(Message.STDOUT, b"x"), "has gone"),
        (say(Message.FAILED, b""), "0 bytes: expected 4"),
    ],
)
def test_a_hostile_agent_is_found_out(said: bytes, words: str) -> None:
    with pytest.raises(AgentError, match=words):
        Agent(Script(said).connect).run(["true"])


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_whatever_an_agent_says_is_an_answer_or_an_error_of_its(data: bytes) -> None:
    for act in (lambda agent: agent.run(["true"]), lambda agent: agent.get("x"), lambda agent: agent.wait()):
        function: Callable[[Agent], Any] = act
        with contextlib.suppress(AgentError, GuestOSError):
            function(Agent(Script(data).connect))
