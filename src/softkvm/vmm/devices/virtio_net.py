# SPDX-License-Identifier: Apache-2.0
"""The network device (VIRTIO 1.3, section 5.1): frames between queues and a back end of ``vmm.net``.

Segments of TCP go uncut in both directions, without checksums, where driver and back end take such. A frame of the
driver's is handed on as views of guest memory; one for it is copied into as many buffers as it takes.
"""

from __future__ import annotations

import os
import struct
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.devices.spec import Placement, Words
from softkvm.vmm.errors import complain
from softkvm.vmm.net.filter import ReceiveFilter
from softkvm.vmm.net.link import FRAME_MAX, MTU_DEFAULT, NO_OFFLOAD, Backend, Data, Frame, Offloads
from softkvm.vmm.net.spec import MTU, QUEUE_PAIRS, REPEATED, TapNet, UserNet, mac_address, network_of
from softkvm.vmm.net.tap import Tap
from softkvm.vmm.net.user.stack import UserStack
from softkvm.vmm.net.wire import ETHERNET
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_NET, bit
from softkvm.vmm.virtio.queue import Chain, Queue, QueueError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

VIRTIO_NET_F_CSUM: Final = 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: Final = 2
VIRTIO_NET_F_MTU: Final = 3
VIRTIO_NET_F_MAC: Final = 5
VIRTIO_NET_F_GUEST_TSO4: Final = 7
VIRTIO_NET_F_GUEST_TSO6: Final = 8
VIRTIO_NET_F_GUEST_ECN: Final = 9
VIRTIO_NET_F_HOST_TSO4: Final = 11
VIRTIO_NET_F_HOST_TSO6: Final = 12
VIRTIO_NET_F_HOST_ECN: Final = 13
VIRTIO_NET_F_MRG_RXBUF: Final = 15
VIRTIO_NET_F_STATUS: Final = 16
VIRTIO_NET_F_CTRL_VQ: Final = 17
VIRTIO_NET_F_CTRL_RX: Final = 18
VIRTIO_NET_F_CTRL_VLAN: Final = 19
VIRTIO_NET_F_CTRL_RX_EXTRA: Final = 20
VIRTIO_NET_F_GUEST_ANNOUNCE: Final = 21
VIRTIO_NET_F_MQ: Final = 22
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 23
VIRTIO_NET_F_SPEED_DUPLEX: Final = 63

VIRTIO_NET_S_LINK_UP: Final = 1
VIRTIO_NET_S_ANNOUNCE: Final = 2

VIRTIO_NET_OK: Final = 0
VIRTIO_NET_ERR: Final = 1

HEADER_SIZE: Final = 12
QUEUE_SIZE: Final = 256
CONTROL_QUEUE_SIZE: Final = 64
SPEED_MBPS: Final = 10_000
FULL_DUPLEX: Final = 1

HELD: Final = 16
HELD_BYTES: Final = 16384
HELD_S: Final = 0.002
"""How many frames' ends, or of how many bytes, and how long, the driver isn't told of."""

FRAME_BYTES: Final = Size(
    "bytes of a frame", FRAME_MAX, None, least=ETHERNET, giver="guest", effect="the frame is dropped", where=__name__
)
WAITING: Final = Size(
    "frames that wait for a driver's buffers", 256, None, giver="guest", effect="later ones are dropped", where=__name__
)
COMMAND: Final = Size(
    "bytes of a command of a network driver's", 1 << 16, None, least=2, giver="guest", effect="VIRTIO_NET_ERR",
    where=__name__,
)  # fmt: skip

_CONFIG: Final = struct.Struct("<6sHHHIB")
_ONE_BUFFER: Final = b"\1\0"
_STEERING: Final = 256
_IPV6: Final = b"\x86\xdd"

_Waiting = tuple[int, tuple[Data, ...]]

_OFFLOADS: Final = {
    VIRTIO_NET_F_GUEST_CSUM: "checksum",
    VIRTIO_NET_F_GUEST_TSO4: "tso4",
    VIRTIO_NET_F_GUEST_TSO6: "tso6",
    VIRTIO_NET_F_GUEST_ECN: "ecn",
}


