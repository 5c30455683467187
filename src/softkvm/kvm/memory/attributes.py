# SPDX-License-Identifier: Apache-2.0
"""Attributes of guest frames: which are private (KVM API, KVM_SET_MEMORY_ATTRIBUTES; ``kvm->mem_attr_array``)."""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from softkvm.abi import kvm_memory_attributes


_U64: Final = (1 << 64) - 1
#: The range must not wrap.
_BYTES: Final = Size("kvm_memory_attributes.size", _U64, errno.EINVAL, least=1, where=__name__)


class PrivateFrames:
    """A set of frames, as the ends of its ranges: in it are those that an odd number of ends lie at or before.

    Readers take no lock: a change makes a new list.
    """

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        self._ends: list[int] = []

    def __contains__(self, gfn: int) -> bool:
        return bool(bisect_right(self._ends, gfn) & 1)

    def are_alike(self, start: int, end: int) -> bool:
        """Tell whether all frames of [start, end) are in it, or none is."""
        ends = self._ends
        return bisect_right(ends, start) == bisect_left(ends, end)

    def set(self, start: int, end: int, *, private: bool) -> None:
        """Put the frames [start, end) in, or take them out."""
        ends = self._ends
        first, last = bisect_left(ends, start), bisect_right(ends, end)
        # An end stays, or comes, where what is before or behind differs from what is in the middle.
        middle = [start] if bool(first & 1) != private else []
        middle += [end] if bool(last & 1) != private else []
        self._ends = [*ends[:first], *middle, *ends[last:]]


def check(attributes: kvm_memory_attributes, supported: int) -> tuple[int, int]:
    """Return the frames [start, end) that *attributes* is about; EINVAL unless they are within *supported* ones."""
    if attributes.flags:
        raise kvm_error(errno.EINVAL, f"flags={attributes.flags:#x}, expected 0")
    if attributes.attributes & ~supported:
        raise kvm_error(errno.EINVAL, f"attributes={attributes.attributes:#x}, expected within {supported:#x}")
    start, size = attributes.address, attributes.size
    _BYTES.check(size, room=_U64 - start)
    if (start | size) & (PAGE_SIZE - 1):
        raise kvm_error(errno.EINVAL, f"address={start:#x} size={size:#x}, expected multiples of {PAGE_SIZE}")
    return start >> PAGE_SHIFT, start + size >> PAGE_SHIFT


def is_private(attributes: kvm_memory_attributes) -> bool:
    """Tell whether *attributes* makes frames private."""
    return bool(attributes.attributes & abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
