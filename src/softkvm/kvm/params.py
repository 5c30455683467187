# SPDX-License-Identifier: Apache-2.0
"""Module parameters of kvm and kvm_amd, with the kernel's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Params:
    """What ``/sys/module/kvm*/parameters`` holds, as far as it means something here."""

    #: Advance RIP by the VMCB's NEXT_RIP; otherwise by the decoded length of the instruction.
    nrips: bool = True
    #: Retired PAUSEs before VMEXIT_PAUSE; 0 switches the intercept off.
    pause_filter_count: int = 3000
    #: Unknown MSRs read as zero and ignore writes instead of raising #GP.
    ignore_msrs: bool = False
    #: Log the accesses that ``ignore_msrs`` lets pass.
    report_ignored_msrs: bool = True
    #: Handle the forced-emulation prefix (UD2 followed by the letters ``kvm``).
    force_emulation_prefix: bool = False
    #: Largest nested leaf: 1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB.
    max_huge_page_level: int = 3
    #: Split large leaves at once when dirty logging starts, instead of at the next write.
    eager_page_split: bool = True
    #: Cache MMIO in nested page-table entries.
    enable_mmio_caching: bool = True
    #: Answer the VMware backdoor ports.
    enable_vmware_backdoor: bool = False
    #: Smallest period of an in-kernel timer, in microseconds.
    min_timer_period_us: int = 200
