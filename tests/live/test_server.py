# SPDX-License-Identifier: Apache-2.0
"""The side of the machines: what may be asked, by whom, and that nobody who asks can hold a machine up."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.tiny import Tiny

from softkvm.kvm import TRACEPOINTS
from softkvm.live import asker as askers
from softkvm.live import place
from softkvm.live.asker import Asker, LiveError, processes
from softkvm.live.server import Server, serve


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "softkvm"


@pytest.fixture
def server(runtime: Path) -> Iterator[Server]:
    server = Server()
    assert server.listens
    yield server
    server.close()


def connect(server: Server) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.settimeout(30)
    channel.connect(str(place.socket_of(server.pid)))
    return channel


def test_the_socket_is_the_users_alone_and_goes_with_the_server(runtime: Path) -> None:
    server = Server()
    assert server.listens
    path = runtime / f"{os.getpid()}.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert [one.pid for one in processes()] == [os.getpid()]
    server.close()
    server.close()
    assert not path.exists() and processes() == []


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o702])
def test_a_directory_that_others_may_enter_is_not_used(runtime: Path, mode: int) -> None:
    runtime.mkdir()
    runtime.chmod(mode)
    server = Server()
    assert not server.listens and place.directory() is None
    server.close()


def test_a_link_in_place_of_the_directory_is_not_used(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    runtime.symlink_to(tmp_path / "other")
    assert place.directory(make=True) is None


def test_it_can_be_switched_off(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.SWITCH, "0")
    assert serve() is None


def test_statistics_are_those_of_the_machines(server: Server) -> None:
    tiny = Tiny(vcpus=2).long_mode()
    tiny.load(b"\x0f\xa2\x0f\xa2\xf4")
    tiny.run_to_halt()
    with Asker(server.pid) as asker:
        answer = asker.ask("stats")
    ours = [machine for machine in answer["machines"] if machine["memory_bytes"] == tiny.memory.size][-1]
    assert answer["pid"] == os.getpid() and [vcpu["id"] for vcpu in ours["vcpus"]] == [0, 1]
    assert ours["vcpus"][0]["stats"]["exit_cpuid"] == 2 and ours["vcpus"][0]["state"] == "host"
    tiny.close()


def test_a_running_machine_is_traced_until_the_connection_ends(server: Server) -> None:
    tiny = Tiny(irqchip=True).long_mode()
    tiny.load(b"\x31\xc0\x31\xc9\x0f\xa2\xeb\xf8")  # cpuid again and again

    def run() -> None:
        with pytest.raises(InterruptedError):
            tiny.vcpu.run()

    thread = threading.Thread(target=run, name="the vCPU")
    thread.start()
    try:
        with tempfile.TemporaryFile() as spool:
            with Asker(server.pid) as asker:
                answer = asker.ask("trace", spool.fileno(), events=["kvm_exit"], filters=["exit_reason == 0x72"])
                assert [system for system, _ in answer["events"]] == ["kvm"]
                assert "name: kvm_exit\n" in answer["events"][0][1]
                end = time.monotonic() + 30
                while not os.fstat(spool.fileno()).st_size and time.monotonic() < end:
                    time.sleep(0.01)
                assert os.fstat(spool.fileno()).st_size
                assert "the vCPU" in asker.ask("threads")["threads"].values()
                with pytest.raises(LiveError, match="records already"):
                    asker.ask("trace", spool.fileno())
            while TRACEPOINTS["kvm_exit"].enabled and time.monotonic() < end:
                time.sleep(0.01)
            assert not TRACEPOINTS["kvm_exit"].enabled
    finally:
        tiny.vcpu.kick()
        thread.join(30)
    tiny.close()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (b"{}", "unknown request"),
        (b"[]", "unknown request"),
        (b'{"ask": ["stats"]}', "unknown request"),
        (b'{"ask": "nothing"}', "unknown request nothing"),
        (b'{"ask": "pause", "machine": 3}', "machine: expected a name"),
        (b"nonsense", "Expecting value"),
        (b"\xff\xff", "decode"),
        (b'{"ask": "trace"}', "lacks the descriptor"),
        (b'{"ask": "threads"}', "records nothing"),
        (b'{"ask": "stop"}', "records nothing"),
        (b"[" * 5000, "recursion"),
    ],
)
def test_bad_requests_are_refused_and_the_connection_goes_on(server: Server, request_: bytes, words: str) -> None:
    with connect(server) as channel:
        channel.sendall(request_ + b"\n")
        assert words in json.loads(channel.makefile().readline())["error"]
        channel.sendall(b'{"ask": "stats"}\n')
        assert "machines" in json.loads(channel.makefile().readline())


@pytest.mark.parametrize(
    ("events", "filters", "words"),
    [
        (["nothing"], [], "nothing: there is no such tracepoint"),
        (["kvm_exit"], ["a b"], "there is no field 'a'"),
        ([1], [], "expected texts"),
        (3, [], "not iterable"),
    ],
)
def test_bad_choices_of_tracepoints_are_refused(server: Server, events: object, filters: object, words: str) -> None:
    with tempfile.TemporaryFile() as spool, Asker(server.pid) as asker, pytest.raises(LiveError, match=words):
        asker.ask("trace", spool.fileno(), events=events, filters=filters)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_refused_files_are_let_go_and_the_connection_goes_on(server: Server) -> None:
    reader, writer = os.pipe()
    with Asker(server.pid) as asker, tempfile.TemporaryFile() as spool:
        asker.ask("stats")
        before = descriptors()
        for _ in range(20):
            with pytest.raises(LiveError, match="no regular file"):  # nobody reads it: the next answer would not come
                asker.ask("trace", writer, events=["kvm_exit"])
            with pytest.raises(LiveError, match="nothing"):
                asker.ask("trace", spool.fileno(), events=["nothing"])
        assert descriptors() == before
        assert asker.ask("trace", spool.fileno(), events=["kvm_exit"])["events"]
        asker.ask("stop")
    os.close(reader)
    os.close(writer)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_leave_it_listening(server: Server, data: bytes) -> None:
    with connect(server) as channel:
        channel.sendall(data)
    with connect(server) as channel:
        channel.sendall(b'{"ask": "stats"}\n')
        assert "machines" in json.loads(channel.makefile().readline())


def test_whoever_sends_without_an_end_or_does_not_read_is_disconnected(server: Server) -> None:
    with connect(server) as channel, pytest.raises(OSError):
        while True:
            channel.sendall(b"x" * 4096)
    with connect(server) as channel, pytest.raises(OSError):
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(1 << 20):
            channel.sendall(b'{"ask": "stats"}\n')
    with Asker(server.pid) as asker:
        asker.ask("stats")


def test_connections_are_bounded(server: Server) -> None:
    channels = [connect(server) for _ in range(40)]
    channels[0].sendall(b'{"ask": "stats"}\n')
    assert "machines" in json.loads(channels[0].makefile().readline())
    assert channels[39].recv(1) == b""
    for channel in channels:
        channel.close()


def test_descriptors_that_nobody_asked_for_are_closed(server: Server) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryFile() as file, connect(server) as channel, pytest.raises(OSError):
        while True:
            socket.send_fds(channel, [b'{"ask": "stats"}\n'], [file.fileno()] * 4)
    end = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_forked_child_does_not_listen_and_its_parent_does(server: Server) -> None:
    child = os.fork()
    if not child:
        server.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with Asker(server.pid) as asker:
        asker.ask("stats")


def test_sockets_of_dead_processes_are_taken_away(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    path = runtime / "999999.sock"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    (runtime / "other.file").touch()
    assert processes() == [] and not path.exists()


def test_a_process_without_machines_is_told_of_in_one_line(runtime: Path) -> None:
    with pytest.raises(LiveError, match=f"process {os.getpid()}: it has no machine to look at"):
        Asker(os.getpid())
    with pytest.raises(LiveError, match="it does not run"):
        Asker(1 << 22 | 1)


def test_a_process_that_does_not_answer_is_not_waited_for(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers, "_TIMEOUT_S", 0.1)
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(str(runtime / "4711.sock"))
        deaf.listen()
        with Asker(4711) as asker, pytest.raises(LiveError, match="it does not answer"):
            asker.ask("stats")
