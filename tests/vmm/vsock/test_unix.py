# SPDX-License-Identifier: Apache-2.0
"""UNIX sockets by Firecracker's convention: who connects to what, what is said, how each end ends."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.vsock import EOM, RCV, REQUEST, RESPONSE, RST, RW, SEND, SEQPACKET, SHUTDOWN, Guest
from tests.vmm.vsock.conftest import ECHO

from softkvm.vmm.errors import ConfigError
from softkvm.vmm.virtio.worker import Worker
from softkvm.vmm.vsock import unix
from softkvm.vmm.vsock.hub import Hub
from softkvm.vmm.vsock.unix import UnixSockets


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test vsock")
    yield worker
    worker.close()


@pytest.fixture
def path(tmp_path: Path, echo_hub: Hub, worker: Worker) -> Iterator[str]:
    place = str(tmp_path / "v.sock")
    sockets = UnixSockets(echo_hub, worker, place)
    yield place
    sockets.close()
    assert not os.path.exists(place)


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def dial(path: str, line: bytes, kind: int = socket.SOCK_STREAM) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, kind)
    channel.settimeout(30)
    channel.connect(path)
    channel.sendall(line)
    return channel


def test_connect_is_answered_with_ok_and_the_hosts_port(path: str) -> None:
    with dial(path, b"CONNECT %d\n" % ECHO) as channel:
        word, port = channel.recv(64).split()
        assert word == b"OK" and port.isdigit()
        channel.sendall(b"hello")
        assert channel.recv(64) == b"hello"


def test_what_follows_the_line_at_once_is_data(path: str) -> None:
    with dial(path, b"CONNECT %d\nhello" % ECHO) as channel, channel.makefile("rb") as lines:
        assert lines.readline().startswith(b"OK ")
        assert lines.read(5) == b"hello"


def test_a_line_may_come_in_pieces(path: str) -> None:
    with dial(path, b"CONN") as channel:
        time.sleep(0.02)
        channel.sendall(b"ECT 50")
        time.sleep(0.02)
        channel.sendall(b"00\n")
        assert channel.recv(64).startswith(b"OK ")


@pytest.mark.parametrize(
    "line", [b"CONNECT 1\n", b"HELLO\n", b"CONNECT\n", b"CONNECT -1\n", b"CONNECT 4294967296\n", b"x" * 40, b"\0\n"]
)
def test_anything_else_is_closed(path: str, line: bytes) -> None:
    with dial(path, line) as channel:
        try:
            assert channel.recv(64) == b""
        except ConnectionResetError:  # it had not read all of it
            pass


def test_who_says_nothing_is_closed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "HANDSHAKE_S", 0.02)
    with dial(path, b"") as channel:
        assert channel.recv(64) == b""


def test_a_half_close_of_the_programs_ends_what_the_guest_reads_and_it_still_gets_the_answer(path: str) -> None:
    with dial(path, b"CONNECT %d\n" % ECHO) as channel, channel.makefile("rb") as lines:
        lines.readline()
        channel.sendall(b"x" * 300_000)
        channel.shutdown(socket.SHUT_WR)
        assert lines.read() == b"x" * 300_000


def test_connections_of_a_program_that_is_gone_end(path: str, echo_hub: Hub) -> None:
    channels = [dial(path, b"CONNECT %d\n" % ECHO) for _ in range(20)]
    for channel in channels:
        assert channel.recv(64).startswith(b"OK ")
        channel.sendall(b"unread")
        channel.close()
    wait(lambda: not echo_hub.connections)


def test_messages_keep_their_bounds(path: str) -> None:
    with dial(path + "_seqpacket", b"CONNECT %d\n" % ECHO, socket.SOCK_SEQPACKET) as channel:
        assert channel.recv(64).startswith(b"OK ")
        sizes = (1, 5000, 60_000, 2)
        for size in sizes:
            channel.send(bytes(size))
        assert [len(channel.recv(1 << 20)) for _ in sizes] == list(sizes)


def test_the_guest_reaches_the_program_at_path_port(tmp_path: Path, worker: Worker) -> None:
    hub = Hub(3)
    guest = Guest(hub)
    sockets = UnixSockets(hub, worker, str(tmp_path / "v"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "v_52"))
        listener.listen()
        listener.settimeout(30)
        guest.send(REQUEST, 7, 52)
        assert guest.ops() == [RESPONSE]
        guest.send(RW, 7, 52, b"from the guest")
        guest.send(SHUTDOWN, 7, 52, flags=SEND)
        channel, _ = listener.accept()
        with channel, channel.makefile("rb") as lines:
            assert lines.read() == b"from the guest"
            channel.sendall(b"answer")
            answer = b""
            while len(answer) < 6:
                answer += b"".join(data for _, data in guest.all())
            assert answer == b"answer"
        wait(lambda: SHUTDOWN in guest.ops())
    guest.send(REQUEST, 7, 53)
    assert RST in guest.ops()
    sockets.close()


def test_a_message_of_the_guests_is_one_of_the_programs(tmp_path: Path, worker: Worker) -> None:
    hub = Hub(3)
    guest = Guest(hub)
    sockets = UnixSockets(hub, worker, str(tmp_path / "v"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "v_52"))
        listener.listen()
        guest.send(REQUEST, 7, 52, kind=SEQPACKET)
        assert guest.ops() == [RESPONSE]
        channel, _ = listener.accept()
        channel.settimeout(30)
        guest.send(RW, 7, 52, b"one ", kind=SEQPACKET)
        guest.send(RW, 7, 52, b"message", kind=SEQPACKET, flags=EOM)
        guest.send(RW, 7, 52, bytes(200_000), kind=SEQPACKET, flags=EOM)
        assert [channel.recv(1 << 20) for _ in range(2)] == [b"one message", bytes(200_000)]
        guest.send(SHUTDOWN, 7, 52, kind=SEQPACKET, flags=RCV | SEND)
        assert channel.recv(9) == b""
        channel.close()
    sockets.close()


def test_only_the_user_may_connect(path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_dead_process_socket_is_replaced_and_nothing_else_is(tmp_path: Path, worker: Worker) -> None:
    place = tmp_path / "v"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    UnixSockets(Hub(3), worker, str(place)).close()
    alive = UnixSockets(Hub(3), worker, str(place))
    with pytest.raises(ConfigError, match="another process listens there"):
        UnixSockets(Hub(3), worker, str(place))
    alive.close()
    place.write_text("a file of the user's")
    with pytest.raises(ConfigError, match="no socket"):
        UnixSockets(Hub(3), worker, str(place))
    assert place.read_text() == "a file of the user's"
    with pytest.raises(ConfigError, match="No such file"):
        UnixSockets(Hub(3), worker, str(tmp_path / "none" / "v"))


def test_a_path_is_used_whole_or_refused(tmp_path: Path, worker: Worker) -> None:
    for size in (96, 97, 108, 5000):
        path = "p" * size
        if size > 96:
            with pytest.raises(ConfigError, match=f"={size}, expected at most 96"):
                UnixSockets(Hub(3), worker, path)
        else:
            here = os.getcwd()
            os.chdir(tmp_path)
            try:
                sockets = UnixSockets(Hub(3), worker, path)
                assert sorted(os.listdir()) == [path, path + "_seqpacket"]
                sockets.close()
            finally:
                os.chdir(here)
