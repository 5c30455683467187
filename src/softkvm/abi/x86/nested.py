# SPDX-License-Identifier: Apache-2.0
"""State of nested virtualization (KVM API 4.114 KVM_GET_NESTED_STATE)."""

from ctypes import Structure, Union
from typing import Annotated

from softkvm.abi._layout import layout, u8s, u16, u32, u64

KVM_STATE_NESTED_FORMAT_VMX = 0
KVM_STATE_NESTED_FORMAT_SVM = 1
KVM_STATE_NESTED_GUEST_MODE = 0x0001
KVM_STATE_NESTED_RUN_PENDING = 0x0002
KVM_STATE_NESTED_EVMCS = 0x0004
KVM_STATE_NESTED_MTF_PENDING = 0x0008
KVM_STATE_NESTED_GIF_SET = 0x0100
KVM_STATE_NESTED_SMM_GUEST_MODE = 0x0001
KVM_STATE_NESTED_SMM_VMXON = 0x0002
KVM_STATE_NESTED_VMX_VMCS_SIZE = 0x1000
KVM_STATE_NESTED_SVM_VMCB_SIZE = 0x1000
KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE = 0x0001


@layout
class kvm_vmx_nested_state_smm(Structure):
    flags: u16


@layout
class kvm_vmx_nested_state_hdr(Structure):
    vmxon_pa: u64
    vmcs12_pa: u64
    smm: kvm_vmx_nested_state_smm
    pad: u16
    flags: u32
    preemption_timer_deadline: u64


@layout
class kvm_vmx_nested_state_data(Structure):
    vmcs12: Annotated[u8s, KVM_STATE_NESTED_VMX_VMCS_SIZE]
    shadow_vmcs12: Annotated[u8s, KVM_STATE_NESTED_VMX_VMCS_SIZE]


@layout
class kvm_svm_nested_state_hdr(Structure):
    vmcb_pa: u64


@layout
class kvm_svm_nested_state_data(Structure):
    vmcb12: Annotated[u8s, KVM_STATE_NESTED_SVM_VMCB_SIZE]


@layout
class kvm_nested_state_hdr(Union):
    vmx: kvm_vmx_nested_state_hdr
    svm: kvm_svm_nested_state_hdr
    pad: Annotated[u8s, 120]


@layout
class kvm_nested_state(Structure):
    """Header of KVM_GET/SET_NESTED_STATE; ``size`` includes the data that follow it."""

    flags: u16
    format: u16
    size: u32
    hdr: kvm_nested_state_hdr
