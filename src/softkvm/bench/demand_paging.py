# SPDX-License-Identifier: Apache-2.0
"""What memory costs that comes page by page, as behind a post-copy migration: the kernel's ``demand_paging_test``.

::

    from softkvm.bench import demand_paging

    report = demand_paging.measure(softkvm.open(), demand_paging.Options(vcpus=2, bytes_per_vcpu=64 << 20))
    print(report.mode, report.pages_per_second)

Each vCPU has a part of memory, or all have the same, and goes over its pages once, none of which is there. Who gives
them is the *mode*:

| mode | who |
|---|---|
| ``none`` | the host's kernel, on its own: what the others compare with |
| ``missing`` | a thread of ours, by userfaultfd: a copy of another page |
| ``minor`` | the same; the page is in the file, and is only mapped |
| ``exit`` | the vCPU's thread: KVM_RUN ends with KVM_EXIT_MEMORY_FAULT |
| ``auto`` | ``missing`` where the host lets us, else ``exit`` |
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from softkvm import abi, api
from softkvm.bench.userfaultfd import MINOR, MISSING, Userfaultfd
from softkvm.bench.walkers import PAGE as PAGE
from softkvm.bench.walkers import PAGE_2M as PAGE_2M
from softkvm.bench.walkers import TEST_GPA, Walk, Walkers, check_memory
from softkvm.bench.walkers import BenchError as BenchError

REPORT_VERSION: Final = 1
MODES: Final = ("auto", "none", "missing", "minor", "exit")
MAX_DELAY_US: Final = 1_000_000

#: What pages have that somebody gives.
PATTERN: Final = b"\xab"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; sizes in bytes."""

    vcpus: int = 1
    bytes_per_vcpu: int = 64 << 20
    #: All vCPUs go over the same memory.
    overlap: bool = False
    mode: str = "auto"
    #: Percent of the pages that are written, not read.
    write_percent: int = 100
    #: How long who gives a page takes beside, as a network would.
    delay_us: int = 0

    @property
    def walk(self) -> Walk:
        """What the vCPUs do."""
        return Walk(self.vcpus, self.bytes_per_vcpu, self.overlap, self.write_percent)


@dataclass(slots=True)
class Report:
    """What was found."""

    options: Options
    #: Who gave the pages, and how many times he was asked: once a page, or more where vCPUs meet.
    mode: str
    faults: int
    seconds: float

    @property
    def pages_per_second(self) -> float:
        """Pages that came in a second, all vCPUs together."""
        return self.options.walk.pages / self.seconds

    @property
    def pages_per_second_per_vcpu(self) -> float:
        """Pages that each vCPU went over in a second."""
        return self.options.bytes_per_vcpu / PAGE / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "version": REPORT_VERSION,
            "options": {**asdict(self.options), "pages": self.options.walk.pages},
            "mode": self.mode,
            "faults": self.faults,
            "seconds": self.seconds,
            "pages_per_second": self.pages_per_second,
            "pages_per_second_per_vcpu": self.pages_per_second_per_vcpu,
        }


def check(options: Options) -> None:
    """Raise BenchError for what no run can be."""
    if options.mode not in MODES:
        raise BenchError(f"mode={options.mode}: expected {', '.join(MODES)}")
    if not 0 <= options.write_percent <= 100:
        raise BenchError(f"write_percent={options.write_percent}: expected 0 to 100")
    if not 0 <= options.delay_us <= MAX_DELAY_US:
        raise BenchError(f"delay_us={options.delay_us}: expected 0 to {MAX_DELAY_US}")
    check_memory(options.vcpus, options.bytes_per_vcpu, options.overlap)


class Memory:
    """The guest's memory, which is not there, and another mapping of it for who gives pages.

    Nobody but the guest touches the former.
    """

    def __init__(self, size: int, *, shared: bool) -> None:
        self.size = size
        self.alias: mmap.mmap | None = None
        room = size + PAGE_2M
        if shared:
            fd = os.memfd_create("demand-paging")
            try:
                os.ftruncate(fd, room)
                self.mapping, self.alias = mmap.mmap(fd, room), mmap.mmap(fd, room)
            finally:
                os.close(fd)
        else:
            self.mapping = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, ValueError):  # no host has to have huge pages
                self.mapping.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.address = -(-start // PAGE_2M) * PAGE_2M
        self._offset = self.address - start

    def fill(self, offset: int, size: int) -> None:
        """Put the pattern into pages of the file, which the guest's mapping doesn't have yet."""
        assert self.alias is not None
        at = self._offset + offset
        self.alias[at : at + size] = PATTERN * size

    def protect(self, offset: int, size: int, protection: int) -> None:
        """Change what may be done with the guest's mapping."""
        if _libc.mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), protection):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def read(self, offset: int, size: int) -> bytes:
        """Return what is in the guest's mapping by now."""
        return ctypes.string_at(self.address + offset, size)


