# SPDX-License-Identifier: Apache-2.0
"""Requests of a client under ``softkvm exec`` beside the same calls of the Python API, microseconds.

The client (``client.c``) is compiled here twice: linked dynamically it is served by the preload, statically by the
loader. Each figure is the median of the runs' medians of batches.
"""

from __future__ import annotations

import mmap
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import addressof, c_char
from functools import partial
from pathlib import Path

import softkvm
from benchmarks import common
from softkvm import abi

_SOURCE = Path(__file__).with_suffix(".c")
_RAM_SIZE, _CODE = 0x10000, 0x1000
_BATCHES, _CALLS = 101, 200
#: What each side is compiled with.
_SIDES = {"preload": (), "loader": ("-static",)}
_API = "Python API"

Figures = dict[str, float]


def _median_ns(function: Callable[[], object]) -> float:
    batches = []
    for _ in range(_BATCHES):
        start = time.perf_counter_ns()
        for _ in range(_CALLS):
            function()
        batches.append((time.perf_counter_ns() - start) / _CALLS)
    return statistics.median(batches)


def of_the_api() -> Figures:
    """What the methods of the API take, nanoseconds: the guest and the calls of ``client.c``."""
    ram = mmap.mmap(-1, _RAM_SIZE)
    ram[_CODE : _CODE + 4] = bytes.fromhex("e610 ebfc")  # again: out 0x10, al; jmp again
    with softkvm.open() as kvm, kvm.create_vm() as vm:
        address = addressof(c_char.from_buffer(ram))
        vm.set_user_memory_region(abi.kvm_userspace_memory_region(memory_size=_RAM_SIZE, userspace_addr=address))
        vcpu = vm.create_vcpu(0)
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(abi.kvm_regs(rip=_CODE, rflags=2))
        figures = {"run": _median_ns(vcpu.run), "get_mp_state": _median_ns(vcpu.get_mp_state)}
        for name in ("regs", "sregs", "fpu", "xsave"):
            get, load = getattr(vcpu, f"get_{name}"), getattr(vcpu, f"set_{name}")
            state = get()
            figures[f"get_{name}"] = _median_ns(get)
            figures[f"set_{name}"] = _median_ns(partial(load, state))
    return figures


def of_a_client(program: Path) -> Figures:
    """What the client's requests take, nanoseconds. Raises BenchmarkError if it does not end well."""
    command = [*common.COMMAND, "exec", "--", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise common.BenchmarkError(f"{program.name} ended with status {done.returncode}:\n{done.stderr}")
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: float(ns) for name, ns in rows}


def start_up(program: Path, runs: int) -> dict[str, float]:
    """What it takes to start: nothing, a program without KVM, and one that opens it; milliseconds."""
    under = [*common.COMMAND, "exec", "--"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "softkvm exec -- true": [*under, "true"],
        "softkvm exec, a client that opens /dev/kvm": [*under, str(program), "open"],
    }
    times: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(runs):
        for what, command in commands.items():
            start = time.perf_counter()
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
                raise common.BenchmarkError(f"{what} failed")
            times[what].append((time.perf_counter() - start) * 1e3)
    return {what: common.median(values) for what, values in times.items()}


def build(directory: Path, side: str) -> Path:
    """Compile the client for a side. Raises BenchmarkError without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise common.BenchmarkError("no C compiler (cc)")
    program = directory / side
    done = subprocess.run([compiler, "-O2", *_SIDES[side], "-o", program, _SOURCE], capture_output=True, text=True)
    if done.returncode:
        raise common.BenchmarkError(f"cc: {done.stderr}")
    return program


def _medians(runs: list[Figures]) -> Figures:
    return {name: common.median(run[name] for run in runs) for name in runs[0]}


def measure() -> None:
    """Run, print, save."""
    args = common.arguments(__doc__ or "", runs=5).parse_args()
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as name:
        programs = {side: build(Path(name), side) for side in _SIDES}
        # In turns, so that what else the host does falls on all.
        turns = [
            {_API: of_the_api(), **{side: of_a_client(program) for side, program in programs.items()}}
            for _ in range(args.runs)
        ]
        starts = start_up(programs["preload"], 5 * args.runs)
    sides = {side: _medians([turn[side] for turn in turns]) for side in (_API, *programs)}
    rows = [(what, *(common.number(figures[what] / 1e3, 2) for figures in sides.values())) for what in sides[_API]]
    common.table("Requests, microseconds", ("", *sides), rows)
    common.table("Start-up, milliseconds", ("", "ms"), [(what, common.number(ms)) for what, ms in starts.items()])
    common.save("client", {"ns": sides, "start_up_ms": starts})


if __name__ == "__main__":
    common.main(measure)
