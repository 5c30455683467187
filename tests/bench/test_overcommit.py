# SPDX-License-Identifier: Apache-2.0
"""Overcommit: what guests have of the host, the model of swap, who fits; and bad options are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.guests import missing
from tests.support.machines import open_soft

from softkvm.bench import overcommit
from softkvm.bench.host_budget import SwapModel, control_group, resident, swap_size
from softkvm.bench.overcommit import BenchError, Options, run_series
from softkvm.vmm.memory import MIB, GuestMemory


@pytest.fixture(autouse=True, scope="module")
def guests() -> None:
    """Skips where the bare-metal guest is not built."""
    if not (Path(overcommit.__file__).parent / "data" / "allocator.elf").exists():
        missing("src/softkvm/bench/data/allocator.elf is not built: make guests")


def test_what_a_guest_has_of_the_host_is_what_it_has_touched() -> None:
    memories = [GuestMemory(8 * MIB), GuestMemory(4 * MIB)]
    ranges = [[(ram.hva, ram.hva + ram.end - ram.start) for ram in memory.ranges] for memory in memories]
    before = resident(ranges)
    memories[0].view[: 4 * MIB] = b"\1" * (4 * MIB)
    memories[1].view[:4096] = b"\1" * 4096
    bytes(memories[1].view[2 * MIB :])  # reading takes none of the host's
    held = [after - earlier for after, earlier in zip(resident(ranges), before, strict=True)]
    assert held[0] == 4 * MIB
    assert 4096 <= held[1] <= 2 * MIB  # a large page, perhaps
    memories[0].discard(0, 4 * MIB)
    assert resident(ranges)[0] == before[0]
    for memory in memories:
        memory.close()


def test_swap_takes_first_what_has_not_run_for_longest() -> None:
    model = SwapModel(budget=100, swap=1000)
    model.begin(0, 60)
    assert model.look([60]) == 60
    model.begin(1, 60)
    assert model.look([60, 60]) == 100
    assert (model.swapped, model.out, model.back) == ([20, 0], 20, 0)
    model.begin(0, 60)  # its pages are needed again, and the other's go
    assert model.look([60, 60]) == 100
    assert (model.swapped, model.out, model.back) == ([0, 20], 40, 20)
    # What is given back is gone from swap, too.
    assert model.look([60, 10]) == 60
    assert model.swapped == [0, 10]
    assert not model.full


def test_a_host_without_swap_is_full_beyond_its_budget() -> None:
    model = SwapModel(budget=100, swap=0)
    model.begin(0, 100)
    model.look([100])
    assert not model.full
    model.begin(1, 10)
    model.look([100, 1])
    assert model.full


@given(
    budget=st.integers(0, 200),
    steps=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 100), min_size=4, max_size=4)), max_size=12),
)
def test_no_more_is_in_memory_than_the_budget_and_nothing_is_out_twice(
    budget: int, steps: list[tuple[int, list[int]]]
) -> None:
    model = SwapModel(budget, swap=1 << 20)
    for guest in range(4):
        model.begin(guest, 0)
    for guest, held in steps:
        model.begin(guest, 50)
        in_memory = model.look(held)
        assert in_memory <= budget
        assert in_memory == sum(held) - sum(model.swapped)
        assert all(0 <= out <= its for out, its in zip(model.swapped, held, strict=True))
    assert model.out >= model.back


def test_guests_that_give_nothing_back_fit_three_times_and_those_that_do_five_times() -> None:
    """Row 20, in the shape of row 21's experiment: one runs after the other, and the memory of those before is free."""
    options = Options(guests=5, memory=128 * MIB, modes=("bare", "hypercall"), enforce="accounting")
    report = overcommit.measure("soft", open_soft, options)
    bare, hypercall = report.series["bare"], report.series["hypercall"]
    assert (bare.fit, hypercall.fit) == (3, 5)
    # Swap: none while they fit, more and more behind that; none at all where memory comes back.
    assert [run.swapped_out for run in bare.runs[:3]] == [0, 0, 0]
    assert 0 < bare.runs[3].swapped_out <= bare.runs[4].swapped_out
    assert bare.runs[4].swap_s == bare.runs[4].swapped_out / options.swap_speed
    assert [run.swapped_out for run in hypercall.runs] == [0] * 5
    assert all(run.after < run.peak // 2 for run in hypercall.runs)
    assert all(run.after == run.peak for run in bare.runs)
    assert report.as_dict()["series"]["bare"]["fit"] == 3
    assert max(total for _, total, _ in bare.samples) > options.budget_bytes
    assert max(in_memory for _, _, in_memory in bare.samples) <= options.budget_bytes


def test_without_swap_the_first_guest_too_many_ends_it() -> None:
    options = Options(guests=5, memory=64 * MIB, budget=120 * MIB, swap=0)
    series = run_series(open_soft, options, "bare")
    assert (len(series.runs), series.fit) == (3, 2)
    assert series.ended == "host and swap are full: it would kill a guest"


@pytest.fixture
def permitted() -> None:
    """Skips where no control group can be made, or where the host would swap."""
    if swap_size():
        pytest.skip("the host has swap: no guest is killed")
    with control_group() as group:
        if group is None:
            pytest.skip("no control group can be made here")


@pytest.mark.usefixtures("permitted")
def test_a_control_group_ends_the_first_guest_too_many() -> None:
    options = Options(guests=5, memory=128 * MIB, budget=300 * MIB, modes=("bare",), enforce="cgroup")
    series = overcommit.measure("soft", open_soft, options).series["bare"]
    assert series.enforced == "cgroup"
    assert series.fit == 2
    assert series.ended == "the host killed guest 3: it had no more memory"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(modes=("fast",)), "mode=fast: expected off, reporting"),
        (Options(guests=0), "guests=0: expected at least 1"),
        (Options(memory=16 * MIB), "memory=16 MiB: expected 64 MiB"),
        (Options(hog=256 * MIB), "hog=256 MiB: expected less than"),
        (Options(swap_speed=0), "swap_speed=0: expected at least 1"),
        (Options(enforce="hope"), "enforce=hope: expected auto"),
    ],
)
def test_what_cannot_be_is_refused(options: Options, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        overcommit.check(options)
