# SPDX-License-Identifier: Apache-2.0
"""The network device (VIRTIO 1.3, section 5.1), by a driver that lays out its own queues."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.virtio_driver import NEEDS_RESET, Driver, driving

from softkvm.vmm.devices.virtio_net import Net, NetSpec, default_mac, parse
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net.filter import ADDRESSES
from softkvm.vmm.net.link import Backend, Frame, Link, Offloads
from softkvm.vmm.net.spec import TapNet, UserNet

MAC = bytes.fromhex("525400123456")
CSUM, GUEST_CSUM, MTU, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, MRG_RXBUF, STATUS = 0, 1, 3, 7, 8, 9, 15, 16
CTRL_VLAN, MQ = 19, 22
HEADER = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16)
EVERYTHING = Offloads(True, True, True, True)


class Wire(Backend):
    """Notes what comes; sends what a test says."""

    offers = EVERYTHING

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, bytes]] = []
        self.calls: list[str] = []
        self.link: Link | None = None
        self.state: dict[str, Any] = {}

    def start(self, link: Link) -> None:
        self.link = link
        self.calls.append("start")

    def receive(self, frame: Frame) -> None:
        assert frame.head == b"".join(frame.segments)[:256]
        self.frames.append((frame.header, b"".join(frame.segments)))

    def received(self) -> None:
        self.calls.append("received")

    def room(self) -> None:
        self.calls.append("room")

    def stop(self) -> None:
        self.calls.append("stop")

    def offloads(self) -> None:
        self.calls.append("offloads")

    def carrier(self, up: bool) -> None:
        self.calls.append(f"carrier {up}")

    def save(self) -> dict[str, Any]:
        return {"something": 1}

    def restore(self, state: dict[str, Any]) -> None:
        self.state = state

    def close(self) -> None:
        self.calls.append("close")

    def describe(self) -> dict[str, Any]:
        return {}


@contextmanager
def nets(*, pairs: int = 1, **options: Any) -> Iterator[tuple[Driver, Net, Wire]]:
    """A device, its driver and what is behind it."""
    wire = Wire()
    net = Net(wire, MAC, pairs=pairs)
    with driving(net, **options) as driver:
        yield driver, net, wire


def on_worker(driver: Driver, function: Any, *arguments: Any) -> Any:
    """Call something on the device's worker, and wait for it."""
    results: list[Any] = []
    driver.device.call(lambda: results.append(function(*arguments)))
    driver.wait_until(lambda: results)
    return results[0]


def send(driver: Driver, net: Net, frame: bytes, header: bytes = bytes(10)) -> bool:
    """Let the back end send a frame."""

    def both() -> bool:
        taken = net.send(frame[:60], (frame[60:],), header)
        net.flush()
        return taken

    return bool(on_worker(driver, both))


def frame(size: int = 100, to: bytes = MAC) -> bytes:
    """A frame whose bytes tell their place."""
    return (to + b"\2\2\2\2\2\2" + b"\x08\x00" + bytes(number & 0xFF for number in range(size)))[:size]


TRANSPORTS = pytest.mark.parametrize(("transport", "packed"), [("pci", False), ("pci", True), ("mmio", False)])


def test_the_configuration_is_the_specifications() -> None:
    """5.1.4: mac, status (link up), pairs of queues, MTU, speed, duplex."""
    with nets(pairs=3) as (driver, _, _):
        config = bytes(driver.registers.config(at, 1) for at in range(17))
        assert struct.unpack("<6sHHHIB", config) == (MAC, 1, 3, 1500, 10_000, 1)
        assert driver.registers.config(400, 4) == 0
        driver.registers.set_config(0, 1, 0xFF)  # read-only for a driver of 1.x
        assert driver.registers.config(0, 1) == MAC[0]


def test_what_the_back_end_cannot_do_is_not_offered() -> None:
    wire = Wire()
    wire.offers = Offloads()
    plain = Net(wire, MAC).features
    wire.offers = EVERYTHING
    assert Net(wire, MAC).features & ~plain == sum(1 << bit for bit in (0, 1, 2, 7, 8, 9, 11, 12, 13))
    assert not plain >> MQ & 1 and Net(wire, MAC, pairs=2).features >> MQ & 1


