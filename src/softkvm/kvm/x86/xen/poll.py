# SPDX-License-Identifier: Apache-2.0
"""SCHEDOP_poll: a vCPU sleeps until a port is pending, masked or not, or an event can be taken.

It may return before that, as Xen's may. The time it has, if any, counts from now on, as KVM has it.
"""

from __future__ import annotations

import errno
import struct
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.x86.mmu.paging import read_guest_virt
from softkvm.kvm.x86.xen import timer_queue
from softkvm.kvm.x86.xen.state import ANY_PORT

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu as RunnableVcpu
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: struct sched_poll: ports (an address), nr_ports, timeout in ns.
_SCHED_POLL: Final = {True: struct.Struct("<QI4xQ"), False: struct.Struct("<IIQ")}
PORTS: Final = Size("ports of SCHEDOP_poll", 128, None, element=4, giver="guest", effect="-EINVAL", where=__name__)


def wake_poller(vcpu: Vcpu, port: int) -> None:
    """A port has become pending, or any: end the vCPU's wait if it is for that; any thread."""
    xen = vcpu.xen
    if xen.polling and (ANY_PORT in (port, xen.poll_port) or port == xen.poll_port):
        _wake(vcpu)


def _wake(vcpu: Vcpu) -> None:
    vcpu.xen.polling = False
    vcpu.call_soon(_nothing)


def _nothing() -> None:
    """That there is something to do on the vCPU's thread ends its wait."""


def _timed_out(vcpu: Vcpu, now_ns: int) -> int:
    _wake(vcpu)
    return 0


def poll(vcpu: Vcpu, address: int, *, longmode: bool) -> int | None:
    """Carry out SCHEDOP_poll on the structure at a linear address; None where KVM doesn't see all events.

    That is so unless userspace sends all by KVM (KVM_XEN_HVM_CONFIG_EVTCHN_SEND).
    """
    if vcpu.apic is None or not vcpu.vm.xen.config.flags & abi.KVM_XEN_HVM_CONFIG_EVTCHN_SEND:
        return None
    structure = _SCHED_POLL[longmode]
    data = read_guest_virt(vcpu, address, structure.size)
    if data is None:
        return -errno.EFAULT
    at, count, timeout_ns = structure.unpack(data)
    if not PORTS.allows(count):
        return -errno.EINVAL
    data = read_guest_virt(vcpu, at, PORTS.bytes(count))
    if data is None:
        return -errno.EFAULT
    ports = struct.unpack(f"<{count}I", data)
    if any(port >= vcpu.vm.xen.layout.ports for port in ports):
        return -errno.EINVAL
    _wait(vcpu, ports, timeout_ns)
    return 0


def _wait(vcpu: Vcpu, ports: tuple[int, ...], timeout_ns: int) -> None:
    xen = vcpu.xen
    xen.poll_port = ports[0] if len(ports) == 1 else ANY_PORT
    xen.polling = True  # before the look: what becomes pending behind it wakes
    try:
        if not _any_pending(vcpu, ports):
            _halt(vcpu, timeout_ns)
    finally:
        xen.polling = False


def _any_pending(vcpu: Vcpu, ports: tuple[int, ...]) -> bool:
    """Tell whether a port is pending; without a page to look into nobody has to wait."""
    area, layout = vcpu.vm.xen.shared_info, vcpu.vm.xen.layout
    if area is None:
        return True
    return any(area.test_bit(layout.evtchn_pending, port) is not False for port in ports)


def _halt(vcpu: Vcpu, timeout_ns: int) -> None:
    xen = vcpu.xen
    if timeout_ns:
        if xen.poll_timer is None:
            xen.poll_timer = timer_queue.make(vcpu.vm, partial(_timed_out, vcpu))
        xen.poll_timer.start(vcpu.vm.xen.timers.clock() + timeout_ns)
    vcpu.mp_state = abi.KVM_MP_STATE_HALTED
    try:
        cast("RunnableVcpu", vcpu).halt_and_wait()
    finally:
        vcpu.mp_state = abi.KVM_MP_STATE_RUNNABLE
        if timeout_ns and xen.poll_timer is not None:
            xen.poll_timer.cancel()
