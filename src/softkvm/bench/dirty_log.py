# SPDX-License-Identifier: Apache-2.0
"""What dirty logging costs: the measurement of the kernel's ``dirty_log_perf_test``, on either KVM.

::

    from softkvm.bench import dirty_log

    report = dirty_log.measure(softkvm.open(), dirty_log.Options(vcpus=2, bytes_per_vcpu=1 << 30))
    print(report.seconds["get"], report.pages_per_second["dirty"])

Each vCPU has a part of memory, or all have the same, and goes over its pages: writes a fraction of them, chosen by a
linear congruential generator, and reads the others. Timed are: the first pass, which populates memory; the request that
turns logging on; each pass under logging; KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG behind each; and the request that
turns it off.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

from softkvm import abi, api

REPORT_VERSION: Final = 1
PAGE: Final = 4096
PAGE_2M: Final = 2 << 20
#: Where the vCPUs' memory begins, and where code and page tables are.
TEST_GPA: Final = 1 << 32
CODE: Final = 0x1000
TABLES: Final = 0x2000
#: The guest says here that it has gone over its pages.
PORT: Final = 0x10

PHASES: Final = {
    "populate": "first pass over memory",
    "enable": "logging turned on",
    "dirty": "pass under logging",
    "get": "KVM_GET_DIRTY_LOG",
    "clear": "KVM_CLEAR_DIRTY_LOG",
    "disable": "logging turned off",
}

BACKINGS: Final = ("anonymous", "thp", "shmem", "hugetlb")

_U32: Final = (1 << 32) - 1
_MADV_HUGEPAGE: Final = 14
_MAP_HUGETLB: Final = 0x40000

#: RDI: the first page, RSI: how many, R9D: pages whose number is at most this are written, EAX: the generator.
_GUEST: Final = bytes.fromhex(
    "4889f1"  # again: mov rcx, rsi
    "4889fb"  #        mov rbx, rdi
    "69c00d661900"  # page: imul eax, eax, 1664525
    "055ff36e3c"  #   add eax, 1013904223
    "4439c8"  #       cmp eax, r9d
    "7705"  #         ja read
    "488903"  #       mov [rbx], rax
    "eb03"  #         jmp next
    "488b13"  # read: mov rdx, [rbx]
    "4881c300100000"  # next: add rbx, 4096
    "48ffc9"  #       dec rcx
    "75dc"  #         jnz page
    "e610"  #         out 0x10, al
    "ebd2"  #         jmp again
)


class BenchError(Exception):
    """What was asked for cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; sizes in bytes."""

    vcpus: int = 1
    bytes_per_vcpu: int = 256 << 20
    iterations: int = 3
    #: Percent of the pages that a pass writes.
    write_percent: int = 100
    #: All vCPUs go over the same memory.
    overlap: bool = False
    backing: str = "anonymous"
    #: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0: without it, 1, or 3 with all pages dirty at first.
    manual_protect: int = 1

    @property
    def pages(self) -> int:
        """Pages of the test's memory."""
        return self.bytes_per_vcpu // PAGE * (1 if self.overlap else self.vcpus)


@dataclass(slots=True)
class Report:
    """What was found."""

    options: Options
    #: Of each phase, the median where it was done several times.
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)
    #: Pages that each log had.
    dirty_pages: list[int] = field(default_factory=list)

    @property
    def pages_per_second(self) -> dict[str, float]:
        """How many of the test's pages a phase gets through in a second."""
        return {name: self.options.pages / seconds for name, seconds in self.seconds.items() if seconds}

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "version": REPORT_VERSION,
            "options": {**asdict(self.options), "pages": self.options.pages},
            "seconds": self.seconds,
            "runs": self.runs,
            "pages_per_second": self.pages_per_second,
            "dirty_pages": self.dirty_pages,
        }


