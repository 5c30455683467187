# SPDX-License-Identifier: Apache-2.0
"""MSG_ZEROCOPY: how the sender's kernel does it is its own business; the host's half sends and receives the bytes."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import Final

from softkvm.vsocktest.half import SEQPACKET, STREAM, Half, hash_djb2

PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Transfer:
    """Sizes of the parts of what is sent at once."""

    sizes: tuple[int, ...]
    unmapped: bool = False
    """Whether a part is memory that is not there: nothing is sent."""
    stream_only: bool = False


TRANSFERS: Final = (
    Transfer((PAGE, PAGE, 200)),
    Transfer((PAGE, 2 * PAGE, 3 * PAGE)),
    Transfer((16 * PAGE, 16 * PAGE, 16 * PAGE)),
    Transfer((PAGE, 100, PAGE)),
    Transfer((PAGE, PAGE, PAGE), unmapped=True),
    Transfer((PAGE,)),
    Transfer((100 * PAGE,), stream_only=True),
)


def _transfers(kind: int) -> list[Transfer]:
    return [transfer for transfer in TRANSFERS if kind == STREAM or not transfer.stream_only]


def _client(half: Half, kind: int) -> None:
    for transfer in _transfers(kind):
        channel = half.connected(kind)
        data = b"".join(map(half.random.randbytes, transfer.sizes))
        if not transfer.unmapped:
            half.send(channel, data)
        half.control.put(0 if transfer.unmapped else hash_djb2(data))
        half.control.put("DONE")
        channel.close()


def _server(half: Half, kind: int) -> None:
    for transfer in _transfers(kind):
        channel = half.accepted(kind)
        size = sum(transfer.sizes)
        data = b""
        while len(data) < size:
            with half.failing("recv"):
                more = channel.recv(size - len(data))
            if not more:
                break
            data += more
        half.expect("the hash", half.control.number(), 0 if transfer.unmapped else hash_djb2(data))
        half.control.expect("DONE")
        channel.close()


def stream_client(half: Half) -> None:
    _client(half, STREAM)


def stream_server(half: Half) -> None:
    _server(half, STREAM)


def seqpacket_client(half: Half) -> None:
    _client(half, SEQPACKET)


def seqpacket_server(half: Half) -> None:
    _server(half, SEQPACKET)


def empty_client(half: Half) -> None:
    channel = half.connected()
    with half.error("recv", errno.EAGAIN):
        channel.recv(1, socket.MSG_DONTWAIT)  # there is no error queue here, and nothing else either
    half.control.put("DONE")


def empty_server(half: Half) -> None:
    channel = half.accepted()
    half.control.expect("DONE")
    channel.close()


def leak_client(half: Half) -> None:
    channel = half.connected()
    half.send_byte(channel)
    channel.close()


def leak_server(half: Half) -> None:
    channel = half.accepted()
    half.receive_byte(channel)
    half.wait_close(channel)


def no_memory_client(half: Half) -> None:
    half.connected().close()


def no_memory_server(half: Half) -> None:
    half.wait_close(half.accepted())
