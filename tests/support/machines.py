# SPDX-License-Identifier: Apache-2.0
"""KVMs for tests of the machine monitor, and a vCPU that only records what a boot loader sets."""

import os
from collections.abc import Callable

import pytest

import softkvm
from softkvm import abi, api


def open_soft() -> api.Kvm:
    """Open KVM on the software CPU; skips where the extension is not built, which CI does not accept."""
    try:
        return softkvm.open()
    except ImportError as error:
        if os.environ.get("SOFTKVM_CI"):
            raise
        pytest.skip(f"the software CPU is not built: {error}")


def open_device() -> api.Kvm:
    """Open /dev/kvm; skips with the reason where that is impossible."""
    if not os.path.exists("/dev/kvm"):
        pytest.skip("there is no /dev/kvm")
    try:
        return softkvm.open("/dev/kvm")
    except OSError as error:
        pytest.skip(f"/dev/kvm may not be opened: {error}")


KVMS: dict[str, Callable[[], api.Kvm]] = {"soft": open_soft, "device": open_device}


class RecordingVcpu:
    """Takes the registers that a loader sets."""

    def __init__(self) -> None:
        self.regs = abi.kvm_regs()
        self.sregs = abi.kvm_sregs()

    def get_sregs(self) -> abi.kvm_sregs:
        return abi.kvm_sregs.from_buffer_copy(self.sregs)

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        self.sregs = abi.kvm_sregs.from_buffer_copy(sregs)

    def set_regs(self, regs: abi.kvm_regs) -> None:
        self.regs = abi.kvm_regs.from_buffer_copy(regs)
