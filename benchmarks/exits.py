# SPDX-License-Identifier: Apache-2.0
"""Round trips: guest, silicon, KVM, for some the machine and its device, and back; timed by the guest.

CPUID and the local APIC end in KVM; IN, OUT and MMIO go to the machine. HLT: to itself by IPI, and how late a timer
wakes it. Aim: at most 5 us each. QEMU's TCG has no such exits (one process emulates all): its figures are the work.
"""

from __future__ import annotations

from typing import Any

from benchmarks import common

KERNELS = {
    "cpuid": "CPUID",
    "in": "IN (serial scratch register)",
    "out": "OUT (serial scratch register)",
    "mmio": "MMIO read, nobody there",
    "lapic": "local APIC read",
    "hlt-ipi": "self-IPI, HLT, wake",
    "hlt-timer": "HLT, lateness of a timer's wake",
    "ipi-pingpong": "IPI to a halted vCPU and back",
}
AIM_US = 5.0


def measure() -> None:
    """Run, print, save."""
    args = common.arguments(__doc__ or "", runs=5).parse_args()
    us: dict[str, dict[str, float]] = {}
    for side in common.chosen_sides(args):
        runs = [common.run_bench(side, list(KERNELS), vcpus=2)[0] for _ in range(args.runs)]
        us[side] = {name: common.median(run[name].ns / run[name].iterations / 1e3 for run in runs) for name in KERNELS}
    rows = []
    for name, title in KERNELS.items():
        ours, theirs = (us.get(side, {}).get(name) for side in (common.SOFTKVM, common.QEMU))
        rows.append((title, common.number(ours, 2), common.number(theirs, 2), common.number(AIM_US, 0)))
    common.table("Round trips, microseconds", ("", "softkvm", "QEMU", "aim"), rows)
    result: dict[str, Any] = {"runs": args.runs, "us": us}
    common.save("exits", result)


if __name__ == "__main__":
    common.main(measure)
