# SPDX-License-Identifier: Apache-2.0
"""The virtual machine control block: layout, intercept bits and exit codes.

Source: AMD64 Architecture Programmer's Manual, volume 2, appendix B (layout) and appendix C (exit codes).

Fields are reached through memory views of the page, cast once to 8-, 4-, 2- and 1-byte elements, with
element indexes computed here: ``vmcb.q[RIP]`` is one subscription, which is what the run loop can afford.
Constants named ``*_OFFSET`` are byte offsets; all others are indexes into the view their comment names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from softkvm._softcpu import Page

# --- control area, 64-bit elements (view ``q``) ------------------------------------------------
IOPM_BASE_PA: Final = 0x040 // 8
MSRPM_BASE_PA: Final = 0x048 // 8
TSC_OFFSET: Final = 0x050 // 8
INT_CTL_Q: Final = 0x060 // 8
INT_STATE: Final = 0x068 // 8
EXIT_CODE: Final = 0x070 // 8
EXIT_INFO_1: Final = 0x078 // 8
EXIT_INFO_2: Final = 0x080 // 8
EXIT_INT_INFO: Final = 0x088 // 8
NESTED_CTL: Final = 0x090 // 8
AVIC_APIC_BAR: Final = 0x098 // 8
EVENT_INJ: Final = 0x0A8 // 8
NESTED_CR3: Final = 0x0B0 // 8
VIRT_EXT: Final = 0x0B8 // 8
NEXT_RIP: Final = 0x0C8 // 8
AVIC_BACKING_PAGE: Final = 0x0E0 // 8
AVIC_LOGICAL_ID: Final = 0x0F0 // 8
AVIC_PHYSICAL_ID: Final = 0x0F8 // 8

# --- control area, 32-bit elements (view ``d``) ------------------------------------------------
INTERCEPT_CR: Final = 0x000 // 4
INTERCEPT_DR: Final = 0x004 // 4
INTERCEPT_EXCEPTION: Final = 0x008 // 4
INTERCEPT_WORD3: Final = 0x00C // 4
INTERCEPT_WORD4: Final = 0x010 // 4
INTERCEPT_WORD5: Final = 0x014 // 4
ASID: Final = 0x058 // 4
INT_CTL: Final = 0x060 // 4
INT_VECTOR: Final = 0x064 // 4
CLEAN: Final = 0x0C0 // 4

# --- control area, 16-bit elements (view ``w``) and bytes (view ``b``) -------------------------
PAUSE_FILTER_THRESH: Final = 0x03C // 2
PAUSE_FILTER_COUNT: Final = 0x03E // 2
BUS_LOCK_COUNTER: Final = 0x120 // 2
TLB_CTL: Final = 0x05C
V_TPR: Final = 0x060
INT_STATE_B: Final = 0x068
INSN_LEN: Final = 0x0D0
INSN_BYTES: Final = 0x0D1
CPL: Final = 0x4CB

# --- save area, 64-bit elements (view ``q``) ---------------------------------------------------
EFER: Final = 0x4D0 // 8
CR4: Final = 0x548 // 8
CR3: Final = 0x550 // 8
CR0: Final = 0x558 // 8
DR7: Final = 0x560 // 8
DR6: Final = 0x568 // 8
RFLAGS: Final = 0x570 // 8
RIP: Final = 0x578 // 8
RSP: Final = 0x5D8 // 8
RAX: Final = 0x5F8 // 8
STAR: Final = 0x600 // 8
LSTAR: Final = 0x608 // 8
CSTAR: Final = 0x610 // 8
SFMASK: Final = 0x618 // 8
KERNEL_GS_BASE: Final = 0x620 // 8
SYSENTER_CS: Final = 0x628 // 8
SYSENTER_ESP: Final = 0x630 // 8
SYSENTER_EIP: Final = 0x638 // 8
CR2: Final = 0x640 // 8
G_PAT: Final = 0x668 // 8
DBGCTL: Final = 0x670 // 8
BR_FROM: Final = 0x678 // 8
BR_TO: Final = 0x680 // 8
LAST_EXCP_FROM: Final = 0x688 // 8
LAST_EXCP_TO: Final = 0x690 // 8

# --- segment registers: byte offset of selector; +2 attributes, +4 limit, +8 base --------------
ES_OFFSET: Final = 0x400
CS_OFFSET: Final = 0x410
SS_OFFSET: Final = 0x420
DS_OFFSET: Final = 0x430
FS_OFFSET: Final = 0x440
GS_OFFSET: Final = 0x450
GDTR_OFFSET: Final = 0x460
LDTR_OFFSET: Final = 0x470
IDTR_OFFSET: Final = 0x480
TR_OFFSET: Final = 0x490

FS_BASE: Final = (FS_OFFSET + 8) // 8
GS_BASE: Final = (GS_OFFSET + 8) // 8
CS_BASE: Final = (CS_OFFSET + 8) // 8
CS_ATTRIB: Final = (CS_OFFSET + 2) // 2
SS_ATTRIB: Final = (SS_OFFSET + 2) // 2

# Segment attribute bits of the 16-bit attribute field (APM vol. 2, 15.5.1: descriptor bits 55:52, 47:40).
SEG_TYPE_MASK: Final = 0x00F
SEG_S: Final = 1 << 4
SEG_DPL_SHIFT: Final = 5
SEG_P: Final = 1 << 7
SEG_AVL: Final = 1 << 8
SEG_L: Final = 1 << 9
SEG_DB: Final = 1 << 10
SEG_G: Final = 1 << 11

# --- intercepts --------------------------------------------------------------------------------
# CR vector: bit n is a read of CRn, bit 16+n a write.
CR0_READ: Final = 1 << 0
CR3_READ: Final = 1 << 3
CR4_READ: Final = 1 << 4
CR8_READ: Final = 1 << 8
CR0_WRITE: Final = 1 << 16
CR3_WRITE: Final = 1 << 19
CR4_WRITE: Final = 1 << 20
CR8_WRITE: Final = 1 << 24
# DR vector: reads of DR0..DR7 and writes, all but DR6 reads matter to the debugger alone.
DR_ALL: Final = 0x00FF_00FF

# Word 3 (offset 00Ch)
INTR: Final = 1 << 0
NMI: Final = 1 << 1
SMI: Final = 1 << 2
INIT: Final = 1 << 3
VINTR: Final = 1 << 4
SELECTIVE_CR0: Final = 1 << 5
STORE_IDTR: Final = 1 << 6
STORE_GDTR: Final = 1 << 7
STORE_LDTR: Final = 1 << 8
STORE_TR: Final = 1 << 9
LOAD_IDTR: Final = 1 << 10
LOAD_GDTR: Final = 1 << 11
LOAD_LDTR: Final = 1 << 12
LOAD_TR: Final = 1 << 13
RDTSC: Final = 1 << 14
RDPMC: Final = 1 << 15
PUSHF: Final = 1 << 16
POPF: Final = 1 << 17
CPUID: Final = 1 << 18
RSM: Final = 1 << 19
IRET: Final = 1 << 20
INTN: Final = 1 << 21
INVD: Final = 1 << 22
PAUSE: Final = 1 << 23
HLT: Final = 1 << 24
INVLPG: Final = 1 << 25
INVLPGA: Final = 1 << 26
IOIO_PROT: Final = 1 << 27
MSR_PROT: Final = 1 << 28
TASK_SWITCH: Final = 1 << 29
FERR_FREEZE: Final = 1 << 30
SHUTDOWN: Final = 1 << 31

# Word 4 (offset 010h)
VMRUN: Final = 1 << 0
VMMCALL: Final = 1 << 1
VMLOAD: Final = 1 << 2
VMSAVE: Final = 1 << 3
STGI: Final = 1 << 4
CLGI: Final = 1 << 5
SKINIT: Final = 1 << 6
RDTSCP: Final = 1 << 7
ICEBP: Final = 1 << 8
WBINVD: Final = 1 << 9
MONITOR: Final = 1 << 10
MWAIT: Final = 1 << 11
MWAIT_COND: Final = 1 << 12
XSETBV: Final = 1 << 13
RDPRU: Final = 1 << 14

# Word 5 (offset 014h)
INVLPGB: Final = 1 << 0
INVPCID: Final = 1 << 2
BUSLOCK: Final = 1 << 5
IDLE_HLT: Final = 1 << 6

# --- interrupt control (offset 060h) -----------------------------------------------------------
V_TPR_MASK: Final = 0x0F
V_IRQ: Final = 1 << 8
V_GIF: Final = 1 << 9
V_INTR_PRIO_SHIFT: Final = 16
V_INTR_PRIO_MASK: Final = 0x0F << 16
V_IGN_TPR: Final = 1 << 20
V_INTR_MASKING: Final = 1 << 24
V_GIF_ENABLE: Final = 1 << 25
X2AVIC_ENABLE: Final = 1 << 30
AVIC_ENABLE: Final = 1 << 31

INTERRUPT_SHADOW: Final = 1 << 0
GUEST_INTERRUPT_MASK: Final = 1 << 1

NP_ENABLE: Final = 1 << 0

TLB_CONTROL_DO_NOTHING: Final = 0
TLB_CONTROL_FLUSH_ALL_ASID: Final = 1
TLB_CONTROL_FLUSH_ASID: Final = 3
TLB_CONTROL_FLUSH_ASID_LOCAL: Final = 7

# --- EVENTINJ and EXITINTINFO (APM vol. 2, 15.20 and 15.7.2) -----------------------------------
EVTINJ_VECTOR_MASK: Final = 0xFF
EVTINJ_TYPE_MASK: Final = 7 << 8
EVTINJ_TYPE_INTR: Final = 0 << 8
EVTINJ_TYPE_NMI: Final = 2 << 8
EVTINJ_TYPE_EXEPT: Final = 3 << 8
EVTINJ_TYPE_SOFT: Final = 4 << 8
EVTINJ_VALID: Final = 1 << 31
EVTINJ_VALID_ERR: Final = 1 << 11

# --- EXITINFO1 of IOIO (APM vol. 2, 15.10.2) ---------------------------------------------------
IOIO_TYPE_IN: Final = 1 << 0
IOIO_STR: Final = 1 << 2
IOIO_REP: Final = 1 << 3
IOIO_SIZE_SHIFT: Final = 4
IOIO_SIZE_MASK: Final = 7
IOIO_ASIZE_SHIFT: Final = 7
IOIO_SEG_SHIFT: Final = 10
IOIO_PORT_SHIFT: Final = 16

# --- EXITINFO1 of NPF (APM vol. 2, 15.25.6) ----------------------------------------------------
PFERR_GUEST_FINAL: Final = 1 << 32
PFERR_GUEST_PAGE: Final = 1 << 33

# --- exit codes (APM vol. 2, appendix C) -------------------------------------------------------
EXIT_READ_CR0: Final = 0x000
EXIT_WRITE_CR0: Final = 0x010
EXIT_READ_DR0: Final = 0x020
EXIT_WRITE_DR0: Final = 0x030
EXIT_EXCP_BASE: Final = 0x040
EXIT_INTR: Final = 0x060
EXIT_NMI: Final = 0x061
EXIT_SMI: Final = 0x062
EXIT_INIT: Final = 0x063
EXIT_VINTR: Final = 0x064
EXIT_CR0_SEL_WRITE: Final = 0x065
EXIT_IDTR_READ: Final = 0x066
EXIT_GDTR_READ: Final = 0x067
EXIT_LDTR_READ: Final = 0x068
EXIT_TR_READ: Final = 0x069
EXIT_IDTR_WRITE: Final = 0x06A
EXIT_GDTR_WRITE: Final = 0x06B
EXIT_LDTR_WRITE: Final = 0x06C
EXIT_TR_WRITE: Final = 0x06D
EXIT_RDTSC: Final = 0x06E
EXIT_RDPMC: Final = 0x06F
EXIT_PUSHF: Final = 0x070
EXIT_POPF: Final = 0x071
EXIT_CPUID: Final = 0x072
EXIT_RSM: Final = 0x073
EXIT_IRET: Final = 0x074
EXIT_SWINT: Final = 0x075
EXIT_INVD: Final = 0x076
EXIT_PAUSE: Final = 0x077
EXIT_HLT: Final = 0x078
EXIT_INVLPG: Final = 0x079
EXIT_INVLPGA: Final = 0x07A
EXIT_IOIO: Final = 0x07B
EXIT_MSR: Final = 0x07C
EXIT_TASK_SWITCH: Final = 0x07D
EXIT_FERR_FREEZE: Final = 0x07E
EXIT_SHUTDOWN: Final = 0x07F
EXIT_VMRUN: Final = 0x080
EXIT_VMMCALL: Final = 0x081
EXIT_VMLOAD: Final = 0x082
EXIT_VMSAVE: Final = 0x083
EXIT_STGI: Final = 0x084
EXIT_CLGI: Final = 0x085
EXIT_SKINIT: Final = 0x086
EXIT_RDTSCP: Final = 0x087
EXIT_ICEBP: Final = 0x088
EXIT_WBINVD: Final = 0x089
EXIT_MONITOR: Final = 0x08A
EXIT_MWAIT: Final = 0x08B
EXIT_MWAIT_COND: Final = 0x08C
EXIT_XSETBV: Final = 0x08D
EXIT_RDPRU: Final = 0x08E
EXIT_INVLPGB: Final = 0x0A0
EXIT_INVPCID: Final = 0x0A2
EXIT_BUSLOCK: Final = 0x0A5
EXIT_IDLE_HLT: Final = 0x0A6
EXIT_NPF: Final = 0x400
EXIT_AVIC_INCOMPLETE_IPI: Final = 0x401
EXIT_AVIC_UNACCELERATED_ACCESS: Final = 0x402
EXIT_ERR: Final = (1 << 64) - 1

_EXCEPTION_NAMES: Final = {
    0: "DE",
    1: "DB",
    2: "NMI",
    3: "BP",
    4: "OF",
    5: "BR",
    6: "UD",
    7: "NM",
    8: "DF",
    10: "TS",
    11: "NP",
    12: "SS",
    13: "GP",
    14: "PF",
    16: "MF",
    17: "AC",
    18: "MC",
    19: "XF",
}

_SINGLE_EXITS: Final = {
    "intr": EXIT_INTR,
    "nmi": EXIT_NMI,
    "smi": EXIT_SMI,
    "init": EXIT_INIT,
    "vintr": EXIT_VINTR,
    "cr0_sel_write": EXIT_CR0_SEL_WRITE,
    "read_idtr": EXIT_IDTR_READ,
    "read_gdtr": EXIT_GDTR_READ,
    "read_ldtr": EXIT_LDTR_READ,
    "read_tr": EXIT_TR_READ,
    "write_idtr": EXIT_IDTR_WRITE,
    "write_gdtr": EXIT_GDTR_WRITE,
    "write_ldtr": EXIT_LDTR_WRITE,
    "write_tr": EXIT_TR_WRITE,
    "rdtsc": EXIT_RDTSC,
    "rdpmc": EXIT_RDPMC,
    "pushf": EXIT_PUSHF,
    "popf": EXIT_POPF,
    "cpuid": EXIT_CPUID,
    "rsm": EXIT_RSM,
    "iret": EXIT_IRET,
    "swint": EXIT_SWINT,
    "invd": EXIT_INVD,
    "pause": EXIT_PAUSE,
    "hlt": EXIT_HLT,
    "invlpg": EXIT_INVLPG,
    "invlpga": EXIT_INVLPGA,
    "io": EXIT_IOIO,
    "msr": EXIT_MSR,
    "task_switch": EXIT_TASK_SWITCH,
    "ferr_freeze": EXIT_FERR_FREEZE,
    "shutdown": EXIT_SHUTDOWN,
    "vmrun": EXIT_VMRUN,
    "hypercall": EXIT_VMMCALL,
    "vmload": EXIT_VMLOAD,
    "vmsave": EXIT_VMSAVE,
    "stgi": EXIT_STGI,
    "clgi": EXIT_CLGI,
    "skinit": EXIT_SKINIT,
    "rdtscp": EXIT_RDTSCP,
    "icebp": EXIT_ICEBP,
    "wbinvd": EXIT_WBINVD,
    "monitor": EXIT_MONITOR,
    "mwait": EXIT_MWAIT,
    "mwait_cond": EXIT_MWAIT_COND,
    "xsetbv": EXIT_XSETBV,
    "rdpru": EXIT_RDPRU,
    "invlpgb": EXIT_INVLPGB,
    "invpcid": EXIT_INVPCID,
    "buslock": EXIT_BUSLOCK,
    "idle_hlt": EXIT_IDLE_HLT,
    "npf": EXIT_NPF,
    "avic_incomplete_ipi": EXIT_AVIC_INCOMPLETE_IPI,
    "avic_unaccelerated_access": EXIT_AVIC_UNACCELERATED_ACCESS,
    "invalid": EXIT_ERR,
}


def _exit_names() -> dict[int, str]:
    names = {code: name for name, code in _SINGLE_EXITS.items()}
    for n in range(16):
        names[EXIT_READ_CR0 + n] = f"read_cr{n}"
        names[EXIT_WRITE_CR0 + n] = f"write_cr{n}"
        names[EXIT_READ_DR0 + n] = f"read_dr{n}"
        names[EXIT_WRITE_DR0 + n] = f"write_dr{n}"
    for n in range(32):
        names[EXIT_EXCP_BASE + n] = f"excp_{_EXCEPTION_NAMES.get(n, str(n)).lower()}"
    return names


#: Name of every exit code, for statistics and traces.
EXIT_NAMES: Final = _exit_names()


class Segment(NamedTuple):
    """One segment register as the VMCB holds it."""

    selector: int
    attrib: int
    limit: int
    base: int


class Vmcb:
    """Typed views of one VMCB page."""

    __slots__ = ("address", "b", "d", "page", "q", "w")

    page: Page
    address: int
    b: memoryview
    w: memoryview
    d: memoryview
    q: memoryview

    def __init__(self, page: Page) -> None:
        self.page = page
        self.address = page.address
        self.b = memoryview(page).cast("B")
        self.w = self.b.cast("H")
        self.d = self.b.cast("I")
        self.q = self.b.cast("Q")

    def segment(self, offset: int) -> Segment:
        """Return the segment register whose selector is at byte ``offset``."""
        return Segment(
            self.w[offset >> 1],
            self.w[(offset >> 1) + 1],
            self.d[(offset >> 2) + 1],
            self.q[(offset >> 3) + 1],
        )

    def set_segment(self, offset: int, selector: int, attrib: int, limit: int, base: int) -> None:
        """Write the segment register whose selector is at byte ``offset``."""
        self.w[offset >> 1] = selector
        self.w[(offset >> 1) + 1] = attrib
        self.d[(offset >> 2) + 1] = limit
        self.q[(offset >> 3) + 1] = base
