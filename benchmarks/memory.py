# SPDX-License-Identifier: Apache-2.0
"""What a booted, idle 256 MiB guest costs the host besides its own memory.

The resident set of the process minus what is resident of the guest's RAM (the mappings as large as it, from
/proc/PID/smaps). Aim: at most 80 MiB, Python included.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from pathlib import Path

from benchmarks import common
from softkvm.progress import TerminalProgress
from softkvm.vmm.guest import GuestUnavailable, prepare

MEMORY_MIB = 256
AIM_MIB = 80.0
SETTLE_S = 2.0
BOOT_TIMEOUT_S = 120.0
READY = "softkvm: idle now"

_MAPPING = re.compile(r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) ")
_RSS = re.compile(r"^Rss:\s+(?P<kib>\d+) kB")


def resident_mib(pid: int, guest_mib: int) -> tuple[float, float]:
    """Return the process's resident set without the guest's RAM, and the RAM's."""
    other = guest = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if mapping := _MAPPING.match(line):
            size = int(mapping["end"], 16) - int(mapping["start"], 16)
        elif rss := _RSS.match(line):
            if size >= guest_mib << 20:
                guest += int(rss["kib"])
            else:
                other += int(rss["kib"])
    return other / 1024, guest / 1024


def _measure_once(side: str, image: common.Image) -> tuple[float, float]:
    process = subprocess.Popen(
        common.command(side, image),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    expired = threading.Timer(BOOT_TIMEOUT_S, process.kill)
    expired.start()
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(READY):
                time.sleep(SETTLE_S)
                return resident_mib(process.pid, image.memory_mib)
        raise common.BenchmarkError(f"{side} did not boot:\n{''.join(lines[-15:])}")
    finally:
        expired.cancel()
        process.kill()
        process.communicate()


def measure() -> None:
    """Boot, look, print, save."""
    args = common.arguments(__doc__ or "", runs=3).parse_args()
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        raise common.BenchmarkError(str(error)) from None
    append = f'{guest.command_line} softkvm.run="echo {READY}; sleep 1000"'
    image = common.Image(guest.kernel, guest.initrd, append, memory_mib=MEMORY_MIB)
    results, rows = {}, []
    for side in common.chosen_sides(args, (common.SOFTKVM, common.EXEC, common.QEMU)):
        runs = [_measure_once(side, image) for _ in range(args.runs)]
        other, ram = (common.median(values) for values in zip(*runs, strict=True))
        results[side] = {"overhead_mib": other, "guest_ram_resident_mib": ram}
        rows.append((side, common.number(other), common.number(ram), common.number(AIM_MIB, 0)))
    common.table(f"Memory of a {MEMORY_MIB} MiB guest, MiB", ("", "besides RAM", "RAM touched", "aim"), rows)
    common.save("memory", {"runs": args.runs, "mib": results})


if __name__ == "__main__":
    common.main(measure)
