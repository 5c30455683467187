# SPDX-License-Identifier: Apache-2.0
"""A client's seccomp filters, which would end the KVM in its process, and system calls that it makes by number."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.client.conftest import EXEC, TIMEOUT_S

FILTERS = [
    "filter_by_seccomp",
    "filter_for_all_threads",
    "filter_by_prctl",
    "strict_mode_by_seccomp",
    "strict_mode_by_prctl",
]


@pytest.mark.parametrize("case", FILTERS)
def test_a_client_that_filters_its_calls_runs_guests(holds: Callable[..., None], case: str) -> None:
    holds("filters", case)


@pytest.mark.parametrize("case", FILTERS)
def test_a_static_client_that_filters_its_calls_runs_guests(holds_static: Callable[..., None], case: str) -> None:
    holds_static("filters", case)


ANSWERS = ["questions_are_the_kernels", "wrong_filters_are_refused", "a_filter_takes_a_right"]


@pytest.mark.parametrize("case", ANSWERS)
def test_what_is_asked_and_what_is_wrong_the_kernel_answers(holds: Callable[..., None], case: str) -> None:
    holds("filters", case)


@pytest.mark.parametrize("case", ANSWERS)
def test_the_kernel_answers_a_static_client(holds_static: Callable[..., None], case: str) -> None:
    holds_static("filters", case)


def test_a_static_client_that_has_no_rights_from_the_beginning(build: Callable[..., Path]) -> None:
    without = ["setpriv", "--bounding-set", "-sys_admin"] if os.geteuid() == 0 else []
    if without and not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    command = [*without, *EXEC, "--", str(build("filters", "-static")), "a_filter_takes_a_right"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_requests_may_be_made_by_the_number_of_the_call(holds: Callable[..., None]) -> None:
    holds("filters", "calls_by_number")
