# SPDX-License-Identifier: Apache-2.0
"""All instructions that the emulator knows: importing this module fills its table of handlers."""

from __future__ import annotations

from typing import Final

from softkvm.kvm.x86.emulate import alu as emulate_alu
from softkvm.kvm.x86.emulate import far as emulate_far
from softkvm.kvm.x86.emulate import misc as emulate_misc
from softkvm.kvm.x86.emulate import move as emulate_move
from softkvm.kvm.x86.emulate import stack as emulate_stack
from softkvm.kvm.x86.emulate import string as emulate_string
from softkvm.kvm.x86.emulate import system as emulate_system
from softkvm.kvm.x86.emulate import x87 as emulate_x87
from softkvm.kvm.x86.emulate.emulator import HANDLERS, Emulator

MODULES: Final = (
    emulate_alu,
    emulate_far,
    emulate_misc,
    emulate_move,
    emulate_stack,
    emulate_string,
    emulate_system,
    emulate_x87,
)

__all__ = ["HANDLERS", "MODULES", "Emulator"]
