# SPDX-License-Identifier: Apache-2.0
"""State of Xen's interfaces: a VM's (``struct kvm_xen``) and a vCPU's (``struct kvm_vcpu_xen``). Data.

What happens to it is in the modules that take it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from softkvm import _softcpu, abi
from softkvm.kvm.x86.irqchip.hrtimer import Hrtimer, HrtimerQueue, HrtimerThread
from softkvm.kvm.x86.xen.layout import COMPAT, LONG, Layout

if TYPE_CHECKING:
    from softkvm.kvm.irq.eventfile import EventFile
    from softkvm.kvm.memory.guest_area import GuestArea

#: ``XenVcpu.poll_port``: any.
ANY_PORT = -1


class SendPort(NamedTuple):
    """What a port that the guest sends on leads to: another of its own, or an eventfd."""

    type: int
    port: int
    vcpu_id: int
    file: EventFile | None


class XenVm:
    """One VM's; ``lock`` serialises changes, as requests and vCPUs' threads make some."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        #: What KVM_XEN_HVM_CONFIG said last. The rest is there once it has named an MSR.
        self.config = abi.kvm_xen_hvm_config()
        #: The guest's structures are those of 64-bit guests.
        self.long_mode = False
        self.shared_info: GuestArea | None = None
        #: The vector of every vCPU's upcalls, past its local APIC; 0: none.
        self.upcall_vector = 0
        self.xen_version = 0
        self.runstate_update_flag = False
        #: KVM_XEN_ATTR_TYPE_EVTCHN, by the port that the guest names.
        self.send_ports: dict[int, SendPort] = {}
        self.timers = HrtimerQueue(_softcpu.clock_ns)
        self.timer_thread: HrtimerThread | None = None

    @property
    def intercepts_hypercalls(self) -> bool:
        """Whether hypercalls are Xen's, and the page for them is KVM's."""
        return bool(self.config.msr and self.config.flags & abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL)

    @property
    def layout(self) -> Layout:
        """Where fields of the guest's structures are."""
        return LONG if self.long_mode else COMPAT


@dataclass(eq=False, slots=True)
class XenVcpu:
    """One vCPU's."""

    #: How the guest numbers it: at first as KVM has, in the order of creation.
    vcpu_id: int = 0
    vcpu_info: GuestArea | None = None
    time_info: GuestArea | None = None
    #: The vector of its own upcalls, as its local APIC takes them; 0: the VM's.
    upcall_vector: int = 0
    #: What is to be marked in the guest's ``vcpu_info``, which was not there; under the vCPU's ``request_lock``.
    pending_sel: int = 0

    # Runstate
    runstate_area: GuestArea | None = None
    runstate: int = abi.RUNSTATE_running
    runstate_entry_time: int = 0
    runstate_times: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    #: How long the thread that ran it last had waited for a processor by then.
    last_steal: int = 0

    # SCHEDOP_poll
    polling: bool = False
    poll_port: int = 0
    poll_timer: Hrtimer | None = None

    # The one-shot timer, in the guest's nanoseconds
    timer_lock: threading.Lock = field(default_factory=threading.Lock)
    timer: Hrtimer | None = None
    timer_port: int = 0
    timer_expires: int = 0
    #: The same on the queue's clock.
    timer_deadline: int = 0
