# SPDX-License-Identifier: Apache-2.0
"""Segments of guests that more than one kind of test sets up."""

from __future__ import annotations

from softkvm import abi


def enter_ring_3(sregs: abi.kvm_sregs, segments: tuple[str, ...] = ("cs", "ss")) -> None:
    """Make code and stack, or the given *segments*, user's: descriptors' and selectors' privilege level 3."""
    for name in segments:
        segment: abi.kvm_segment = getattr(sregs, name)
        segment.dpl, segment.selector = 3, segment.selector | 3
