# SPDX-License-Identifier: Apache-2.0
"""Single registers by number (KVM API 4.68, 4.69, 4.84)."""

from ctypes import Structure

from softkvm.abi._layout import layout, u64


@layout
class kvm_one_reg(Structure):
    id: u64
    addr: u64


@layout
class kvm_reg_list(Structure):
    """Header of KVM_GET_REG_LIST, followed by ``u64 reg[n]``."""

    n: u64
