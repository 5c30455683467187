# SPDX-License-Identifier: Apache-2.0
"""What vCPUs of every architecture have: their multiprocessing state, the signal mask (KVM API 4.38, 4.39, 4.21)."""

from ctypes import Structure

from softkvm.abi._layout import layout, u32

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4
KVM_MP_STATE_STOPPED = 5
KVM_MP_STATE_CHECK_STOP = 6
KVM_MP_STATE_OPERATING = 7
KVM_MP_STATE_LOAD = 8
KVM_MP_STATE_AP_RESET_HOLD = 9
KVM_MP_STATE_SUSPENDED = 10


@layout
class kvm_mp_state(Structure):
    mp_state: u32


@layout
class kvm_signal_mask(Structure):
    """Header of KVM_SET_SIGNAL_MASK, followed by ``len`` bytes of signal set (8 on x86)."""

    len: u32
