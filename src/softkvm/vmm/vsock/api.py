# SPDX-License-Identifier: Apache-2.0
"""``machine.vsock``: a machine's vsock device, for scripts."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from softkvm.vmm.vsock import sockets
from softkvm.vmm.vsock.hub import CONNECT_TIMEOUT_S, Hub
from softkvm.vmm.vsock.packet import PORT_ANY
from softkvm.vmm.vsock.sockets import VsockListener, VsockSocket

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from softkvm.vmm.vsock.aio import ClientConnected, VsockServer


class Vsock:
    """Connections between the host and one guest.

    Blocking, from any thread::

        with machine.vsock.connect(1024, timeout_s=30, retry=True) as guest:
            guest.sendall(b"hello")

    and in asyncio::

        reader, writer = await machine.vsock.open_connection(1024)
    """

    def __init__(self, hub: Hub, set_cid: Callable[[int], None]) -> None:
        self.hub = hub
        self._set_cid = set_cid

    def __repr__(self) -> str:
        return f"<Vsock cid={self.cid}>"

    @property
    def cid(self) -> int:
        """The guest's context ID; the host's is 2. Setting another one ends all connections."""
        return self.hub.guest_cid

    @cid.setter
    def cid(self, cid: int) -> None:
        self._set_cid(cid)

    @property
    def live_sockets(self) -> int:
        """How many connections there are, those among them that nobody has any more and that wait for their end."""
        return len(self.hub.connections)

    def connect(
        self,
        port: int,
        kind: int = socket.SOCK_STREAM,
        *,
        local_port: int | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
        retry: bool = False,
    ) -> VsockSocket:
        """Connect to the guest's *port*; *kind* is SOCK_STREAM or SOCK_SEQPACKET.

        OSError: ECONNRESET if nobody listens there, ETIMEDOUT if the guest doesn't answer within *timeout_s*. With
        *retry* it tries for *timeout_s* until somebody listens: a guest that boots.
        """
        return sockets.connect(self.hub, port, kind, local_port=local_port, timeout_s=timeout_s, retry=retry)

    def listen(self, port: int = PORT_ANY, kind: int = socket.SOCK_STREAM, *, backlog: int = 128) -> VsockListener:
        """Listen at *port* of the host, by default at one that is free; OSError (EADDRINUSE) if somebody does."""
        return VsockListener(self.hub, port, kind, backlog)

    async def open_connection(
        self, port: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the guest's *port*; OSError as :meth:`connect`."""
        from softkvm.vmm.vsock.aio import open_connection

        return await open_connection(self.hub, port, timeout_s=timeout_s)

    async def start_server(self, client_connected: ClientConnected, port: int = PORT_ANY) -> VsockServer:
        """Call *client_connected* with reader and writer of each connection that the guest makes to *port*."""
        from softkvm.vmm.vsock.aio import start_server

        return await start_server(self.hub, client_connected, port)
