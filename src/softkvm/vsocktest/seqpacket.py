# SPDX-License-Identifier: Apache-2.0
"""Messages: the host's halves of the kernel's cases."""

from __future__ import annotations

import errno
import socket
import time
from typing import Final

from softkvm.vsocktest import stream
from softkvm.vsocktest.half import SEQPACKET, Half, hash_djb2

PAGE: Final = 4096
LARGEST: Final = 4 * PAGE
BUFFER: Final = 2 << 20
TRUNCATED: Final = 32
MASK: Final = (1 << 64) - 1


def bounds_client(half: Half) -> None:
    """Messages of any size, some with MSG_EOR."""
    channel = half.connected(SEQPACKET)
    half.control.expect("SRVREADY")
    total = 0
    count = BUFFER // LARGEST
    for number in range(count):
        size = half.random.randrange(PAGE, LARGEST) if number & 1 else half.random.randint(1, PAGE)
        data = bytes([half.random.randrange(256)]) * size
        eor = number == count // 2 or half.random.random() < 0.5
        half.send(channel, data, socket.MSG_EOR if eor else 0)
        total += eor + hash_djb2(data)
    half.control.put("SENDDONE")
    half.control.put(total & MASK)
    channel.close()


def bounds_server(half: Half) -> None:
    channel = half.accepted(SEQPACKET)
    channel.buffer_size = BUFFER
    half.control.put("SRVREADY")
    half.control.expect("SENDDONE")
    total = 0
    while True:
        with half.failing("recvmsg"):
            data, flags, _ = channel.recvmsg(LARGEST)
        if not data:
            break
        total += bool(flags & socket.MSG_EOR) + hash_djb2(data)
    half.expect("the hash", half.control.number(), total & MASK)


def truncated_client(half: Half) -> None:
    channel = half.connected(SEQPACKET)
    half.send(channel, bytes(TRUNCATED))
    half.control.put("SENDDONE")
    channel.close()


def truncated_server(half: Half) -> None:
    """A message that is cut off says so."""
    channel = half.accepted(SEQPACKET)
    half.control.expect("SENDDONE")
    data, flags, size = channel.recvmsg(TRUNCATED // 2)
    half.expect("the message", (len(data), flags, size), (TRUNCATED // 2, socket.MSG_TRUNC, TRUNCATED))


def timeout_client(half: Half) -> None:
    channel = half.connected(SEQPACKET)
    channel.settimeout(1.0)
    before = time.monotonic()
    try:
        channel.recv(1)
    except TimeoutError:
        half.expect("a second", time.monotonic() - before >= 0.99, True)
    else:
        half.expect("recv", "something", "a timeout")
    half.control.put("WAITDONE")


def timeout_server(half: Half) -> None:
    channel = half.accepted(SEQPACKET)
    half.control.expect("WAITDONE")
    channel.close()


def hole_client(half: Half) -> None:
    channel = half.connected(SEQPACKET)
    half.send(channel, b"a" * 3 * PAGE)
    half.send(channel, b"b" * 3 * PAGE)
    channel.close()


def hole_server(half: Half) -> None:
    """A message that cannot be stored is lost; the next is whole."""
    channel = half.accepted(SEQPACKET)
    try:
        channel.recv_into(bytes(3 * PAGE))
    except TypeError:
        pass
    else:
        half.expect("recv_into read-only memory", "success", "TypeError")
    half.expect("the next", half.receive(channel, 3 * PAGE), b"b" * 3 * PAGE)


def big_client(half: Half) -> None:
    """A message is no larger than the peer's buffer."""
    channel = half.connected(SEQPACKET)
    with half.error("send", errno.EMSGSIZE):
        channel.send(bytes(channel.connection.peer_buf_alloc + 1))
    half.control.put("CLISENT")


def big_server(half: Half) -> None:
    channel = half.accepted(SEQPACKET)
    half.control.expect("CLISENT")
    channel.close()


def peek_client(half: Half) -> None:
    stream.peek_client(half, SEQPACKET)


def peek_server(half: Half) -> None:
    stream.peek_server(half, SEQPACKET)


def invalid_client(half: Half) -> None:
    stream.invalid_client(half, SEQPACKET)


def invalid_server(half: Half) -> None:
    stream.invalid_server(half, SEQPACKET)


def unsent_client(half: Half) -> None:
    stream.unsent_client(half, SEQPACKET)


def unsent_server(half: Half) -> None:
    stream.unsent_server(half, SEQPACKET)


# -- as Linux 6.1 has them

OLD_COUNT, OLD_EOR = 7, 3


def old_bounds_client(half: Half) -> None:
    channel = half.connected(SEQPACKET)
    for number in range(OLD_COUNT):
        half.send(channel, b"A", socket.MSG_EOR if number == OLD_EOR else 0)
    half.control.put("SENDDONE")
    channel.close()


def old_bounds_server(half: Half) -> None:
    channel = half.accepted(SEQPACKET)
    half.control.expect("SENDDONE")
    for number in range(OLD_COUNT):
        expected = (b"A", socket.MSG_EOR if number == OLD_EOR else 0, 1)
        half.expect("the message", channel.recvmsg(16), expected)
