# SPDX-License-Identifier: Apache-2.0
"""Blocking sockets: what waits, what does not, and what comes of it (as AF_VSOCK's do on Linux)."""

from __future__ import annotations

import errno
import select
import socket
import threading
import time

import pytest
from tests.support.vsock import RCV, REQUEST, RESPONSE, RW, SEND, SHUTDOWN, Guest
from tests.vmm.vsock.conftest import ECHO

from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.hub import Hub
from softkvm.vmm.vsock.sockets import VsockSocket


def test_what_is_sent_comes_back(vsock: Vsock) -> None:
    with vsock.connect(ECHO) as guest:
        assert guest.getpeername() == (3, ECHO)
        assert guest.getsockname()[0] == 2
        guest.sendall(b"hello")
        assert guest.recv(5, socket.MSG_WAITALL) == b"hello"
        assert guest.unsent() == 0


def test_much_more_than_any_buffer_goes_through(vsock: Vsock) -> None:
    data = bytes(range(251)) * 20_000
    with vsock.connect(ECHO) as guest:
        sender = threading.Thread(target=guest.sendall, args=(data,))
        sender.start()
        received = bytearray()
        while len(received) < len(data):
            received += guest.recv(1 << 20)
        sender.join()
        assert received == data


def test_messages_come_back_one_by_one(vsock: Vsock) -> None:
    with vsock.connect(ECHO, socket.SOCK_SEQPACKET) as guest:
        for size in (1, 4096, 4097, 60_000, 0, 7):
            guest.send(bytes(size), socket.MSG_EOR if size & 1 else 0)
        for size in (1, 4096, 4097, 60_000, 0, 7):
            assert guest.recvmsg(1 << 20) == (bytes(size), socket.MSG_EOR if size & 1 else 0, size)


def test_nobody_listens_is_econnreset_and_the_socket_can_try_again(vsock: Vsock) -> None:
    guest = VsockSocket(vsock.hub, socket.SOCK_STREAM)
    with pytest.raises(ConnectionResetError):
        guest.connect(1)
    guest.connect(ECHO)
    with pytest.raises(OSError) as error:
        guest.connect(ECHO)
    assert error.value.errno == errno.EISCONN
    guest.close()
    for call in (lambda: guest.recv(1), lambda: guest.send(b"x"), lambda: guest.connect(ECHO)):
        with pytest.raises(OSError) as error:
            call()
        assert error.value.errno == errno.EBADF


def test_retry_waits_for_somebody_to_listen(vsock: Vsock, echo_hub: Hub) -> None:
    before = time.monotonic()
    with pytest.raises(ConnectionResetError):
        vsock.connect(1, timeout_s=0.1, retry=True)
    assert time.monotonic() - before > 0.05


def test_a_guest_without_a_driver_times_out() -> None:
    silent = Vsock(Hub(3), lambda cid: None)
    silent.hub.wake_at = lambda seconds: threading.Timer(seconds, silent.hub.expire).start()
    with pytest.raises(TimeoutError):
        silent.connect(1, timeout_s=0.05)
    assert silent.live_sockets == 0


def test_timeouts_are_those_of_sockets(vsock: Vsock) -> None:
    with vsock.connect(ECHO) as guest:
        guest.settimeout(0)
        with pytest.raises(BlockingIOError):
            guest.recv(1)
        guest.settimeout(0.01)
        with pytest.raises(TimeoutError):
            guest.recv(1)
        guest.settimeout(None)
        with pytest.raises(BlockingIOError):
            guest.recv(1, socket.MSG_DONTWAIT)
        assert guest.gettimeout() is None


def test_a_close_wakes_who_waits(vsock: Vsock) -> None:
    guest = vsock.connect(ECHO)
    threading.Timer(0.02, guest.close).start()
    with pytest.raises(OSError) as error:
        guest.recv(1)
    assert error.value.errno == errno.EBADF
    listener = vsock.listen(9)
    threading.Timer(0.02, listener.close).start()
    with pytest.raises(OSError) as error:
        listener.accept()
    assert error.value.errno == errno.EBADF


def test_poll_knows_low_water_half_close_and_end(vsock: Vsock) -> None:
    hub = Hub(3)
    guest = Guest(hub)
    listener = Vsock(hub, lambda cid: None).listen(1)
    guest.send(REQUEST, 7, 1)
    assert guest.ops() == [RESPONSE]
    accepted, _ = listener.accept()
    assert accepted.poll(select.POLLIN | select.POLLRDHUP, 0) == 0
    assert accepted.poll(select.POLLOUT, 0) == select.POLLOUT
    accepted.rcvlowat = 3
    guest.send(RW, 7, 1, b"ab")
    assert accepted.poll(select.POLLIN, 0) == 0
    guest.send(RW, 7, 1, b"c")
    assert accepted.poll(select.POLLIN, 0) == select.POLLIN
    guest.send(SHUTDOWN, 7, 1, flags=SEND)
    assert accepted.poll(select.POLLRDHUP, 0) == select.POLLRDHUP
    guest.send(SHUTDOWN, 7, 1, flags=RCV)
    assert accepted.poll(0, 0) == select.POLLHUP
    accepted.close()
    listener.close()


def test_files_of_a_stream(vsock: Vsock) -> None:
    with vsock.connect(ECHO) as guest:
        with guest.makefile("wb") as out:
            out.write(b"one\ntwo\n")
        with guest.makefile("rb") as lines:
            assert [lines.readline(), lines.readline()] == [b"one\n", b"two\n"]


def test_a_local_port_is_one_connections_at_a_time(vsock: Vsock) -> None:
    with vsock.connect(ECHO, local_port=77) as guest:
        assert guest.getsockname() == (2, 77)
        with pytest.raises(OSError) as error:
            vsock.connect(ECHO, local_port=77)
        assert error.value.errno == errno.EADDRINUSE


def test_a_hundred_connections_at_once(vsock: Vsock) -> None:
    guests = [vsock.connect(ECHO) for _ in range(100)]
    for number, guest in enumerate(guests):
        guest.sendall(b"%d" % number)
    for number, guest in enumerate(guests):
        assert guest.recv(9) == b"%d" % number
        guest.close()
    deadline = time.monotonic() + 30
    while vsock.live_sockets:
        assert time.monotonic() < deadline
        time.sleep(0.001)
