# SPDX-License-Identifier: Apache-2.0
"""Ports that a guest sends on, and where those lead to (KVM_XEN_ATTR_TYPE_EVTCHN): another port of the guest's, for
IPIs and its own devices, or an eventfd. EVTCHNOP_send on any other is userspace's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.irq.eventfile import EventFile
from softkvm.kvm.x86.mmu.paging import read_guest_virt
from softkvm.kvm.x86.xen import evtchn
from softkvm.kvm.x86.xen.state import SendPort

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm


def set_attr(vm: Vm, given: abi.kvm_xen_attr_evtchn) -> None:
    """KVM_XEN_ATTR_TYPE_EVTCHN: assign, update, deassign one port, or reset all."""
    xen = vm.xen
    port = given.send_port
    if given.flags == abi.KVM_XEN_EVTCHN_RESET:
        xen.send_ports = {}
        return
    if not port:
        raise kvm_error(errno.EINVAL, "send_port=0, expected one that there is")
    evtchn.check_port(vm, port)
    if given.flags == abi.KVM_XEN_EVTCHN_DEASSIGN:
        if xen.send_ports.pop(port, None) is None:
            raise kvm_error(errno.ENOENT, f"send_port={port} leads nowhere")
    elif given.flags == abi.KVM_XEN_EVTCHN_UPDATE:
        xen.send_ports[port] = _updated(xen.send_ports.get(port), given)
    elif given.flags:
        raise kvm_error(errno.EINVAL, f"flags={given.flags:#x}, expected one KVM_XEN_EVTCHN_* or none")
    else:
        new = _assigned(vm, given)
        if port in xen.send_ports:
            raise kvm_error(errno.EEXIST, f"send_port={port} leads somewhere already")
        xen.send_ports[port] = new


def _updated(old: SendPort | None, given: abi.kvm_xen_attr_evtchn) -> SendPort:
    """Return the port with another vCPU: nothing else may change, and of an eventfd nothing at all."""
    if old is None:
        raise kvm_error(errno.ENOENT, f"send_port={given.send_port} leads nowhere")
    target = given.deliver.port
    if old.type != given.type or not old.port or old.port != target.port:
        raise kvm_error(errno.EINVAL, f"type={given.type} port={target.port}, expected {old.type} and {old.port}")
    evtchn.check_priority(target.priority)
    return old._replace(vcpu_id=target.vcpu)


def _assigned(vm: Vm, given: abi.kvm_xen_attr_evtchn) -> SendPort:
    target = given.deliver.port
    if given.type == abi.EVTCHNSTAT_ipi:
        if target.port != given.send_port:
            raise kvm_error(errno.EINVAL, f"port={target.port}, expected {given.send_port}: IPIs come on their port")
    elif given.type != abi.EVTCHNSTAT_interdomain:
        raise kvm_error(errno.EINVAL, f"type={given.type}, expected EVTCHNSTAT_ipi or EVTCHNSTAT_interdomain")
    elif not target.port:
        return SendPort(given.type, 0, 0, EventFile.of(given.deliver.eventfd.fd))
    else:
        evtchn.check_port(vm, target.port)
    evtchn.check_priority(target.priority)
    return SendPort(given.type, target.port, target.vcpu, None)


def send(vcpu: Vcpu, address: int) -> int | None:
    """EVTCHNOP_send: the port is at a linear address. None if it is userspace's to do."""
    data = read_guest_virt(vcpu, address, 4)
    if data is None:
        return -errno.EFAULT
    target = vcpu.vm.xen.send_ports.get(int.from_bytes(data, "little"))
    if target is None:
        return None
    if target.file is not None:
        target.file.signal()
        return 0
    result = evtchn.deliver(vcpu.vm, target.port, target.vcpu_id, vcpu)
    return None if result < 0 and result != -errno.ENOTCONN else 0