@TRANSPORTS
@pytest.mark.parametrize("pieces", [(12, 100), (112,), (5, 7, 14, 86), (12, 14, 20, 66), (1, 111), (60, 52)])
def test_a_frames_header_may_end_anywhere(transport: str, packed: bool, pieces: tuple[int, ...]) -> None:
    """2.7.4: a device must not assume how messages are divided into descriptors."""
    with nets(transport=transport, packed=packed) as (driver, _, wire):
        whole = HEADER + b"\0\0" + frame(100)
        parts, at = [], 0
        for size in pieces:
            parts.append(whole[at : at + size])
            at += size
        driver.queues[1].request(parts)
        assert wire.frames == [(HEADER, frame(100))]
        driver.wait_until(lambda: "received" in wire.calls)


@TRANSPORTS
def test_a_frame_for_the_driver_has_a_header_that_says_one_buffer(transport: str, packed: bool) -> None:
    """5.1.6.3.1: num_buffers is set even where buffers are not merged."""
    for without in ((), (MRG_RXBUF,)):
        with nets(transport=transport, packed=packed, without=without) as (driver, net, _):
            buffer = driver.queues[0].add(writable=[12, 1600])
            driver.queues[0].notify()
            assert send(driver, net, frame(1000), HEADER)
            assert driver.queues[0].wait(buffer).data() == HEADER + b"\1\0" + frame(1000)
            driver.wait_interrupt()


@TRANSPORTS
def test_a_large_frame_fills_as_many_buffers_as_it_takes(transport: str, packed: bool) -> None:
    """5.1.6.4.1: num_buffers is their number, each but the last is full."""
    with nets(transport=transport, packed=packed) as (driver, net, _):
        queue = driver.queues[0]
        buffers = [queue.add(writable=[500, 524] if number % 2 else [1024]) for number in range(70)]
        queue.notify()
        assert send(driver, net, frame(65000), HEADER)
        count = (65012 + 1023) // 1024
        for buffer in buffers[:count]:
            queue.wait(buffer)
        data = b"".join(buffer.data() for buffer in buffers[:count])
        assert data == HEADER + struct.pack("<H", count) + frame(65000)
        assert [buffer.written for buffer in buffers[:count]] == [1024] * (count - 1) + [65012 - 1024 * (count - 1)]
        assert buffers[count].written is None


def test_a_frame_waits_until_there_are_buffers_and_the_back_end_is_told() -> None:
    with nets() as (driver, net, wire):
        queue = driver.queues[0]
        assert not on_worker(driver, net.ready)
        first = queue.add(writable=[1024])
        queue.notify()
        driver.wait_until(lambda: "room" in wire.calls)
        assert on_worker(driver, net.ready)
        assert send(driver, net, frame(3000)) and not on_worker(driver, net.ready)
        assert queue.used() == [] and first.written is None
        wire.calls.clear()
        buffers = [first, *(queue.add(writable=[1024]) for _ in range(2))]
        queue.notify()
        for buffer in buffers:
            queue.wait(buffer)
        assert b"".join(buffer.data() for buffer in buffers)[12:] == frame(3000)
        driver.wait_until(lambda: "room" in wire.calls)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [100, 3000, 20_000])
def test_a_driver_that_only_notifies_when_it_is_asked_to_gets_every_frame(packed: bool, size: int) -> None:
    """2.7.10, 2.8.10: buffers come one by one, too few at first; the device asks for the one that it waits for."""
    with nets(packed=packed) as (driver, net, _):
        queue = driver.queues[0]
        data = b""
        for number in range(3):
            assert send(driver, net, frame(size))
            buffers: list[Any] = []
            while not buffers or buffers[-1].written is None:
                wanted = queue.wants_notification()
                buffers.append(queue.add(writable=[1024]))
                if wanted():
                    queue.notify()
                on_worker(driver, lambda: None)
                queue.used()
                assert len(buffers) <= size // 1024 + 2, f"frame {number} never comes"
            data = b"".join(buffer.data() for buffer in buffers)
            assert data[12:] == frame(size)


def test_frames_that_wait_are_a_bounded_number() -> None:
    with nets() as (driver, net, _):
        taken = on_worker(driver, lambda: [net.send(frame(60)) for _ in range(300)])
        assert taken == [True] * 256 + [False] * 44
        assert net.counters["rx_dropped"] == 44


