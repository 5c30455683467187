# SPDX-License-Identifier: Apache-2.0
"""Interrupts: GSI routing, MSIs, eventfds (KVM API, section 4)."""

from ctypes import Structure, Union
from typing import Annotated

from softkvm.abi._layout import layout, s32, u8s, u32, u32s, u64

KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_IRQ_ROUTING_S390_ADAPTER = 3
KVM_IRQ_ROUTING_HV_SINT = 4
KVM_IRQ_ROUTING_XEN_EVTCHN = 5
KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL = 0xFFFFFFFF

KVM_MSI_VALID_DEVID = 1 << 0

KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1

KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY = 1 << 3
KVM_IOEVENTFD_FLAG_FAST_MMIO = 1 << 4
KVM_IOEVENTFD_VALID_FLAG_MASK = (1 << 5) - 1


@layout
class _irq_or_status(Union):
    irq: u32
    status: s32


@layout
class kvm_irq_level(Structure):
    """KVM_IRQ_LINE(_STATUS): ``irq`` is a GSI, ``status`` comes back from the second."""

    _anonymous_ = ("_u",)
    _u: _irq_or_status
    level: u32


@layout
class kvm_irq_routing_irqchip(Structure):
    irqchip: u32
    pin: u32


@layout
class _pad_or_devid(Union):
    pad: u32
    devid: u32


@layout
class kvm_irq_routing_msi(Structure):
    _anonymous_ = ("_u",)
    address_lo: u32
    address_hi: u32
    data: u32
    _u: _pad_or_devid


@layout
class kvm_irq_routing_s390_adapter(Structure):
    ind_addr: u64
    summary_addr: u64
    ind_offset: u64
    summary_offset: u32
    adapter_id: u32


@layout
class kvm_irq_routing_hv_sint(Structure):
    vcpu: u32
    sint: u32


@layout
class kvm_irq_routing_xen_evtchn(Structure):
    port: u32
    vcpu: u32
    priority: u32


@layout
class kvm_irq_routing_target(Union):
    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    adapter: kvm_irq_routing_s390_adapter
    hv_sint: kvm_irq_routing_hv_sint
    xen_evtchn: kvm_irq_routing_xen_evtchn
    pad: Annotated[u32s, 8]


@layout
class kvm_irq_routing_entry(Structure):
    """One row of the GSI routing table; ``type`` is a KVM_IRQ_ROUTING_* number."""

    gsi: u32
    type: u32
    flags: u32
    pad: u32
    u: kvm_irq_routing_target


@layout
class kvm_irq_routing(Structure):
    """Header of KVM_SET_GSI_ROUTING; see :func:`softkvm.abi.flexible`."""

    nr: u32
    flags: u32


@layout
class kvm_msi(Structure):
    address_lo: u32
    address_hi: u32
    data: u32
    flags: u32
    devid: u32
    pad: Annotated[u8s, 12]


@layout
class kvm_interrupt(Structure):
    irq: u32


@layout
class kvm_irqfd(Structure):
    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: Annotated[u8s, 16]


@layout
class kvm_ioeventfd(Structure):
    datamatch: u64
    addr: u64
    len: u32
    fd: s32
    flags: u32
    pad: Annotated[u8s, 36]
