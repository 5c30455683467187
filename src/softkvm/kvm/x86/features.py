# SPDX-License-Identifier: Apache-2.0
"""CPUID's feature bits by the kernel's names (APM vol. 3, appendix E; arch/x86/include/asm/cpufeatures.h)."""

from __future__ import annotations

from typing import Final, NamedTuple

EAX: Final = 0
EBX: Final = 1
ECX: Final = 2
EDX: Final = 3


class Feature(NamedTuple):
    """One bit: its leaf and subleaf, register (EAX to EDX are 0 to 3) and number."""

    leaf: int
    subleaf: int
    register: int
    bit: int

    @property
    def mask(self) -> int:
        """The bit in its register."""
        return 1 << self.bit


X86_FEATURE_XMM3: Final = Feature(0x1, 0, ECX, 0)  # SSE3
X86_FEATURE_MWAIT: Final = Feature(0x1, 0, ECX, 3)  # MONITOR, too
X86_FEATURE_PDCM: Final = Feature(0x1, 0, ECX, 15)
X86_FEATURE_PCID: Final = Feature(0x1, 0, ECX, 17)
X86_FEATURE_X2APIC: Final = Feature(0x1, 0, ECX, 21)
X86_FEATURE_TSC_DEADLINE_TIMER: Final = Feature(0x1, 0, ECX, 24)
X86_FEATURE_XSAVE: Final = Feature(0x1, 0, ECX, 26)
X86_FEATURE_OSXSAVE: Final = Feature(0x1, 0, ECX, 27)
X86_FEATURE_HYPERVISOR: Final = Feature(0x1, 0, ECX, 31)
X86_FEATURE_APIC: Final = Feature(0x1, 0, EDX, 9)

X86_FEATURE_FSGSBASE: Final = Feature(0x7, 0, EBX, 0)
X86_FEATURE_TSC_ADJUST: Final = Feature(0x7, 0, EBX, 1)
X86_FEATURE_SMEP: Final = Feature(0x7, 0, EBX, 7)
X86_FEATURE_INVPCID: Final = Feature(0x7, 0, EBX, 10)
X86_FEATURE_SMAP: Final = Feature(0x7, 0, EBX, 20)
X86_FEATURE_UMIP: Final = Feature(0x7, 0, ECX, 2)
X86_FEATURE_PKU: Final = Feature(0x7, 0, ECX, 3)
X86_FEATURE_OSPKE: Final = Feature(0x7, 0, ECX, 4)
X86_FEATURE_WAITPKG: Final = Feature(0x7, 0, ECX, 5)
X86_FEATURE_LA57: Final = Feature(0x7, 0, ECX, 16)
X86_FEATURE_RDPID: Final = Feature(0x7, 0, ECX, 22)

X86_FEATURE_ARCH_CAPABILITIES: Final = Feature(0x7, 0, EDX, 29)
X86_FEATURE_XSAVES: Final = Feature(0xD, 1, EAX, 3)

X86_FEATURE_SVM: Final = Feature(0x8000_0001, 0, ECX, 2)
X86_FEATURE_OSVW: Final = Feature(0x8000_0001, 0, ECX, 9)
X86_FEATURE_PERFCTR_CORE: Final = Feature(0x8000_0001, 0, ECX, 23)
X86_FEATURE_SYSCALL: Final = Feature(0x8000_0001, 0, EDX, 11)
X86_FEATURE_NX: Final = Feature(0x8000_0001, 0, EDX, 20)
X86_FEATURE_GBPAGES: Final = Feature(0x8000_0001, 0, EDX, 26)
X86_FEATURE_RDTSCP: Final = Feature(0x8000_0001, 0, EDX, 27)
X86_FEATURE_LM: Final = Feature(0x8000_0001, 0, EDX, 29)
X86_FEATURE_VIRT_SSBD: Final = Feature(0x8000_0008, 0, EBX, 25)
X86_FEATURE_PERFMON_V2: Final = Feature(0x8000_0022, 0, EAX, 0)
