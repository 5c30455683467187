# SPDX-License-Identifier: Apache-2.0
"""The console device: consoles and named ports, each a stream both ways (VIRTIO 1.3, section 5.3).

With one console and no name, there is no need of VIRTIO_CONSOLE_F_MULTIPORT, and the terminal's size is in the
configuration space, where all drivers find it. With several ports it comes by a control message, of which Linux had
the two numbers in another order than the specification until 6.15.

What nobody takes stays with the guest: its buffers are given back when the host's end has taken what is in them. Input
waits on the host until the guest has opened the port and gives buffers.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_CONSOLE, bit
from softkvm.vmm.virtio.queue import Chain, QueueError

VIRTIO_CONSOLE_F_SIZE: Final = 0
VIRTIO_CONSOLE_F_MULTIPORT: Final = 1
VIRTIO_CONSOLE_F_EMERG_WRITE: Final = 2

VIRTIO_CONSOLE_DEVICE_READY: Final = 0
VIRTIO_CONSOLE_DEVICE_ADD: Final = 1
VIRTIO_CONSOLE_PORT_READY: Final = 3
VIRTIO_CONSOLE_CONSOLE_PORT: Final = 4
VIRTIO_CONSOLE_RESIZE: Final = 5
VIRTIO_CONSOLE_PORT_OPEN: Final = 6
VIRTIO_CONSOLE_PORT_NAME: Final = 7

PORT_QUEUE_SIZE: Final = 128
CONTROL_QUEUE_SIZE: Final = 32
CONTROL_RX, CONTROL_TX = 2, 3

_CONTROL: Final = struct.Struct("<IHH")  # id, event, value
_SIZE: Final = struct.Struct("<HH")  # columns, rows
_CONFIG: Final = struct.Struct("<HHII")  # columns, rows, max_nr_ports, emerg_wr
_EMERGENCY: Final = 8

PORTS: Final = Size("ports of a console device", 31, ValueError, least=1, effect="ValueError", where=__name__)
INPUT: Final = Size(
    "bytes of input that wait for a port's buffers", 65536, None, effect="the host's end is not read", where=__name__
)
PIECE: Final = 65536
"""Bytes that a host's end is offered at a time."""

BATCH: Final = 256
"""Buffers of a port that are served before other devices have their turn."""


class PortEnd(Protocol):
    """The host's end of a port. All but ``close`` is called on the device's worker."""

    def start(self, port: Port) -> None:
        """Begin: *port* is where input goes, and who is told when output may go on."""

    def send(self, data: bytes) -> int:
        """Take output, without waiting; return how many bytes. After none :meth:`Port.go_on` is called, later."""

    def room(self) -> None:
        """Input may go on."""

    def close(self) -> None:
        """There is no port any more."""


def _needing_reset(function: Callable[[Port], None]) -> Callable[[Port], None]:
    """Have the driver's mistakes end as they do in a notification, whoever calls *function*."""

    def guarded(port: Port) -> None:
        try:
            function(port)
        except QueueError as error:
            if port.device is not None:
                port.device.needs_reset(str(error))

    return guarded


class Port:
    """A stream of *device*'s, with *end* on the host; *name* is empty for none."""

    def __init__(self, end: PortEnd, name: str = "", *, console: bool = False) -> None:
        self.end = end
        self.name = name
        self.console = console
        self.number = 0
        self.device: Console | None = None
        self.host_open = True
        """Whether somebody is at the host's end."""
        self.guest_open = False
        self.input = bytearray()
        self._unsent = b""  # of the buffer that is being sent: what has been read of it and not taken
        self._sending: Chain | None = None
        self._consumed = 0

    @property
    def rx(self) -> int:
        """The index of the queue with input."""
        return 0 if self.number == 0 else 2 * self.number + 2

    @property
    def tx(self) -> int:
        """The index of the queue with output."""
        return self.rx + 1

    @property
    def room(self) -> int:
        """Bytes of input that can be taken."""
        return INPUT.most - len(self.input) if self.guest_open else 0

    def feed(self, data: bytes) -> None:
        """Take input for the guest; on the worker."""
        self.input += data
        self.deliver()

    @_needing_reset
    def deliver(self) -> None:
        """Put input into the guest's buffers."""
        device = self.device
        if device is None or not self.input or not self.guest_open:
            return
        queue = device.queues[self.rx]
        taken = 0
        while taken < len(self.input):
            chain = queue.pop()
            if chain is None:
                if not queue.ready or not queue.enable_notifications():
                    break
                continue
            taken += chain.write(memoryview(self.input)[taken : taken + PIECE].tobytes())
            queue.push(chain)
        if taken:
            del self.input[:taken]
            queue.flush()
            self.end.room()

    @_needing_reset
    def go_on(self) -> None:
        """The host's end takes output again; on the worker."""
        device = self.device
        if device is None:
            return
        queue = device.queues[self.tx]
        if not queue.ready:
            return
        for _ in range(BATCH):
            chain = self._sending or queue.pop()
            if chain is None:
                queue.flush()
                if not queue.enable_notifications():
                    return
                continue
            self._sending = chain
            if not self._send(chain):
                queue.flush()
                return
            self._sending, self._consumed = None, 0
            queue.push(chain, 0)
        queue.flush()
        device.call(self.go_on)

    def _send(self, chain: Chain) -> bool:
        """Send what is left of a buffer; whether that was all. Without anybody at the other end it is dropped."""
        while True:
            if not self._unsent:
                self._unsent = chain.read(PIECE)
                if not self._unsent:
                    return True
            taken = self.end.send(self._unsent) if self.host_open else len(self._unsent)
            self._consumed += taken
            self._unsent = self._unsent[taken:]
            if not taken:
                return False

    def set_host_open(self, value: bool) -> None:
        """Somebody has come to the host's end, or gone; on the worker."""
        self.host_open = value
        if self.device is not None:
            self.device.tell_open(self)
        if not value:
            self.go_on()

    def forget(self) -> None:
        """The driver is gone."""
        self.guest_open = False
        self.input.clear()
        self._unsent, self._sending, self._consumed = b"", None, 0

    def save(self) -> dict[str, Any]:
        """What is under way."""
        sending = None if self._sending is None else self._sending.save()
        return {"guest_open": self.guest_open, "input": bytes(self.input), "sending": sending, "sent": self._consumed}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.forget()
        self.guest_open = state["guest_open"]
        self.input += state["input"]
        if state["sending"] is not None and self.device is not None:
            self._sending = self.device.queues[self.tx].chain(state["sending"])
            self._sending.read(state["sent"])
            self._consumed = state["sent"]


