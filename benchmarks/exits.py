# SPDX-License-Identifier: Apache-2.0
"""Round trips: guest, silicon, KVM, for some the machine and its device, and back; timed by the guest.

``softkvm bench vmexit`` with its own guest, in microseconds beside the aim of at most 5 us each. CPUID and the local
APIC end in KVM; IN, OUT and MMIO go to the machine. QEMU's TCG has no such exits (one process emulates all): its
figures are the work.
"""

from __future__ import annotations

from benchmarks import common
from softkvm import qemu
from softkvm.bench import vmexit
from softkvm.bench.sides import QemuSide, Side, SideError, SoftkvmSide

AIM_US = 5.0


def _us(kind: vmexit.Kind, side: str) -> float | None:
    figure = kind.figures.get(side)
    return None if figure is None or figure.ns is None else figure.ns / 1e3


def measure() -> None:
    """Run, print, save."""
    args = common.arguments(__doc__ or "", runs=5).parse_args()
    chosen = common.chosen_sides(args)
    try:
        sides: list[Side] = [SoftkvmSide()] if common.SOFTKVM in chosen else []
        if common.QEMU in chosen:
            sides.append(QemuSide(qemu.PROGRAM))
        report = vmexit.own_guest(sides, args.runs)
    except SideError as error:
        raise common.BenchmarkError(str(error)) from None
    rows = [
        (
            kind.what,
            *(common.number(_us(kind, side), 2) for side in (common.SOFTKVM, common.QEMU)),
            common.number(AIM_US, 0),
        )
        for kind in report.kinds
    ]
    common.table("Round trips, microseconds", ("", "softkvm", "QEMU", "aim"), rows)
    common.save("exits", report.as_dict())


if __name__ == "__main__":
    common.main(measure)
