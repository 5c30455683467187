# SPDX-License-Identifier: Apache-2.0
"""Event channels with two levels: a bit for each port in ``shared_info``, and one for each word of those in a vCPU's
``vcpu_info``.

A port becomes pending by a GSI that is routed there (KVM_IRQ_ROUTING_XEN_EVTCHN), by userspace
(KVM_XEN_HVM_EVTCHN_SEND), by a timer, or by the guest itself: EVTCHNOP_send, for ports that userspace has told of
(:mod:`.ports`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.irqchip.seams import IRQ_IGNORED
from softkvm.kvm.x86.xen import upcall
from softkvm.kvm.x86.xen.layout import EVTCHN_UPCALL_PENDING
from softkvm.kvm.x86.xen.poll import wake_poller
from softkvm.kvm.x86.xen.state import ANY_PORT

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm

_PENDING: Final = b"\1"


def deliver(vm: Vm, port: int, vcpu_id: int, sender: Vcpu | None = None) -> int:
    """Make a port pending, and tell the vCPU that is bound to it (``kvm_xen_set_evtchn``); any thread.

    Returns 1 if that is new to the vCPU or 0 if the port was pending already, else an errno, negative: ENOTCONN for a
    masked port, EINVAL for no such port or vCPU and without a ``shared_info``, EFAULT if that is not there any more.
    """
    xen = vm.xen
    vcpu = vm.vcpu_by_id.get(vcpu_id)
    with xen.lock:
        layout, area = xen.layout, xen.shared_info
        if vcpu is None or port >= layout.ports or area is None:
            return -errno.EINVAL
        was_pending = area.test_and_set_bit(layout.evtchn_pending, port)
        if was_pending is None:
            return -errno.EFAULT
        if was_pending:
            return 0
        wake_poller(vcpu, port)
        if area.test_bit(layout.evtchn_mask, port):
            return -errno.ENOTCONN
        _select(vcpu, port // layout.word_bits, sender)
    return 1


def _select(vcpu: Vcpu, word: int, sender: Vcpu | None) -> None:
    """Mark a word of ports as having a pending one; the vCPU does it itself where its ``vcpu_info`` is not there."""
    info = vcpu.xen.vcpu_info
    was = None if info is None else info.test_and_set_bit(vcpu.vm.xen.layout.evtchn_pending_sel, word)
    if was is None:
        with vcpu.request_lock:
            new = not vcpu.xen.pending_sel >> word & 1
            vcpu.xen.pending_sel |= 1 << word
        if new:
            vcpu.call_soon(partial(inject_pending_events, vcpu))
    elif not was:
        assert info is not None
        info.write(EVTCHN_UPCALL_PENDING, _PENDING)
        wake_poller(vcpu, ANY_PORT)
        upcall.bring(vcpu, sender)


def inject_pending_events(vcpu: Vcpu) -> None:
    """Mark what could not be marked before; on the vCPU's thread, or under its mutex. It waits on without memory."""
    xen = vcpu.xen
    info = xen.vcpu_info
    if not xen.pending_sel or info is None:
        return
    layout = vcpu.vm.xen.layout
    for word in range(layout.word_bits):
        if xen.pending_sel >> word & 1:
            if info.test_and_set_bit(layout.evtchn_pending_sel, word) is None:
                return
            with vcpu.request_lock:
                xen.pending_sel &= ~(1 << word)
    info.write(EVTCHN_UPCALL_PENDING, _PENDING)
    upcall.bring(vcpu)


def memory_has_come(vm: Vm) -> None:
    """There are other slots: vCPUs that have something to be marked look again."""
    for vcpu in vm.vcpus:
        if vcpu.xen.pending_sel:
            vcpu.call_soon(partial(inject_pending_events, vcpu))


def check_priority(priority: int) -> None:
    """Raise EINVAL for event channels that don't have two levels."""
    if priority != abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL:
        raise kvm_error(errno.EINVAL, f"priority={priority:#x}, expected KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL")


def check_port(vm: Vm, port: int) -> None:
    """Raise EINVAL for a port that there is not."""
    if port >= vm.xen.layout.ports:
        raise kvm_error(errno.EINVAL, f"port={port}, expected below {vm.xen.layout.ports}")


def route(vm: Vm, target: abi.kvm_irq_routing_xen_evtchn) -> Callable[[int, int], int]:
    """Return what a GSI that is routed to an event channel does: a rising level makes it pending.

    The vCPU may come later. EINVAL for a port or priority that there is not.
    """
    check_port(vm, target.port)
    check_priority(target.priority)
    port, vcpu_id = target.port, target.vcpu
    return lambda source, level: deliver(vm, port, vcpu_id) if level else IRQ_IGNORED


def send(vm: Vm, event: abi.kvm_irq_routing_xen_evtchn) -> None:
    """KVM_XEN_HVM_EVTCHN_SEND: a masked port is no error. EINVAL and EFAULT as :func:`deliver` has them."""
    if not event.port:
        raise kvm_error(errno.EINVAL, "port=0, expected one that there is")
    check_port(vm, event.port)
    check_priority(event.priority)
    result = deliver(vm, event.port, event.vcpu)
    if result < 0 and result != -errno.ENOTCONN:
        raise kvm_error(-result, f"port={event.port} vcpu={event.vcpu}: there is no such vCPU, or no shared_info")