class Console(VirtioDevice):
    """Consoles and ports; *size* of the terminal is columns and rows."""

    type = VIRTIO_ID_CONSOLE
    name = "console"
    pci_class = 0x078000  # communication, none of its kinds

    def __init__(self, ports: Sequence[Port], size: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        PORTS.check(len(ports))
        self.ports = list(ports)
        self.multiport = len(ports) > 1 or not ports[0].console or bool(ports[0].name)
        self.queue_sizes = (PORT_QUEUE_SIZE,) * 2
        self.features = bit(VIRTIO_CONSOLE_F_EMERG_WRITE)
        if self.multiport:
            self.features |= bit(VIRTIO_CONSOLE_F_MULTIPORT)
            self.queue_sizes += (CONTROL_QUEUE_SIZE,) * 2 + (PORT_QUEUE_SIZE,) * (2 * len(ports) - 2)
        else:
            self.features |= bit(VIRTIO_CONSOLE_F_SIZE)
        self._by_queue: dict[int, Callable[[], None]] = {CONTROL_RX: self._send_control, CONTROL_TX: self._take_control}
        for number, port in enumerate(self.ports):
            port.number, port.device = number, self
            self._by_queue[port.rx] = port.deliver
            self._by_queue[port.tx] = port.go_on
        self.size = size
        self._control: dict[tuple[int, int], bytes] = {}  # messages that wait for buffers, one of a kind for each port
        self._started = False

    # -- the driver

    def activate(self) -> None:
        """Without control messages, a console is open as soon as there is a driver."""
        if not self._started:
            self._started = True
            for port in self.ports:
                port.end.start(port)
        if not self.negotiated(VIRTIO_CONSOLE_F_MULTIPORT):
            self.ports[0].guest_open = True
            self.ports[0].end.room()
            if self.size != (0, 0):
                self.call(self.config_changed)  # Linux's driver looks at the size only when it has changed

    def reset(self) -> None:
        """Forget what waits for the driver."""
        self._control.clear()
        for port in self.ports:
            port.forget()

    def notified(self, index: int) -> None:
        """Serve a queue."""
        self._by_queue[index]()

    def read_config(self, offset: int, size: int) -> bytes:
        """The terminal's size, the number of ports."""
        config = _CONFIG.pack(*self.size, len(self.ports), 0)
        return config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """A character that has to get out before there are queues (5.3.4)."""
        if offset == _EMERGENCY and data:
            self.ports[0].end.send(data[:1])

    # -- control

    def _take_control(self) -> None:
        queue = self.queues[CONTROL_TX]
        for chain in queue.drain():
            message = chain.read(_CONTROL.size)
            queue.push(chain, 0)
            if len(message) == _CONTROL.size:
                self._controlled(*_CONTROL.unpack(message))

    def _controlled(self, number: int, event: int, value: int) -> None:
        if event == VIRTIO_CONSOLE_DEVICE_READY:
            if value:
                for port in self.ports:
                    self._tell(port, VIRTIO_CONSOLE_DEVICE_ADD, 1)
            return
        if number >= len(self.ports):
            return
        port = self.ports[number]
        if event == VIRTIO_CONSOLE_PORT_READY and value:
            self._introduce(port)
        elif event == VIRTIO_CONSOLE_PORT_OPEN:
            port.guest_open = bool(value)
            if value:
                port.deliver()
                port.end.room()

    def _introduce(self, port: Port) -> None:
        """Say what a port is, once the driver has it."""
        if port.console:
            self._tell(port, VIRTIO_CONSOLE_CONSOLE_PORT, 1)
            self._tell_size(port)
        if port.name:
            self._tell(port, VIRTIO_CONSOLE_PORT_NAME, 1, port.name.encode("utf-8", "surrogateescape"))
        if port.host_open:
            self.tell_open(port)

    def tell_open(self, port: Port) -> None:
        """Tell the driver whether somebody is at the host's end."""
        if self.negotiated(VIRTIO_CONSOLE_F_MULTIPORT):
            self._tell(port, VIRTIO_CONSOLE_PORT_OPEN, int(port.host_open))

    def _tell_size(self, port: Port) -> None:
        if self.size != (0, 0):
            self._tell(port, VIRTIO_CONSOLE_RESIZE, 0, _SIZE.pack(*self.size))

    def _tell(self, port: Port, event: int, value: int, more: bytes = b"") -> None:
        """Send a control message, in place of one of the same kind that has not gone yet."""
        key = (port.number, event)
        self._control.pop(key, None)
        self._control[key] = _CONTROL.pack(port.number, event, value) + more
        self._send_control()

    def _send_control(self) -> None:
        queue = self.queues[CONTROL_RX]
        while self._control:
            chain = queue.pop()
            if chain is None:
                if not queue.ready or not queue.enable_notifications():
                    break
                continue
            key = next(iter(self._control))
            chain.write(self._control.pop(key))
            queue.push(chain)
        queue.flush()

    # -- the host

    def resize(self, columns: int, rows: int) -> None:
        """The terminal of the consoles has another size; on the worker."""
        self.size = min(columns, 0xFFFF), min(rows, 0xFFFF)
        if self.negotiated(VIRTIO_CONSOLE_F_MULTIPORT):
            for port in self.ports:
                if port.console:
                    self._tell_size(port)
        else:
            self.config_changed()

    def save(self) -> dict[str, Any]:
        """Ports, and messages that wait."""
        control = [[*key, message] for key, message in self._control.items()]
        return {"ports": [port.save() for port in self.ports], "control": control, "size": list(self.size)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; who is at the host's ends now, the driver is told."""
        self._control = {(number, event): message for number, event, message in state["control"]}
        for port, saved in zip(self.ports, state["ports"], strict=True):
            port.restore(saved)
        size, self.size = self.size, (state["size"][0], state["size"][1])
        if size not in ((0, 0), self.size):
            self.call(self.resize, *size)
        for port in self.ports:
            self.call(port.deliver)
            self.call(port.go_on)
            self.call(self.tell_open, port)

    def close(self) -> None:
        """Close the host's ends."""
        for port in self.ports:
            port.device = None
            port.end.close()


class Outlet:
    """An end whose output goes to a function that may wait: a thread of its own calls it. Input is fed from any thread.

    Up to :data:`OUTPUT` bytes wait for that thread, and as many may be in its call. After an OSError it gets no more.
    """

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._sink = sink
        self._port: Port | None = None
        self._changed = threading.Condition()
        self._output = bytearray()
        self._input = 0  # bytes that were fed and are not in the guest's buffers
        self._full = False
        self._closed = False
        self._busy = False
        self._broken = False
        self._thread: threading.Thread | None = None

    def start(self, port: Port) -> None:
        """Begin."""
        self._port = port

    def send(self, data: bytes) -> int:
        """Keep what there is room for."""
        with self._changed:
            if self._broken or self._closed:
                return len(data)
            room = OUTPUT.most - len(self._output)
            self._full = room < len(data)
            self._output += data[:room]
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="console output", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return min(room, len(data))

    def _main(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._output and not self._closed:
                    self._changed.wait()
                if not self._output:
                    return
                data, self._output = bytes(self._output), bytearray()
                self._busy = True
                full, self._full = self._full, False
            port = self._port
            if full and port is not None and port.device is not None:
                port.device.call(port.go_on)
            try:
                self._sink(data)
            except OSError:
                self._broken = True

    def flush(self, timeout_s: float = 1.0) -> None:
        """Wait until all output is with the function."""
        with self._changed:
            self._changed.wait_for(lambda: not self._output and not self._busy, timeout_s)

    def room(self) -> None:
        """Input has gone to the guest, or can."""
        with self._changed:
            self._input = len(self._port.input) if self._port is not None else 0
            self._changed.notify_all()

    # -- a line, as a serial port is one

    @property
    def ready(self) -> bool:
        """Whether the guest takes input."""
        return self._port is not None and self._port.guest_open

    @property
    def pending_input(self) -> int:
        """Bytes that the guest has not taken."""
        return self._input

    def feed(self, data: bytes) -> None:
        """Send *data* to the guest; from any thread."""
        port = self._port
        if port is None or port.device is None:
            return
        with self._changed:
            self._input += len(data)
        port.device.call(port.feed, data)

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until not much waits to be taken."""
        with self._changed:
            return self._changed.wait_for(lambda: self._input < PIECE, timeout_s)

    def close(self) -> None:
        """End the thread when all is written."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)


OUTPUT: Final = Size(
    "bytes of a console's output that wait", 1 << 20, None, giver="guest", effect="the guest waits", where=__name__
)
