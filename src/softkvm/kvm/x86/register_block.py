# SPDX-License-Identifier: Apache-2.0
"""Places in the processor's register block (:attr:`softkvm._softcpu.Cpu.registers`), by the view that reads them.

A name's end tells the view: ``_B`` is an offset in bytes, ``_W``, ``_D`` and ``_Q`` are indices of words, doublewords
and quadwords. The x87 registers lie by their physical number, 16 bytes apart; the vector registers 32 bytes apart.
"""

from __future__ import annotations

from typing import Final

from softkvm._softcpu import REGISTER_OFFSETS as _AT

#: DR0 to DR3.
DR_Q: Final = _AT["dr"] // 8
XCR0_Q: Final = _AT["xcr0"] // 8
PKRU_D: Final = _AT["pkru"] // 4
MXCSR_D: Final = _AT["mxcsr"] // 4
TSC_AUX_Q: Final = _AT["tsc_aux"] // 8
UMWAIT_CONTROL_D: Final = _AT["umwait_control"] // 4

FCW_W: Final = _AT["fcw"] // 2
FSW_W: Final = _AT["fsw"] // 2
#: The tag word, two bits per physical register, of which the processor only keeps whether it is empty (11b).
FTW_W: Final = _AT["ftw"] // 2
FOP_W: Final = _AT["fop"] // 2
FIP_Q: Final = _AT["fip"] // 8
FDP_Q: Final = _AT["fdp"] // 8
FCS_W: Final = _AT["fcs"] // 2
FDS_W: Final = _AT["fds"] // 2
#: x87 state and vector registers: all that a reset clears but MXCSR.
FPU_B: Final = _AT["fcw"]
FPU_END_B: Final = _AT["ymm"] + 16 * 32

ST_SIZE: Final = 16
YMM_SIZE: Final = 32


def st_b(physical: int) -> int:
    """Return where x87 register ``physical`` lies: significand, then sign and exponent."""
    return _AT["st"] + physical * ST_SIZE


def ymm_b(index: int) -> int:
    """Return where vector register ``index`` lies."""
    return _AT["ymm"] + index * YMM_SIZE
