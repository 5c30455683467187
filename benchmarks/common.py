# SPDX-License-Identifier: Apache-2.0
"""What the measurements share: running a guest on either side, medians, tables, result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BENCH_IMAGE = ROOT / "guests" / "build" / "bench.elf"

SOFTKVM, QEMU = "softkvm", "qemu"
EXEC = "exec"
"""QEMU as well, on our KVM: under ``softkvm exec``."""
COMMAND = [sys.executable, "-m", "softkvm.cli.main"]


class BenchmarkError(Exception):
    """A side did not do what was to be measured; the message holds the end of its output."""


@dataclass(frozen=True)
class Image:
    """What both sides boot."""

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    memory_mib: int = 256
    vcpus: int = 1
    options: tuple[str, ...] = ()
    """More options of ``softkvm run``."""
    qemu_options: tuple[str, ...] = ()
    """The same for QEMU."""


@dataclass
class Run:
    """One guest from start to end. Times in seconds from the start of the host process."""

    wall_s: float
    cpu_s: float
    max_rss_bytes: int
    lines: list[tuple[float, str]]
    stats: dict[str, Any] = field(default_factory=dict)

    def first(self, pattern: str) -> float:
        """When the first line that matches ``pattern`` came; BenchmarkError if none did."""
        for at_s, line in self.lines:
            if re.search(pattern, line):
                return at_s
        raise BenchmarkError(f"no line matches {pattern!r}; the output ends:\n{self.tail()}")

    def tail(self, count: int = 15) -> str:
        """The last lines."""
        return "\n".join(line for _, line in self.lines[-count:])


def command(side: str, image: Image, stats: Path | None = None) -> list[str]:
    """The command line that boots ``image`` with its console on standard output."""
    boot = {"kernel": str(image.kernel), "append": image.append}
    if image.initrd is not None:
        boot["initrd"] = str(image.initrd)
    if side in (QEMU, EXEC):
        started, accelerator = ([*COMMAND, "exec", "--"], "kvm") if side == EXEC else ([], "tcg")
        machine = ["-accel", accelerator, "-m", str(image.memory_mib), "-smp", str(image.vcpus), "-no-reboot"]
        devices = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
        options = [word for name, value in boot.items() for word in (f"-{name}", value)]
        return [*started, "qemu-system-x86_64", *machine, *devices, *image.qemu_options, *options]
    machine = ["--mem", f"{image.memory_mib}M", "--vcpus", str(image.vcpus)]
    options = [word for name, value in boot.items() for word in (f"--{name}", value)]
    statistics_file = ["--stats", str(stats)] if stats else []
    return [*COMMAND, "run", *machine, *image.options, *statistics_file, *options]


def run(side: str, image: Image, timeout_s: float = 300) -> Run:
    """Boot ``image`` until it powers off. Raises BenchmarkError if it does not end well within ``timeout_s``."""
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as directory:
        stats_path = Path(directory) / "stats.json"
        start = time.monotonic()
        process = subprocess.Popen(
            command(side, image, stats_path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines: list[tuple[float, str]] = []
        assert process.stdout is not None
        expired = threading.Timer(timeout_s, process.kill)
        expired.start()
        try:
            lines.extend((time.monotonic() - start, line.rstrip()) for line in process.stdout)
            _, status, usage = os.wait4(process.pid, 0)
            wall_s = time.monotonic() - start
        finally:
            expired.cancel()
            process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        stats = json.loads(stats_path.read_text()) if stats_path.exists() else {}
    result = Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, lines, stats)
    if process.returncode != 0:
        raise BenchmarkError(f"{side} ended with status {process.returncode}:\n{result.tail()}")
    return result


def sides() -> list[str]:
    """Which sides can be measured here; says on stderr which cannot."""
    found: list[str] = []
    try:
        import softkvm

        softkvm.open().close()
        found += [SOFTKVM, EXEC]
    except (ImportError, OSError) as error:
        print(f"not measured: softkvm ({error})", file=sys.stderr)
    if shutil.which("qemu-system-x86_64"):
        found.append(QEMU)
    else:
        found = [side for side in found if side != EXEC]
        print("not measured: QEMU (no qemu-system-x86_64)", file=sys.stderr)
    return found


def arguments(description: str, runs: int) -> argparse.ArgumentParser:
    """The options that every measurement has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=runs, help=f"runs per figure (default: {runs})")
    parser.add_argument("--sides", default=None, help="comma-separated: softkvm,exec,qemu (default: what there is)")
    return parser


def chosen_sides(args: argparse.Namespace, default: Sequence[str] = (SOFTKVM, QEMU)) -> list[str]:
    """The sides of ``--sides`` that are there."""
    wanted = args.sides.split(",") if args.sides else default
    return [side for side in sides() if side in wanted]


def median(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


def ratio(a: float | None, b: float | None) -> str:
    """``a / b`` for a table."""
    return f"{a / b:.2f}" if a and b else "-"


def number(value: float | None, digits: int = 1) -> str:
    """A figure for a table."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    print(f"\n{title}")
    for row in (header, tuple("-" * width for width in widths), *rows):
        cells = [cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        print("  " + "  ".join(cells).rstrip())


def save(name: str, results: dict[str, Any]) -> None:
    """Write ``benchmarks/results/NAME.json``, with the host it was measured on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"host": host(), **results}, indent=2) + "\n")
    print(f"  ({path.relative_to(ROOT)})")


def host() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    qemu = shutil.which("qemu-system-x86_64")
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False).stdout if qemu else ""
    return {
        "processor": model[1] if model else platform.processor(),
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": version.splitlines()[0] if version else None,
        "date": time.strftime("%Y-%m-%d"),
    }


_BENCH_LINE = re.compile(r"^bench (?P<name>\S+) iterations (?P<n>\d+) checksum (?P<sum>[0-9a-f]+) ns (?P<ns>\d+)$")


@dataclass(frozen=True)
class Kernel:
    """One result line of the benchmark guest."""

    iterations: int
    checksum: str
    ns: int


def run_bench(
    side: str, names: Sequence[str], iterations: int | None = None, vcpus: int = 1
) -> tuple[dict[str, Kernel], Run]:
    """Run kernels of the benchmark guest (``guests/bench``) and return their result lines."""
    if not BENCH_IMAGE.exists():
        raise BenchmarkError(f"{BENCH_IMAGE.relative_to(ROOT)} is not built: make guests")
    append = f"bench={','.join(names)}" + (f" iterations={iterations}" if iterations is not None else "")
    result = run(side, Image(BENCH_IMAGE, append=append, vcpus=vcpus))
    kernels = {
        match["name"]: Kernel(int(match["n"]), match["sum"], int(match["ns"]))
        for _, line in result.lines
        if (match := _BENCH_LINE.match(line))
    }
    missing = [name for name in names if name not in kernels]
    if missing:
        raise BenchmarkError(f"{side}: no result for {', '.join(missing)}:\n{result.tail()}")
    return kernels, result


def main(measure: Callable[[], None]) -> None:
    """Run ``measure()`` as a script: a BenchmarkError is one message and status 1."""
    try:
        measure()
    except BenchmarkError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