def test_without_merging_a_frame_that_does_not_fit_is_dropped() -> None:
    with nets(without=(MRG_RXBUF,)) as (driver, net, _):
        queue = driver.queues[0]
        small = queue.add(writable=[100])
        large = queue.add(writable=[12, 1500])
        queue.notify()
        send(driver, net, frame(1000))
        send(driver, net, frame(999))
        assert queue.wait(small).written == 0
        assert queue.wait(large).data()[12:] == frame(999)
        assert net.counters["rx_too_big"] == 1


def test_a_buffer_without_room_for_a_header_is_a_drivers_fault() -> None:
    """5.1.6.3.2: the driver makes buffers that have room for one."""
    with nets() as (driver, net, _):
        driver.queues[0].add(writable=[4])
        driver.queues[0].notify()
        assert not send(driver, net, frame())
        assert driver.registers.status() & NEEDS_RESET


@pytest.mark.parametrize("size", [0, 1, 13, 65551, 70000])
def test_what_is_no_frame_is_dropped_and_given_back(size: int) -> None:
    with nets() as (driver, net, wire):
        driver.queues[1].request([bytes(12)] + ([frame(size)] if size else []))
        driver.queues[1].request([bytes(12) + frame(60)])
        assert [len(data) for _, data in wire.frames] == [60]
        assert net.counters["tx_dropped"] == 1


def test_a_short_header_is_no_frame() -> None:
    with nets() as (driver, net, wire):
        driver.queues[1].request([bytes(11)])
        assert not wire.frames and net.counters["tx_dropped"] == 1


def test_of_a_few_frames_ends_the_driver_is_told_at_leisure_and_of_many_at_once() -> None:
    """They are in the used ring at once; the interrupt, which costs a driver more, may wait (5.1.6.2.3)."""
    with nets(without=(29,)) as (driver, _, _):  # without event index, every flush is an interrupt
        queue = driver.queues[1]
        queue.request([bytes(12) + frame()])
        driver.wait_interrupt()
        buffers = [queue.add([bytes(12) + frame(1500)]) for _ in range(20)]
        queue.notify()
        for buffer in buffers:
            queue.wait(buffer)
        driver.wait_interrupt()


def control(driver: Driver, kind: int, command: int, data: bytes) -> int:
    """Send a command (5.1.6.5); return its acknowledgement: 0 for OK."""
    (ack,) = driver.queues[-1].request([bytes((kind, command)), data] if data else [bytes((kind, command))], [1])
    return int(ack)


def test_receive_modes_and_tables_decide_which_frames_come() -> None:
    """5.1.6.5.1, 5.1.6.5.2: a driver that has turned promiscuity off gets its own, its table's and broadcasts."""
    with nets() as (driver, net, _):
        own, other, group, every = MAC, b"\x02\0\0\0\0\1", b"\x01\0\x5e\0\0\1", b"\xff" * 6

        def wanted() -> list[bool]:
            return [net.filter.wants(frame(60, to)) for to in (own, other, group, every)]

        assert wanted() == [True, True, True, True]
        assert control(driver, 0, 0, b"\0") == 0
        assert wanted() == [True, False, False, True]
        assert control(driver, 0, 1, b"\1") == 0 and wanted() == [True, False, True, True]
        assert control(driver, 0, 1, b"\0") == 0 and control(driver, 0, 2, b"\1") == 0
        assert wanted() == [True, True, False, True]
        assert control(driver, 0, 2, b"\0") == 0
        assert control(driver, 1, 0, struct.pack("<I6sI6s", 1, other, 1, group)) == 0
        assert wanted() == [True, True, True, True]
        assert control(driver, 0, 3, b"\1") == 0 and control(driver, 0, 5, b"\1") == 0
        assert wanted() == [True, True, False, False]
        assert control(driver, 0, 4, b"\1") == 0 and wanted() == [False, False, False, False]
        many = ADDRESSES.most + 1
        assert control(driver, 1, 0, struct.pack("<I", many) + other * many + struct.pack("<I", 0)) == 0
        assert control(driver, 0, 4, b"\0") == 0 and net.filter.wants(frame(60, b"\x02\0\0\0\0\x99"))


def test_the_driver_may_choose_another_address_until_it_resets() -> None:
    with nets() as (driver, net, _):
        assert control(driver, 1, 1, b"\2\1\1\1\1\1") == 0
        assert net.mac == b"\2\1\1\1\1\1" and driver.registers.config(5, 1) == 1
        driver.start()
        assert net.mac == MAC


