# SPDX-License-Identifier: Apache-2.0
"""Flat images: raw code for real mode, loaded at 0x10000 and entered at its first byte (kvmtool's convention)."""

from __future__ import annotations

from softkvm import abi, api
from softkvm.vmm.boot import layout
from softkvm.vmm.boot.cpustate import enter_real_mode
from softkvm.vmm.boot.image import Deadline, Image
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import GuestMemory


def load(vcpu: api.Vcpu, memory: GuestMemory, image: Image, deadline: Deadline | None = None) -> None:
    """Load *image* and put *vcpu* at its start: CS = DS = ES = SS = 0x1000, IP = 0, SP = 0x8000.

    Raises ImageError if it is empty or does not fit below the end of conventional memory.
    """
    room = layout.EBDA - layout.FLAT_IMAGE
    if not 0 < image.size <= room:
        raise ImageError(f"flat image has {image.size} bytes: expected 1 to {room}")
    image.copy_to(memory.slice(layout.FLAT_IMAGE, image.size), 0, deadline)
    enter_real_mode(vcpu, layout.FLAT_IMAGE >> 4, abi.kvm_regs(rip=0, rsp=0x8000))
