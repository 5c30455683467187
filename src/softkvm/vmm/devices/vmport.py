# SPDX-License-Identifier: Apache-2.0
"""The VMware backdoor port: a guest asks its hypervisor by reading port 0x5658, with a command in ECX.

Source: open-vm-tools' ``backdoor_def.h`` (magic, port, commands) and QEMU's ``vmport`` for what it answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from softkvm import abi, api

VMPORT: Final = 0x5658
MAGIC: Final = 0x564D5868
GETVERSION: Final = 0x0A
VERSION: Final = 6
PRODUCT_ESX: Final = 2
_LOW: Final = 0xFFFFFFFF


class VmPort:
    """Answers the vCPU that reads the port: ``current_vcpu()`` is the one on whose thread we are called."""

    def __init__(self, current_vcpu: Callable[[], api.Vcpu]) -> None:
        self._current_vcpu = current_vcpu

    def read(self, offset: int, size: int) -> int:
        """Run the command; all ones for an unknown one and without the magic in EAX."""
        vcpu = self._current_vcpu()
        regs = vcpu.get_regs()
        if regs.rax & _LOW != MAGIC:
            return (1 << 8 * size) - 1
        command = _COMMANDS.get(regs.rcx & 0xFFFF)
        if command is None:
            return (1 << 8 * size) - 1
        answer = command(self, regs)
        vcpu.set_regs(regs)
        return answer

    def write(self, offset: int, size: int, value: int) -> None:
        """The same commands; the answer goes to the registers only."""
        self.read(offset, size)

    def _get_version(self, regs: abi.kvm_regs) -> int:
        regs.rbx = MAGIC
        regs.rcx = PRODUCT_ESX
        return VERSION

    def save(self) -> dict[str, Any]:
        """Nothing: the device holds no state."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


_COMMANDS: dict[int, Callable[[VmPort, abi.kvm_regs], int]] = {
    GETVERSION: VmPort._get_version,
}
