# SPDX-License-Identifier: Apache-2.0
"""The vsock test suite (thread 3) between the host and the default guest.

SOFTKVM_VSOCK_TEST names a static build of the kernel's own ``tools/testing/vsock/vsock_test``: it does the guest's half
then, too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm.reports.result import Status
from softkvm.vsocktest.cases import CASES
from softkvm.vsocktest.guest import LOOPBACK, Settings, run

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(900)]

#: What the default guest's kernel (Linux 6.1) cannot do, whatever the host is; a newer one skips none of it.
MAY_LACK = ("ZEROCOPY", "SIOCOUTQ", "SHUT_", "invalid", "big message", "SOCK_SEQPACKET MSG_PEEK", "RCVLOWAT", "LINGER")

KERNELS = os.environ.get("SOFTKVM_VSOCK_TEST")


def check(settings: Settings) -> int:
    """Do it; return how many cases passed."""
    with open_soft() as kvm:
        outcome = run(kvm, linux_guest(), settings, lambda result: None)
    assert not outcome.trouble, f"{outcome.trouble}\n{outcome.log}"
    failed = [result.line for result in outcome.results if result.status is Status.FAIL]
    assert not failed, failed
    skipped = [result.name for result in outcome.results if result.status is Status.SKIP]
    assert all(any(word in name for word in MAY_LACK) for name in skipped), skipped
    # Of the last program's control connections the guest may still have to take the end.
    assert outcome.live_sockets <= 2
    return sum(result.status is Status.PASS for result in outcome.results)


def test_every_case_of_the_kernels_suite_passes_both_ways() -> None:
    assert check(Settings()) >= 2 * len(CASES) - 14


@pytest.mark.skipif(KERNELS is None, reason="SOFTKVM_VSOCK_TEST names no build of the kernel's vsock_test")
def test_the_kernels_own_program_is_the_guests_half() -> None:
    assert KERNELS is not None
    assert check(Settings(kernels=Path(KERNELS))) >= 20
    assert check(Settings(kernels=Path(KERNELS), transport=LOOPBACK)) >= 15
