# SPDX-License-Identifier: Apache-2.0
"""The in-kernel interrupt chips of x86: i8259, IOAPIC, local APIC, i8254 (KVM API, section 4)."""

from ctypes import Array, Structure, Union
from typing import Annotated

from softkvm.abi._layout import Bits, chars, layout, s32, s64, u8, u8s, u16, u32, u32s, u64

KVM_NR_INTERRUPTS = 256
KVM_IOAPIC_NUM_PINS = 24
KVM_APIC_REG_SIZE = 0x400

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_NR_IRQCHIPS = 3

KVM_PIT_SPEAKER_DUMMY = 1
KVM_PIT_FLAGS_HPET_LEGACY = 0x1
KVM_PIT_FLAGS_SPEAKER_DATA_ON = 0x2

KVM_X2APIC_API_USE_32BIT_IDS = 1 << 0
KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK = 1 << 1


@layout
class kvm_pic_state(Structure):
    """One i8259."""

    last_irr: u8
    irr: u8
    imr: u8
    isr: u8
    priority_add: u8
    irq_base: u8
    read_reg_select: u8
    poll: u8
    special_mask: u8
    init_state: u8
    auto_eoi: u8
    rotate_on_auto_eoi: u8
    special_fully_nested_mode: u8
    init4: u8
    elcr: u8
    elcr_mask: u8


@layout
class kvm_ioapic_redirect_fields(Structure):
    vector: u8
    delivery_mode: Annotated[u8, Bits(3)]
    dest_mode: Annotated[u8, Bits(1)]
    delivery_status: Annotated[u8, Bits(1)]
    polarity: Annotated[u8, Bits(1)]
    remote_irr: Annotated[u8, Bits(1)]
    trig_mode: Annotated[u8, Bits(1)]
    mask: Annotated[u8, Bits(1)]
    reserve: Annotated[u8, Bits(7)]
    reserved: Annotated[u8s, 4]
    dest_id: u8


@layout
class kvm_ioapic_redirect_entry(Union):
    bits: u64
    fields: kvm_ioapic_redirect_fields


@layout
class kvm_ioapic_state(Structure):
    base_address: u64
    ioregsel: u32
    id: u32
    irr: u32
    pad: u32
    redirtbl: Annotated[Array[kvm_ioapic_redirect_entry], kvm_ioapic_redirect_entry, KVM_IOAPIC_NUM_PINS]


@layout
class kvm_irqchip_state(Union):
    dummy: Annotated[chars, 512]
    pic: kvm_pic_state
    ioapic: kvm_ioapic_state


@layout
class kvm_irqchip(Structure):
    """KVM_GET_IRQCHIP and KVM_SET_IRQCHIP; ``chip_id`` is a KVM_IRQCHIP_* number."""

    chip_id: u32
    pad: u32
    chip: kvm_irqchip_state


@layout
class kvm_lapic_state(Structure):
    """The local APIC's register page: one 32-bit register at every multiple of 16."""

    regs: Annotated[u8s, KVM_APIC_REG_SIZE]


@layout
class kvm_pit_config(Structure):
    flags: u32
    pad: Annotated[u32s, 15]


@layout
class kvm_pit_channel_state(Structure):
    """One i8254 counter; ``count_load_time`` in nanoseconds."""

    count: u32
    latched_count: u16
    count_latched: u8
    status_latched: u8
    status: u8
    read_state: u8
    write_state: u8
    write_latch: u8
    rw_mode: u8
    mode: u8
    bcd: u8
    gate: u8
    count_load_time: s64


@layout
class kvm_pit_state(Structure):
    channels: Annotated[Array[kvm_pit_channel_state], kvm_pit_channel_state, 3]


@layout
class kvm_pit_state2(Structure):
    channels: Annotated[Array[kvm_pit_channel_state], kvm_pit_channel_state, 3]
    flags: u32
    reserved: Annotated[u32s, 9]


@layout
class kvm_reinject_control(Structure):
    pit_reinject: u8
    reserved: Annotated[u8s, 31]


@layout
class kvm_hyperv_eventfd(Structure):
    conn_id: u32
    fd: s32
    flags: u32
    padding: Annotated[u32s, 3]


KVM_HYPERV_CONN_ID_MASK = 0x00FFFFFF
KVM_HYPERV_EVENTFD_DEASSIGN = 1 << 0
