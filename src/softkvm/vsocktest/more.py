# SPDX-License-Identifier: Apache-2.0
"""Cases of our own."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Final

from softkvm.vmm.vsock.sockets import VsockSocket
from softkvm.vsocktest.half import SEQPACKET, Half, hash_djb2

BULK: Final = 1 << 20
CANCELLED: Final = 50


def _speaks_last(half: Half, channel: VsockSocket) -> None:
    """Who sends no more still gets the answer."""
    half.send(channel, b"question")
    channel.shutdown(socket.SHUT_WR)
    half.expect("the answer", half.receive(channel, 6), b"answer")
    half.at_end(channel)


def _answers(half: Half, channel: VsockSocket) -> None:
    half.expect("the question", half.receive(channel, 8), b"question")
    half.at_end(channel)
    half.send(channel, b"answer")
    channel.close()


def half_client_client(half: Half) -> None:
    _speaks_last(half, half.connected())


def half_client_server(half: Half) -> None:
    _answers(half, half.accepted())


def half_server_client(half: Half) -> None:
    _answers(half, half.connected())


def half_server_server(half: Half) -> None:
    _speaks_last(half, half.accepted())


def _both_close(half: Half, channel: VsockSocket) -> None:
    half.control.put("READY")
    half.control.expect("READY")
    channel.close()
    half.wait_until(lambda: len(half.vsock.hub.connections) <= 1, "the connection stays")


def both_close_client(half: Half) -> None:
    _both_close(half, half.connected())


def both_close_server(half: Half) -> None:
    _both_close(half, half.accepted())


def reset_client(half: Half) -> None:
    """The receiver goes while the sender waits for room."""
    channel = half.connected()
    data = bytes(4 << 20)
    with half.error("send", errno.EPIPE, errno.ECONNRESET):
        channel.sendall(data)


def reset_server(half: Half) -> None:
    channel = half.accepted()
    half.receive(channel, 1000)
    channel.close()


def cancel_client(half: Half) -> None:
    """Connects that are given up at once; one that is not works behind them."""
    half.control.expect("LISTENING")
    for number in range(CANCELLED):
        channel = half.socket()
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            channel.connect(half.port, timeout_s=0.002 * (number % 3))
        channel.close()
    channel = half.connect()
    half.send_byte(channel)
    half.control.expect("DONE")


def cancel_server(half: Half) -> None:
    listener = half.listening()
    half.control.put("LISTENING")
    data = b""
    while not data:  # those that were given up have none
        with contextlib.closing(half.accept(listener)) as channel:
            data = channel.recv(1)
            if data:
                half.control.put("DONE")


def _sends_and_receives(half: Half, channel: VsockSocket) -> None:
    out = half.random.randbytes(BULK)
    join = half.in_background(lambda: half.send(channel, out))
    received = half.receive(channel, BULK)
    join()
    half.control.put(hash_djb2(out))
    half.expect("the hash", half.control.number(), hash_djb2(received))
    channel.close()


def bulk_client(half: Half) -> None:
    _sends_and_receives(half, half.connected())


def bulk_server(half: Half) -> None:
    _sends_and_receives(half, half.accepted())


def empty_client(half: Half) -> None:
    channel = half.connected(SEQPACKET)
    for data in (b"one", b"", b"two"):
        half.send(channel, data)
    half.control.put("SENDDONE")
    half.control.expect("DONE")


def empty_server(half: Half) -> None:
    """A message of no bytes is one, if the sender's kernel sends it, and the others are what they were."""
    channel = half.accepted(SEQPACKET)
    half.control.expect("SENDDONE")
    half.expect("the first", channel.recv(16), b"one")
    data = channel.recv(16)
    half.expect("the last", data or channel.recv(16), b"two")
    half.control.put("DONE")


def type_client(half: Half) -> None:
    half.control.expect("LISTENING")
    half.refused(SEQPACKET)
    half.control.put("DONE")


def type_server(half: Half) -> None:
    half.listening()
    half.control.put("LISTENING")
    half.control.expect("DONE")
