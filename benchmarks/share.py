# SPDX-License-Identifier: Apache-2.0
"""A shared directory: a walk over small files (lstat; then open, read, close as well), and a big file from end to end.

The same kernel, initial file system and program on all sides: virtio-9p of ours and of QEMU's TCG, and virtio-fs of
ours, which QEMU would need a helper of root's for. Times are the guest's. Aim: at least QEMU's speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

from benchmarks import common
from softkvm.progress import TerminalProgress
from softkvm.vmm.guest import Guest, GuestUnavailable, cache_directory, default

KERNEL = "linux-image-amd64"
"""The default guest's kernel, Debian's for clouds, has no 9p."""

DIRECTORIES, FILES, SIZE = 40, 50, 1500
BIG_MIB = 64
FIGURES = ("stat", "cat", "read")
P9_OPTIONS = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap"

OURS_9P, OURS_FS, QEMU_9P = "softkvm 9p", "softkvm virtio-fs", "qemu 9p"


def measure() -> None:
    """Run, print, save."""
    parser = common.arguments(__doc__ or "", runs=3)
    args = parser.parse_args()
    guest = _guest()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="softkvm-share-") as name:
        directory = Path(name)
        _populate(directory)
        available = common.chosen_sides(args)
        for side, needs in ((OURS_9P, common.SOFTKVM), (OURS_FS, common.SOFTKVM), (QEMU_9P, common.QEMU)):
            if needs in available:
                runs = [_run(side, guest, directory) for _ in range(args.runs)]
                results[side] = {figure: common.median(run[figure] for run in runs) for figure in FIGURES}
    files = DIRECTORIES * FILES
    rows = [
        (side, *(common.number(files / found[name], 0) for name in FIGURES[:2]), common.number(BIG_MIB / found["read"]))
        for side, found in results.items()
    ]
    theirs = results.get(QEMU_9P)
    for side in (OURS_9P, OURS_FS):
        if side in results and theirs is not None:
            rows += [(f"  ratio, {side}", *(common.ratio(theirs[name], results[side][name]) for name in FIGURES))]
    common.table(f"Shared directory, {guest.kernel_package}", ("", "lstat/s", "read files/s", "MiB/s"), rows)
    common.save("share", {"guest": guest.kernel_package, "files": files, "big_mib": BIG_MIB, "seconds": results})


def _guest() -> Guest:
    try:
        with mock.patch.object(default, "KERNEL_PACKAGES", (KERNEL,)):
            return default.prepare(TerminalProgress(), directory=cache_directory().parent / "systems" / "generic")
    except GuestUnavailable as error:
        raise common.BenchmarkError(str(error)) from None


def _populate(directory: Path) -> None:
    """Fill the directory that is shared, the program among it."""
    for number in range(DIRECTORIES):
        (directory / f"tree/{number}").mkdir(parents=True)
        for file in range(FILES):
            (directory / f"tree/{number}/{file}.txt").write_bytes(os.urandom(SIZE))
    (directory / "big").write_bytes(os.urandom(1 << 20) * BIG_MIB)
    source = Path(__file__).with_name("share.c")
    subprocess.run(["gcc", "-O2", "-static", "-o", directory / "measure", source], check=True)


def _run(side: str, guest: Guest, directory: Path) -> dict[str, float]:
    kind = "mount -t virtiofs s /mnt" if side == OURS_FS else f"mount -t 9p -o {P9_OPTIONS} s /mnt"
    work = f"mkdir -p /mnt; modprobe -a virtio_pci 9p 9pnet_virtio virtiofs; {kind} && /mnt/measure /mnt"
    option = f"{directory}:s,fs={'virtiofs' if side == OURS_FS else '9p'}"
    image = common.Image(
        guest.kernel,
        guest.initrd,
        f'{guest.command_line} quiet softkvm.run="{work}"',
        memory_mib=512,
        options=("--share", option),
        qemu_options=(
            "-fsdev",
            f"local,id=s,path={directory},security_model=none",
            "-device",
            "virtio-9p-pci,fsdev=s,mount_tag=s",
        ),
    )
    found = common.run(common.QEMU if side == QEMU_9P else common.SOFTKVM, image)
    figures = {}
    for _, line in found.lines:
        if match := re.fullmatch(r"share (\w+) (\d+) (\d+) ([\d.]+)", line):
            figures[match[1]] = float(match[4])
            expected = {"stat": 0, "cat": DIRECTORIES * FILES * SIZE, "read": BIG_MIB << 20}[match[1]]
            if int(match[3]) != expected:
                raise common.BenchmarkError(f"{side}: {line}: expected {expected} bytes")
    if set(figures) != set(FIGURES):
        raise common.BenchmarkError(f"{side} has not measured all:\n{found.tail()}")
    return figures


if __name__ == "__main__":
    common.main(measure)