def check(options: Options) -> None:
    """Raise BenchError for what no run can be."""
    if options.backing not in BACKINGS:
        raise BenchError(f"backing={options.backing}: expected {', '.join(BACKINGS)}")
    if not 0 <= options.write_percent <= 100:
        raise BenchError(f"write_percent={options.write_percent}: expected 0 to 100")
    if options.vcpus < 1 or options.iterations < 1:
        raise BenchError(f"vcpus={options.vcpus} iterations={options.iterations}: expected at least 1")
    if options.bytes_per_vcpu <= 0 or options.bytes_per_vcpu % PAGE_2M:
        raise BenchError(f"bytes_per_vcpu={options.bytes_per_vcpu:#x}: expected a multiple of 2 MiB")
    available = os.sysconf("SC_AVPHYS_PAGES") * PAGE
    if options.pages * PAGE > available:
        raise BenchError(f"{options.pages * PAGE >> 20} MiB of memory: this host has {available >> 20} MiB free")


def _memory(size: int, backing: str) -> tuple[mmap.mmap, int]:
    """Return memory, and an address in it, aligned to 2 MiB, that ``size`` bytes follow."""
    room = size + PAGE_2M
    if backing == "hugetlb":
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
        except OSError as error:
            raise BenchError(f"backing=hugetlb: {error.strerror} (/proc/sys/vm/nr_hugepages)") from None
    elif backing == "shmem":
        fd = os.memfd_create("dirty-log")
        try:
            os.ftruncate(fd, room)
            memory = mmap.mmap(fd, room)
        finally:
            os.close(fd)
    else:
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if backing == "thp":
        try:
            memory.madvise(_MADV_HUGEPAGE)
        except OSError as error:
            raise BenchError(f"backing=thp: {error.strerror}") from None
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -(-address // PAGE_2M) * PAGE_2M


class _Machine:
    """A VM whose vCPUs go over their memory when they are told to."""

    def __init__(self, kvm: api.Kvm, options: Options) -> None:
        self.options = options
        self.vm = kvm.create_vm()
        self._size = options.pages * PAGE
        self._low = mmap.mmap(-1, self._tables_size() + TABLES)
        self._memory, self._address = _memory(self._size, options.backing)
        if options.manual_protect:
            self.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, options.manual_protect)
        self._build_tables()
        self.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                memory_size=len(self._low), userspace_addr=ctypes.addressof(ctypes.c_char.from_buffer(self._low))
            )
        )
        self.log(False)
        self._vcpus = [self._vcpu(kvm, number) for number in range(options.vcpus)]
        self._go = threading.Barrier(options.vcpus + 1)
        self._done = threading.Barrier(options.vcpus + 1)
        self._ended = False
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._main, args=(vcpu,), daemon=True) for vcpu in self._vcpus]
        for thread in self._threads:
            thread.start()

    # --- the guest ---------------------------------------------------------------------------------

    def _tables_size(self) -> int:
        gigabytes = (TEST_GPA + self._size >> 30) + 1
        return PAGE * (2 + gigabytes)

    def _build_tables(self) -> None:
        """Map addresses one to one, by pages of 2 MiB."""
        gigabytes = self._tables_size() // PAGE - 2
        entries: dict[int, int] = {TABLES: TABLES + PAGE | 3}
        for n in range(gigabytes):
            table = TABLES + PAGE * (2 + n)
            entries[TABLES + PAGE + 8 * n] = table | 3
            for m in range(512):
                entries[table + 8 * m] = (n << 30) + m * PAGE_2M | 0x83
        for at, entry in entries.items():
            self._low[at : at + 8] = struct.pack("<Q", entry)
        self._low[CODE : CODE + len(_GUEST)] = _GUEST

    def _vcpu(self, kvm: api.Kvm, number: int) -> api.Vcpu:
        vcpu = self.vm.create_vcpu(number)
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        sregs = vcpu.get_sregs()
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment: abi.kvm_segment = getattr(sregs, name)
            segment.base, segment.limit, segment.selector, segment.g = 0, _U32, 8 if name == "cs" else 16, 1
            segment.type, segment.present, segment.s, segment.dpl = 11 if name == "cs" else 3, 1, 1, 0
            segment.l, segment.db, segment.unusable = int(name == "cs"), int(name != "cs"), 0
        sregs.cr3, sregs.cr4 = TABLES, sregs.cr4 | abi.X86_CR4_PAE
        sregs.cr0 |= abi.X86_CR0_PE | abi.X86_CR0_PG
        sregs.efer |= abi.EFER_LME | abi.EFER_LMA
        vcpu.set_sregs(sregs)
        part = 0 if self.options.overlap else number
        vcpu.set_regs(
            abi.kvm_regs(
                rip=CODE,
                rflags=2,
                rax=number + 1,
                rdi=TEST_GPA + part * self.options.bytes_per_vcpu,
                rsi=self.options.bytes_per_vcpu // PAGE,
                r9=self.options.write_percent * _U32 // 100,
            )
        )
        return vcpu

    def _main(self, vcpu: api.Vcpu) -> None:
        while True:
            self._go.wait()
            if self._ended:
                return
            try:
                self._run(vcpu)
            except BaseException as failure:  # told to who waits
                self._failure = failure
            self._done.wait()

    @staticmethod
    def _run(vcpu: api.Vcpu) -> None:
        while True:
            try:
                vcpu.run()
            except InterruptedError:
                continue
            if vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO and vcpu.kvm_run.io.port == PORT:
                return
            name = abi.EXIT_REASON_NAMES.get(vcpu.kvm_run.exit_reason, str(vcpu.kvm_run.exit_reason))
            raise BenchError(f"the guest ended with {name}")

    # --- what is timed -----------------------------------------------------------------------------

    def go_over_memory(self) -> None:
        """Let every vCPU go over its pages once."""
        self._go.wait()
        self._done.wait()
        if self._failure is not None:
            raise self._failure

    def log(self, on: bool) -> None:
        """Turn dirty logging of the test's memory on or off."""
        self.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=1,
                flags=abi.KVM_MEM_LOG_DIRTY_PAGES if on else 0,
                guest_phys_addr=TEST_GPA,
                memory_size=self._size,
                userspace_addr=self._address,
            ),
            self._memory,
        )

    def get(self) -> bytes:
        """Return the log."""
        return self.vm.get_dirty_log(1)

    def clear(self, log: bytes) -> None:
        """Clear what the log has."""
        self.vm.clear_dirty_log(1, 0, self.options.pages, log)

    def close(self) -> None:
        """End the threads and the VM."""
        self._ended = True
        self._go.wait()
        for thread in self._threads:
            thread.join()
        for vcpu in self._vcpus:
            vcpu.close()
        self.vm.close()


