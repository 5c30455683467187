# SPDX-License-Identifier: Apache-2.0
"""HVCALL_FLUSH_VIRTUAL_ADDRESS_*: the guest has changed its page tables, for many processors at once (TLFS, 9.4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import _softcpu, abi
from softkvm.abi.sizes import Size
from softkvm.kvm.memory.pages import PAGE_SHIFT
from softkvm.kvm.x86.hyperv.call import Call
from softkvm.kvm.x86.hyperv.vp_set import VpSet
from softkvm.kvm.x86.svm.svm import ASID_GUEST

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_INVALID: Final = abi.HV_STATUS_INVALID_HYPERCALL_INPUT
_EX: Final = (abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX)
_LISTS: Final = (abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX)
#: A longer list is a flush of everything (the kernel keeps 16 entries for each processor, one of which means that).
_RANGES: Final = Size(
    "rep_count of HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST",
    15,
    None,
    element=8,
    giver="guest",
    effect="everything is flushed",
    where=__name__,
)


class GvaRange(NamedTuple):
    """Pages to flush: the first one's linear address, and how many."""

    gva: int
    pages: int


def flush_virtual_address(vcpu: Vcpu, call: Call) -> int:
    """Any of the four calls. All of a list is done at once: "reps completed" is what was asked for.

    Which address space is meant doesn't matter: a running processor's CR3 isn't known.
    """
    extended = call.code in _EX
    words = call.words(vcpu, 0, 4 if extended else 3)
    if words is None:
        return _INVALID
    done = abi.HV_STATUS_SUCCESS | call.rep_count << abi.HV_HYPERCALL_REP_COMP_OFFSET
    flags = words[1]
    targets: Sequence[Vcpu] = vcpu.vm.vcpus
    list_at = 3
    if not extended:
        # Windows Server 2012 names no processor when it means all.
        if words[2] and not flags & abi.HV_FLUSH_ALL_PROCESSORS:
            targets = VpSet({0: words[2]}).members(vcpu.vm)
    else:
        kind, valid_banks = words[2:]
        if call.var_count != valid_banks.bit_count():
            return _INVALID
        if kind == abi.HV_GENERIC_SET_SPARSE_4K:
            if not valid_banks:
                return done
            named = VpSet.read(vcpu, call, 4, valid_banks)
            if named is None:
                return _INVALID
            targets = named.members(vcpu.vm)
        list_at = 4 + call.var_count
    ranges = None
    if call.code in _LISTS and _RANGES.allows(call.rep_count):
        entries = call.words(vcpu, list_at, call.rep_count)
        if entries is None:
            return _INVALID
        if not flags & abi.HV_FLUSH_USE_EXTENDED_RANGE_FORMAT:
            ranges = [GvaRange(entry & ~0xFFF, (entry & 0xFFF) + 1) for entry in entries]
    flush_guest_tlbs(targets, ranges)
    return done


def flush_guest_tlbs(vcpus: Sequence[Vcpu], ranges: Sequence[GvaRange] | None) -> None:
    """Flush *ranges* of linear addresses, or all of them, on some processors; returns when that is so.

    None of them leaves its guest for it, and nested translations stay (INVLPGB's way, APM vol. 3).
    """
    pages = None if ranges is None else [(gva >> PAGE_SHIFT, pages) for gva, pages in ranges]
    _softcpu.flush_linear([vcpu.cpu for vcpu in vcpus], ASID_GUEST, pages)
    for vcpu in vcpus:
        vcpu.stat_tlb_flush += 1
