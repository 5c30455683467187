# SPDX-License-Identifier: Apache-2.0
"""How long the arrays of x86's requests may be whose checks are in more than one place (:mod:`softkvm.abi.sizes`)."""

from __future__ import annotations

import ctypes
import errno
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.abi.x86.msr import (
    KVM_MSR_FILTER_MAX_BITMAP_SIZE,
    KVM_MSR_FILTER_MAX_RANGES,
    kvm_msr_entry,
    kvm_msr_filter_range,
)
from softkvm.abi.x86.nested import kvm_nested_state
from softkvm.abi.x86.processor import (
    KVM_MAX_XCRS,
    KVM_PMU_EVENT_FILTER_MAX_EVENTS,
    kvm_cpuid_entry2,
    kvm_xcr,
    kvm_xsave,
)

#: KVM_GET_MSRS and KVM_SET_MSRS take fewer than MAX_IO_MSRS, 256.
NMSRS: Final = Size("kvm_msrs.nmsrs", 255, errno.E2BIG, element=ctypes.sizeof(kvm_msr_entry), where=__name__)
FILTER_RANGES: Final = Size(
    "kvm_msr_filter.ranges",
    KVM_MSR_FILTER_MAX_RANGES,
    errno.EINVAL,
    element=ctypes.sizeof(kvm_msr_filter_range),
    where=__name__,
)
#: A bit for each MSR, in whole bytes.
FILTER_MSRS: Final = Size(
    "kvm_msr_filter_range.nmsrs", 8 * KVM_MSR_FILTER_MAX_BITMAP_SIZE, errno.EINVAL, where=__name__
)
#: KVM_MAX_CPUID_ENTRIES.
CPUID_ENTRIES: Final = Size(
    "CPUID entries of a vCPU", 256, errno.E2BIG, element=ctypes.sizeof(kvm_cpuid_entry2), where=__name__
)
XCRS: Final = Size("kvm_xcrs.nr_xcrs", KVM_MAX_XCRS, errno.EINVAL, element=ctypes.sizeof(kvm_xcr), where=__name__)
PMU_EVENTS: Final = Size(
    "kvm_pmu_event_filter.nevents", KVM_PMU_EVENT_FILTER_MAX_EVENTS, errno.E2BIG, element=8, where=__name__
)
#: KVM_CAP_XSAVE2; with AMX it is 11008.
XSAVE_BYTES: Final = Size(
    "bytes of KVM_GET_XSAVE2's area",
    1 << 16,
    None,
    least=ctypes.sizeof(kvm_xsave),
    giver="kernel",
    effect="no processor has more state",
    where=__name__,
)
#: Header and data; a state without a nested guest's has no data, and whatever is behind it isn't looked at.
NESTED_BYTES: Final = Size(
    "kvm_nested_state.size",
    (1 << 32) - 1,
    errno.EINVAL,
    least=ctypes.sizeof(kvm_nested_state),
    where=__name__,
)
#: Two pages of VMX's behind the header.
NESTED_ROOM: Final = Size(
    "bytes of KVM_GET_NESTED_STATE's state", 1 << 14, None, giver="kernel", effect="E2BIG", where=__name__
)
