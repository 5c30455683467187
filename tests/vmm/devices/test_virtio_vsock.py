# SPDX-License-Identifier: Apache-2.0
"""The socket device: its queues, its events, what a reset, a restore and its end do (VIRTIO 1.3, 5.10)."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.virtio_driver import Driver, connect, driving
from tests.support.vsock import (
    BUF_ALLOC,
    CREDIT_UPDATE,
    EOM,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SEQPACKET,
    SHUTDOWN,
    STREAM,
)

import softkvm
from softkvm.vmm.devices.virtio_vsock import RX, TX, VirtioVsock, VsockSpec, parse
from softkvm.vmm.errors import ConfigError, StateError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.vsock.packet import HEADER_SIZE, Header

F_STREAM, F_SEQPACKET, F_NO_IMPLIED_STREAM = 0, 1, 2


class Guest:
    """The guest's driver of the device."""

    def __init__(self, driver: Driver, *, room: int = 4096, buffers: int = 32) -> None:
        self.driver = driver
        self.rx, self.tx, self.events = driver.queues
        self.posted = [self.rx.add(writable=[HEADER_SIZE, room]) for _ in range(buffers)]
        self.event_buffers = [self.events.add(writable=[4]) for _ in range(8)]
        self.room = room
        for queue in (self.rx, self.events):
            queue.notify()

    def send(self, op: int, guest: int, host: int, data: bytes = b"", *, kind: int = STREAM, flags: int = 0) -> None:
        """Send a packet, and wait until the device has taken it."""
        header = Header(3, 2, guest, host, len(data), kind, op, flags, BUF_ALLOC, 0).pack()
        self.tx.request(readable=[header, data] if data else [header])

    def take(self) -> tuple[Header, bytes]:
        """Wait for a packet, and give the device a buffer in its place."""
        buffer = self.rx.wait(self.posted.pop(0))
        data = buffer.data()
        self.posted.append(self.rx.add(writable=[HEADER_SIZE, self.room]))
        self.rx.notify()
        header = Header.unpack(data[:HEADER_SIZE])
        assert len(data) == HEADER_SIZE + header.len
        return header, data[HEADER_SIZE:]

    def event(self) -> int:
        """Wait for an event."""
        found: int = struct.unpack("<I", self.events.wait(self.event_buffers.pop(0)).data())[0]
        return found


@contextmanager
def guest_of(device: VirtioVsock, **options: Any) -> Iterator[Guest]:
    with driving(device, **options) as driver:
        yield Guest(driver)


ALL = [
    pytest.mark.parametrize("transport", ["pci", "mmio"]),
    pytest.mark.parametrize("packed", [False, True]),
]


@ALL[0]
@ALL[1]
def test_bytes_go_both_ways(transport: str, packed: bool) -> None:
    device = VirtioVsock()
    with guest_of(device, transport=transport, packed=packed) as guest, device.vsock.listen(1234) as listener:
        guest.send(REQUEST, 7000, 1234)
        header, _ = guest.take()
        assert (header.op, header.src_port, header.dst_port, header.dst_cid) == (RESPONSE, 1234, 7000, 3)
        accepted, _ = listener.accept()
        guest.send(RW, 7000, 1234, b"hello host")
        assert accepted.recv(100) == b"hello host"
        accepted.sendall(bytes(range(256)) * 40)
        received = b""
        while len(received) < 256 * 40:
            header, data = guest.take()
            assert header.op == RW and header.len <= 4096
            received += data
        assert received == bytes(range(256)) * 40


def test_the_configuration_has_the_context_id() -> None:
    with driving(VirtioVsock(77)) as driver:
        assert driver.registers.config(0, 4) == 77 and driver.registers.config(4, 4) == 0


@pytest.mark.parametrize(
    ("without", "stream", "seqpacket"),
    [
        ((), True, True),
        ((F_SEQPACKET,), True, False),
        ((F_STREAM,), False, True),
        ((F_STREAM, F_NO_IMPLIED_STREAM), True, True),
        ((F_STREAM, F_SEQPACKET, F_NO_IMPLIED_STREAM), True, False),
    ],
)
def test_types_are_those_that_the_driver_has_accepted(without: tuple[int, ...], stream: bool, seqpacket: bool) -> None:
    device = VirtioVsock()
    kinds = {socket.SOCK_STREAM: stream, socket.SOCK_SEQPACKET: seqpacket}
    with guest_of(device, without=without) as guest:
        listeners = [device.vsock.listen(port, kind) for port, kind in enumerate(kinds, 1)]
        for port, (kind, there) in enumerate(kinds.items(), 1):
            guest.send(REQUEST, 7000, port, kind=SEQPACKET if kind == socket.SOCK_SEQPACKET else STREAM)
            assert guest.take()[0].op == (RESPONSE if there else RST)
        for listener in listeners:
            listener.close()


