# SPDX-License-Identifier: Apache-2.0
"""What a test program of the suite says: its log, and the status that it ends with."""

from __future__ import annotations

import re

from softkvm.reports.result import Status, Subtest

SUMMARY = re.compile(r"^SUMMARY: (.*?)\s*$")
SUBTEST = re.compile(r"^(PASS|FAIL|SKIP|XFAIL|XPASS|KFAIL): (.*?)\s*$")
SUMMARY_LINES = 5  # the summary is looked for among the last lines, as the suite does

# Exit statuses of a test program, as the debug-exit port delivers them (value << 1 | 1)
STATUS_PASS = 1
STATUS_SKIP = 77
STATUS_ABORT = 127


def read_log(log: str) -> tuple[list[Subtest], str]:
    """Return the checks that *log* reports, and its summary."""
    lines = log.splitlines()
    subtests = [Subtest(match[1], match[2]) for line in lines if (match := SUBTEST.match(line))]
    summary = ""
    for line in lines[-SUMMARY_LINES:]:
        match = SUMMARY.match(line)
        if match:
            summary = match[1]
    return subtests, summary


def judge(exit_status: int) -> tuple[Status, str]:
    """Return what a test's exit status means, and a reason where the log need not give one."""
    if exit_status == STATUS_PASS:
        return Status.PASS, ""
    if exit_status == STATUS_SKIP:
        return Status.SKIP, ""
    if exit_status == STATUS_ABORT:
        return Status.FAIL, "aborted"
    return Status.FAIL, ""
