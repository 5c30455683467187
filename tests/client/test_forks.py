# SPDX-License-Identifier: Apache-2.0
"""Children of a client under ``softkvm exec``: what they inherit is EIO, what they open works, the parent goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "case",
    [
        "child",
        "grandchild",
        "while_another_thread_runs",
        "spawned",
        "executed",
        "executed_from_a_thread_that_runs_a_guest",
        "daemon_opens_it",
        "from_many_threads",
        "while_another_thread_opens",
        "while_other_threads_make_requests",
    ],
)
def test_children_have_a_kvm_of_their_own(holds: Callable[..., None], case: str) -> None:
    holds("forks", case)
