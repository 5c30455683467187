# SPDX-License-Identifier: Apache-2.0
"""``struct kvm_run`` of x86: the general exits and KVM_EXIT_DEBUG's registers (KVM API, section 5)."""

from ctypes import Structure, Union
from typing import Annotated

from softkvm.abi._layout import chars, layout, u64
from softkvm.abi.run import SYNC_REGS_SIZE_BYTES, kvm_run_exits, kvm_run_page
from softkvm.abi.x86.processor import kvm_debug_exit_arch, kvm_sync_regs

KVM_EXIT_HYPERCALL_LONG_MODE = 1 << 0


@layout
class kvm_run_debug(Structure):
    arch: kvm_debug_exit_arch


@layout
class kvm_run_exit(kvm_run_exits):
    """What ``exit_reason`` tells to look at."""

    debug: kvm_run_debug


@layout
class kvm_run_sync(Union):
    regs: kvm_sync_regs
    padding: Annotated[chars, SYNC_REGS_SIZE_BYTES]


@layout
class kvm_run(kvm_run_page):
    """The page that a vCPU shares with its client."""

    _anonymous_ = ("exit",)
    exit: kvm_run_exit
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    s: kvm_run_sync
