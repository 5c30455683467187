# SPDX-License-Identifier: Apache-2.0
"""The Hyper-V test device: routes to sources of SynICs, and ports of messages and events behind connections.

One port, 0x3000, written with 32 bits: the source in bits 7:0, the virtual processor in 15:8, the command in 23:16,
the connection's number in 31:24. Source: the behaviour of QEMU's ``hyperv-testdev`` as kvm-unit-tests use it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from softkvm import abi
from softkvm.vmm.hyperv import Hyperv
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.sint_routes import SintRoute, SintRoutes

CONTROL_PORT: Final = 0x3000
CONTROL_SIZE: Final = 4
_FLAGS_BYTES: Final = abi.HV_EVENT_FLAGS_COUNT // 8
_HEADER_SIZE: Final = abi.HV_MESSAGE_SIZE - abi.HV_MESSAGE_PAYLOAD_BYTE_COUNT
_FLAGS_AT: Final = 5  # hv_message.message_flags


class MessagePort:
    """Puts messages into the slot of a source. One that finds it full waits until the guest has emptied it."""

    def __init__(self, hyperv: Hyperv, memory: GuestMemory, route: SintRoute) -> None:
        self._hyperv = hyperv
        self._memory = memory
        self.route = route
        self._waiting: bytes | None = None
        self._lock = threading.Lock()
        route.on_ack = self._acked

    def post(self, message: abi.hv_post_message) -> int:
        """Deliver, or keep it; HV_STATUS_INSUFFICIENT_BUFFERS while one waits."""
        with self._lock:
            if self._waiting is not None:
                return abi.HV_STATUS_INSUFFICIENT_BUFFERS
            size = message.payload_size
            header = abi.hv_message(message_type=message.message_type, payload_size=size)
            self._waiting = bytes(header)[:_HEADER_SIZE] + bytes(message.payload)[:size]
            self._deliver()
            return abi.HV_STATUS_SUCCESS

    def _acked(self) -> None:
        with self._lock:
            if self._waiting is not None:
                self._deliver()

    def _deliver(self) -> None:
        page, message = self._hyperv.pages(self.route.vp_index).messages, self._waiting
        assert message is not None
        if not page:
            return
        slot = page + self.route.sint * abi.HV_MESSAGE_SIZE
        flags = slot + _FLAGS_AT
        if any(self._memory.read(slot, 4)):
            self._memory.write(flags, bytes([self._memory.read(flags, 1)[0] | abi.HV_MESSAGE_FLAG_PENDING]))
            if any(self._memory.read(slot, 4)):
                return  # the guest looks at the flag after it has emptied the slot, and tells
        self._memory.write(slot + 4, message[4:])
        self._memory.write(slot, message[:4])  # the type last: that makes it a message
        self._waiting = None
        self.route.raise_sint()


class EventPort:
    """Sets a flag of a source, of which one is one connection's; the guest clears it."""

    def __init__(self, hyperv: Hyperv, memory: GuestMemory, route: SintRoute, flag: int) -> None:
        self._hyperv = hyperv
        self._memory = memory
        self.route = route
        self._flag = flag

    def signal(self) -> int:
        """Interrupt unless the flag is set already."""
        page = self._hyperv.pages(self.route.vp_index).events
        if not page:
            return abi.HV_STATUS_INVALID_HYPERCALL_INPUT
        at = page + self.route.sint * _FLAGS_BYTES + self._flag // 8
        before, bit = self._memory.read(at, 1)[0], 1 << self._flag % 8
        if not before & bit:
            self._memory.write(at, bytes([before | bit]))
            self.route.raise_sint()
        return abi.HV_STATUS_SUCCESS


class HypervTestDevice:
    """The device on its port."""

    def __init__(self, hyperv: Hyperv, memory: GuestMemory, routes: SintRoutes) -> None:
        self._hyperv = hyperv
        self._memory = memory
        self._routes = routes
        self._sints: dict[tuple[int, int], SintRoute] = {}
        self._connections: dict[int, SintRoute] = {}
        self._commands: dict[int, Callable[[int, int, int], None]] = {
            1: self._create_route,
            2: self._destroy_route,
            3: self._set_sint,
            4: self._create_message_port,
            5: self._destroy_message_port,
            6: self._create_event_port,
            7: self._destroy_event_port,
        }

    def read(self, offset: int, size: int) -> int:
        """Ones: there is nothing to read."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry a command out; what names nothing that there is does nothing."""
        command = self._commands.get(value >> 16 & 0xFF)
        if size == CONTROL_SIZE and command is not None:
            command(value >> 8 & 0xFF, value & 0xFF, value >> 24)

    def close(self) -> None:
        """Give back the routes."""
        self._routes.close()

    def _create_route(self, vp_index: int, sint: int, connection: int) -> None:
        if (vp_index, sint) not in self._sints:
            self._sints[vp_index, sint] = self._routes.create(vp_index, sint)

    def _destroy_route(self, vp_index: int, sint: int, connection: int) -> None:
        route = self._sints.pop((vp_index, sint), None)
        if route is not None:
            self._routes.destroy(route)

    def _set_sint(self, vp_index: int, sint: int, connection: int) -> None:
        route = self._sints.get((vp_index, sint))
        if route is not None:
            route.raise_sint()

    def _create_message_port(self, vp_index: int, sint: int, connection: int) -> None:
        if connection not in self._connections and sint < abi.HV_SYNIC_SINT_COUNT:
            route = self._connections[connection] = self._routes.create(vp_index, sint)
            self._hyperv.message_ports[connection] = MessagePort(self._hyperv, self._memory, route).post

    def _destroy_message_port(self, vp_index: int, sint: int, connection: int) -> None:
        if self._hyperv.message_ports.pop(connection, None) is not None:
            self._routes.destroy(self._connections.pop(connection))

    def _create_event_port(self, vp_index: int, sint: int, connection: int) -> None:
        if connection not in self._connections and sint < abi.HV_SYNIC_SINT_COUNT:
            route = self._connections[connection] = self._routes.create(vp_index, sint)
            self._hyperv.event_ports[connection] = EventPort(self._hyperv, self._memory, route, connection).signal

    def _destroy_event_port(self, vp_index: int, sint: int, connection: int) -> None:
        if self._hyperv.event_ports.pop(connection, None) is not None:
            self._routes.destroy(self._connections.pop(connection))
