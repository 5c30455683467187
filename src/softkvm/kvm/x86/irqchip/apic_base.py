# SPDX-License-Identifier: Apache-2.0
"""IA32_APIC_BASE: its bits and modes (APM vol. 2, 16.3.1; SDM vol. 3, 11.4.4 and 11.12.5).

The rules are the processor's, so they hold wherever the local APIC is, in the kernel or in userspace.
"""

from __future__ import annotations

from softkvm.kvm.x86.irqchip.apicdef import (
    LAPIC_MODE_DISABLED,
    LAPIC_MODE_INVALID,
    LAPIC_MODE_X2APIC,
    LAPIC_MODE_XAPIC,
    MSR_IA32_APICBASE_BASE,
    MSR_IA32_APICBASE_BSP,
    MSR_IA32_APICBASE_ENABLE,
    X2APIC_ENABLE,
)


def valid_bits(maxphyaddr: int, *, x2apic: bool) -> int:
    """Return the bits that exist for a guest with that width of physical addresses, and with x2APIC or without."""
    valid = (1 << maxphyaddr) - 1 & MSR_IA32_APICBASE_BASE | MSR_IA32_APICBASE_BSP | MSR_IA32_APICBASE_ENABLE
    return valid | X2APIC_ENABLE if x2apic else valid


def may_load(old: int, new: int, valid: int, *, host: bool) -> bool:
    """Tell whether ``new`` may replace ``old``; False stands for #GP.

    A guest leaves x2APIC mode, and enters it, by way of the states that the manual's figure 11-27 has in between;
    userspace (``host``) restores any.
    """
    before, after = old & LAPIC_MODE_X2APIC, new & LAPIC_MODE_X2APIC
    if old == new:
        return True
    if new & ~valid or after == LAPIC_MODE_INVALID:
        return False
    return host or (before, after) not in (
        (LAPIC_MODE_X2APIC, LAPIC_MODE_XAPIC),
        (LAPIC_MODE_DISABLED, LAPIC_MODE_X2APIC),
    )
