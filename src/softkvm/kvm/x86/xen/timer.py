# SPDX-License-Identifier: Apache-2.0
"""A vCPU's one-shot timer (VCPUOP_set_singleshot_timer, HYPERVISOR_set_timer_op): an event channel's at a time of the
guest's clock. There is one once userspace has given it a port (KVM_XEN_VCPU_ATTR_TYPE_TIMER).
"""

from __future__ import annotations

import errno
import struct
from functools import partial
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86.mmu.paging import read_guest_virt
from softkvm.kvm.x86.paravirt.kvmclock import get_kvmclock_ns
from softkvm.kvm.x86.xen import evtchn, timer_queue

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1
#: What Xen takes for an overflow of the guest's: a negative time, or one this far away; it is tried again soon then.
_FAR_NS: Final = 1 << 50
_SOON_NS: Final = 100_000_000
#: struct vcpu_set_singleshot_timer: timeout_abs_ns, flags; a 64-bit guest's is padded.
_SINGLESHOT: Final = {True: struct.Struct("<QI4x"), False: struct.Struct("<QI")}


def start(vcpu: Vcpu, expires_ns: int) -> None:
    """Have the timer expire at a time of the guest's, modulo 2**64; at once if that has passed."""
    xen = vcpu.xen
    delta = _signed(expires_ns - get_kvmclock_ns(vcpu.vm))
    if xen.timer is None:
        xen.timer = timer_queue.make(vcpu.vm, partial(_expired, vcpu))
    with xen.timer_lock:
        xen.timer.cancel()
        xen.timer_expires = expires_ns
        xen.timer_deadline = vcpu.vm.xen.timers.clock() + delta if delta > 0 else 0
        if delta > 0:
            xen.timer.start(xen.timer_deadline)
    if delta <= 0:
        _expired(vcpu, 0)


def _signed(value: int) -> int:
    return (value + (1 << 63) & _U64) - (1 << 63)


def stop(vcpu: Vcpu) -> None:
    """Have it not expire."""
    xen = vcpu.xen
    with xen.timer_lock:
        if xen.timer is not None:
            xen.timer.cancel()
        xen.timer_expires = 0


def _expired(vcpu: Vcpu, now_ns: int) -> int:
    """Make the port pending. Without a shared_info the event is lost, as the kernel has it."""
    xen = vcpu.xen
    with xen.timer_lock:
        # One that has been started again since the queue let go of it comes again.
        if xen.timer_expires and now_ns >= xen.timer_deadline:
            evtchn.deliver(vcpu.vm, xen.timer_port, vcpu.vcpu_id)
            xen.timer_expires = 0
    return 0


# --- the attribute -----------------------------------------------------------------------------------------


def set_attr(vcpu: Vcpu, given: abi.kvm_xen_attr_timer) -> None:
    """KVM_XEN_VCPU_ATTR_TYPE_TIMER: the port, and when it expires; 0 is never."""
    if given.port:
        evtchn.check_priority(given.priority)
    stop(vcpu)
    vcpu.xen.timer_port = given.port
    if given.port and given.expires_ns:
        start(vcpu, given.expires_ns)


def get_attr(vcpu: Vcpu) -> abi.kvm_xen_attr_timer:
    """Return the port, and when it expires; 0 once it has become pending."""
    with vcpu.xen.timer_lock:
        return abi.kvm_xen_attr_timer(
            port=vcpu.xen.timer_port,
            priority=abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
            expires_ns=vcpu.xen.timer_expires,
        )


# --- hypercalls --------------------------------------------------------------------------------------------


def set_timer_op(vcpu: Vcpu, expires_ns: int) -> int | None:
    """HYPERVISOR_set_timer_op; 0 stops it. None where userspace has given no port."""
    if not vcpu.xen.timer_port:
        return None
    if not expires_ns:
        stop(vcpu)
        return 0
    now = get_kvmclock_ns(vcpu.vm)
    if expires_ns >> 63 or _signed(expires_ns - now) >= _FAR_NS:
        expires_ns = now + _SOON_NS & _U64
    start(vcpu, expires_ns)
    return 0


def vcpu_op(vcpu: Vcpu, command: int, vcpu_id: int, address: int, *, longmode: bool) -> int | None:
    """VCPUOP_set_singleshot_timer and VCPUOP_stop_singleshot_timer, of the calling vCPU; None for all else."""
    if not vcpu.xen.timer_port or command not in (abi.VCPUOP_set_singleshot_timer, abi.VCPUOP_stop_singleshot_timer):
        return None
    if vcpu_id != vcpu.xen.vcpu_id:
        return -errno.EINVAL
    if command == abi.VCPUOP_stop_singleshot_timer:
        stop(vcpu)
        return 0
    structure = _SINGLESHOT[longmode]
    data = read_guest_virt(vcpu, address, structure.size)
    if data is None:
        return -errno.EFAULT
    expires_ns, _ = structure.unpack(data)
    start(vcpu, expires_ns)
    return 0
