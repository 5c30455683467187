# SPDX-License-Identifier: Apache-2.0
"""How soon a vCPU's thread does what was called for: from the kick to the call, and how late CPU timers are.

::

    from softkvm.bench import task_work

    report = task_work.measure(softkvm.open())
    print(report.percentile("loop", 99), report.percentile("loop", 100))  # nanoseconds
"""

from __future__ import annotations

import ctypes
import mmap
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from softkvm import abi, api
from softkvm.cputime import CpuTimer

REPORT_VERSION: Final = 1
MEMORY: Final = 0x10000
CODE: Final = 0x1000

#: What is measured, and on which guest.
GUESTS: Final[dict[str, tuple[str, bytes]]] = {
    "loop": ("call_soon to the call: a loop without exits", b"\xeb\xfe"),
    "exits": ("the same: CPUID for ever", b"\x0f\xa2\xeb\xfc"),
    "halt": ("the same: HLT", b"\xf4\xeb\xfd"),
    "timer": ("a CPU timer's expiry to its call, in CPU time: a loop", b"\xeb\xfe"),
}
PERCENTILES: Final = (0, 50, 90, 99, 100)

#: How far apart timers expire, and calls are at most.
_TIMER_NS: Final = 2_000_000
_PAUSE_S: Final = 0.0005
_PATIENCE_S: Final = 30.0


class BenchError(Exception):
    """The measurement does not come to its end; the message says where."""


@dataclass(slots=True)
class Report:
    """Nanoseconds of each guest's samples, in ascending order."""

    samples: dict[str, list[int]] = field(default_factory=dict)

    def percentile(self, name: str, percent: float) -> int:
        """Return what so many percent of the samples are not above; 0: the least, 100: the most."""
        samples = self.samples[name]
        return samples[min(int(len(samples) * percent / 100), len(samples) - 1)]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "version": REPORT_VERSION,
            "ns": {name: {f"p{p}": self.percentile(name, p) for p in PERCENTILES} for name in self.samples},
            "samples": self.samples,
        }


@contextmanager
def _running(kvm: api.Kvm, code: bytes, *, halts: bool) -> Iterator[api.Vcpu]:
    """Run a guest of a few bytes on a thread of its own."""
    memory = mmap.mmap(-1, MEMORY)
    memory[CODE : CODE + len(code)] = code
    with kvm.create_vm() as vm:
        if vm.check_extension(abi.KVM_CAP_SET_TSS_ADDR):
            vm.set_tss_addr(0xFFFBD000)
        if halts:
            vm.create_irqchip()
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(memory_size=MEMORY, userspace_addr=address), memory
        )  # fmt: skip
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(kvm.get_supported_cpuid())
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            vcpu.set_regs(abi.kvm_regs(rip=CODE, rflags=2))
            stop = threading.Event()

            def main() -> None:
                while not stop.is_set():
                    try:
                        vcpu.run()
                    except InterruptedError:  # a kick, or on a device task work
                        continue
                    except OSError:
                        if not stop.is_set():  # a second signal came at the end: the VM is closed already
                            raise

            thread = threading.Thread(target=main, name="bench vcpu", daemon=True)
            thread.start()
            try:
                yield vcpu
            finally:
                stop.set()
                while thread.is_alive():
                    vcpu.kick()
                    thread.join(0.01)


def _calls(vcpu: api.Vcpu, samples: int) -> list[int]:
    numbers = random.Random(0)
    took: list[int] = []
    for _ in range(samples):
        time.sleep(numbers.random() * _PAUSE_S)
        done = threading.Event()
        start = time.perf_counter_ns()

        def work(start: int = start, done: threading.Event = done) -> None:
            took.append(time.perf_counter_ns() - start)
            done.set()

        vcpu.call_soon(work)
        if not done.wait(_PATIENCE_S):
            raise BenchError("what was called for is not done")
    return took


def _timers(vcpu: api.Vcpu, samples: int) -> list[int]:
    clock = vcpu.cpu_clock
    late: list[int] = []
    done = threading.Event()
    due = [_TIMER_NS]

    def expired(timer: CpuTimer) -> None:
        now = clock.total_ns()
        late.append(now - due[0])
        if len(late) == samples:
            done.set()
            return
        due[0] = now + _TIMER_NS
        timer.settime(due[0], absolute=True)

    clock.create_timer(expired).settime(due[0], absolute=True)
    before = -1
    while not done.wait(_PATIENCE_S):
        if len(late) == before:
            raise BenchError("a timer does not expire")
        before = len(late)
    return late


def measure(kvm: api.Kvm, samples: int = 1000, progress: Callable[[str], None] = lambda what: None) -> Report:
    """Take samples of everything. Raises BenchError if a call doesn't come."""
    report = Report()
    for name, (what, code) in GUESTS.items():
        progress(what)
        with _running(kvm, code, halts=name == "halt") as vcpu:
            _calls(vcpu, 1)  # it runs
            take = _timers if name == "timer" else _calls
            report.samples[name] = sorted(take(vcpu, samples))
    return report
