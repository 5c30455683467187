# SPDX-License-Identifier: Apache-2.0
"""A client that executes RDTSC sees the counter that its KVM runs on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from softkvm.client.world import counts_steadily


@pytest.mark.parametrize(
    "case",
    [
        "the_guests_counter_is_the_clients_with_its_offset",
        "its_frequency_is_what_kvm_says",
        "the_clock_names_the_hosts_counter",
    ],
)
def test_the_time_stamp_counter_is_the_hosts(holds: Callable[..., None], case: str) -> None:
    if not counts_steadily():
        pytest.skip("the host's time-stamp counter is none to tell the time with")
    holds("clocks", case)
