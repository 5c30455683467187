# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the booted default guest: restore to the guest's next output, clones, saving, moving elsewhere.

Aims: from the process's start to the guest's next output at most 150 ms, for 256 MiB as for 8 GiB; 20 clones of a guest
at its prompt within 3 s, with at most 15 MiB of their own each.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import softkvm
from benchmarks import common
from softkvm.progress import TerminalProgress
from softkvm.vmm.console import Console
from softkvm.vmm.guest import Guest, GuestUnavailable, prepare
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.migration.source import Migration
from softkvm.vmm.migration.stream import Channel
from softkvm.vmm.migration.target import listen_for
from softkvm.vmm.snapshot.directory import save

SIZES: Final = (256, 8192)
CLONES: Final = 20
TICKS: Final = "while :; do echo tick; usleep 10000; done"


def measure() -> None:
    """Boot, save, restore, print."""
    parser = common.arguments(__doc__ or "", runs=9)
    args = parser.parse_args()
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        raise common.BenchmarkError(str(error)) from None
    results: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as place:
        for mib in SIZES:
            directory = Path(place) / str(mib)
            found = _save(guest, mib, directory)
            found["first_output_s"] = common.median(_first_output(directory) for _ in range(args.runs))
            results[f"{mib} MiB"] = found
            rows.append(
                (
                    f"{mib} MiB",
                    common.number(found["stored_bytes"] / MIB),
                    *(common.number(1000 * found[name], 0) for name in ("stands_s", "save_s", "first_output_s")),
                )
            )
        header = ("memory", "stored, MiB", "stands, ms", "saved, ms", "first output, ms")
        common.table(f"Snapshots of {guest.kernel_package}", header, rows)
        _save(guest, SIZES[0], Path(place) / "idle", ticks=False)
        clones = [_clones(Path(place) / "idle") for _ in range(max(args.runs // 3, 1))]
        results["clones"] = {
            "count": CLONES,
            "all_run_s": common.median(seconds for seconds, _ in clones),
            "private_bytes": max(private for _, private in clones),
        }
    moves = [_move(guest) for _ in range(max(args.runs // 3, 1))]
    results["migration"] = {name: common.median(move[name] for move in moves) for name in moves[0]}
    common.table(
        f"{CLONES} clones, and a move to another process",
        ("", "seconds", "MiB", "downtime, ms"),
        [
            (
                f"{CLONES} clones, each",
                common.number(results["clones"]["all_run_s"], 2),
                common.number(results["clones"]["private_bytes"] / MIB),
                "-",
            ),
            (
                "migration, idle guest",
                common.number(results["migration"]["seconds"], 2),
                common.number(results["migration"]["sent"] / MIB),
                common.number(1000 * results["migration"]["downtime_s"], 0),
            ),
        ],
    )
    common.save("snapshot", {"guest": guest.kernel_package, "runs": args.runs, "snapshots": results})


@contextlib.contextmanager
def _booted(guest: Guest, mib: int) -> Iterator[tuple[Machine, Console]]:
    console = Console()
    with softkvm.open() as kvm, Machine(kvm, Config(mib * MIB), console.output) as machine:
        console.attach(machine)
        machine.load(guest.kernel, guest.initrd, f"{guest.command_line} quiet")
        machine.start()
        console.expect("# ", 120)
        time.sleep(1)
        yield machine, console


def _save(guest: Guest, mib: int, directory: Path, *, ticks: bool = True) -> dict[str, float]:
    """Save a guest, that prints all the time or waits; how long that took, and how long it stood for it."""
    with _booted(guest, mib) as (machine, console):
        if ticks:
            console.send(f"{TICKS}\n")
            console.expect("tick\r\ntick", 30)
        stood: list[float] = []
        began = time.monotonic()
        manifest = save(machine, directory, durable=False, stopped=lambda: stood.append(time.monotonic() - began))
        return {
            "save_s": time.monotonic() - began,
            "stands_s": stood[0],
            "stored_bytes": manifest.memory.stored,
        }


def _restore(directory: Path, *options: str) -> list[str]:
    return [*common.COMMAND, "snapshot", "restore", str(directory), *options]


def _first_output(directory: Path) -> float:
    """From the process's start to the guest's first byte."""
    began = time.monotonic()
    with subprocess.Popen(
        _restore(directory), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise common.BenchmarkError(f"restoring ended with status {process.wait()}")
        taken = time.monotonic() - began
        process.kill()
        return taken


def _clones(directory: Path) -> tuple[float, int]:
    """From the start until all clones run; the most memory that one has for itself a second later."""
    began = time.monotonic()
    command = _restore(directory, "--clones", str(CLONES), "--console", "none")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        if f"{CLONES} clones" not in (said := process.stderr.readline()):
            process.kill()
            raise common.BenchmarkError(said)
        taken = time.monotonic() - began
        time.sleep(1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        private = max(map(_private_bytes, children))
        process.terminate()
        process.communicate(timeout=60)
        return taken, private


def _private_bytes(pid: str) -> int:
    rows = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(row[1]) << 10 for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:"))


def _move(guest: Guest) -> dict[str, float]:
    """Move an idle guest over a socket, to a child process that is forked before there is any machine."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        try:
            with softkvm.open() as kvm, Channel(there) as channel, listen_for(channel, kvm) as machine:
                machine.start()
                machine.wait(0.5)
        finally:
            os._exit(0)
    there.close()
    try:
        with _booted(guest, SIZES[0]) as (machine, _), Channel(here) as channel:
            report = Migration(machine, channel).run()
    finally:
        os.waitpid(child, 0)
    return {"seconds": report.seconds, "sent": report.sent, "downtime_s": report.downtime_s}


if __name__ == "__main__":
    common.main(measure)
