# SPDX-License-Identifier: Apache-2.0
"""Bad input of a client under ``softkvm exec``: the documented errno, no crash, no leak."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "case",
    [
        "wild_pointers",
        "structures_that_end_too_early",
        "read_only_memory",
        "lists_that_are_too_short",
        "arrays_are_read_last",
        "requests_of_other_files",
        "arguments_that_must_be_none",
    ],
)
def test_what_is_wrong_with_a_request_is_its_errno(holds: Callable[..., None], case: str) -> None:
    holds("requests", case)


def test_threads_take_turns_in_one_vcpu(holds: Callable[..., None]) -> None:
    holds("requests", "one_vcpu_in_many_threads")


def test_random_requests_from_four_threads_break_nothing(holds: Callable[..., None]) -> None:
    holds("requests", "fuzzer")
