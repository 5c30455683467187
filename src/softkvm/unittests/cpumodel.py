# SPDX-License-Identifier: Apache-2.0
"""CPU models and feature names of QEMU's ``-cpu`` option, as changes to a CPUID table.

``max`` and ``host`` are everything that the KVM supports. A named model has the features, the family and the leaf
limits of its namesake, as far as the KVM supports them. Then single features are added and taken away, by name.

Sources: AMD APM vol. 3, appendix E and Intel SDM vol. 2A, CPUID (bits); QEMU's documentation of CPU models and the
features that its models list (``qemu-system-x86_64 -cpu help``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from softkvm import abi
from softkvm.unittests.cpufeatures import WORDS, Word

_ALIASES = {
    "sse3": "pni",
    "sse4-1": "sse4.1",
    "sse4-2": "sse4.2",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "xd": "nx",
    "i64": "lm",
    "lahf_lm": "lahf-lm",
    "tsc_adjust": "tsc-adjust",
    "ffxsr": "fxsr-opt",
    "hv-passthrough": "hv_passthrough",
}

_BITS: dict[str, list[tuple[Word, int]]] = {}
for _word, _named in WORDS.items():
    for _bit, _name in _named.items():
        _BITS.setdefault(_name, []).append((_word, _bit))

_XSAVE_LEAF = 0xD
_COMPONENTS = {"avx": 2, "pku": 9}
"""The XSAVE state component of a feature."""
_ALWAYS = frozenset({"hypervisor", "ht", "apic"})
"""Facts of the machine, not of the model."""


@dataclass(frozen=True, slots=True)
class Model:
    """A named processor: its features, leaf limits, and the signature in leaf 1's EAX."""

    vendor: str
    family: int
    model: int
    stepping: int
    level: int
    xlevel: int
    features: frozenset[str]

    @property
    def signature(self) -> int:
        """Leaf 1, EAX."""
        family, extended = min(self.family, 15), max(self.family - 15, 0)
        return extended << 20 | (self.model >> 4) << 16 | family << 8 | (self.model & 0xF) << 4 | self.stepping


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BASE = _names(
    "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 pni syscall nx lm"
)
_INTEL = _BASE | _names(
    "vme cx16 ssse3 sse4.1 sse4.2 popcnt pclmulqdq aes x2apic tsc-deadline xsave avx lahf-lm rdtscp xsaveopt pcid"
)
_IVY_BRIDGE = _INTEL | _names("f16c rdrand fsgsbase smep erms")
_SKYLAKE_SERVER = _IVY_BRIDGE | _names(
    "fma movbe bmi1 hle avx2 bmi2 invpcid rtm rdseed adx smap clflushopt clwb avx512f avx512dq avx512bw avx512cd "
    "avx512vl 3dnowprefetch abm pdpe1gb xsavec xgetbv1 pku"
)

MODELS: dict[str, Model] = {
    "qemu64": Model("AuthenticAMD", 15, 107, 1, 0xD, 0x8000000A, _BASE | _names("cx16 lahf-lm x2apic")),
    "Opteron_G1": Model("AuthenticAMD", 15, 6, 1, 5, 0x80000008, _BASE | _names("vme x2apic")),
    "IvyBridge": Model("GenuineIntel", 6, 58, 9, 0xD, 0x80000008, _IVY_BRIDGE),
    "Skylake-Server": Model("GenuineIntel", 6, 85, 4, 0xD, 0x80000008, _SKYLAKE_SERVER),
}
MODELS["kvm64"] = MODELS["qemu64"]
EVERYTHING = ("max", "host")
DEFAULT = "qemu64"


@dataclass(slots=True)
class CpuModel:
    """What one ``-cpu`` option asks for; :meth:`apply` makes it of what is supported."""

    name: str = DEFAULT
    added: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    vendor: str | None = None
    phys_bits: int | None = None
    hyperv: bool = False
    """Hyper-V's interfaces, all that the KVM has."""
    ignored: list[str] = field(default_factory=list)
    """Parts of the option that mean nothing here."""

    def missing(self, supported: Sequence[abi.kvm_cpuid_entry2]) -> list[str]:
        """Return the features asked for by name that are not in *supported*."""
        return sorted(name for name in self.added if not _has(supported, name))

    def apply(self, entries: list[abi.kvm_cpuid_entry2]) -> list[abi.kvm_cpuid_entry2]:
        """Return the CPUID table of this model, made of *entries* (everything that is supported)."""
        model = MODELS.get(self.name)
        if model is not None:
            keep = model.features | self.added | _ALWAYS
            for word, named in WORDS.items():
                entry = _find(entries, word)
                if entry is not None:
                    mask = sum(1 << bit for bit, name in named.items() if name in keep)
                    setattr(entry, word[2], getattr(entry, word[2]) & mask)
            entries = _limit(entries, model)
        for name in self.removed:
            _clear(entries, name)
        for name, component in _COMPONENTS.items():
            if not _has(entries, name):
                _clear_component(entries, component)
        if not _has(entries, "xsave"):
            for entry in entries:
                if entry.function == _XSAVE_LEAF:
                    entry.eax = entry.ebx = entry.ecx = entry.edx = 0
        if self.vendor is not None:
            _set_vendor(entries, self.vendor)
        if self.phys_bits is not None:
            for entry in entries:
                if entry.function == 0x80000008:
                    entry.eax = entry.eax & ~0xFF | self.phys_bits
        return entries


