# SPDX-License-Identifier: Apache-2.0
"""Connections whose events are eventfds (KVM API 4.112, KVM_HYPERV_EVENTFD): HVCALL_SIGNAL_EVENT signals them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.irq.eventfile import EventFile

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VmState as Vm

_CONNECTIONS: Final = Size("connections of Hyper-V's", abi.KVM_HYPERV_CONN_ID_MASK + 1, errno.EINVAL, where=__name__)


def hyperv_eventfd(vm: Vm, conn_id: int, fd: int, flags: int) -> None:
    """Give a connection an eventfd, or take it away.

    EINVAL for flags and for an id of more than 24 bits; EEXIST for a connection that has one, ENOENT to take away
    what isn't there; EBADF and EINVAL for what is no eventfd.
    """
    if flags & ~abi.KVM_HYPERV_EVENTFD_DEASSIGN:
        raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected KVM_HYPERV_EVENTFD_DEASSIGN or none")
    _CONNECTIONS.index(conn_id, called="conn_id")
    hv = vm.hyperv
    if flags:
        with hv.lock:
            if hv.connections.pop(conn_id, None) is None:
                raise kvm_error(errno.ENOENT, f"conn_id={conn_id:#x} has no eventfd")
        return
    file = EventFile.of(fd)
    with hv.lock:
        if conn_id in hv.connections:
            raise kvm_error(errno.EEXIST, f"conn_id={conn_id:#x} has an eventfd already")
        hv.connections[conn_id] = file
