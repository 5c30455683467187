# SPDX-License-Identifier: Apache-2.0
"""The socket device: carries packets between a guest and the host's ends of its connections (VIRTIO 1.3, 5.10).

The connections are the hub's (``vmm/vsock/``); here are the queues, and what becomes of connections when the guest's
driver begins anew or the machine is restored: the guest is told by an event, and all connections end on both sides.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.devices.spec import Placement, Words
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.virtio.device import Attachment, VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_VSOCK, bit
from softkvm.vmm.virtio.queue import QueueError
from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.connection import BUFFER
from softkvm.vmm.vsock.hub import Hub
from softkvm.vmm.vsock.packet import (
    CID_MAX,
    CID_MIN,
    HEADER_SIZE,
    VIRTIO_VSOCK_EVENT_TRANSPORT_RESET,
    VIRTIO_VSOCK_F_NO_IMPLIED_STREAM,
    VIRTIO_VSOCK_F_SEQPACKET,
    VIRTIO_VSOCK_F_STREAM,
    VIRTIO_VSOCK_TYPE_SEQPACKET,
    VIRTIO_VSOCK_TYPE_STREAM,
    Header,
)
from softkvm.vmm.vsock.unix import UnixSockets, check_path

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine
    from softkvm.vmm.memory import GuestMemory
    from softkvm.vmm.virtio.worker import Timer, Worker

RX, TX, EVENT = range(3)
DEFAULT_CID: Final = CID_MIN
PACKET: Final = Size(
    "bytes of data in a vsock packet", BUFFER.most, None, giver="guest", effect="dropped", where=__name__
)


class VirtioVsock(VirtioDevice):
    """The device of the guest with context ID *cid*."""

    type = VIRTIO_ID_VSOCK
    name = "vsock"
    features = bit(VIRTIO_VSOCK_F_STREAM, VIRTIO_VSOCK_F_SEQPACKET, VIRTIO_VSOCK_F_NO_IMPLIED_STREAM)
    queue_sizes = (256, 256, 16)

    def __init__(self, cid: int = DEFAULT_CID, *, keep_cid: bool = False) -> None:
        super().__init__()
        self.hub = Hub(cid)
        self.vsock = Vsock(self.hub, self.set_cid)
        """What scripts use."""
        self._keep_cid = keep_cid
        self._unix: UnixSockets | None = None
        self._pump_asked = False
        self._broken = False
        self._reset_due = False
        self._timer: Timer | None = None

    def attach(self, transport: Attachment, memory: GuestMemory, worker: Worker) -> None:
        """Become *transport*'s."""
        super().attach(transport, memory, worker)
        self.hub.wake = self._wake
        self.hub.wake_at = self._wake_at

    def serve(self, path: str) -> None:
        """Have UNIX sockets at *path* for programs of the host's; ConfigError if that cannot be."""
        self._unix = UnixSockets(self.hub, self.worker, path)

    def set_cid(self, cid: int) -> None:
        """Give the guest another context ID; its connections end. ValueError if there is no such."""
        if not CID_MIN <= cid <= CID_MAX:
            raise ValueError(f"cid={cid}: expected a number from {CID_MIN} to {CID_MAX}")
        with self.worker.lock, self.hub.lock:
            self.hub.guest_cid = cid
            self.hub.reset()
            self._reset_due = True
        self.config_changed()
        self.call(self._tell_reset)

    # -- the driver

    def read_config(self, offset: int, size: int) -> bytes:
        """The guest's context ID (5.10.4)."""
        return struct.pack("<Q", self.hub.guest_cid)[offset : offset + size].ljust(size, b"\0")

    def activate(self) -> None:
        """The driver is there."""
        kinds = set()
        if self.negotiated(VIRTIO_VSOCK_F_STREAM) or not self.negotiated(VIRTIO_VSOCK_F_NO_IMPLIED_STREAM):
            kinds.add(VIRTIO_VSOCK_TYPE_STREAM)
        if self.negotiated(VIRTIO_VSOCK_F_SEQPACKET):
            kinds.add(VIRTIO_VSOCK_TYPE_SEQPACKET)
        self.hub.kinds = frozenset(kinds)
        self._tell_reset()
        self._pump()

    def reset(self) -> None:
        """The driver begins anew: it knows of no connection."""
        self._broken = self._reset_due = False
        self.hub.reset()

    def notified(self, index: int) -> None:
        """Packets of the guest's, room for ours, or for events."""
        if index == TX:
            self._receive()
        elif index == EVENT:
            self._tell_reset()
        self._pump()

    def _receive(self) -> None:
        """Take packets, as long as the guest takes the answers."""
        queue, hub = self.queues[TX], self.hub
        self._pump_asked = True  # it comes behind this batch
        for chain in queue.drain():
            if hub.congested:
                queue.unpop(chain)
                queue.flush()
                return
            head = chain.read(HEADER_SIZE)
            if len(head) == HEADER_SIZE:
                header = Header.unpack(head)
                if PACKET.allows(header.len):
                    hub.receive(header, chain.read(header.len) if header.len else b"")
            queue.push(chain)

    def _pump(self) -> None:
        """Send what there is to send, as far as there is room."""
        self._pump_asked = False
        hub, queue = self.hub, self.queues[RX]
        if not queue.ready or self._broken:
            return
        congested = hub.congested
        while hub.has_output:
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    continue
                break
            room = chain.writable_size - HEADER_SIZE
            if room < 0:
                raise QueueError(f"queue {RX}: a buffer of {chain.writable_size} bytes, less than a packet's header")
            packet = hub.transmit(room)
            if packet is None:
                queue.unpop(chain)
                break
            header, data = packet
            chain.write(header + data if data else header)
            queue.push(chain)
        queue.flush()
        if congested and not hub.congested:
            self._receive()

    def _guarded_pump(self) -> None:
        """As :meth:`_pump`, where nobody else looks after a driver's mistakes."""
        try:
            self._pump()
        except QueueError as error:
            self._broken = True
            self.needs_reset(str(error))

    def _tell_reset(self) -> None:
        """Tell the guest that its connections are gone, and to look for its context ID (5.10.6.7)."""
        if not self._reset_due or not self.queues[EVENT].ready:
            return
        chain = self.queues[EVENT].pop()
        if chain is None:
            self.queues[EVENT].enable_notifications()
            return
        self._reset_due = False
        chain.write(struct.pack("<I", VIRTIO_VSOCK_EVENT_TRANSPORT_RESET))
        self.queues[EVENT].push(chain)
        self.queues[EVENT].flush()

    # -- the hub, on any thread

    def _wake(self) -> None:
        if not self._pump_asked:
            self._pump_asked = True
            self.call(self._guarded_pump)

    def _wake_at(self, seconds: float) -> None:
        self.call(self._set_timer, seconds)  # not here: the hub's lock is held, and the worker's comes before it

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.worker.call_later(seconds, self.hub.expire)

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """The context ID; connections don't outlive a restore."""
        return {"cid": self.hub.guest_cid}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the context ID, unless this device was given one, and tell the guest of it."""
        cid = state["cid"]
        if not isinstance(cid, int) or not CID_MIN <= cid <= CID_MAX:
            raise ValueError(f"vsock: the saved context ID is {cid!r}")
        if not self._keep_cid:
            self.hub.guest_cid = cid
        self._reset_due = True

    def new_identity(self, number: int) -> None:
        """Of several clones each has a context ID of its own; the guest reads it anew when it goes on."""
        if number:
            self.hub.guest_cid = CID_MIN + (self.hub.guest_cid - CID_MIN + number) % (CID_MAX - CID_MIN + 1)
            self._reset_due = True

    def close(self) -> None:
        """End everything, orphans that wait for their timeout too."""
        self.hub.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._unix is not None:
            self._unix.close()


@dataclass(frozen=True, slots=True)
class VsockSpec:
    """``--vsock``; ConfigError if that is nothing that there can be."""

    cid: int | None = None
    """The guest's context ID; None: 3, or what a restored machine had."""
    path: str = ""
    """Where the UNIX sockets for the host's programs are, ``%p`` being the process's number; none if it is empty."""
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        if self.cid is not None and (not isinstance(self.cid, int) or not CID_MIN <= self.cid <= CID_MAX):
            raise ConfigError(f"vsock cid={self.cid!r}: expected a number from {CID_MIN} to {CID_MAX}")
        if self.path:
            check_path(self.path)

    def attach(self, machine: Machine) -> VirtioVsock:
        """Make the device, the machine's only one."""
        device = VirtioVsock(DEFAULT_CID if self.cid is None else self.cid, keep_cid=self.cid is not None)
        machine.set_vsock(device.vsock)
        self.placement.add(machine, device, machine.workers.own("vsock"))
        if self.path:
            device.serve(self.path.replace("%p", str(os.getpid())))
        return device


def parse(text: str) -> VsockSpec:
    """Read ``--vsock``'s text."""
    words = Words.of("--vsock", text, first=False)
    cid = words.number("cid", CID_MIN, CID_MAX, 0) or None
    path = words.value("path")
    placement = words.placement()
    words.end()
    try:
        return VsockSpec(cid, path, placement)
    except ConfigError as error:
        raise words.error(str(error)) from None