def test_a_header_and_its_data_may_lie_in_one_buffer_or_in_many() -> None:
    device = VirtioVsock()
    with guest_of(device) as guest, device.vsock.listen(1) as listener:
        guest.send(REQUEST, 7000, 1)
        guest.take()
        accepted, _ = listener.accept()
        packet = Header(3, 2, 7000, 1, 5, STREAM, RW, 0, BUF_ALLOC, 0).pack() + b"hello"
        for pieces in ([packet], [packet[:10], packet[10:46], packet[46:]]):
            guest.tx.request(readable=pieces)
            assert accepted.recv(9) == b"hello"


def test_what_is_no_packet_is_dropped() -> None:
    device = VirtioVsock()
    with guest_of(device) as guest:
        guest.tx.request(readable=[b"short"])
        guest.tx.request(readable=[Header(3, 2, 1, 1, 0xFFFFFFFF, STREAM, RW, 0, 0, 0).pack()])
        guest.tx.request(readable=[Header(3, 2, 1, 1, 100, STREAM, RW, 0, 0, 0).pack() + b"less"])
        guest.send(RW, 5, 6)
        assert guest.take()[0].dst_port == 5  # the first answer


def test_a_buffer_without_room_for_a_header_needs_a_reset() -> None:
    device = VirtioVsock()
    with driving(device) as driver:
        driver.queues[RX].add(writable=[20])
        driver.queues[TX].request(readable=[Header(3, 2, 1, 1, 0, STREAM, RW, 0, 0, 0).pack()])
        driver.wait_until(lambda: driver.registers.status() & 64)
        driver.start()
        assert device.hub.connections == []


def test_what_is_sent_before_there_are_buffers_waits_for_them() -> None:
    device = VirtioVsock()
    with driving(device) as driver, device.vsock.listen(1):
        driver.queues[TX].request(readable=[Header(3, 2, 7000, 1, 0, STREAM, REQUEST, 0, BUF_ALLOC, 0).pack()])
        guest = Guest(driver)
        assert guest.take()[0].op == RESPONSE


def test_a_guest_that_takes_no_answers_is_not_listened_to() -> None:
    device = VirtioVsock()
    with driving(device) as driver:
        sent = 0
        queue = driver.queues[TX]
        pending = []
        while not device.hub.congested:
            packet = Header(3, 2, sent, 1, 0, STREAM, RW, 0, 0, 0).pack()
            queue.request(readable=[packet])
            sent += 1
            assert sent < 3000
        for _ in range(50):
            pending.append(queue.add(readable=[Header(3, 2, sent, 1, 0, STREAM, RW, 0, 0, 0).pack()]))
            sent += 1
        queue.notify()
        guest = Guest(driver)
        assert [guest.take()[0].dst_port for _ in range(sent)] == list(range(sent))
        for buffer in pending:
            queue.wait(buffer)


# -- the device's end, the driver's, and a restore


def orphans_of(device: VirtioVsock, guest: Guest, count: int) -> list[weakref.ref[Any]]:
    """Connections that their owners have closed, and whose guest never answers."""
    found = []
    with device.vsock.listen(1) as listener:
        for port in range(count):
            guest.send(REQUEST, port, 1)
            assert guest.take()[0].op == RESPONSE
            accepted, _ = listener.accept()
            found.append(weakref.ref(accepted.connection))
            accepted.close()
            assert guest.take()[0].op == SHUTDOWN
    return found