class _Pager:
    """Gives pages on a thread of its own (``uffd_handler_thread_fn``)."""

    def __init__(self, memory: Memory, options: Options, mode: int, *, user_mode_only: bool) -> None:
        self._memory = memory
        self._delay_s = options.delay_us / 1e6
        self.faults = 0
        self._source = mmap.mmap(-1, PAGE)
        self._source[:] = PATTERN * PAGE
        self._source_address = ctypes.addressof(ctypes.c_char.from_buffer(self._source))
        self._failure: BaseException | None = None
        if mode == MINOR:
            memory.fill(0, memory.size)
        self._file = Userfaultfd(mode, user_mode_only=user_mode_only)
        try:
            self._file.register(memory.address, memory.size)
        except OSError:
            self._file.close()
            raise
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._main, name="bench pager", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        ready = select.poll()
        ready.register(self._file.fd, select.POLLIN)
        ready.register(self._stop, select.POLLIN)
        try:
            while all(fd != self._stop for fd, _ in ready.poll()):
                address = self._file.next_fault()
                if address is not None:
                    self._give(address & -PAGE)
        except OSError as failure:  # told to who waits; those who have touched memory go on without us
            self._failure = failure
        finally:
            self._file.close()

    def _give(self, address: int) -> None:
        self.faults += 1
        if self._delay_s:
            time.sleep(self._delay_s)
        with self._file.provided(address, PAGE):
            if self._file.mode == MISSING:
                self._file.copy(address, self._source_address, PAGE)
            else:
                self._file.go_on(address, PAGE)

    def close(self) -> None:
        """End the thread; raises what has ended it before."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        if self._failure is not None:
            raise self._failure


class _Machine(Walkers):
    """vCPUs that go over memory which is not there; with mode ``exit`` their threads give it."""

    def __init__(self, kvm: api.Kvm, options: Options, memory: Memory, *, exits: bool) -> None:
        self._options = options
        self._pages = memory
        self._exits = exits
        self._lock = threading.Lock()
        self._given: set[int] = set()
        self.faults = 0
        if exits:
            memory.protect(0, memory.size, 0)
        super().__init__(kvm, options.walk, memory.mapping, memory.address)

    def _resolve(self, vcpu: api.Vcpu) -> bool:
        run = vcpu.kvm_run
        offset = run.memory_fault.gpa - TEST_GPA
        if not self._exits or run.exit_reason != abi.KVM_EXIT_MEMORY_FAULT or not 0 <= offset < self._pages.size:
            return False
        if self._options.delay_us:
            time.sleep(self._options.delay_us / 1e6)
        with self._lock:
            self.faults += 1
            first = offset & -PAGE
            if first in self._given:  # by another vCPU's thread meanwhile, whose guest may have written it by now
                return True
            self._given.add(first)
            self._pages.fill(offset, PAGE)
            self._pages.protect(offset, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        return True


@contextlib.contextmanager
def _pager(memory: Memory, options: Options, mode: str, *, user_mode_only: bool) -> Iterator[_Pager | None]:
    """Have pages given; None with a mode that has no such thread. Raises BenchError where the host doesn't let us."""
    kinds = {"missing": MISSING, "minor": MINOR}
    if mode not in kinds:
        yield None
        return
    try:
        pager = _Pager(memory, options, kinds[mode], user_mode_only=user_mode_only)
    except OSError as error:
        raise BenchError(f"mode {mode}: userfaultfd: {error.strerror}") from None
    try:
        yield pager
    finally:
        pager.close()


def available(*, user_mode_only: bool) -> bool:
    """Tell whether the host lets us have a userfaultfd."""
    try:
        Userfaultfd(MISSING, user_mode_only=user_mode_only).close()
    except OSError:
        return False
    return True


def measure(
    kvm: api.Kvm,
    options: Options,
    progress: Callable[[str], None] = lambda what: None,
    *,
    user_mode_only: bool = True,
    look: Callable[[Memory], object] = lambda memory: None,
) -> Report:
    """Run the measurement once. Raises BenchError for what cannot be measured here.

    *user_mode_only* is false for a device, whose guest's accesses are the kernel's; *look* is called with the memory
    at the end.
    """
    check(options)
    mode = options.mode
    if mode == "auto":
        mode = "missing" if available(user_mode_only=user_mode_only) else "exit"
    memory = Memory(options.walk.pages * PAGE, shared=mode in ("minor", "exit"))
    try:
        with _pager(memory, options, mode, user_mode_only=user_mode_only) as pager:
            machine = _Machine(kvm, options, memory, exits=mode == "exit")
            try:
                progress(f"a pass over {options.walk.pages:,} pages")
                start = time.perf_counter()
                machine.go_over_memory()
                seconds = time.perf_counter() - start
            finally:
                machine.close()
            look(memory)
            faults = machine.faults if pager is None else pager.faults
    except (OSError, BenchError) as error:
        told = isinstance(error, BenchError) or error.errno == errno.EFAULT
        if mode == "exit" and told:  # the kernel's KVM takes it for MMIO
            raise BenchError("mode exit: this KVM does not tell of memory that is not there") from None
        if isinstance(error, BenchError) or error.errno != errno.ENOMEM:
            raise
        raise BenchError(f"{options.walk.pages * PAGE >> 20} MiB of memory: {error.strerror}") from None
    return Report(options, mode, faults, seconds)


def rows(reports: Sequence[Report]) -> list[list[str]]:
    """Return a table for people: a row for each report."""
    return [
        [
            report.mode,
            f"{report.seconds * 1e3:,.1f}",
            f"{report.pages_per_second:,.0f}",
            f"{report.pages_per_second_per_vcpu:,.0f}",
            f"{report.faults:,}",
        ]
        for report in reports
    ]
