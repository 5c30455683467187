# SPDX-License-Identifier: Apache-2.0
"""Runs the kernel's KVM selftests (``tools/testing/selftests/kvm``), unmodified clients all of them, from a build.

====================================  ============================================================================
:mod:`~softkvm.selftests.build`       which programs a build should have, and has
:mod:`~softkvm.selftests.table`       what to expect of each: ``expected.toml``
:mod:`~softkvm.selftests.runner`      runs them under ``softkvm exec``'s KVM and judges what came out
====================================  ============================================================================
"""

from __future__ import annotations

from softkvm.selftests.build import BuildError, programs
from softkvm.selftests.runner import Settings, run_program
from softkvm.selftests.table import Table, expected

__all__ = ["BuildError", "Settings", "Table", "expected", "programs", "run_program"]
