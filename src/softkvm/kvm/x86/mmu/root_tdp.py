# SPDX-License-Identifier: Apache-2.0
"""x86's remote TLB flushes: by the silicon, for the nested root that all of a VM's vCPUs have in common (``hv_tlb.c``).

A vCPU's root is known from when it loads it, at its first KVM_RUN; a VM's is the one that all have loaded, or
INVALID_PAGE while that isn't known. Then the vCPUs' roots are flushed one after the other, each once; those that have
none are left out, so a VM that has never run costs nothing; and the first failure ends it. With one root for all (there
is no nesting) that happens once.

The operation itself is ``vm.flush_guest_mapping``: it takes a root and a list of ranges, None for all, and tells
whether it could. It is the silicon's here. Where KVM is itself a guest of Hyper-V's it is a hypercall
(HvFlushGuestPhysicalAddressSpace and -List, with the root as the address space); a guest of ours that runs one with its
nested root will come to :func:`flush_remote_tlbs_range` the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from softkvm import _softcpu

if TYPE_CHECKING:
    from softkvm.kvm.tlb import TlbRange
    from softkvm.kvm.x86.state import VcpuState, VmState

#: No table's address.
INVALID_PAGE: Final = (1 << 64) - 1

#: Has the processors that use a root forget ranges of frames, None for all of them; False if it can't.
FlushGuestMapping: TypeAlias = "Callable[[VmState, int, Sequence[TlbRange] | None], bool]"


def flush_by_silicon(vm: VmState, root: int, ranges: Sequence[TlbRange] | None) -> bool:
    """Let the silicon do it, between two of the guest's instructions (INVLPGB's way, APM vol. 3)."""
    if ranges is not None and len(ranges) > _softcpu.FLUSH_MAX_RANGES:
        return False
    _softcpu.flush_physical([vcpu.cpu for vcpu in vm.vcpus if vcpu.root_tdp == root], ranges)
    return True


def load_root_tdp(vcpu: VcpuState) -> None:
    """Let the vCPU's processor use the VM's nested tables, and remember which those are."""
    vm = vcpu.vm
    root = vm.mmu.root_address
    with vm.remote_tlbs.lock:
        vcpu.load_root_tdp(root)
        if root != vm.root_tdp:
            vm.root_tdp = INVALID_PAGE


def flush_remote_tlbs_range(vm: VmState, ranges: Sequence[TlbRange] | None) -> bool:
    """Flush ranges of frames, None for all, of every root that a vCPU has loaded; False if one of them failed.

    With the lock of ``vm.remote_tlbs`` held.
    """
    if vm.root_tdp != INVALID_PAGE:
        return vm.flush_guest_mapping(vm, vm.root_tdp, ranges)
    done = True
    roots: list[int] = []
    for vcpu in vm.vcpus:
        root = vcpu.root_tdp
        if root == INVALID_PAGE or root in roots:
            continue
        roots.append(root)
        if done:
            done = vm.flush_guest_mapping(vm, root, ranges)
        if not done and len(roots) > 1:
            break  # there is no common root, and everything will be flushed by request
    if len(roots) == 1:
        vm.root_tdp = roots[0]
    return done
