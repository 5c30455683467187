# SPDX-License-Identifier: Apache-2.0
"""Guests to boot when none is given: Debian's kernel with busybox, or the built-in demonstration guest."""

from softkvm.vmm.guest.default import Guest, cache_directory, cached, prepare
from softkvm.vmm.guest.demo import demo_kernel
from softkvm.vmm.guest.errors import GuestUnavailable

__all__ = [
    "Guest",
    "GuestUnavailable",
    "cache_directory",
    "cached",
    "demo_kernel",
    "prepare",
]
