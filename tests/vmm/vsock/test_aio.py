# SPDX-License-Identifier: Apache-2.0
"""asyncio's streams over vsock."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.vsock import REQUEST, RESPONSE, RST, RW, SEND, SHUTDOWN, Guest
from tests.vmm.vsock.conftest import ECHO

from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.hub import Hub


def test_what_is_written_comes_back(vsock: Vsock) -> None:
    async def main() -> None:
        reader, writer = await vsock.open_connection(ECHO)
        assert writer.get_extra_info("peername") == (3, ECHO)
        writer.write(b"hello\n")
        await writer.drain()
        assert await reader.readline() == b"hello\n"
        writer.close()
        await writer.wait_closed()

    asyncio.run(main())


def test_drain_waits_for_room_and_nothing_is_lost(vsock: Vsock) -> None:
    data = bytes(range(256)) * 10_000

    async def main() -> None:
        reader, writer = await vsock.open_connection(ECHO)
        pauses = 0

        async def write() -> None:
            nonlocal pauses
            for at in range(0, len(data), 50_000):
                writer.write(data[at : at + 50_000])
                pauses += writer.transport.get_write_buffer_size() > 0
                await writer.drain()
            writer.write_eof()

        _, received = await asyncio.gather(write(), reader.read())
        assert received == data
        assert pauses
        writer.close()
        await writer.wait_closed()

    asyncio.run(main())


def test_nobody_listens_is_econnreset(vsock: Vsock) -> None:
    async def main() -> None:
        with pytest.raises(ConnectionResetError):
            await vsock.open_connection(1)

    asyncio.run(main())
    assert vsock.live_sockets == 0


def test_fifty_connections_at_once(vsock: Vsock) -> None:
    async def one(number: int) -> None:
        reader, writer = await vsock.open_connection(ECHO)
        text = b"%d" % number * 1000
        writer.write(text)
        assert await reader.readexactly(len(text)) == text
        writer.close()

    async def main() -> None:
        await asyncio.gather(*map(one, range(50)))

    asyncio.run(main())


def test_a_server_gets_what_the_guest_connects() -> None:
    hub = Hub(3)
    vsock = Vsock(hub, lambda cid: None)
    guest = Guest(hub)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await vsock.start_server(echo, 99) as server:
            assert server.is_serving()
            guest.send(REQUEST, 7, 99)
            assert guest.ops() == [RESPONSE]
            guest.send(RW, 7, 99, b"shout")
            guest.send(SHUTDOWN, 7, 99, flags=SEND)
            packets: list[tuple[int, bytes]] = []
            while not packets or packets[-1][0] != SHUTDOWN:
                await asyncio.sleep(0.001)
                packets += [(header.op, data) for header, data in guest.all()]
            assert (RW, b"SHOUT") in packets
            guest.send(RST, 7, 99)
        guest.send(REQUEST, 7, 99)
        assert guest.ops() == [RST]

    asyncio.run(main())


def test_a_reset_ends_reading_and_a_lost_device_is_an_error() -> None:
    hub = Hub(3)
    guest = Guest(hub)
    vsock = Vsock(hub, lambda cid: None)

    async def main() -> None:
        connecting = asyncio.ensure_future(vsock.open_connection(7))
        await asyncio.sleep(0)
        header, _ = guest.all()[0]
        guest.send(RESPONSE, 7, header.src_port)
        reader, writer = await connecting
        hub.close()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()

    asyncio.run(main())