@pytest.mark.parametrize("end", ["timeout", "driver's reset", "close"])
def test_orphaned_sockets_are_freed(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softkvm.vmm.vsock.connection.CLOSE_TIMEOUT_S", 0.05 if end == "timeout" else 3600)
    device = VirtioVsock()
    with guest_of(device) as guest:
        orphans = orphans_of(device, guest, 10)
        if end != "timeout":
            assert device.vsock.live_sockets == 10
        if end == "driver's reset":
            guest.driver.registers.set_status(0)
            assert device.vsock.live_sockets == 0
        elif end == "timeout":
            guest.driver.wait_until(lambda: device.vsock.live_sockets == 0)
            assert [guest.take()[0].op for _ in range(10)] == [RST] * 10
    assert device.vsock.live_sockets == 0
    gc.collect()
    assert [found() for found in orphans] == [None] * 10


def test_a_drivers_reset_ends_connections_and_keeps_listeners() -> None:
    device = VirtioVsock()
    with driving(device) as driver, device.vsock.listen(1) as listener:
        guest = Guest(driver)
        guest.send(REQUEST, 7000, 1)
        accepted, _ = listener.accept()
        driver.start()
        with pytest.raises(ConnectionResetError):
            accepted.recv(1)
        guest = Guest(driver)
        guest.send(REQUEST, 7000, 1)
        assert guest.take()[0].op == RESPONSE
        listener.accept()


def test_the_devices_end_wakes_who_waits() -> None:
    device = VirtioVsock()
    with guest_of(device) as guest, device.vsock.listen(1) as listener:
        guest.send(REQUEST, 7000, 1)
        accepted, _ = listener.accept()
        device.worker.call_later(0.02, device.hub.close)
        with pytest.raises(ConnectionResetError):
            accepted.recv(1)
        with pytest.raises(OSError) as error:
            device.vsock.connect(1)
        assert error.value.errno == errno.ESHUTDOWN


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("own", "expected"), [(None, 77), (5, 5)])
def test_a_restored_guest_is_told_that_its_connections_are_gone(packed: bool, own: int | None, expected: int) -> None:
    device = VirtioVsock(77)
    with driving(device, packed=packed) as driver, device.vsock.listen(1) as listener:
        guest = Guest(driver)
        header = Header(77, 2, 7000, 1, 0, STREAM, REQUEST, 0, BUF_ALLOC, 0).pack()
        guest.tx.request(readable=[header])
        accepted, _ = listener.accept()
        state = driver.transport.save()
        assert accepted.connection.state.name == "ESTABLISHED"  # the one that was saved goes on

        other = VirtioVsock(own or 3, keep_cid=own is not None)
        restored = connect(other, driver.memory, driver.transport.worker, driver.vm, packed=packed)
        restored.transport.restore(state)
        assert guest.event() == 0  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        assert restored.registers.config(0, 4) == expected
        assert other.vsock.live_sockets == 0
        restored.transport.close()


def test_another_context_id_resets_the_guests_connections() -> None:
    device = VirtioVsock()
    with guest_of(device) as guest, device.vsock.listen(1) as listener:
        guest.send(REQUEST, 7000, 1)
        accepted, _ = listener.accept()
        device.vsock.cid = 99
        assert guest.event() == 0
        guest.driver.wait_interrupt(2)
        assert guest.driver.registers.config(0, 4) == 99
        with pytest.raises(ConnectionResetError):
            accepted.recv(1)


def test_messages_of_the_guests_are_fragments_until_their_end() -> None:
    device = VirtioVsock()
    with guest_of(device) as guest, device.vsock.listen(1, socket.SOCK_SEQPACKET) as listener:
        guest.send(REQUEST, 7000, 1, kind=SEQPACKET)
        guest.take()
        accepted, _ = listener.accept()
        guest.send(RW, 7000, 1, b"one ", kind=SEQPACKET)
        guest.send(RW, 7000, 1, b"message", kind=SEQPACKET, flags=EOM)
        assert accepted.recv(100) == b"one message"
        assert accepted.send(bytes(5000)) == 5000
        assert [(len(data), header.flags) for header, data in (guest.take(), guest.take())] == [(4096, 0), (904, EOM)]
        guest.send(CREDIT_UPDATE, 7000, 1, kind=SEQPACKET)


# -- the option


def test_the_option() -> None:
    assert parse("") == VsockSpec()
    assert parse("cid=9") == VsockSpec(9)
    assert parse("cid=9,path=/run/v.sock") == VsockSpec(9, "/run/v.sock")
    assert parse("path=/tmp/a,,b,cid=4294967294").path == "/tmp/a,b"
    for text in ("cid=2", "cid=4294967295", "cid=x", "nine", "cid=9,cid=8", "path=" + "p" * 97, "size=3"):
        with pytest.raises(ConfigError, match=r"^--vsock "):
            parse(text)


def test_a_path_may_have_the_processs_number(tmp_path: Path) -> None:
    with softkvm.open() as kvm, Machine(kvm, Config(device_specs=(VsockSpec(path=f"{tmp_path}/v%p"),))) as machine:
        assert machine.vsock.cid == 3
        assert (tmp_path / f"v{os.getpid()}").is_socket()
    assert not list(tmp_path.iterdir())


def test_a_machine_has_one_at_most() -> None:
    with softkvm.open() as kvm:
        with pytest.raises(ConfigError, match="two vsock devices"):
            Machine(kvm, Config(device_specs=(VsockSpec(), VsockSpec())))
        with Machine(kvm) as machine, pytest.raises(StateError, match="--vsock"):
            _ = machine.vsock
