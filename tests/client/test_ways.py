# SPDX-License-Identifier: Apache-2.0
"""The ways of Unix lead to KVM under ``softkvm exec`` as to the kernel's: signals, children, ends, calls by number."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from tests.support.clients import Completed


@pytest.fixture(params=["dynamic", "static"])
def holds_either(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a case of a program that is linked in either way."""
    fixture: Callable[..., None] = request.getfixturevalue("holds" if request.param == "dynamic" else "holds_static")
    return fixture


@pytest.mark.parametrize("case", ["signals_that_are_waited_for", "a_timer_for_one_thread"])
def test_signals_come_to_who_waits_for_them(holds_either: Callable[..., None], case: str) -> None:
    holds_either("ways", case)


@pytest.mark.parametrize("case", ["handlers_on_a_stack_of_their_own", "older_functions"])
def test_handlers_are_installed_by_whatever_function(holds_either: Callable[..., None], case: str) -> None:
    holds_either("ways", case)


@pytest.mark.parametrize("case", ["children_from_threads", "becomes_a_daemon", "children_leave_nothing"])
def test_children_start_from_everywhere_and_leave_nothing(holds_either: Callable[..., None], case: str) -> None:
    holds_either("ways", case)


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("segmentation_fault", -signal.SIGSEGV),
        ("illegal_instruction", -signal.SIGILL),
        ("aborted", -signal.SIGABRT),
        ("terminated", -signal.SIGTERM),
        ("quick", 7),
    ],
)
def test_a_client_that_ends_while_a_guest_runs_ends_by_itself(
    client: Callable[..., Completed], case: str, status: int
) -> None:
    done = client("ways", case)
    assert (done.returncode, done.stderr, done.stdout) == (status, "", "")


@pytest.mark.parametrize("case", ["namespaces", "calls_about_memory_and_copies_by_number"])
def test_other_calls(holds_either: Callable[..., None], case: str) -> None:
    holds_either("ways", case)
