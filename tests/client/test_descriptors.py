# SPDX-License-Identifier: Apache-2.0
"""A client's descriptors under ``softkvm exec`` are as the kernel's, and nothing is left of those that are closed."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "case",
    [
        "copies",
        "close_on_exec_as_the_kernels",
        "numbers_are_the_lowest_free",
        "vm_is_closed_first",
        "raw_close",
        "ranges",
        "over_a_socket",
        "mapping_outlives_its_descriptor",
        "guest_memory",
    ],
)
def test_descriptors_are_copied_passed_and_closed_as_the_kernels(holds: Callable[..., None], case: str) -> None:
    holds("descriptors", case)


@pytest.mark.parametrize("case", ["vms_leave_nothing", "vcpus_leave_nothing", "threads_leave_nothing"])
def test_what_is_closed_leaves_no_descriptor_thread_or_memory(holds: Callable[..., None], case: str) -> None:
    holds("descriptors", case)
