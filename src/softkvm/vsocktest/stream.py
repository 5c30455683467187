# SPDX-License-Identifier: Apache-2.0
"""Streams: the host's halves of the kernel's cases."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from typing import Final

from softkvm.vmm.vsock.sockets import VsockSocket
from softkvm.vsocktest.control import CaseFailed
from softkvm.vsocktest.half import SEQPACKET, STREAM, Half

CONNECTIONS: Final = 100
PEEKED: Final = 64
WATER: Final = 128
CREDIT_BUFFER: Final = 128 << 10
PACKET: Final = 64 << 10
STRESS_S: Final = 2.0
GOES_ON, IS_DONE = 1, 0


def nothing(half: Half) -> None:
    """The other half does it alone."""


def connection_reset(half: Half) -> None:
    """Nobody listens."""
    half.refused()


def bind_only_client(half: Half) -> None:
    """Somebody has the port, and doesn't listen."""
    half.control.expect("BIND")
    half.refused()
    half.control.put("DONE")


def bind_only_server(half: Half) -> None:
    """A port of ours is bound by listening only; nobody does."""
    half.control.put("BIND")
    half.control.expect("DONE")


def sends_and_closes(half: Half, channel: VsockSocket) -> None:
    """One byte, and the end."""
    half.send_byte(channel)
    channel.close()


def reads_behind_close(half: Half, channel: VsockSocket) -> None:
    """The peer has closed: nothing can be sent, what it has sent can be read, then comes the end."""
    half.wait_close(channel)
    half.broken_pipe(channel)
    if half.read_after_close:
        half.receive_byte(channel)
        half.at_end(channel)


def client_close_client(half: Half) -> None:
    sends_and_closes(half, half.connected())


def client_close_server(half: Half) -> None:
    reads_behind_close(half, half.accepted())


def server_close_client(half: Half) -> None:
    reads_behind_close(half, half.connected())


def server_close_server(half: Half) -> None:
    sends_and_closes(half, half.accepted())


def _connections(half: Half, channels: list[VsockSocket], *, client: bool) -> None:
    for number, channel in enumerate(channels):
        if bool(number % 2) == client:
            half.receive_byte(channel)
        else:
            half.send_byte(channel)
    for channel in channels:
        channel.close()


def connections_client(half: Half) -> None:
    """A hundred at once."""
    _connections(half, [half.connected() for _ in range(CONNECTIONS)], client=True)


def connections_server(half: Half) -> None:
    _connections(half, [half.accepted() for _ in range(CONNECTIONS)], client=False)


def peek_client(half: Half, kind: int = STREAM) -> None:
    channel = half.connected(kind)
    half.control.expect("SRVREADY")
    half.send(channel, half.random.randbytes(PEEKED))
    channel.close()