def test_vlans_are_filtered_where_that_is_negotiated() -> None:
    tagged = MAC + bytes(6) + b"\x81\x00\x20\x07" + bytes(46)
    with nets() as (driver, net, _):
        assert not net.filter.wants(tagged)
        assert control(driver, 2, 0, struct.pack("<H", 7)) == 0 and net.filter.wants(tagged)
        assert control(driver, 2, 1, struct.pack("<H", 7)) == 0 and not net.filter.wants(tagged)
    with nets(without=(CTRL_VLAN,)) as (driver, net, _):
        assert net.filter.wants(tagged) and control(driver, 2, 0, struct.pack("<H", 7)) == 1


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (0, 0, b""), (0, 0, b"\2"), (0, 0, b"\0\0"), (0, 9, b"\0"), (9, 0, b"\0"),
        (1, 0, b""), (1, 0, b"\1\0\0\0"), (1, 0, struct.pack("<II", 0xFFFFFFFF, 0)), (1, 1, b"\0" * 5),
        (2, 0, b"\0"), (2, 0, b"\0\x10"), (4, 0, b"\1\0"), (5, 0, b"\0"), (5, 0, struct.pack("<Q", 1 << 40)),
    ],
)  # fmt: skip
def test_commands_that_mean_nothing_are_errors(kind: int, command: int, data: bytes) -> None:
    with nets() as (driver, _, _):
        assert control(driver, kind, command, data) == 1


def test_offloads_can_be_turned_off_and_on() -> None:
    """5.1.6.5.6: no more than was negotiated."""
    with nets(without=(GUEST_ECN,)) as (driver, net, wire):
        assert net.takes == Offloads(True, True, True, False)
        assert control(driver, 5, 0, struct.pack("<Q", 0)) == 0
        assert net.takes == Offloads() and wire.calls[-1] == "offloads"
        assert control(driver, 5, 0, struct.pack("<Q", 1 << GUEST_ECN)) == 1
        assert control(driver, 5, 0, struct.pack("<Q", 1 << GUEST_CSUM | 1 << GUEST_TSO4)) == 0
        assert net.takes == Offloads(True, True)


def flow(port: int, *, back: bool = False) -> bytes:
    """A frame of a flow between two addresses, a port and port 99."""
    addresses = [b"\x0a\0\0\1", b"\x0a\0\0\2"]
    ports = [struct.pack(">H", port), struct.pack(">H", 99)]
    if back:
        addresses.reverse()
        ports.reverse()
    return MAC + bytes(6) + b"\x08\x00" + bytes(12) + b"".join(addresses + ports) + bytes(26)


def test_with_several_pairs_answers_come_where_a_flow_was_sent() -> None:
    """5.1.6.5.5."""
    with nets(pairs=2) as (driver, net, wire):
        assert len(driver.queues) == 5
        for pair in (0, 1):
            for _ in range(8):
                driver.queues[2 * pair].add(writable=[1600])
            driver.queues[2 * pair].notify()
        driver.queues[3].request([bytes(12) + flow(1)])
        assert send(driver, net, flow(1, back=True))
        assert len(driver.queues[0].used()) == 1  # the driver uses one pair only
        assert control(driver, 4, 0, struct.pack("<H", 3)) == 1
        assert control(driver, 4, 0, struct.pack("<H", 2)) == 0
        driver.queues[3].request([bytes(12) + flow(1)])
        assert send(driver, net, flow(1, back=True))
        assert len(driver.queues[2].used()) == 1
        driver.queues[1].request([bytes(12) + flow(1)])
        assert send(driver, net, flow(1, back=True))
        assert len(driver.queues[0].used()) == 1
        assert len(wire.frames) == 3


def test_the_control_queue_is_the_third_for_a_driver_that_knows_no_more() -> None:
    """5.1.2: its number depends on whether VIRTIO_NET_F_MQ is negotiated."""
    with nets(pairs=2, without=(MQ,), queues=3) as (driver, net, _):
        assert control(driver, 0, 0, b"\0") == 0 and not net.filter.promiscuous


