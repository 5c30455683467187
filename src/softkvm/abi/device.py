# SPDX-License-Identifier: Apache-2.0
"""Devices of KVM_CREATE_DEVICE and attributes of all files (KVM API 4.79, 4.80)."""

from ctypes import Structure

from softkvm.abi._layout import layout, u32, u64

KVM_CREATE_DEVICE_TEST = 1
KVM_DEV_TYPE_FSL_MPIC_20 = 1
KVM_DEV_TYPE_FSL_MPIC_42 = 2
KVM_DEV_TYPE_XICS = 3
KVM_DEV_TYPE_VFIO = 4
KVM_DEV_TYPE_ARM_VGIC_V2 = 5
KVM_DEV_TYPE_FLIC = 6
KVM_DEV_TYPE_ARM_VGIC_V3 = 7
KVM_DEV_TYPE_ARM_VGIC_ITS = 8
KVM_DEV_TYPE_XIVE = 9
KVM_DEV_TYPE_ARM_PV_TIME = 10


@layout
class kvm_create_device(Structure):
    type: u32
    fd: u32
    flags: u32


@layout
class kvm_device_attr(Structure):
    flags: u32
    group: u32
    attr: u64
    addr: u64