class Net(VirtioDevice):
    """A network device with the address *mac*, *pairs* pairs of queues, and *backend* behind it, which it closes."""

    type = VIRTIO_ID_NET
    name = "net"
    pci_class = 0x020000

    def __init__(
        self, backend: Backend, mac: bytes, *, mtu: int = MTU_DEFAULT, pairs: int = 1, shared: bool = False
    ) -> None:
        super().__init__()
        self.backend = backend
        self.shared = shared
        """Whether others see the address."""
        self.own_mac = mac
        self._mtu = mtu
        self.pairs_max = pairs
        self.pairs = 1
        """Pairs of queues that the driver uses."""
        self.link_up = True
        self.announcing = False
        self.queue_sizes = (QUEUE_SIZE, QUEUE_SIZE) * pairs + (CONTROL_QUEUE_SIZE,)
        self.counters: Counter[str] = Counter()
        self.filter = ReceiveFilter(mac)
        self._takes = Offloads()
        self._active = False
        self._restored = False
        self._reported: set[str] = set()
        self._steering = bytearray(_STEERING)
        self._waiting: list[deque[_Waiting]] = [deque() for _ in range(pairs)]
        self._touched: set[int] = set()
        self._held: dict[Queue, int] = {}
        """Queues that have frames of whose end the driver hasn't been told."""
        self._telling = False
        self.features = self._features()

    def _features(self) -> int:
        offers = self.backend.offers
        features = bit(
            VIRTIO_NET_F_MTU, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_SPEED_DUPLEX,
        )  # fmt: skip
        if offers.checksum:
            features |= bit(VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
            if offers.tso4:
                features |= bit(VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4)
            if offers.tso6:
                features |= bit(VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6)
            if offers.ecn:
                features |= bit(VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN)
        if self.pairs_max > 1:
            features |= bit(VIRTIO_NET_F_MQ)
        return features

    # -- what a back end sees

    @property
    def mtu(self) -> int:
        """Bytes of the largest IP packet that others don't cut."""
        return self._mtu

    @property
    def mac(self) -> bytes:
        """The guest's address."""
        return self.filter.mac

    @property
    def takes(self) -> Offloads:
        """What the driver takes."""
        return self._takes

    def report(self, message: str) -> None:
        """Tell the user, once."""
        if message not in self._reported:
            self._reported.add(message)
            complain(f"{self.name}: {message}")

    def ready(self) -> bool:
        """Whether a frame would go to the driver now."""
        if not self._active or not self.link_up:
            return False
        try:
            for pair in range(self.pairs):
                if self._waiting[pair]:
                    return False
                queue = self.queues[2 * pair]
                if not queue.available() and not queue.enable_notifications():
                    return False
        except QueueError as error:
            self._broken(error)
            return False
        return True

    def _broken(self, error: QueueError) -> None:
        """The driver has spoilt a queue that we came upon by ourselves."""
        self._active = False
        self.needs_reset(str(error))

    def send(self, head: bytes, payload: Sequence[Data] = (), header: bytes = NO_OFFLOAD) -> bool:
        """Give the driver a frame; False if it is thrown away."""
        if not self._active or not self.link_up or not self.filter.wants(head):
            self.counters["rx_filtered"] += 1
            return False
        size = len(head) + sum(map(len, payload)) if payload else len(head)
        pair = self._steering[_flow_to_driver(head)] % self.pairs if self.pairs > 1 else 0
        waiting = self._waiting[pair]
        frame = (size, (header, head, *payload))
        try:
            taken = not waiting and self._deliver(pair, frame)
        except QueueError as error:
            self._broken(error)
            return False
        if not taken:
            if not WAITING.allows(len(waiting) + 1):
                self.counters["rx_dropped"] += 1
                return False
            waiting.append(frame)
        return True

    def flush(self) -> None:
        """Show the driver what it has got."""
        if self._touched:
            for pair in self._touched:
                self.queues[2 * pair].flush()
            self._touched.clear()

    def _deliver(self, pair: int, frame: _Waiting) -> bool:
        """Copy a frame into the driver's buffers; False if there are too few."""
        queue = self.queues[2 * pair]
        size, parts = frame
        left = HEADER_SIZE + size
        chains: list[Chain] = []
        while left > 0:
            chain = queue.pop()
            if chain is None:
                # Of the next one, behind those that are there and too few: so before these are put back.
                if queue.enable_notifications():
                    continue
                for taken in reversed(chains):
                    queue.unpop(taken)
                return False
            chains.append(chain)
            room = chain.writable_size
            if room < HEADER_SIZE and len(chains) == 1:
                raise QueueError(
                    f"queue {queue.index}: a buffer of {room} bytes, which has no room for a frame's header"
                )
            left -= room
            if left > 0 and not self._mergeable:
                queue.push(chain, 0)  # it never fits
                self._touched.add(pair)
                self.counters["rx_too_big"] += 1
                return True
        if len(chains) == 1:
            count = _ONE_BUFFER
        else:
            count = len(chains).to_bytes(2, "little")
        first = b"".join((parts[0], count, parts[1]))
        _scatter(chains, first, parts[2:])
        for chain in chains:
            queue.push(chain)
        self._touched.add(pair)
        self.counters["rx_frames"] += 1
        self.counters["rx_bytes"] += size
        return True

    # -- what the driver does

    def activate(self) -> None:
        """Begin."""
        if not self._restored:
            self._takes = Offloads(**{name: self.negotiated(feature) for feature, name in _OFFLOADS.items()})
            self.filter = ReceiveFilter(self.own_mac, vlan=self.negotiated(VIRTIO_NET_F_CTRL_VLAN))
            self.pairs = 1
        self._mergeable = self.negotiated(VIRTIO_NET_F_MRG_RXBUF)
        self._active = True
        self.backend.start(self)
        self.flush()
        if self._restored:
            self._restored = False
            self.announce()

    def reset(self) -> None:
        """The driver is gone."""
        self._active = False
        self.backend.stop()
        for waiting in self._waiting:
            waiting.clear()
        self._touched.clear()
        self._held.clear()
        self._restored = False
        self.filter = ReceiveFilter(self.own_mac)
        self.pairs = 1
        self.announcing = False

    def close(self) -> None:
        """Give back what the back end holds."""
        self._active = False
        self.backend.close()

    def notified(self, index: int) -> None:
        """Buffers have come."""
        if index == self._control_index:
            self._control()
        elif index >= 2 * self.pairs_max:
            return
        elif index & 1:
            self._transmit(index)
        else:
            self._receive_buffers(index // 2)

    @property
    def _control_index(self) -> int:
        """Where the control queue is: behind all pairs only if the driver knows that there may be some (5.1.2)."""
        return 2 * self.pairs_max if self.negotiated(VIRTIO_NET_F_MQ) else 2

    def _receive_buffers(self, pair: int) -> None:
        """The driver has room again."""
        waiting = self._waiting[pair]
        while waiting and self._deliver(pair, waiting[0]):
            waiting.popleft()
        if not waiting:
            self.backend.room()
        self.flush()

    def _transmit(self, index: int) -> None:
        """Take frames."""
        queue = self.queues[index]
        backend, up = self.backend, self.link_up
        frames = size = 0
        try:
            for chain in queue.drain(interrupt=False):
                frame = _frame(chain, queue)
                if frame is None or not FRAME_BYTES.allows(frame.size) or not up:
                    self.counters["tx_dropped"] += 1
                else:
                    frames += 1
                    size += frame.size
                    if self.pairs > 1:
                        self._steering[_flow_of_driver(frame.head)] = index // 2
                    backend.receive(frame)
                queue.push(chain, 0)
        finally:
            self.counters["tx_frames"] += frames
            self.counters["tx_bytes"] += size
        backend.received()
        self.flush()
        self._complete(queue, frames, size)

    def _complete(self, queue: Queue, frames: int, size: int) -> None:
        """Tell the driver that its frames are gone: at once after many, of a few at leisure.

        An interrupt costs it more than it gains. It sees them when it looks (Linux's does before it sends, and when it
        receives), and waits for none of so few.
        """
        self._held[queue] = held = self._held.get(queue, 0) + frames
        if held > HELD or size > HELD_BYTES:
            del self._held[queue]
            queue.flush()
        elif not self._telling:
            self._telling = True
            self.worker.call_later(HELD_S, self._tell)

    def _tell(self) -> None:
        self._telling = False
        held, self._held = self._held, {}
        for queue in held:
            queue.flush()

    # -- the control queue (5.1.6.5)

    def _control(self) -> None:
        queue = self.queues[self._control_index]
        for chain in queue.drain():
            size = chain.readable_size
            done = False
            if COMMAND.allows(size) and chain.writable_size:
                command = chain.read()
                handler = _COMMANDS.get((command[0], command[1]))
                done = handler is not None and handler(self, command[2:])
            chain.write(bytes((VIRTIO_NET_OK if done else VIRTIO_NET_ERR,)))
            queue.push(chain)
        self.flush()

    def _set_receive_mode(self, attribute: str, data: bytes) -> bool:
        if len(data) != 1 or data[0] > 1:
            return False
        setattr(self.filter, attribute, bool(data[0]))
        return True

    def _set_tables(self, data: bytes) -> bool:
        tables = []
        for _ in range(2):
            count = int.from_bytes(data[:4], "little")
            if len(data) < 4 or len(data) - 4 < 6 * count:
                return False
            tables.append([data[4 + 6 * entry : 10 + 6 * entry] for entry in range(count)])
            data = data[4 + 6 * count :]
        self.filter.set_tables(*tables)
        return not data

    def _set_mac(self, data: bytes) -> bool:
        if len(data) != 6:
            return False
        self.filter.mac = data
        return True

    def _set_vlan(self, data: bytes, *, on: bool) -> bool:
        vlan = int.from_bytes(data, "little")
        if len(data) != 2 or vlan > 4095 or self.filter.vlans is None:
            return False
        (self.filter.vlans.add if on else self.filter.vlans.discard)(vlan)
        return True

    def _announced(self, data: bytes) -> bool:
        if data or not self.negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE):
            return False
        self.announcing = False
        return True

    def _set_pairs(self, data: bytes) -> bool:
        pairs = int.from_bytes(data, "little")
        if len(data) != 2 or not self.negotiated(VIRTIO_NET_F_MQ) or not 1 <= pairs <= self.pairs_max:
            return False
        for waiting in self._waiting[pairs:]:
            waiting.clear()
        self.pairs = pairs
        self.backend.room()
        return True

    def _set_offloads(self, data: bytes) -> bool:
        wanted = int.from_bytes(data, "little")
        may = self.driver_features & bit(*_OFFLOADS)
        if len(data) != 8 or wanted & ~may or not self.negotiated(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS):
            return False
        self._takes = Offloads(**{name: bool(wanted >> feature & 1) for feature, name in _OFFLOADS.items()})
        self.backend.offloads()
        return True

    # -- configuration and commands

    def read_config(self, offset: int, size: int) -> bytes:
        """MAC, status, pairs, MTU, speed (5.1.4)."""
        status = (VIRTIO_NET_S_LINK_UP if self.link_up else 0) | (VIRTIO_NET_S_ANNOUNCE if self.announcing else 0)
        whole = _CONFIG.pack(self.filter.mac, status, self.pairs_max, self._mtu, SPEED_MBPS, FULL_DUPLEX)
        return whole[offset : offset + size].ljust(size, b"\0")

    def set_link(self, up: bool) -> None:
        """Pull the cable, or plug it in. Called on the worker (``device.call``), or under its lock."""
        if up != self.link_up:
            self.link_up = up
            self.config_changed()
            if self._active:
                self.backend.carrier(up)
                if up:
                    self.backend.room()
                    self.flush()

    def announce(self) -> None:
        """Ask the driver to tell the network where it is now (5.1.6.5.4)."""
        if self.negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE) and self.negotiated(VIRTIO_NET_F_STATUS):
            self.announcing = True
            self.config_changed()

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """What the driver has told the device, frames that wait, and what the back end needs."""
        self.flush()
        self._held.clear()  # saving a queue tells of all
        return {
            "mac": self.own_mac,
            "filter": self.filter.save(),
            "pairs": self.pairs,
            "link_up": self.link_up,
            "takes": [self._takes.checksum, self._takes.tso4, self._takes.tso6, self._takes.ecn],
            "backend": self.backend.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.own_mac = bytes(state["mac"])
        self.filter.restore(state["filter"])
        self.pairs = min(max(int(state["pairs"]), 1), self.pairs_max)
        self.link_up = bool(state["link_up"])
        self._takes = Offloads(*map(bool, state["takes"]))
        self.backend.restore(state["backend"])
        self._restored = bool(self.driver_features)  # a driver that begins later begins anew

    def new_identity(self, number: int) -> None:
        """Take an address that no other clone has, where others could see it. A driver finds it when it looks again."""
        if number and self.shared:
            last = int.from_bytes(self.own_mac[3:], "big") + number
            self.own_mac = self.filter.mac = self.own_mac[:3] + (last & 0xFFFFFF).to_bytes(3, "big")
            self.config_changed()

    def describe(self) -> dict[str, Any]:
        """The device and its network, for whoever asks a running machine."""
        return {
            "name": self.name,
            "mac": self.mac.hex(":"),
            "link": "up" if self.link_up else "down",
            "counters": dict(self.counters),
            "net": self.backend.describe(),
        }


_COMMANDS: Final = {
    (0, 0): lambda net, data: net._set_receive_mode("promiscuous", data),
    (0, 1): lambda net, data: net._set_receive_mode("all_multicast", data),
    (0, 2): lambda net, data: net._set_receive_mode("all_unicast", data),
    (0, 3): lambda net, data: net._set_receive_mode("no_multicast", data),
    (0, 4): lambda net, data: net._set_receive_mode("no_unicast", data),
    (0, 5): lambda net, data: net._set_receive_mode("no_broadcast", data),
    (1, 0): Net._set_tables,
    (1, 1): Net._set_mac,
    (2, 0): lambda net, data: net._set_vlan(data, on=True),
    (2, 1): lambda net, data: net._set_vlan(data, on=False),
    (3, 0): Net._announced,
    (4, 0): Net._set_pairs,
    (5, 0): Net._set_offloads,
}
"""By class and command."""


def _flow_to_driver(head: bytes) -> int:
    """Return a number for the flow that a frame belongs to, by its addresses and ports."""
    if head[12:14] == _IPV6:
        return hash(head[22:58]) & _STEERING - 1
    return hash(head[26:38]) & _STEERING - 1


def _flow_of_driver(head: bytes) -> int:
    """Return the same number for a frame in the other direction."""
    if head[12:14] == _IPV6:
        return hash(head[38:54] + head[22:38] + head[56:58] + head[54:56]) & _STEERING - 1
    return hash(head[30:34] + head[26:30] + head[36:38] + head[34:36]) & _STEERING - 1


def _frame(chain: Chain, queue: Queue) -> Frame | None:
    """Return the frame in a buffer, wherever its header ends; None if it is no frame."""
    segments = chain.readable
    if not segments:
        raise QueueError(f"queue {queue.index}: a frame without device-readable bytes")
    first = segments[0]
    if len(first) >= HEADER_SIZE:
        header, rest = bytes(first[:10]), first[HEADER_SIZE:]
        return Frame([rest, *segments[1:]] if len(rest) else segments[1:], header)
    header = chain.read(HEADER_SIZE)
    if len(header) < HEADER_SIZE:
        return None
    left = HEADER_SIZE
    views = []
    for segment in segments:
        if left < len(segment):
            views.append(segment[left:])
        left = max(left - len(segment), 0)
    return Frame(views, header[:10])


def _scatter(chains: list[Chain], first: bytes, rest: Sequence[Data]) -> None:
    """Store what a frame has in the buffers, which have room for it."""
    if len(rest) == 1 and all(len(chain.writable) == 1 for chain in chains):
        # As drivers make them: each buffer is one segment.
        payload, at = memoryview(rest[0]), -len(first)
        for chain in chains:
            segment = chain.writable[0]
            size = len(segment)
            if at < 0:
                if size < len(first):
                    break
                segment[: len(first)] = first
                at = size - len(first)
                piece = payload[:at]
                segment[len(first) : len(first) + len(piece)] = piece
                chain.written = len(first) + len(piece)
            else:
                piece = payload[at : at + size]
                segment[: len(piece)] = piece
                chain.written = len(piece)
                at += size
        else:
            return
    number = 0
    chain = chains[0]
    for data in (first, *rest):
        view = memoryview(data)
        while len(view):
            done = chain.write(view)
            if done == len(view):
                break
            view = view[done:]
            number += 1
            chain = chains[number]


@dataclass(frozen=True, slots=True)
class NetSpec:
    """``--net``."""

    net: UserNet | TapNet = field(default_factory=UserNet)
    mac: bytes | None = None
    """None: made of the device's number; for a tap device, which others may be on, by chance."""
    mtu: int = MTU_DEFAULT
    queues: int = 1
    placement: Placement = field(default_factory=Placement)

    def attach(self, machine: Machine) -> Net:
        """Make the device; ConfigError if the host refuses a port, a name or a tap device."""
        backend = UserStack(self.net) if isinstance(self.net, UserNet) else Tap(self.net.name)
        number = sum(isinstance(transport.device, Net) for transport in machine.board.virtio.transports.values())
        shared = isinstance(self.net, TapNet)
        mac = self.mac or default_mac(number, shared=shared)
        device = Net(backend, mac, mtu=self.mtu, pairs=self.queues, shared=shared)
        try:
            self.placement.add(machine, device, machine.workers.own(f"net{number}"))
        except BaseException:
            backend.close()
            raise
        return device


def default_mac(number: int, *, shared: bool) -> bytes:
    """Return an address for the device of this number: QEMU's for the first, another by chance if others see it."""
    if shared:
        return b"\x52\x54\x00" + os.urandom(3)
    return bytes.fromhex("5254001234") + bytes(((0x56 + number) & 0xFF,))


def parse(text: str) -> NetSpec:
    """Read ``--net``'s text."""
    words = Words.of("--net", text, repeated=REPEATED)
    placement = words.placement()
    net = network_of(words)
    spec = NetSpec(
        net,
        words.checked("mac", mac_address, None),
        words.number("mtu", MTU.least, MTU.most, MTU_DEFAULT),
        words.number("queues", QUEUE_PAIRS.least, QUEUE_PAIRS.most, 1),
        placement,
    )
    words.end()
    return spec