def _find(entries: Sequence[abi.kvm_cpuid_entry2], word: Word) -> abi.kvm_cpuid_entry2 | None:
    return next((e for e in entries if e.function == word[0] and e.index == word[1]), None)


def _has(entries: Sequence[abi.kvm_cpuid_entry2], name: str) -> bool:
    for word, bit in _BITS.get(name, []):
        entry = _find(entries, word)
        if entry is not None and getattr(entry, word[2]) >> bit & 1:
            return True
    return False


def _clear(entries: Sequence[abi.kvm_cpuid_entry2], name: str) -> None:
    for word, bit in _BITS[name]:
        entry = _find(entries, word)
        if entry is not None:
            setattr(entry, word[2], getattr(entry, word[2]) & ~(1 << bit))


def _clear_component(entries: Sequence[abi.kvm_cpuid_entry2], component: int) -> None:
    """Take an XSAVE state component away: from XCR0's bits, and its own sub-leaf."""
    for entry in entries:
        if (entry.function, entry.index) == (_XSAVE_LEAF, 0):
            entry.eax &= ~(1 << component)
        elif (entry.function, entry.index) == (_XSAVE_LEAF, component):
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0


def _limit(entries: list[abi.kvm_cpuid_entry2], model: Model) -> list[abi.kvm_cpuid_entry2]:
    """Cut the table to the model's leaf limits and give it the model's signature. The vendor stays KVM's."""
    kept = []
    for entry in entries:
        limit = {0x0: model.level, 0x8000: model.xlevel}.get(entry.function >> 16)
        if limit is not None and entry.function > limit:
            continue
        if entry.function in (0x0, 0x80000000) and limit is not None:
            entry.eax = min(entry.eax, limit)
        elif entry.function == 0x1 or (entry.function == 0x80000001 and model.vendor == "AuthenticAMD"):
            entry.eax = model.signature
        kept.append(entry)
    return kept


def _set_vendor(entries: Sequence[abi.kvm_cpuid_entry2], vendor: str) -> None:
    ebx, edx, ecx = (int.from_bytes(vendor.encode()[at : at + 4], "little") for at in (0, 4, 8))
    for entry in entries:
        if entry.function in (0x0, 0x80000000):
            entry.ebx, entry.ecx, entry.edx = ebx, ecx, edx


def _vendor(model: CpuModel, value: str) -> bool:
    if len(value) != 12:
        return False
    model.vendor = value
    return True


def _phys_bits(model: CpuModel, value: str) -> bool:
    if not value.isdecimal() or not 32 <= int(value) <= 52:
        return False
    model.phys_bits = int(value)
    return True


def _host_phys_bits(model: CpuModel, value: str) -> bool:
    """On is what we do anyway; off goes with phys-bits=."""
    return value in ("on", "off")


def _hv_passthrough(model: CpuModel, value: str) -> bool:
    model.hyperv = value == "on"
    return value in ("on", "off")


_PROPERTIES: dict[str, Callable[[CpuModel, str], bool]] = {
    "vendor": _vendor,
    "phys-bits": _phys_bits,
    "host-phys-bits": _host_phys_bits,
    "hv_passthrough": _hv_passthrough,
}


def parse(option: str) -> CpuModel:
    """Return what the argument of a ``-cpu`` option asks for; what is unknown is in ``ignored``."""
    name, *parts = option.split(",")
    model = CpuModel(name)
    if name not in MODELS and name not in EVERYTHING:
        model.name = "max"
        model.ignored.append(f"-cpu {name}")
    for part in parts:
        key, _, value = part.partition("=")
        sign = key[:1] if key[:1] in "+-" else ""
        feature = key.removeprefix(sign) if sign else key
        feature = _ALIASES.get(feature, feature)
        if feature in _PROPERTIES:
            if not _PROPERTIES[feature](model, value or "on"):
                model.ignored.append(f"-cpu {part}")
        elif feature in _BITS and value in ("", "on", "off"):
            off = sign == "-" or value == "off"
            (model.removed if off else model.added).add(feature)
            (model.added if off else model.removed).discard(feature)
        elif sign != "-" and value != "off":  # a feature that is not there needs not be taken away
            model.ignored.append(f"-cpu {part}")
    return model
