# SPDX-License-Identifier: Apache-2.0
"""A directory that looks like a build of kvm-unit-tests, made of our own test program."""

import os
import shutil
from pathlib import Path

import pytest
from tests.support.guests import ROOT

CONFIG = """\
# our own entries
[pass]
file = probe.flat
test_args = pass
groups = quick good

[fail]
file = probe.flat
test_args = fail
groups = quick

[skip]
file = probe.flat
test_args = skip

[abort]
file = probe.flat
test_args = abort

[hang]
file = probe.flat
test_args = hang
timeout = 2

[crash]
file = probe.flat
test_args = crash

[smp]
file = probe.flat
test_args = smp
smp = 3

[platform]
file = probe.flat
test_args = platform
qemu_params = -m 256 -cpu max

[sleep]
file = probe.flat
test_args = sleep

[real]
file = probe.flat
test_args = real

[environment]
file = probe.flat
test_args = environment

[arguments]
file = probe.flat
test_args = "one  two 'three'"
qemu_params = -cpu qemu64,+vmx,hv_passthrough -overcommit cpu-pm=on

[needs]
file = probe.flat
qemu_params = -M q35,kernel-irqchip=split -device edu

[old]
file = probe.flat
arch = i386

[manual]
file = probe.flat
test_args = pass
groups = nodefault

[tcg]
file = probe.flat
accel = tcg

[intel]
file = probe.flat
check = /sys/module/kvm_intel/parameters/ept=Y

[missing]
file = nowhere.flat
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The directory; skips where the test program is not built, which CI does not accept."""
    program = ROOT / "guests" / "build" / "multiboot.elf"
    if not program.exists():
        if os.environ.get("SOFTKVM_CI"):
            pytest.fail("guests/build/multiboot.elf is not built: make guests")
        pytest.skip("guests/build/multiboot.elf is not built: make guests")
    directory = tmp_path / "suite" / "x86"
    directory.mkdir(parents=True)
    shutil.copy(program, directory / "probe.flat")
    (directory / "unittests.cfg").write_text(CONFIG)
    return directory.parent
