# SPDX-License-Identifier: Apache-2.0
"""Xen's interfaces: what userspace says to KVM (``<asm/kvm.h>``), and what Xen's public headers have for guests.

The guest's structures are here as sizes and offsets by the name of their field: they differ by the guest's width
(:mod:`softkvm.kvm.x86.xen.layout` has them together), and KVM accesses single fields.
"""

from ctypes import Structure, Union
from typing import Annotated

from softkvm.abi._layout import layout, s32, u8, u8s, u16, u16s, u32, u32s, u64, u64s

# KVM_CAP_XEN_HVM, and the flags of KVM_XEN_HVM_CONFIG
KVM_XEN_HVM_CONFIG_HYPERCALL_MSR = 1 << 0
KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL = 1 << 1
KVM_XEN_HVM_CONFIG_SHARED_INFO = 1 << 2
KVM_XEN_HVM_CONFIG_RUNSTATE = 1 << 3
KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL = 1 << 4
KVM_XEN_HVM_CONFIG_EVTCHN_SEND = 1 << 5
KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG = 1 << 6
KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE = 1 << 7
KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA = 1 << 8

# kvm_xen_hvm_attr.type
KVM_XEN_ATTR_TYPE_LONG_MODE = 0x0
KVM_XEN_ATTR_TYPE_SHARED_INFO = 0x1
KVM_XEN_ATTR_TYPE_UPCALL_VECTOR = 0x2
KVM_XEN_ATTR_TYPE_EVTCHN = 0x3
KVM_XEN_ATTR_TYPE_XEN_VERSION = 0x4
KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG = 0x5
KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA = 0x6

# kvm_xen_hvm_attr.u.evtchn.flags
KVM_XEN_EVTCHN_DEASSIGN = 1 << 0
KVM_XEN_EVTCHN_UPDATE = 1 << 1
KVM_XEN_EVTCHN_RESET = 1 << 2

# kvm_xen_vcpu_attr.type
KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO = 0x0
KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO = 0x1
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR = 0x2
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT = 0x3
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA = 0x4
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST = 0x5
KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID = 0x6
KVM_XEN_VCPU_ATTR_TYPE_TIMER = 0x7
KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR = 0x8
KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA = 0x9

#: No frame, or address: what was there is taken away.
KVM_XEN_INVALID_GFN = (1 << 64) - 1
KVM_XEN_INVALID_GPA = (1 << 64) - 1


@layout
class kvm_xen_hvm_config(Structure):
    """KVM_XEN_HVM_CONFIG: the MSR that places the hypercall page, and pages of userspace's own for it."""

    flags: u32
    msr: u32
    blob_addr_32: u64
    blob_addr_64: u64
    blob_size_32: u8
    blob_size_64: u8
    pad2: Annotated[u8s, 30]


@layout
class kvm_xen_attr_shared_info(Union):
    gfn: u64
    hva: u64


@layout
class kvm_xen_attr_evtchn_port(Structure):
    port: u32
    vcpu: u32
    priority: u32


@layout
class kvm_xen_attr_evtchn_eventfd(Structure):
    """``port`` is 0."""

    port: u32
    fd: s32


@layout
class kvm_xen_attr_evtchn_deliver(Union):
    port: kvm_xen_attr_evtchn_port
    eventfd: kvm_xen_attr_evtchn_eventfd
    padding: Annotated[u32s, 4]


@layout
class kvm_xen_attr_evtchn(Structure):
    """What a port of the guest's leads to: another port of its own, or an eventfd. ``type`` is an EVTCHNSTAT_*."""

    send_port: u32
    type: u32
    flags: u32
    deliver: kvm_xen_attr_evtchn_deliver


@layout
class kvm_xen_hvm_attr_u(Union):
    long_mode: u8
    vector: u8
    runstate_update_flag: u8
    shared_info: kvm_xen_attr_shared_info
    evtchn: kvm_xen_attr_evtchn
    xen_version: u32
    pad: Annotated[u64s, 8]


@layout
class kvm_xen_hvm_attr(Structure):
    """KVM_XEN_HVM_SET_ATTR, KVM_XEN_HVM_GET_ATTR: ``type`` is a KVM_XEN_ATTR_TYPE_*."""

    type: u16
    pad: Annotated[u16s, 3]
    u: kvm_xen_hvm_attr_u


@layout
class kvm_xen_attr_runstate(Structure):
    state: u64
    state_entry_time: u64
    time_running: u64
    time_runnable: u64
    time_blocked: u64
    time_offline: u64


@layout
class kvm_xen_attr_timer(Structure):
    port: u32
    priority: u32
    expires_ns: u64


@layout
class kvm_xen_vcpu_attr_u(Union):
    gpa: u64
    hva: u64
    pad: Annotated[u64s, 8]
    runstate: kvm_xen_attr_runstate
    vcpu_id: u32
    timer: kvm_xen_attr_timer
    vector: u8


@layout
class kvm_xen_vcpu_attr(Structure):
    """KVM_XEN_VCPU_SET_ATTR, KVM_XEN_VCPU_GET_ATTR: ``type`` is a KVM_XEN_VCPU_ATTR_TYPE_*."""

    type: u16
    pad: Annotated[u16s, 3]
    u: kvm_xen_vcpu_attr_u


# --- Xen's public headers ----------------------------------------------------------------------------------

XEN_SIGNATURE = b"XenVMMXenVMM"

# Hypercalls (__HYPERVISOR_*) and their commands
HYPERVISOR_set_timer_op = 15
HYPERVISOR_xen_version = 17
HYPERVISOR_vcpu_op = 24
HYPERVISOR_sched_op = 29
HYPERVISOR_event_channel_op = 32

XENVER_version = 0
SCHEDOP_yield = 0
SCHEDOP_block = 1
SCHEDOP_poll = 3
VCPUOP_set_singleshot_timer = 8
VCPUOP_stop_singleshot_timer = 9
EVTCHNOP_send = 4

# States of an event channel
EVTCHNSTAT_closed = 0
EVTCHNSTAT_unbound = 1
EVTCHNSTAT_interdomain = 2
EVTCHNSTAT_pirq = 3
EVTCHNSTAT_virq = 4
EVTCHNSTAT_ipi = 5

# vcpu_runstate_info.state
RUNSTATE_running = 0
RUNSTATE_runnable = 1
RUNSTATE_blocked = 2
RUNSTATE_offline = 3
#: Bit of vcpu_runstate_info.state_entry_time: the structure is being written.
XEN_RUNSTATE_UPDATE = 1 << 63
