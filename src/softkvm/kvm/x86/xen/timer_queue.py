# SPDX-License-Identifier: Apache-2.0
"""The timers of Xen's interfaces: a queue and a thread for a VM, from the first on; they need no chips."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm.x86.irqchip.hrtimer import Hrtimer, HrtimerFunction, HrtimerThread

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VmState as Vm


def make(vm: Vm, function: HrtimerFunction) -> Hrtimer:
    """Return a new timer of the VM's."""
    xen = vm.xen
    with xen.lock:
        if xen.timer_thread is None:
            xen.timer_thread = HrtimerThread(xen.timers, "kvm-xen-timer")
    return Hrtimer(xen.timers, function)


def close(vm: Vm) -> None:
    """End the thread: nothing expires any more."""
    if vm.xen.timer_thread is not None:
        vm.xen.timer_thread.stop()