def test_a_pulled_cable_is_seen_and_nothing_goes_over_it() -> None:
    with nets() as (driver, net, wire):
        driver.queues[0].add(writable=[1600])
        driver.queues[0].notify()
        on_worker(driver, net.set_link, False)
        driver.wait_interrupt(2)
        assert driver.registers.config(6, 2) == 0
        driver.queues[1].request([bytes(12) + frame()])
        assert not wire.frames and not send(driver, net, frame()) and not on_worker(driver, net.ready)
        on_worker(driver, net.set_link, True)
        driver.wait_interrupt(2)
        assert driver.registers.config(6, 2) == 1
        assert send(driver, net, frame()) and wire.calls.count("carrier True") == 1


def test_a_reset_stops_the_back_end_and_a_start_starts_it() -> None:
    with nets() as (driver, net, wire):
        send(driver, net, frame())
        driver.registers.set_status(0)
        assert wire.calls[-1] == "stop"
        driver.start()
        assert wire.calls[-1] == "start"
        buffer = driver.queues[0].add(writable=[1600])
        driver.queues[0].notify()
        assert send(driver, net, frame(61))
        assert len(driver.queues[0].wait(buffer).data()) == 12 + 61  # not the frame from before


def test_a_saved_device_goes_on_and_announces_itself() -> None:
    """What the driver has set is there; it is asked to tell the network where it is (5.1.6.5.4)."""
    with nets(pairs=2) as (driver, net, _):
        control(driver, 0, 0, b"\0")
        control(driver, 1, 1, b"\2\1\1\1\1\1")
        control(driver, 2, 0, struct.pack("<H", 7))
        control(driver, 4, 0, struct.pack("<H", 2))
        control(driver, 5, 0, struct.pack("<Q", 1 << GUEST_CSUM))
        on_worker(driver, net.set_link, False)
        state = on_worker(driver, net.save)
    with nets(pairs=2) as (driver, net, wire):

        def restore() -> None:
            net.restore(state)
            net.activate()

        on_worker(driver, restore)
        assert wire.state == {"something": 1}
        assert (net.mac, net.pairs, net.link_up, net.takes) == (b"\2\1\1\1\1\1", 2, False, Offloads(True))
        assert net.filter.vlans == {7} and not net.filter.promiscuous
        assert on_worker(driver, net.save) == state
        driver.wait_interrupt(2)
        assert driver.registers.config(6, 2) == 2
        assert control(driver, 3, 0, b"") == 0
        assert driver.registers.config(6, 2) == 0


def test_a_clone_has_an_address_of_its_own_where_others_see_it() -> None:
    with nets() as (driver, net, _):
        on_worker(driver, net.new_identity, 3)
        assert net.mac == MAC
        net.shared = True
        on_worker(driver, net.new_identity, 0)
        assert net.mac == MAC
        on_worker(driver, net.new_identity, 3)
        assert net.mac.hex() == "525400123459" and driver.registers.config(5, 1) == 0x59


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.lists(st.binary(min_size=1, max_size=300), max_size=4),
                          st.lists(st.integers(1, 4000), max_size=3)), max_size=12))  # fmt: skip
def test_no_buffers_break_the_device(buffers: list[tuple[int, list[bytes], list[int]]]) -> None:
    """Whatever lies in the queues, frames go on or the device asks for a reset, behind which it works."""
    with nets() as (driver, net, wire):
        for queue, readable, writable in buffers:
            if readable or writable:
                driver.queues[queue].add(readable, writable)
        for queue in driver.queues:
            queue.notify()
        send(driver, net, frame(5000))
        on_worker(driver, lambda: None)
        driver.start()
        wire.frames.clear()
        driver.queues[1].request([bytes(12) + frame(60)])
        assert len(wire.frames) == 1


def test_options_of_both_kinds_make_a_specification() -> None:
    spec = parse("user,mac=52:54:00:aa:bb:cc,mtu=9000,queues=4,id=lan,transport=mmio,packed")
    assert (spec.mac, spec.mtu, spec.queues) == (bytes.fromhex("525400aabbcc"), 9000, 4)
    assert (spec.placement.name, spec.placement.transport, spec.placement.packed) == ("lan", "mmio", True)
    assert parse("user") == NetSpec(UserNet()) and parse("tap=t0").net == TapNet("t0")
    with pytest.raises(ConfigError, match="unknown: speed"):
        parse("user,speed=1")


def test_addresses_by_default_differ() -> None:
    assert default_mac(0, shared=False) == MAC and default_mac(1, shared=False) != MAC
    assert default_mac(0, shared=True) != default_mac(0, shared=True)
    assert default_mac(0, shared=True)[:3] == MAC[:3]
