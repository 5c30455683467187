# SPDX-License-Identifier: Apache-2.0
"""GSIs that raise sources of Hyper-V's SynICs, and tell when the guest has acknowledged one (KVM_IRQ_ROUTING_HV_SINT).

KVM tells it by an irqfd's resample eventfd, which a thread waits for.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Sequence
from typing import Final

from softkvm import abi, api
from softkvm.threads import start_quiet

#: The first GSI behind the IOAPIC's.
FIRST_GSI: Final = 24


class SintRoute:
    """One GSI; ``on_ack`` is called on another thread when a message slot of the source may be free."""

    def __init__(self, vm: api.Vm, gsi: int, vp_index: int, sint: int) -> None:
        self._vm = vm
        self.gsi = gsi
        self.vp_index = vp_index
        self.sint = sint
        self.on_ack: Callable[[], object] = lambda: None
        self.line = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.resample = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def entry(self) -> abi.kvm_irq_routing_entry:
        """Its row of the routing table."""
        entry = abi.kvm_irq_routing_entry(gsi=self.gsi, type=abi.KVM_IRQ_ROUTING_HV_SINT)
        entry.u.hv_sint.vcpu, entry.u.hv_sint.sint = self.vp_index, self.sint
        return entry

    def raise_sint(self) -> None:
        """Interrupt the virtual processor."""
        self._vm.irq_line(self.gsi, 1)
        self._vm.irq_line(self.gsi, 0)

    def watch(self) -> None:
        """Have KVM tell of acknowledgements; the route is in force."""
        self._vm.irqfd(self.line, self.gsi, abi.KVM_IRQFD_FLAG_RESAMPLE, self.resample)

    def close(self) -> None:
        """Give back the eventfds."""
        with contextlib.suppress(OSError):  # the VM may be closed
            self._vm.irqfd(self.line, self.gsi, abi.KVM_IRQFD_FLAG_DEASSIGN)
        os.close(self.line)
        os.close(self.resample)


class SintRoutes:
    """All routes of a machine, behind those of its board (*others*)."""

    def __init__(self, vm: api.Vm, others: Sequence[abi.kvm_irq_routing_entry]) -> None:
        self._vm = vm
        self._others = list(others)
        self._routes: dict[int, SintRoute] = {}  # by the resample eventfd
        self._lock = threading.RLock()
        self._epoll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread = start_quiet(self._main, "sint acknowledgements")

    def create(self, vp_index: int, sint: int) -> SintRoute:
        """Return a new route to a source."""
        with self._lock:
            used = {route.gsi for route in self._routes.values()}
            gsi = next(number for number in range(FIRST_GSI, FIRST_GSI + len(used) + 1) if number not in used)
            route = SintRoute(self._vm, gsi, vp_index, sint)
            self._routes[route.resample] = route
            self._apply()
            route.watch()
            self._epoll.register(route.resample, select.EPOLLIN)
            return route

    def destroy(self, route: SintRoute) -> None:
        """Take a route away."""
        with self._lock:
            self._epoll.unregister(route.resample)
            del self._routes[route.resample]
            route.close()
            self._apply()

    def close(self) -> None:
        """Give everything back; no route is acknowledged any more."""
        os.eventfd_write(self._stop, 1)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._epoll.close()
        os.close(self._stop)
        for route in self._routes.values():
            route.close()
        self._routes = {}

    def _apply(self) -> None:
        self._vm.set_gsi_routing([*self._others, *(route.entry for route in self._routes.values())])

    def _main(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._stop:
                    return
                with self._lock:
                    route = self._routes.get(fd)
                    if route is not None:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(fd)
                            route.on_ack()
