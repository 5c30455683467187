# SPDX-License-Identifier: Apache-2.0
"""Millions of guest instructions per second on fixed kernels (``guests/bench``), timed by the guest's own clock.

The loops in assembly have a known number of instructions a round. The others are counted: the software CPU's exact
count with the kernel minus without it. Aims: 350 on the compiled code, 80 on the huge footprint.
"""

from __future__ import annotations

from typing import Any

from benchmarks import common

# Instructions a round; None: counted.
KERNELS: dict[str, int | None] = {
    "registers": 10,
    "loadstore": 9,
    "callret": 9,
    "compiled": None,
    "footprint": None,
    "pages": 65541,
}
AIMS = {"compiled": 350.0, "footprint": 80.0}


def measure() -> None:
    """Run, print, save."""
    args = common.arguments(__doc__ or "", runs=3).parse_args()
    sides = common.chosen_sides(args)
    results: dict[str, Any] = {}
    rows = []
    for name, known in KERNELS.items():
        ns: dict[str, float] = {}
        checksums = set()
        iterations = 0
        instructions = None
        for side in sides:
            runs = [common.run_bench(side, [name]) for _ in range(args.runs)]
            ns[side] = common.median(kernels[name].ns for kernels, _ in runs)
            iterations = runs[0][0][name].iterations
            checksums |= {kernels[name].checksum for kernels, _ in runs}
            counted = runs[0][1].stats.get("instructions")
            if counted:
                counted -= common.run_bench(side, [name], iterations=0)[1].stats["instructions"]
                instructions = counted
        if len(checksums) > 1:
            raise common.BenchmarkError(f"{name}: different checksums {', '.join(sorted(checksums))}")
        count = known * iterations if known else instructions
        mips = {side: count * 1e3 / ns[side] if count else None for side in sides}
        results[name] = {"iterations": iterations, "instructions": count, "ns": ns, "mips": mips}
        ours, theirs = mips.get(common.SOFTKVM), mips.get(common.QEMU)
        aim = AIMS.get(name)
        row = (common.number(count / 1e6 if count else None, 0), common.number(ours, 0), common.number(theirs, 0))
        rows.append((name, *row, common.ratio(ours, theirs), common.number(aim, 0)))
    header = ("kernel", "M instructions", "softkvm MIPS", "QEMU MIPS", "ratio", "aim")
    common.table("Guest instructions per second", header, rows)
    common.save("mips", {"runs": args.runs, "kernels": results})


if __name__ == "__main__":
    common.main(measure)
