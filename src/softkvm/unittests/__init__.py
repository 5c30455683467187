# SPDX-License-Identifier: Apache-2.0
"""Runs kvm-unit-tests, the test programs of the KVM developers, from a build of them.

::

    import softkvm.unittests

    result = softkvm.unittests.run("kvm-unit-tests", "eventinj")
    print(result.line, result.exits)

Nothing of the suite is in this package. It reads the suite's ``x86/unittests.cfg``, loads the Multiboot images that the
suite's build makes, and gives them the platform that they expect of QEMU.
"""

from __future__ import annotations

from softkvm.reports.result import Place, Result, Status, Subtest
from softkvm.unittests.config import Entry, SuiteError, read
from softkvm.unittests.runner import Settings, run, run_entry

__all__ = [
    "Entry",
    "Place",
    "Result",
    "Settings",
    "Status",
    "Subtest",
    "SuiteError",
    "read",
    "run",
    "run_entry",
]
