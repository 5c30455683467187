# SPDX-License-Identifier: Apache-2.0
"""What holds for a client that the preload is in, holds for one that is linked statically, which the loader runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

#: By program. Not among them: what counts the process's threads, of which the loader has its own; reading what is no
#: file of statistics, which is empty there; and a main thread that ends as the process does, which a static C library
#: cannot unwind any more by then.
CASES = {
    "faults": [
        "handler_before_open",
        "handler_after_open",
        "handler_by_other_functions",
        "on_alternate_stack",
        "handlers_call_the_one_before",
        "without_a_handler",
        "handler_for_once",
        "ram_is_unmapped",
        "ram_is_truncated",
        "ram_is_protected",
        "ram_is_read_only",
        "ram_is_covered",
        "ram_is_moved",
        "ram_file_is_unmapped",
        "ram_is_replaced",
        "client_faults_while_a_guest_runs",
    ],
    "forks": [
        "child",
        "grandchild",
        "while_another_thread_runs",
        "spawned",
        "executed",
        "executed_from_a_thread_that_runs_a_guest",
        "daemon_opens_it",
        "from_many_threads",
    ],
    "descriptors": [
        "copies",
        "close_on_exec_as_the_kernels",
        "numbers_are_the_lowest_free",
        "vm_is_closed_first",
        "raw_close",
        "ranges",
        "over_a_socket",
        "mapping_outlives_its_descriptor",
        "numbers_are_used_again",
        "vms_leave_nothing",
        "vcpus_leave_nothing",
    ],
    "signals": [
        "handler_before_open",
        "handler_after_first_run",
        "handler_by_other_functions",
        "restart_flag",
        "timer",
        "halted",
        "ignored",
        "siginfo",
        "mask_open_in_run",
        "mask_blocked_in_run",
        "immediate_exit_race",
        "longjmp_out",
        "longjmp_out_of_anything",
        "thread_ends_in_handler",
        "cancel_deferred",
        "cancel_asynchronous",
        "exit_under_a_guest",
    ],
    "requests": [
        "wild_pointers",
        "structures_that_end_too_early",
        "read_only_memory",
        "lists_that_are_too_short",
        "requests_of_other_files",
        "arguments_that_must_be_none",
        "one_vcpu_in_many_threads",
        "fuzzer",
    ],
}


@pytest.mark.parametrize(("program", "case"), [(program, case) for program in CASES for case in CASES[program]])
def test_a_static_client(program: str, case: str, holds_static: Callable[..., None]) -> None:
    holds_static(program, case)
