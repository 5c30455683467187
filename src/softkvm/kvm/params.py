# SPDX-License-Identifier: Apache-2.0
"""Module parameters of kvm and kvm_amd, with the kernel's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields

#: How a module parameter that is yes or no is spelled.
ON = ("1", "Y", "y")
OFF = ("0", "N", "n")

USHORT_MAX, UINT_MAX = (1 << 16) - 1, (1 << 32) - 1

#: The least and the greatest value of a number that isn't an unsigned int, by the kernel's types.
LIMITS = {
    "pause_filter_count": (0, USHORT_MAX),
    "pause_filter_thresh": (0, USHORT_MAX),
    "pause_filter_count_grow": (0, USHORT_MAX),
    "pause_filter_count_max": (0, USHORT_MAX),
    "pause_filter_count_shrink": (0, USHORT_MAX),
    "max_huge_page_level": (1, 3),
    "pte_prefetch_num": (1, 512),
}


@dataclass(slots=True)
class Params:
    """What ``/sys/module/kvm*/parameters`` holds, as far as it means something here."""

    #: Advance RIP by the VMCB's NEXT_RIP; otherwise by the decoded length of the instruction.
    nrips: bool = True
    #: Let the processor virtualize local APICs that are in the kernel (AVIC, and x2AVIC).
    avic: bool = True
    #: PAUSEs that retire before VMEXIT_PAUSE; 0: PAUSE stays in the guest.
    pause_filter_count: int = 3000
    #: Cycles, for the silicon instructions, since the last PAUSE after which that number starts anew; 0: PAUSE stays in
    #: the guest.
    pause_filter_thresh: int = 128
    #: Factor by which the number grows with each such exit, up to the maximum; 0: it is ``pause_filter_count`` again.
    #: One that is not less than ``pause_filter_count`` is added instead.
    pause_filter_count_grow: int = 2
    pause_filter_count_max: int = 0xFFFF
    #: Divisor by which it shrinks when the vCPU has slept, to ``pause_filter_count`` at least; 0: to that at once. One
    #: that is not less than ``pause_filter_count`` is taken off instead.
    pause_filter_count_shrink: int = 0
    #: Unknown MSRs read as zero and ignore writes instead of raising #GP.
    ignore_msrs: bool = False
    #: Log the accesses that ``ignore_msrs`` lets pass.
    report_ignored_msrs: bool = True
    #: Handle the forced-emulation prefix (UD2 followed by the letters ``kvm``).
    force_emulation_prefix: bool = False
    #: Largest nested leaf: 1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB.
    max_huge_page_level: int = 3
    #: How many small pages a nested fault maps, those around the missing one with it: a power of 2. (The kernel's
    #: PTE_PREFETCH_NUM is 8, and no parameter.) A mapping costs no host memory until the guest uses it.
    pte_prefetch_num: int = 64
    #: Cache MMIO in nested page-table entries.
    enable_mmio_caching: bool = True
    #: Guests have performance counters.
    enable_pmu: bool = True
    #: Program a counter anew at each overflow and each change of a register, whether or not that makes a difference, as
    #: kernels did: to measure what it costs (``softkvm bench pmu``).
    pmu_reprogram_always: bool = False
    #: Answer the VMware backdoor ports.
    enable_vmware_backdoor: bool = False
    #: Longest that a halted vCPU waits awake before its thread sleeps, in ns; 0: never. The kernel's default is 200 us;
    #: see :mod:`.halt_poll` for why this one isn't.
    halt_poll_ns: int = 0
    #: Factor by which that wait grows, from ``halt_poll_ns_grow_start`` ns on; 0: it doesn't.
    halt_poll_ns_grow: int = 2
    halt_poll_ns_grow_start: int = 10_000
    #: Divisor by which the wait shrinks; 0: to nothing at once.
    halt_poll_ns_shrink: int = 2
    #: Smallest period of an in-kernel timer, in microseconds.
    min_timer_period_us: int = 200

    def parse(self, name: str, text: str) -> bool | int | str:
        """Return the value that *text* means for a parameter; ValueError if it means none, or there is no such one."""
        if name not in {field.name for field in fields(self)}:
            known = ", ".join(sorted(field.name for field in fields(self)))
            raise ValueError(f"{name}={text}: no such parameter; there are {known}")
        current = getattr(self, name)
        if isinstance(current, bool):
            if text not in ON + OFF:
                raise ValueError(f"{name}={text}: expected Y or N")
            return text in ON
        if isinstance(current, int):
            try:
                number = int(text, 0)
            except ValueError:
                raise ValueError(f"{name}={text}: expected a number") from None
            least, greatest = LIMITS.get(name, (0, UINT_MAX))
            if not least <= number <= greatest:
                raise ValueError(f"{name}={text}: expected a number from {least} to {greatest}")
            if name == "pte_prefetch_num" and number & (number - 1):
                raise ValueError(f"{name}={text}: expected a power of 2")
            return number
        return text

    def assign(self, name: str, text: str) -> None:
        """Set a parameter as a line of ``/etc/modprobe.d`` does; ValueError as :meth:`parse` raises it."""
        setattr(self, name, self.parse(name, text))
