# SPDX-License-Identifier: Apache-2.0
"""The measurement of demand paging: each page is given once, and it is the one that the guest finds."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable

import pytest
from tests.support.machines import KVMS

from softkvm import abi
from softkvm.bench import demand_paging
from softkvm.bench.demand_paging import PAGE, PATTERN, BenchError, Memory, Options
from softkvm.bench.userfaultfd import MINOR, MISSING, Userfaultfd
from softkvm.bench.walkers import TEST_GPA

SIZE = 2 << 20
PAGES = SIZE // PAGE


def measure(kind: str, options: Options, look: Callable[[Memory], object] = lambda _: None) -> demand_paging.Report:
    """Measure on a KVM; skips where the host has no such userfaultfd for us."""
    user_mode_only = kind == "soft"
    mode = {"missing": MISSING, "minor": MINOR}.get(options.mode)
    if mode is not None:
        try:
            Userfaultfd(mode, user_mode_only=user_mode_only).close()
        except OSError as error:
            pytest.skip(f"userfaultfd: {error.strerror}")
    with KVMS[kind]() as kvm:
        return demand_paging.measure(kvm, options, user_mode_only=user_mode_only, look=look)


@pytest.mark.parametrize("kind", sorted(KVMS))
@pytest.mark.parametrize("mode", ["none", "missing", "minor"])
@pytest.mark.parametrize("overlap", [False, True])
def test_each_page_is_given(kind: str, mode: str, overlap: bool) -> None:
    options = Options(2, SIZE, overlap, mode)
    report = measure(kind, options)
    assert options.walk.pages == PAGES * (1 if overlap else 2)
    assert report.mode == mode
    assert report.seconds > 0
    if mode == "none":
        assert report.faults == 0
    elif overlap:
        assert PAGES <= report.faults <= 2 * PAGES  # both may have waited for one
    else:
        assert report.faults == 2 * PAGES


@pytest.mark.parametrize("overlap", [False, True])
def test_a_vcpus_own_thread_gives_pages_behind_an_exit(overlap: bool) -> None:
    report = measure("soft", Options(2, SIZE, overlap, "exit"))
    assert report.faults >= report.options.walk.pages


def test_a_page_that_another_thread_has_given_is_not_given_again() -> None:
    memory = Memory(SIZE, shared=True)
    options = Options(1, SIZE, mode="exit")
    with KVMS["soft"]() as kvm, contextlib.closing(demand_paging._Machine(kvm, options, memory, exits=True)) as machine:
        vcpu = machine._vcpus[0]
        vcpu.kvm_run.exit_reason = abi.KVM_EXIT_MEMORY_FAULT
        vcpu.kvm_run.memory_fault.gpa = TEST_GPA
        assert machine._resolve(vcpu)
        assert memory.read(0, PAGE) == PATTERN * PAGE
        ctypes.memset(memory.address, 0x11, PAGE)  # the other's guest goes on
        assert machine._resolve(vcpu)
        assert memory.read(0, PAGE) == b"\x11" * PAGE
        assert machine.faults == 2


@pytest.mark.parametrize("mode", ["missing", "minor", "exit"])
def test_who_reads_finds_what_was_given(mode: str) -> None:
    found: list[bytes] = []
    report = measure(
        "soft", Options(1, SIZE, mode=mode, write_percent=0), lambda memory: found.append(memory.read(0, SIZE))
    )
    assert found == [PATTERN * SIZE]
    assert report.faults == PAGES


def test_auto_is_what_the_host_has() -> None:
    report = measure("soft", Options(1, SIZE))
    assert report.mode == ("missing" if demand_paging.available(user_mode_only=True) else "exit")
    assert report.as_dict()["options"]["pages"] == PAGES


def test_the_device_does_not_tell_of_missing_memory() -> None:
    with pytest.raises(BenchError, match="mode exit: this KVM does not tell"):
        measure("device", Options(1, SIZE, mode="exit"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(mode="x"), "mode=x: expected auto, none, missing, minor, exit"),
        (Options(write_percent=101), "write_percent=101: expected 0 to 100"),
        (Options(delay_us=-1), "delay_us=-1: expected 0 to 1000000"),
        (Options(vcpus=0), "vcpus=0: expected at least 1"),
        (Options(bytes_per_vcpu=4096), "4 KiB of memory for each vCPU: expected 2 MiB or a multiple"),
        (Options(bytes_per_vcpu=1 << 50), "this host has"),
    ],
)
def test_what_cannot_be_is_refused(options: Options, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        demand_paging.check(options)