@contextmanager
def _machine(kvm: api.Kvm, options: Options) -> Iterator[_Machine]:
    machine = _Machine(kvm, options)
    try:
        yield machine
    finally:
        machine.close()


def measure(kvm: api.Kvm, options: Options, progress: Callable[[str], None] = lambda what: None) -> Report:
    """Run the measurement once. Raises BenchError for what cannot be measured here."""
    check(options)
    if options.manual_protect and not kvm.check_extension(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
        raise BenchError("this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    report = Report(options, runs={name: [] for name in PHASES})

    def timed(phase: str, function: Callable[[], Any]) -> Any:
        progress(PHASES[phase])
        start = time.perf_counter()
        result = function()
        report.runs[phase].append(time.perf_counter() - start)
        return result

    try:
        with _machine(kvm, options) as machine:
            timed("populate", machine.go_over_memory)
            timed("enable", lambda: machine.log(True))
            for _ in range(options.iterations):
                timed("dirty", machine.go_over_memory)
                log = timed("get", machine.get)
                report.dirty_pages.append(int.from_bytes(log, "little").bit_count())
                if options.manual_protect:
                    timed("clear", partial(machine.clear, log))
            timed("disable", lambda: machine.log(False))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise BenchError(f"{options.pages * PAGE >> 20} MiB of memory: {error.strerror}") from None
    report.seconds = {name: statistics.median(runs) for name, runs in report.runs.items() if runs}
    return report


def rows(reports: Sequence[Report]) -> list[list[str]]:
    """Return a table of people's: a row per phase, two columns per report: milliseconds, and pages in a second."""
    table = []
    for name, what in PHASES.items():
        row = [name, what]
        for report in reports:
            seconds, rate = report.seconds.get(name), report.pages_per_second.get(name)
            row += ["-" if seconds is None else f"{seconds * 1e3:,.2f}", "-" if rate is None else f"{rate:,.0f}"]
        table.append(row)
    return table