def peek_server(half: Half, kind: int = STREAM) -> None:
    """What is peeked at stays."""
    channel = half.accepted(kind)
    half.would_block(channel, PEEKED, socket.MSG_PEEK)
    half.control.put("SRVREADY")
    first = half.receive(channel, PEEKED // 2, socket.MSG_PEEK)
    peeked = half.receive(channel, PEEKED, socket.MSG_PEEK)
    if kind == SEQPACKET:
        _, _, size = channel.recvmsg(PEEKED // 2, socket.MSG_PEEK)
        half.expect("the message's size", size, PEEKED)
    data = half.receive(channel, PEEKED)
    half.expect("what was peeked at", (peeked, first), (data, data[: PEEKED // 2]))


def low_water_client(half: Half) -> None:
    """poll() waits for as much as SO_RCVLOWAT says."""
    channel = half.connected()
    channel.rcvlowat = WATER
    half.control.expect("SRVSENT")
    half.expect("poll with one byte", channel.poll(select.POLLIN | select.POLLRDNORM, 1.0), 0)
    half.control.put("CLNSENT")
    wanted = select.POLLIN | select.POLLRDNORM
    half.expect("poll with all bytes", channel.poll(wanted, 60), wanted)
    half.receive(channel, WATER, socket.MSG_DONTWAIT)
    half.control.put("POLLDONE")


def low_water_server(half: Half) -> None:
    channel = half.accepted()
    half.send_byte(channel)
    half.control.put("SRVSENT")
    half.control.expect("CLNSENT")
    for _ in range(1, WATER):
        half.send_byte(channel)
    half.control.expect("POLLDONE")


def merge_client(half: Half) -> None:
    channel = half.connected()
    half.send(channel, b"HELLO")
    half.control.put("SEND0")
    half.control.expect("REPLY0")
    half.send(channel, b"WORLD")
    half.control.put("SEND1")
    half.control.expect("REPLY1")


def merge_server(half: Half) -> None:
    """A packet that is read in part, and another behind it."""
    channel = half.accepted()
    half.control.expect("SEND0")
    data = half.receive(channel, 2)
    half.control.put("REPLY0")
    half.control.expect("SEND1")
    data += half.receive(channel, 8)
    half.would_block(channel, 50)
    half.expect("the bytes", data, b"HELLOWORLD")
    half.control.put("REPLY1")


def invalid_client(half: Half, kind: int = STREAM) -> None:
    """Memory that cannot be received into: a stream keeps its bytes, a message is lost."""
    channel = half.connected(kind)
    half.control.expect("SENDDONE")
    try:
        channel.recv_into(bytes(512))
    except TypeError:
        pass
    else:
        raise CaseFailed("recv_into read-only memory succeeds")
    if kind == STREAM:
        half.receive(channel, 512, socket.MSG_DONTWAIT)
    else:
        half.would_block(channel, 512)
    half.control.put("DONE")


def invalid_server(half: Half, kind: int = STREAM) -> None:
    channel = half.accepted(kind)
    half.send(channel, bytes(512))
    half.control.put("SENDDONE")
    half.control.expect("DONE")


def shut_wr_client(half: Half) -> None:
    """Who has said that he sends no more doesn't."""
    channel = half.connected()
    channel.shutdown(socket.SHUT_WR)
    half.broken_pipe(channel)
    half.control.put("CLIENTDONE")


def shut_wr_server(half: Half) -> None:
    channel = half.accepted()
    half.control.expect("CLIENTDONE")
    channel.close()


def shut_rd_client(half: Half) -> None:
    """Nothing can be sent to a peer that receives no more."""
    channel = half.connected()
    half.control.expect("SHUTRDDONE")
    half.broken_pipe(channel)
    half.control.put("CLIENTDONE")


def shut_rd_server(half: Half) -> None:
    channel = half.accepted()
    channel.shutdown(socket.SHUT_RD)
    half.control.put("SHUTRDDONE")
    half.control.expect("CLIENTDONE")


def double_bind_client(half: Half) -> None:
    """The port of a connection that was closed can be another's at once."""
    for _ in range(2):
        half.control.expect("LISTENING")
        port = half.port + 1
        # bind() of a port that is still waiting for its peer fails on Linux, too.
        half.wait_until(
            lambda: all(known.local_port != half.port + 1 for known in half.vsock.hub.connections), "the port stays"
        )
        half.connect(local_port=port).close()


def double_bind_server(half: Half) -> None:
    listener = half.listening()
    for _ in range(2):
        half.control.put("LISTENING")
        half.wait_close(half.accept(listener))


def credit_client(half: Half) -> None:
    """One byte more than the peer has room for."""
    channel = half.connected()
    half.receive_byte(channel)
    half.send(channel, bytes(CREDIT_BUFFER + 1))
    channel.close()


def _credit_server(half: Half, *, low_bytes: bool) -> None:
    """The peer hears of room when so much has been read that it is worth it, or as SO_RCVLOWAT needs it."""
    channel = half.accepted()
    channel.buffer_size = CREDIT_BUFFER
    if low_bytes:
        channel.rcvlowat = PACKET + 1
    half.send_byte(channel)
    half.wait_until(lambda: len(channel.recv(CREDIT_BUFFER, socket.MSG_PEEK)) == CREDIT_BUFFER, "less than all comes")
    half.receive(channel, PACKET)
    if not low_bytes:
        channel.rcvlowat = PACKET + 1
    events = channel.poll(select.POLLIN | select.POLLRDHUP, 60)
    if events & select.POLLERR or not events & select.POLLIN:
        raise CaseFailed(f"poll finds {events:#x}")
    half.receive(channel, PACKET + 1, socket.MSG_DONTWAIT)


def credit_rcvlowat_server(half: Half) -> None:
    _credit_server(half, low_bytes=False)


def credit_low_bytes_server(half: Half) -> None:
    _credit_server(half, low_bytes=True)


def unsent_client(half: Half, kind: int = STREAM) -> None:
    """What the peer has received is no longer unsent."""
    channel = half.connected(kind)
    half.send(channel, half.random.randbytes(PEEKED))
    half.control.expect("RECEIVED")
    half.wait_sent(channel)


def unsent_server(half: Half, kind: int = STREAM) -> None:
    channel = half.accepted(kind)
    half.receive(channel, PEEKED)
    half.control.put("RECEIVED")
    channel.close()


def accept_queue_client(half: Half) -> None:
    """connect() against the listener's close: refused or accepted, and nothing stays."""
    end = time.monotonic() + STRESS_S
    while True:
        half.control.put(GOES_ON)
        half.control.expect("LISTENING")
        channel = half.socket()
        with contextlib.suppress(ConnectionResetError):
            channel.connect(half.port, timeout_s=60)
        channel.close()
        if time.monotonic() > end:
            break
    half.control.put(IS_DONE)


def accept_queue_server(half: Half) -> None:
    while half.control.number() == GOES_ON:
        listener = half.listening()
        half.control.put("LISTENING")
        listener.close()
    half.wait_until(lambda: len(half.vsock.hub.connections) <= 1, "connections stay")


def retry_client(half: Half) -> None:
    """A socket whose connect() failed may try again."""
    channel = half.refused()
    half.control.put("LISTEN")
    half.control.expect("LISTENING")
    with half.failing("connect, the second time"):
        channel.connect(half.port, timeout_s=60)
    channel.close()


def retry_server(half: Half) -> None:
    half.control.expect("LISTEN")
    half.wait_close(half.accepted())


def linger_client(half: Half) -> None:
    half.connected().close()


def linger_server(half: Half) -> None:
    half.wait_close(half.accepted())


def linger_unread_client(half: Half) -> None:
    """close() doesn't wait for what nobody reads."""
    channel = half.connected()
    half.send_byte(channel)
    half.wait_sent(channel)
    before = time.monotonic()
    channel.close()
    if time.monotonic() - before > 5:
        raise CaseFailed("close() waits for what nobody reads")
    half.control.put("DONE")


def linger_unread_server(half: Half) -> None:
    channel = half.accepted()
    half.control.expect("DONE")
    channel.close()


def transport_change_client(half: Half) -> None:
    """Connects that are given up at any moment: the host's have one transport, so that is what is left of the case."""
    half.control.expect("LISTENING")
    end = time.monotonic() + STRESS_S
    while time.monotonic() < end:
        channel = half.socket()
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            channel.connect(half.port, timeout_s=half.random.choice((0.0, 0.0005, 60.0)))
        channel.close()
        half.control.put(GOES_ON)
    half.control.put(IS_DONE)


def transport_change_server(half: Half) -> None:
    listener = half.listening()
    listener.settimeout(0)
    half.control.put("LISTENING")
    while half.control.number() == GOES_ON:
        with half.error("accept", errno.EAGAIN):
            while True:
                listener.accept()[0].close()


# -- as Linux 6.1 has it


def old_peek_client(half: Half) -> None:
    sends_and_closes(half, half.connected())


def old_peek_server(half: Half) -> None:
    channel = half.accepted()
    half.expect("the byte", half.receive(channel, 1, socket.MSG_PEEK), b"A")
    half.receive_byte(channel)
