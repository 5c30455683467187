# SPDX-License-Identifier: Apache-2.0
"""Thread 9, the vPMU: an overflow is no reason to program a counter anew; Linux's perf counts and samples exactly.

The silicon's part: cpu/tests/system/pmu.rs. Registers, filters, interrupts: tests/kvm/x86/test_pmu.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.programs import program
from tests.support.systems import archive, compile_program
from tests.support.tiny import Tiny

from softkvm import abi
from softkvm.kvm.params import Params
from softkvm.kvm.x86.msrs import get_msr, set_msr
from softkvm.kvm.x86.pmu.perf_event import PerfEvent
from softkvm.kvm.x86.pmu.pmu import Pmu

PERF_CTL0, PERF_CTR0, GLOBAL_STATUS_CLR = 0xC001_0200, 0xC001_0201, 0xC000_0302
INSTRUCTIONS = 0xC0
OS, INT, EN = 1 << 17, 1 << 20, 1 << 22
LVTPC, NMI = 0x340, 0x400
PERIOD = 100
ROUNDS = 50


def sampling(params: Params | None = None) -> Tiny:
    """A guest that samples its instructions: each NMI sets the counter back and counts itself in RBX.

    It goes round in its loop until it has had ``ROUNDS`` of them.
    """
    tiny = Tiny(irqchip=True, params=params).long_mode()
    tiny.gate64(2, 0x5000)
    tiny.memory.write(
        0x5000,
        bytes.fromhex(
            "ffc3"  # inc ebx
            "b9010201c0"  # mov ecx, PERF_CTR0
            f"b8{(-PERIOD & 0xFFFF_FFFF).to_bytes(4, 'little').hex()}"  # mov eax, -PERIOD
            "baffff0000"  # mov edx, 0xffff
            "0f30"  # wrmsr
            "48cf"  # iretq
        ),
    )
    assert tiny.vcpu.apic is not None
    tiny.vcpu.apic.set_spiv(0x1FF)
    tiny.vcpu.apic.mmio_write(LVTPC, 4, NMI)
    set_msr(tiny.vcpu, PERF_CTL0, INSTRUCTIONS | OS | INT | EN, host=False)
    set_msr(tiny.vcpu, PERF_CTR0, (1 << 48) - PERIOD, host=False)
    # again: cmp ebx, ROUNDS; jb again; out 0x80, al
    tiny.load(bytes.fromhex(f"83fb{ROUNDS:02x} 72fb e680"), rbx=0)
    return tiny


@pytest.fixture
def programmed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What events have been programmed to count, one after the other."""
    seen: list[int] = []
    enable = PerfEvent.enable

    def noted(self: PerfEvent, select: int, period: int) -> None:
        seen.append(select)
        enable(self, select, period)

    monkeypatch.setattr(PerfEvent, "enable", noted)
    return seen


def test_an_overflow_programs_nothing(programmed: list[int]) -> None:
    tiny = sampling()
    assert programmed == [INSTRUCTIONS | OS | INT | EN]
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rbx == ROUNDS
    assert len(programmed) == 1
    tiny.close()


def test_as_it_was_each_overflow_programs_the_counter(programmed: list[int]) -> None:
    """What the thread is about: to compare with."""
    tiny = sampling(Params(pmu_reprogram_always=True))
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rbx == ROUNDS
    assert len(programmed) >= ROUNDS
    tiny.close()


def test_entries_between_do_nothing(programmed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that counts exits a thousand times: neither is anything programmed, nor asked for."""
    tiny = Tiny().long_mode()
    set_msr(tiny.vcpu, PERF_CTL0, INSTRUCTIONS | OS | EN, host=False)
    tiny.load(bytes.fromhex("bf e8030000 0fa2 ffcf 75fa f4"))  # mov edi, 1000; again: cpuid; dec edi; jnz again
    tiny.vcpu.requests = 0
    asked: list[int] = []
    monkeypatch.setattr(Pmu, "request_reprogram", lambda pmu, bits: asked.append(bits))
    tiny.run_to_halt()
    assert len(programmed) == 1
    assert not asked
    assert get_msr(tiny.vcpu, PERF_CTR0, host=False) == 1 + 3 * 1000 + 1
    tiny.close()


# --- Linux ---------------------------------------------------------------------------------------------------

LOOPS = 1_000_000
#: Entry, LOOPS times two instructions, exit(0).
SOURCE = f"""
__asm__(".globl _start; _start: mov ${LOOPS}, %ecx; 1: dec %ecx; jnz 1b; mov $60, %eax; xor %edi, %edi; syscall");
"""
LOOP_INSTRUCTIONS = 1 + 2 * LOOPS + 3
LOOP_BRANCHES = LOOPS + 1  # SYSCALL is one
SAMPLE_PERIOD = 9973
BOOT_S = 600


@pytest.mark.guest
@pytest.mark.network
@pytest.mark.timeout(900)
def test_linux_counts_and_samples_exactly_with_perf(tmp_path: Path) -> None:
    guest = linux_guest()
    perf = program("linux-perf", r"usr/bin/perf(_[\d.]+)?")
    loop = compile_program(SOURCE, tmp_path / "loop").read_bytes()
    # Where its handler takes long, Linux would take fewer samples.
    script = f"""#!/bin/sh
cd /tmp
echo 0 > /proc/sys/kernel/perf_cpu_time_max_percent
perf=/bin/linux-perf
dmesg | grep -i "performance events"
$perf stat -x, -e instructions:u,branches:u,instructions,branches,cycles loop 2>&1
$perf record -q -e instructions:u -c {SAMPLE_PERIOD} -o data loop 2>&1
$perf script -i data -F ip | sed s/^/ip:/
"""
    initrd = tmp_path / "initrd"
    files = {"bin/loop": loop, "bin/measure": script.encode()}
    initrd.write_bytes(guest.initrd.read_bytes() + perf + archive(files))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "softkvm.cli.main", "run", "--mem", "1024"),
            *("--kernel", str(guest.kernel), "--initrd", str(initrd)),
            *("--timeout", str(BOOT_S), "--append", f'{guest.command_line} quiet softkvm.run="measure"'),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOOT_S + 60,
        check=False,
    )
    text = done.stdout
    assert done.returncode == 0, (text[-3000:], done.stderr)
    assert "AMD PMU driver" in text, text[-3000:]
    counts = {event: int(count) for count, event in re.findall(r"^(\d+),,([\w:]+),", text, re.MULTILINE)}
    assert counts["instructions:u"] == LOOP_INSTRUCTIONS, text[-3000:]
    assert counts["branches:u"] == LOOP_BRANCHES
    assert counts["instructions"] > LOOP_INSTRUCTIONS + 1000, "the kernel's, too"
    assert counts["branches"] > LOOP_BRANCHES + 100
    assert counts["cycles"] >= LOOP_INSTRUCTIONS
    samples = [int(ip, 16) for ip in re.findall(r"^ip:\s+([0-9a-f]+)", text, re.MULTILINE)]
    assert len(samples) == LOOP_INSTRUCTIONS // SAMPLE_PERIOD, text[-3000:]
    # After an odd number of instructions the next one is DEC, after an even number JNZ.
    start = min(samples)
    assert samples == [start if (n + 1) * SAMPLE_PERIOD % 2 else start + 2 for n in range(len(samples))], (
        "behind the very instruction"
    )
