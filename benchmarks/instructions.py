# SPDX-License-Identifier: Apache-2.0
"""Host instructions of one exit, counted by valgrind (callgrind): the same on a busy machine as on an idle one.

Each count is the difference of a long and a short run of one guest, which executes one instruction again and again: the
start of the interpreter and of the machine falls out. The way is KVM's alone: KVM_RUN and back, no VMM. With ``--param
NAME=VALUE`` the second column is that of those module parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Final

from benchmarks import common
from softkvm import abi

#: Real mode; each again and again. IN and OUT of port 0x10; CPUID; a read of what no memory is (DS is 0x8000).
KINDS: Final = {
    "in": ("IN, to userspace", bytes.fromhex("e410 ebfc")),
    "out": ("OUT, to userspace", bytes.fromhex("e610 ebfc")),
    "mmio": ("MMIO read, to userspace", bytes.fromhex("a00000 ebfb")),
    "cpuid": ("CPUID, and OUT to userspace", bytes.fromhex("0fa2 e610 ebfa")),
}
SHORT, LONG = 1000, 4000
_MEMORY, _CODE = 64 << 10, 0x1000
_SPIV, _APIC_ENABLED = 0xF0, 0x1FF


def run_guest(kind: str, exits: int, values: Mapping[str, str]) -> None:
    """Execute the instruction so many times."""
    from softkvm.kvm import Kvm, Params

    params = Params()
    for name, value in values.items():
        params.assign(name, value)
    memory = mmap.mmap(-1, _MEMORY)
    code = KINDS[kind][1]
    memory[_CODE : _CODE + len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with Kvm(params) as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(slot=0, guest_phys_addr=0, memory_size=_MEMORY, userspace_addr=address)
        )
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(kvm.get_supported_cpuid())
            lapic = vcpu.get_lapic()
            lapic.regs[_SPIV : _SPIV + 2] = [*_APIC_ENABLED.to_bytes(2, "little")]
            vcpu.set_lapic(lapic)
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            sregs.ds.base, sregs.ds.selector = 0x80000, 0x8000
            vcpu.set_sregs(sregs)
            vcpu.set_regs(abi.kvm_regs(rip=_CODE, rflags=2))
            for _ in range(exits):
                vcpu.run()


def count(kind: str, exits: int, values: Mapping[str, str]) -> int:
    """Return the instructions of a whole run."""
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as directory:
        started = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={directory}/out",
                sys.executable,
                "-m",
                "benchmarks.instructions",
                "--run",
                f"{kind}:{exits}",
                *(word for name, value in values.items() for word in ("--param", f"{name}={value}")),
            ],
            capture_output=True,
            text=True,
            cwd=common.ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        found = re.search(r"Collected : (\d+)", started.stderr)
        if started.returncode or found is None:
            raise common.BenchmarkError(f"{kind} under valgrind:\n{started.stderr[-2000:]}")
        return int(found[1])


def per_exit(kind: str, values: Mapping[str, str]) -> int:
    """Return the instructions of one exit."""
    short, long = (count(kind, exits, values) for exits in (SHORT, LONG))
    return round((long - short) / (LONG - SHORT))


def measure() -> None:
    """Count, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", metavar="KIND", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--param", metavar="NAME=VALUE", action="append", default=[])
    parser.add_argument("--run", metavar="KIND:EXITS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    values = dict(text.split("=", 1) for text in args.param)
    if args.run:
        kind, exits = args.run.split(":")
        run_guest(kind, int(exits), values)
        return
    unknown = sorted(set(args.kinds) - set(KINDS))
    if unknown or shutil.which("valgrind") is None:
        raise common.BenchmarkError(f"no such kind: {', '.join(unknown)}" if unknown else "valgrind is not there")
    columns = {"": {}, **({" ".join(args.param): values} if values else {})}
    found = {kind: {title: per_exit(kind, column) for title, column in columns.items()} for kind in args.kinds or KINDS}
    rows = [(KINDS[kind][0], *(f"{counts[title]:,}" for title in columns)) for kind, counts in found.items()]
    common.table("Host instructions of an exit", ("", *(title or "softkvm" for title in columns)), rows)
    common.save("instructions", {kind: dict(counts) for kind, counts in found.items()})


if __name__ == "__main__":
    common.main(measure)
