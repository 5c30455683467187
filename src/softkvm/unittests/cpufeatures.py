# SPDX-License-Identifier: Apache-2.0
"""Names of CPUID feature bits: QEMU"s, by leaf, subleaf and register.

Sources: AMD APM vol. 3, appendix E and Intel SDM vol. 2A, CPUID (bits); ``qemu-system-x86_64 -cpu help`` (names).
"""

from __future__ import annotations

Word = tuple[int, int, str]
"""Leaf, subleaf, register."""


def _bits(names: str) -> dict[int, str]:
    """Number the names from bit 0; ``-`` stands for a bit without one."""
    return {bit: name for bit, name in enumerate(names.split()) if name != "-"}


WORDS: dict[Word, dict[int, str]] = {
    (0x1, 0, "ecx"): _bits(
        """
        pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid dca sse4.1
        sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor
        """
    ),
    (0x1, 0, "edx"): _bits(
        """
        fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx
        fxsr sse sse2 ss ht tm ia64 pbe
        """
    ),
    (0x7, 0, "ebx"): _bits(
        """
        fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx - avx512f avx512dq rdseed
        adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw
        avx512vl
        """
    ),
    (0x7, 0, "ecx"): _bits(
        """
        - avx512vbmi umip pku - waitpkg avx512vbmi2 shstk gfni vaes vpclmulqdq avx512vnni avx512bitalg -
        avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks
        """
    ),
    (0x7, 0, "edx"): _bits(
        """
        - - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize -
        tsx-ldtrk - - arch-lbr ibt - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp - arch-capabilities
        core-capability ssbd
        """
    ),
    (0x7, 1, "eax"): {4: "avx-vnni", 5: "avx512-bf16", 26: "lam"},
    (0xD, 1, "eax"): {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves", 4: "xfd"},
    (0x80000001, 0, "ecx"): _bits(
        """
        lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt
        - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb
        """
    ),
    (0x80000001, 0, "edx"): _bits(
        """
        fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - - nx - mmxext mmx
        fxsr fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow
        """
    ),
    (0x80000007, 0, "edx"): {8: "invtsc"},
    (0x80000008, 0, "ebx"): {
        0: "clzero",
        2: "xsaveerptr",
        4: "rdpru",
        9: "wbnoinvd",
        12: "ibpb",
        14: "ibrs",
        15: "amd-stibp",
        24: "amd-ssbd",
        25: "virt-ssbd",
        26: "amd-no-ssb",
    },
    (0x8000000A, 0, "edx"): _bits(
        """
        npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - - pause-filter -
        pfthreshold avic - v-vmsave-vmload vgif
        """
    ),
}
