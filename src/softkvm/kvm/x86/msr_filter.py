# SPDX-License-Identifier: Apache-2.0
"""Which MSRs the guest may access: KVM_X86_SET_MSR_FILTER (KVM API 4.97)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from softkvm import abi
from softkvm.abi.x86 import request_sizes as sizes
from softkvm.kvm.errors import kvm_error

_RANGE_FLAGS: Final = abi.KVM_MSR_FILTER_READ | abi.KVM_MSR_FILTER_WRITE
_X2APIC_FIRST: Final = 0x800
_X2APIC_LAST: Final = 0x8FF


class MsrFilter:
    """Ranges of MSRs with a bit for each that is allowed, and what holds for the others.

    Raises ``OSError``: EINVAL for unknown flags, too many or too large ranges, and for a filter that denies
    everything; EFAULT for a bitmap that is too short.
    """

    __slots__ = ("_default", "_ranges")

    def __init__(self, flags: int, ranges: Sequence[abi.MsrFilterRange]) -> None:
        if flags & ~abi.KVM_MSR_FILTER_DEFAULT_DENY:
            raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected 0 or KVM_MSR_FILTER_DEFAULT_DENY")
        sizes.FILTER_RANGES.check(len(ranges))
        used = [part for part in ranges if part.nmsrs]
        self._default = not flags & abi.KVM_MSR_FILTER_DEFAULT_DENY
        if not self._default and not used:
            raise kvm_error(errno.EINVAL, "KVM_MSR_FILTER_DEFAULT_DENY without a range: no MSR would be left")
        self._ranges = tuple(map(_range, used))

    def allows(self, index: int, access: int) -> bool:
        """Tell whether the guest may do *access*, KVM_MSR_FILTER_READ or _WRITE; x2APIC registers always."""
        if _X2APIC_FIRST <= index <= _X2APIC_LAST:
            return True
        for flags, start, end, bitmap in self._ranges:
            if start <= index < end and flags & access:
                bit = index - start
                return bool(bitmap[bit >> 3] >> (bit & 7) & 1)
        return self._default


def _range(part: abi.MsrFilterRange) -> tuple[int, int, int, bytes]:
    """Return flags, first MSR, end and bitmap of one range; raises what KVM_X86_SET_MSR_FILTER says about it."""
    if not part.flags or part.flags & ~_RANGE_FLAGS:
        raise kvm_error(errno.EINVAL, f"flags={part.flags:#x} of a range, expected KVM_MSR_FILTER_READ|_WRITE")
    size = abi.msr_bitmap_bytes(sizes.FILTER_MSRS.check(part.nmsrs))
    if len(part.bitmap) < size:
        raise kvm_error(errno.EFAULT, f"bitmap of {len(part.bitmap)} bytes, expected {size}")
    return part.flags, part.base, part.base + part.nmsrs, bytes(part.bitmap)
