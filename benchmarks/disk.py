# SPDX-License-Identifier: Apache-2.0
"""A disk (virtio-blk on PCI) beside QEMU's: in order and at random, alone and eight at once, with and without a sync.

Both sides boot the default guest with one disk, a raw image in a temporary directory (or qcow2: ``--format``), and run
the same program in it (``disk.c``), which bypasses the guest's page cache. The guest's clock measures. Aim: at least
QEMU's rates.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks import common
from softkvm.progress import TerminalProgress
from softkvm.vmm.block.files import create_qcow2
from softkvm.vmm.guest import GuestUnavailable, prepare
from softkvm.vmm.guest.cpio import CpioWriter

_SOURCE = Path(__file__).with_suffix(".c")
SIZE = 256 << 20
#: What is done how often (MiB in order, blocks of 4 KiB at random), and by how many threads at once.
CASES: dict[str, tuple[int, int]] = {
    "sequential-write": (192, 1),
    "sequential-read": (192, 1),
    "random-write": (4000, 1),
    "random-read": (4000, 1),
    "random-write-8": (8000, 8),
    "random-read-8": (8000, 8),
    "sync": (500, 1),
}


def _initrd(directory: Path, base: bytes) -> Path:
    """The default guest's initramfs, and the program."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise common.BenchmarkError("no gcc to compile the guest's program with")
    program = directory / "disk"
    subprocess.run([compiler, "-O2", "-static", "-pthread", "-o", program, _SOURCE], check=True)
    out = BytesIO()
    archive = CpioWriter(out)
    archive.directory("bin", 0o755)
    archive.file("bin/disk", program.read_bytes(), 0o755)
    archive.close()
    path = directory / "initrd"
    path.write_bytes(base + bytes(-len(base) % 4) + out.getvalue())
    return path


def measure() -> None:
    """Boot, measure, print, save."""
    parser = common.arguments(__doc__ or "", runs=3)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: all)")
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw", help="the image's (default: raw)")
    parser.add_argument("--vcpus", type=int, default=1, help="processors of the guest (default: 1)")
    parser.add_argument("--directory", help="where the image is (default: where temporary files are)")
    args = parser.parse_args()
    cases = [name for name in CASES if name in args.cases.split(",")]
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        raise common.BenchmarkError(str(error)) from None
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-", dir=args.directory) as directory:
        disk = Path(directory) / "disk"
        commands = "; ".join(
            f"disk /dev/vda {name} {amount} {threads}" for name in cases for amount, threads in [CASES[name]]
        )
        image = common.Image(
            guest.kernel,
            _initrd(Path(directory), guest.initrd.read_bytes()),
            f'{guest.command_line} quiet softkvm.run="{commands}"',
            vcpus=args.vcpus,
            options=("--disk", f"{disk},format={args.format}"),
            qemu_options=(
                "-drive", f"file={disk},format={args.format},if=none,id=d",
                "-device", "virtio-blk-pci,drive=d,num-queues=1",
            ),
        )  # fmt: skip
        for _ in range(args.runs):
            for side in common.chosen_sides(args):
                disk.unlink(missing_ok=True)
                if args.format == "raw":
                    disk.write_bytes(bytes(SIZE))
                else:
                    create_qcow2(str(disk), SIZE)
                run = common.run(side, image)
                figures = found.setdefault(side, {})
                for _, line in run.lines:
                    if match := re.match(r"disk (\S+) (\d+) ([\d.]+)", line):
                        figures.setdefault(match[1], []).append(int(match[2]) / float(match[3]))
                if missing := [name for name in cases if name not in figures]:
                    raise common.BenchmarkError(f"{side}: no {', '.join(missing)}:\n{run.tail()}")
    medians: dict[str, dict[str, float]] = {
        side: {name: common.median(values) for name, values in figures.items()} for side, figures in found.items()
    }
    rows = []
    for name in cases:
        ours, theirs = (medians.get(side, {}).get(name) for side in (common.SOFTKVM, common.QEMU))
        unit = "MiB/s" if name.startswith("sequential") else "per second"
        rows.append((f"{name}, {unit}", common.number(ours), common.number(theirs), common.ratio(ours, theirs)))
    common.table(f"Disk, {args.format}, {args.vcpus} vCPU", ("", "softkvm", "QEMU TCG", "rate"), rows)
    results: dict[str, Any] = {
        "guest": guest.kernel_package, "runs": args.runs, "format": args.format, "vcpus": args.vcpus,
        "cases": {name: list(CASES[name]) for name in cases}, "medians": medians,
    }  # fmt: skip
    common.save("disk" if args.format == "raw" else f"disk-{args.format}", results)


if __name__ == "__main__":
    common.main(measure)
