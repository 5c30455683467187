# SPDX-License-Identifier: Apache-2.0
"""A build of selftests that are ours: shell scripts with the statuses and words of the kernel's."""

from pathlib import Path

import pytest

PROGRAMS = {
    "x86_64/good": "echo fine",
    "x86_64/bad": "echo '==== Test Assertion Failure ===='; echo '  line 7: rc: -1 errno: 22'; exit 254",
    "x86_64/skips": "echo '1..0 # SKIP - Requirement not met: kvm_cpu_has(X86_FEATURE_VMX)'; exit 4",
    "killed": "kill -SEGV $$",
    "endless": "sleep 1000 & echo started; wait",
}

MAKEFILE = """\
LIBKVM += lib/kvm_util.c
TEST_PROGS_x86_64 += x86_64/a_script.sh
TEST_GEN_PROGS_x86_64 = x86_64/good
TEST_GEN_PROGS_x86_64 += x86_64/bad x86_64/skips
TEST_GEN_PROGS_EXTENDED_x86_64 += killed
TEST_GEN_PROGS_x86_64 += endless
TEST_GEN_PROGS_x86_64 += x86_64/unbuilt
TEST_GEN_PROGS_aarch64 += aarch64/other
TEST_GEN_PROGS += $(TEST_GEN_PROGS_$(ARCH_DIR))
"""


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """The directory of the build."""
    (tmp_path / "x86_64").mkdir()
    (tmp_path / "Makefile").write_text(MAKEFILE)
    for name, script in PROGRAMS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return tmp_path
