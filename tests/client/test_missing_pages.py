# SPDX-License-Identifier: Apache-2.0
"""A client's guest that sleeps at a page of its userfaultfd: it hears of signals, and nothing waits for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from softkvm.bench.demand_paging import available

pytestmark = pytest.mark.skipif(not available(user_mode_only=True), reason="the host lets nobody have a userfaultfd")

CASES = ["signal_ends_the_run", "signal_of_the_mask_ends_the_run", "slot_goes", "log_is_read"]


@pytest.mark.parametrize("case", CASES)
def test_a_guest_at_a_page_that_nobody_provides_keeps_nobody(holds: Callable[..., None], case: str) -> None:
    holds("missing_pages", case)


@pytest.mark.parametrize("case", CASES)
def test_nor_does_a_static_programs(holds_static: Callable[..., None], case: str) -> None:
    holds_static("missing_pages", case)
