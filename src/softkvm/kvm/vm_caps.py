# SPDX-License-Identifier: Apache-2.0
"""KVM_ENABLE_CAP on a VM, as on every architecture (KVM API, section 7): one function per capability."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.dirty_ring import check_size

if TYPE_CHECKING:
    from softkvm.kvm.state import VmState as Vm


def enable_cap(vm: Vm, cap: int, value: int) -> bool:
    """Enable *cap* with its first argument; False for what is none of the general ones."""
    enable = _ENABLE.get(cap)
    if enable is None:
        return False
    enable(vm, value)
    return True


def _manual_dirty_log_protect(vm: Vm, value: int) -> None:
    enable, initially = abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, abi.KVM_DIRTY_LOG_INITIALLY_SET
    if value & ~(enable | initially) or value == initially:
        raise kvm_error(errno.EINVAL, f"args[0]={value:#x}, expected 0, 1 or 3")
    vm.manual_dirty_log_protect = value


def _dirty_log_ring(vm: Vm, value: int) -> None:
    check_size(value)
    with vm.lock:
        if vm.dirty_ring_size or vm.vcpus:
            raise kvm_error(errno.EINVAL, "rings of dirty pages come once, and before the first vCPU")
        vm.dirty_ring_size = value


def _halt_poll(vm: Vm, value: int) -> None:
    if value >> 32:
        raise kvm_error(errno.EINVAL, f"args[0]={value}, expected nanoseconds in 32 bits")
    vm.max_halt_poll_ns = value


_ENABLE: Final[dict[int, Callable[[Vm, int], None]]] = {
    abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: _manual_dirty_log_protect,
    abi.KVM_CAP_HALT_POLL: _halt_poll,
    abi.KVM_CAP_DIRTY_LOG_RING: _dirty_log_ring,
    abi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: _dirty_log_ring,
}
