# SPDX-License-Identifier: Apache-2.0
"""The measurement of dirty logging: the guest does what is measured, on either KVM, and bad options are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.machines import KVMS

from softkvm import api
from softkvm.bench import dirty_log
from softkvm.bench.dirty_log import BenchError, Options

SIZE = 4 << 20
PAGES = SIZE // 4096


@pytest.fixture(params=list(KVMS))
def kvm(request: pytest.FixtureRequest) -> Callable[[], api.Kvm]:
    open_kvm: Callable[[], api.Kvm] = KVMS[request.param]
    return open_kvm


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("manual_protect", [0, 1, 3])
def test_a_guest_goes_over_its_memory_and_the_log_has_what_it_wrote(
    kvm: Callable[[], api.Kvm], overlap: bool, manual_protect: int
) -> None:
    options = Options(2, SIZE, iterations=3, overlap=overlap, manual_protect=manual_protect)
    with kvm() as opened:
        report = dirty_log.measure(opened, options)
    assert options.pages == (PAGES if overlap else 2 * PAGES)
    assert report.dirty_pages == [options.pages] * 3
    done = {name: len(runs) for name, runs in report.runs.items()}
    clears = 3 if manual_protect else 0
    assert done == {"populate": 1, "enable": 1, "dirty": 3, "get": 3, "clear": clears, "disable": 1}
    assert all(seconds > 0 for seconds in report.seconds.values())


def test_a_fraction_of_the_pages_is_written(kvm: Callable[[], api.Kvm]) -> None:
    with kvm() as opened:
        report = dirty_log.measure(opened, Options(1, 4 * SIZE, iterations=2, write_percent=25))
    for pages in report.dirty_pages:
        assert 0.2 < pages / (4 * PAGES) < 0.3


def test_each_pass_writes_other_pages(kvm: Callable[[], api.Kvm]) -> None:
    with kvm() as opened:
        report = dirty_log.measure(opened, Options(1, SIZE, iterations=4, write_percent=50))
    assert len(set(report.dirty_pages)) > 1


@pytest.mark.parametrize("backing", ["anonymous", "shmem"])
def test_memory_may_be_of_several_kinds(kvm: Callable[[], api.Kvm], backing: str) -> None:
    with kvm() as opened:
        assert dirty_log.measure(opened, Options(1, SIZE, backing=backing)).dirty_pages == [PAGES] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(backing="paper"), "backing=paper: expected"),
        (Options(write_percent=101), "write_percent=101: expected 0 to 100"),
        (Options(vcpus=0), "vcpus=0: expected"),
        (Options(bytes_per_vcpu=4096), "4 KiB of memory for each vCPU: expected 2 MiB or a multiple"),
        (Options(bytes_per_vcpu=1 << 50), "MiB of memory: this host has"),
    ],
)
def test_what_cannot_be_is_refused(options: Options, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        dirty_log.check(options)
