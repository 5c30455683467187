# SPDX-License-Identifier: Apache-2.0
"""What a vCPU has of asynchronous page faults (``vcpu->arch.apf``); what becomes of it is :mod:`.async_pf`'s."""

from __future__ import annotations

from softkvm.kvm.memory.async_pf import AsyncPf


class Apf(AsyncPf):
    """The pages a vCPU waits for, and what its guest knows of that."""

    __slots__ = ("_id", "halted", "pageready_pending")

    def __init__(self) -> None:
        super().__init__()
        #: The vCPU stands in the middle of an instruction until a page has come, or an interrupt.
        self.halted = False
        #: The guest has been told of a page, and has not acknowledged it.
        self.pageready_pending = False
        self._id = 0

    def new_token(self, vcpu_id: int) -> int:
        """Return what the next page is called: never 0, which is no token, and 32 bits."""
        self._id = self._id + 1 & 0xF_FFFF
        if not self._id:
            self._id = 1
        return self._id << 12 | vcpu_id & 0xFFF
