# SPDX-License-Identifier: Apache-2.0
"""Values of module parameters: the kernel's types have limits (kernel/params.c), and what is beyond them is none."""

from __future__ import annotations

import pytest

from softkvm.kvm.params import Params


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("avic", "N", False),
        ("avic", "1", True),
        ("pause_filter_count", "0", 0),
        ("pause_filter_count_max", "0xffff", 0xFFFF),
        ("halt_poll_ns", "4294967295", 0xFFFF_FFFF),
        ("max_huge_page_level", "1", 1),
        ("pte_prefetch_num", "512", 512),
    ],
)
def test_a_value_is_taken(name: str, text: str, value: object) -> None:
    params = Params()
    params.assign(name, text)
    assert getattr(params, name) == value


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("avic", "2", "Y or N"),
        ("pause_filter_count", "-1", "a number from 0 to 65535"),
        ("pause_filter_thresh", "65536", "a number from 0 to 65535"),
        ("halt_poll_ns", "4294967296", "a number from 0 to 4294967295"),
        ("halt_poll_ns_shrink", "-5", "a number from 0 to 4294967295"),
        ("min_timer_period_us", "few", "a number"),
        ("max_huge_page_level", "0", "a number from 1 to 3"),
        ("max_huge_page_level", "4", "a number from 1 to 3"),
        ("pte_prefetch_num", "0", "a number from 1 to 512"),
        ("pte_prefetch_num", "3", "a power of 2"),
    ],
)
def test_a_value_beyond_the_limits_is_refused_and_changes_nothing(name: str, text: str, expected: str) -> None:
    params = Params()
    with pytest.raises(ValueError, match=f"^{name}={text}: expected {expected}$"):
        params.assign(name, text)
    assert params == Params()
