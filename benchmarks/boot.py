# SPDX-License-Identifier: Apache-2.0
"""Boot of the default guest: to the kernel's first line, to init, to power-off; wall and processor time.

All sides get the same kernel, initrd, command line, memory and vCPUs. ``exec`` is QEMU on our KVM, under
``softkvm exec``. Aim: at most twice the time that QEMU's TCG takes to power-off.
"""

from __future__ import annotations

from typing import Any

from benchmarks import common
from softkvm.progress import TerminalProgress
from softkvm.vmm.guest import GuestUnavailable, prepare

MILESTONES = {"kernel_s": r"Linux version \S+", "init_s": "softkvm: init reached"}
FIGURES = (*MILESTONES, "power_off_s", "cpu_s")


def measure() -> None:
    """Boot, print, save."""
    parser = common.arguments(__doc__ or "", runs=5)
    parser.add_argument("--vcpus", default="1,2", help="comma-separated (default: 1,2)")
    args = parser.parse_args()
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        raise common.BenchmarkError(str(error)) from None
    results: dict[str, Any] = {}
    rows = []
    for vcpus in map(int, args.vcpus.split(",")):
        image = common.Image(guest.kernel, guest.initrd, f'{guest.command_line} softkvm.run="true"', vcpus=vcpus)
        medians: dict[str, dict[str, float]] = {}
        for side in common.chosen_sides(args, (common.SOFTKVM, common.EXEC, common.QEMU)):
            runs = [_figures(common.run(side, image)) for _ in range(args.runs)]
            medians[side] = {name: common.median(run[name] for run in runs) for name in runs[0]}
            rows.append((f"{side}, {vcpus} vCPU", *(common.number(medians[side].get(name), 2) for name in FIGURES)))
        results[f"{vcpus} vcpus"] = medians
        theirs = medians.get(common.QEMU, {})
        for side, ours in medians.items():
            if theirs and side != common.QEMU:
                rows.append((f"  ratio, {side}", *(common.ratio(ours[name], theirs[name]) for name in FIGURES)))
    common.table(f"Boot of {guest.kernel_package}, seconds", ("", "kernel", "init", "power-off", "CPU"), rows)
    common.save("boot", {"guest": guest.kernel_package, "runs": args.runs, "seconds": results})


def _figures(run: common.Run) -> dict[str, float]:
    figures = {name: run.first(pattern) for name, pattern in MILESTONES.items()}
    figures |= {"power_off_s": run.wall_s, "cpu_s": run.cpu_s}
    if run.stats.get("instructions"):
        figures["instructions"] = run.stats["instructions"]
    return figures


if __name__ == "__main__":
    common.main(measure)
