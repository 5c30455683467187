# SPDX-License-Identifier: Apache-2.0
"""SIGSEGV and SIGBUS: a client's faults go to its handler, a guest's and a request's are EFAULT."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "case",
    [
        "handler_before_open",
        "handler_after_open",
        "handler_by_other_functions",
        "on_alternate_stack",
        "handlers_call_the_one_before",
        "client_faults_while_a_guest_runs",
    ],
)
def test_a_clients_handler_sees_its_own_faults_and_no_others(holds: Callable[..., None], case: str) -> None:
    holds("faults", case)


@pytest.mark.parametrize("case", ["without_a_handler", "handler_for_once"])
def test_a_fault_without_a_handler_ends_the_process(holds: Callable[..., None], case: str) -> None:
    holds("faults", case)


@pytest.mark.parametrize(
    "case",
    [
        "ram_is_unmapped",
        "ram_is_truncated",
        "ram_is_protected",
        "ram_is_read_only",
        "ram_is_covered",
        "ram_is_moved",
        "ram_file_is_unmapped",
    ],
)
def test_memory_that_goes_under_a_vcpu_that_runs_is_efault(holds: Callable[..., None], case: str) -> None:
    holds("faults", case)


@pytest.mark.parametrize("case", ["ram_is_replaced", "ram_is_replaced_in_the_last_of_many"])
def test_a_vcpu_that_runs_executes_what_comes_in_the_place_of_its_code(holds: Callable[..., None], case: str) -> None:
    holds("faults", case)
