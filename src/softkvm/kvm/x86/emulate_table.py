# SPDX-License-Identifier: Apache-2.0
"""All instructions that the emulator knows: importing this module fills its table of handlers."""

from __future__ import annotations

from typing import Final

from softkvm.kvm.x86 import emulate_alu, emulate_misc, emulate_move, emulate_string, emulate_system
from softkvm.kvm.x86.emulate import HANDLERS, Emulator

MODULES: Final = (emulate_alu, emulate_misc, emulate_move, emulate_string, emulate_system)

__all__ = ["HANDLERS", "MODULES", "Emulator"]
