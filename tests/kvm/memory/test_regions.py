# SPDX-License-Identifier: Apache-2.0
"""Host memory shared by several slots is known to the machine exactly while some slot uses it."""

from __future__ import annotations

import random

import pytest

from softkvm.kvm.memory.regions import HostRegions

PAGE = 4096


class FakeMachine:
    """Knows regions and refuses overlaps, as the silicon's machine does."""

    def __init__(self) -> None:
        self.regions: dict[int, int] = {}

    def add_region(self, hva: int, size: int) -> None:
        if self.has_region(hva, size):
            raise ValueError("overlap")
        self.regions[hva] = size

    def remove_region(self, hva: int) -> None:
        del self.regions[hva]

    def has_region(self, hva: int, size: int) -> bool:
        return any(start < hva + size and hva < start + length for start, length in self.regions.items())

    def covers(self, page: int) -> bool:
        return any(start <= page < start + length for start, length in self.regions.items())


def test_regions_cover_what_is_used_whatever_the_order() -> None:
    rng = random.Random(7)
    for _ in range(200):
        machine = FakeMachine()
        regions = HostRegions(machine)  # type: ignore[arg-type]
        live: list[tuple[int, int, int]] = []
        for user in range(30):
            if live and rng.random() < 0.4:
                regions.put(*live.pop(rng.randrange(len(live))))
            else:
                span = (rng.randrange(20) * PAGE, rng.randrange(1, 8) * PAGE, user)
                regions.get(*span)
                live.append(span)
            for start, size, _ in live:
                assert all(machine.covers(page) for page in range(start, start + size, PAGE))
            first = rng.randrange(24) * PAGE
            wanted = {user for start, size, user in live if start < first + PAGE and first < start + size}
            assert wanted <= regions.users(first, first + PAGE) <= {user for _, _, user in live}
        for span in live:
            regions.put(*span)
        assert machine.regions == {}


def test_a_refused_region_leaves_nothing_behind() -> None:
    machine = FakeMachine()
    machine.add_region(4 * PAGE, PAGE)  # somebody else's
    regions = HostRegions(machine)  # type: ignore[arg-type]
    regions.get(0, 2 * PAGE, 0)
    with pytest.raises(ValueError):
        regions.get(PAGE, 5 * PAGE, 1)
    assert machine.regions == {0: 2 * PAGE, 4 * PAGE: PAGE}
    assert regions.users(0, 8 * PAGE) == {0}
