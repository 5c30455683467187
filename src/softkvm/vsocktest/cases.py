# SPDX-License-Identifier: Apache-2.0
"""The list of all cases: the kernel's by their names, in its order (Linux 6.16), then ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from softkvm.vsocktest import more, seqpacket, stream, zerocopy
from softkvm.vsocktest.half import Half

Function = Callable[[Half], None]


@dataclass(frozen=True, slots=True)
class Case:
    """The host's halves of a case."""

    name: str
    client: Function
    server: Function


CASES: Final = (
    Case("SOCK_STREAM connection reset", stream.connection_reset, stream.nothing),
    Case("SOCK_STREAM bind only", stream.bind_only_client, stream.bind_only_server),
    Case("SOCK_STREAM client close", stream.client_close_client, stream.client_close_server),
    Case("SOCK_STREAM server close", stream.server_close_client, stream.server_close_server),
    Case("SOCK_STREAM multiple connections", stream.connections_client, stream.connections_server),
    Case("SOCK_STREAM MSG_PEEK", stream.peek_client, stream.peek_server),
    Case("SOCK_SEQPACKET msg bounds", seqpacket.bounds_client, seqpacket.bounds_server),
    Case("SOCK_SEQPACKET MSG_TRUNC flag", seqpacket.truncated_client, seqpacket.truncated_server),
    Case("SOCK_SEQPACKET timeout", seqpacket.timeout_client, seqpacket.timeout_server),
    Case("SOCK_SEQPACKET invalid receive buffer", seqpacket.hole_client, seqpacket.hole_server),
    Case("SOCK_STREAM poll() + SO_RCVLOWAT", stream.low_water_client, stream.low_water_server),
    Case("SOCK_SEQPACKET big message", seqpacket.big_client, seqpacket.big_server),
    Case("SOCK_STREAM test invalid buffer", stream.invalid_client, stream.invalid_server),
    Case("SOCK_SEQPACKET test invalid buffer", seqpacket.invalid_client, seqpacket.invalid_server),
    Case("SOCK_STREAM virtio skb merge", stream.merge_client, stream.merge_server),
    Case("SOCK_SEQPACKET MSG_PEEK", seqpacket.peek_client, seqpacket.peek_server),
    Case("SOCK_STREAM SHUT_WR", stream.shut_wr_client, stream.shut_wr_server),
    Case("SOCK_STREAM SHUT_RD", stream.shut_rd_client, stream.shut_rd_server),
    Case("SOCK_STREAM MSG_ZEROCOPY", zerocopy.stream_client, zerocopy.stream_server),
    Case("SOCK_SEQPACKET MSG_ZEROCOPY", zerocopy.seqpacket_client, zerocopy.seqpacket_server),
    Case("SOCK_STREAM MSG_ZEROCOPY empty MSG_ERRQUEUE", zerocopy.empty_client, zerocopy.empty_server),
    Case("SOCK_STREAM double bind connect", stream.double_bind_client, stream.double_bind_server),
    Case("SOCK_STREAM virtio credit update + SO_RCVLOWAT", stream.credit_client, stream.credit_rcvlowat_server),
    Case("SOCK_STREAM virtio credit update + low rx_bytes", stream.credit_client, stream.credit_low_bytes_server),
    Case("SOCK_STREAM ioctl(SIOCOUTQ) 0 unsent bytes", stream.unsent_client, stream.unsent_server),
    Case("SOCK_SEQPACKET ioctl(SIOCOUTQ) 0 unsent bytes", seqpacket.unsent_client, seqpacket.unsent_server),
    Case("SOCK_STREAM leak accept queue", stream.accept_queue_client, stream.accept_queue_server),
    Case("SOCK_STREAM MSG_ZEROCOPY leak MSG_ERRQUEUE", zerocopy.leak_client, zerocopy.leak_server),
    Case("SOCK_STREAM MSG_ZEROCOPY leak completion skb", zerocopy.no_memory_client, zerocopy.no_memory_server),
    Case("SOCK_STREAM transport release use-after-free", stream.nothing, stream.nothing),
    Case("SOCK_STREAM retry failed connect()", stream.retry_client, stream.retry_server),
    Case("SOCK_STREAM SO_LINGER null-ptr-deref", stream.linger_client, stream.linger_server),
    Case("SOCK_STREAM SO_LINGER close() on unread", stream.linger_unread_client, stream.linger_unread_server),
    Case("SOCK_STREAM transport change null-ptr-deref", stream.transport_change_client, stream.transport_change_server),
    Case("SOCK_STREAM half-closed by the client", more.half_client_client, more.half_client_server),
    Case("SOCK_STREAM half-closed by the server", more.half_server_client, more.half_server_server),
    Case("SOCK_STREAM closed by both at once", more.both_close_client, more.both_close_server),
    Case("SOCK_STREAM reset while sending", more.reset_client, more.reset_server),
    Case("SOCK_STREAM cancelled connect()", more.cancel_client, more.cancel_server),
    Case("SOCK_STREAM 1 MiB both ways", more.bulk_client, more.bulk_server),
    Case("SOCK_SEQPACKET zero-length message", more.empty_client, more.empty_server),
    Case("SOCK_SEQPACKET connect() to a stream", more.type_client, more.type_server),
)

_OLD: Final = (
    Case("SOCK_STREAM MSG_PEEK", stream.old_peek_client, stream.old_peek_server),
    Case("SOCK_SEQPACKET msg bounds", seqpacket.old_bounds_client, seqpacket.old_bounds_server),
)
"""Cases that were others in Linux before 6.4, whose list has no "big message"."""


def cases_of(names: Sequence[str]) -> dict[str, Case]:
    """Return our halves of the cases that a peer's list names."""
    known = {case.name: case for case in CASES}
    if names and "SOCK_SEQPACKET big message" not in names:
        known.update((case.name, case) for case in _OLD)
    return {name: known[name] for name in names if name in known}
