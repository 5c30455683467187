# SPDX-License-Identifier: Apache-2.0
"""Two connections become one: all bytes, half closes, and failures of either end."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from softkvm.control.bridge import bridge

FAR_S = 30


@pytest.fixture
def ends() -> tuple[socket.socket, socket.socket]:
    one, near = socket.socketpair()
    other, far = socket.socketpair()
    bridge(near, far)
    for end in (one, other):
        end.settimeout(FAR_S)
    return one, other


def read(end: socket.socket) -> bytes:
    found = b""
    while data := end.recv(1 << 16):
        found += data
    return found


def test_all_bytes_arrive_and_each_direction_ends_by_itself(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    data = os.urandom(3 << 20)

    def send() -> None:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    assert read(other) == data
    sender.join(FAR_S)
    other.sendall(b"still here")
    other.close()
    assert read(one) == b"still here"
    one.close()


def test_one_that_goes_ends_the_other(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    one.close()
    assert read(other) == b""
    with pytest.raises(OSError):
        while True:
            other.sendall(b"x" * 4096)
    other.close()
