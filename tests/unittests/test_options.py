# SPDX-License-Identifier: Apache-2.0
import pytest

from softkvm import abi
from softkvm.unittests import cpumodel, options
from softkvm.unittests.cpufeatures import WORDS
from softkvm.unittests.cpumodel import MODELS
from softkvm.vmm.memory import GIB, MIB

ALL = 0xFFFFFFFF


def everything() -> list[abi.kvm_cpuid_entry2]:
    """A KVM that supports every bit there is."""
    leaves = [(0, 0), (1, 0), (5, 0), (7, 0), (7, 1), (0xD, 0), (0xD, 1), (0x14, 0)]
    leaves += [(0x80000000 + n, 0) for n in (0, 1, 7, 8, 0xA, 0x1F)]
    table = []
    for function, index in leaves:
        entry = abi.kvm_cpuid_entry2(function=function, index=index, eax=ALL, ebx=ALL, ecx=ALL, edx=ALL)
        if function & 0xFFFF == 0:
            entry.eax = 0x1F | function
        table.append(entry)
    return table


def leaf(table: list[abi.kvm_cpuid_entry2], function: int, index: int = 0) -> abi.kvm_cpuid_entry2:
    return next(e for e in table if (e.function, e.index) == (function, index))


def test_max_is_everything() -> None:
    table = cpumodel.parse("max").apply(everything())
    assert leaf(table, 1).ecx == ALL
    assert leaf(table, 7).ebx == ALL


def test_named_model_has_its_features_its_signature_and_its_limits() -> None:
    table = cpumodel.parse("qemu64").apply(everything())
    assert leaf(table, 1).eax == 0x00060FB1  # family 15, model 107, stepping 1
    assert leaf(table, 1).edx & 1 << 25  # SSE
    assert not leaf(table, 1).ecx & 1 << 28  # AVX
    assert leaf(table, 7).ebx == 0
    assert not [e for e in table if e.function in (0x14, 0x8000001F)]
    assert leaf(table, 0).eax == 0xD
    assert leaf(table, 0x80000000).eax == 0x8000000A
    assert leaf(table, 0xD).eax == 0  # no XSAVE


def test_features_are_added_and_taken_away() -> None:
    table = cpumodel.parse("qemu64,+umip,-x2apic,nx=off,smep=on").apply(everything())
    assert leaf(table, 7).ecx == 1 << 2
    assert leaf(table, 7).ebx == 1 << 7
    assert not leaf(table, 1).ecx & 1 << 21
    assert not leaf(table, 0x80000001).edx & 1 << 20


def test_a_feature_takes_its_xsave_component_with_it() -> None:
    table = cpumodel.parse("max,-pku").apply(everything())
    assert leaf(table, 0xD).eax == ALL & ~(1 << 9)
    assert leaf(cpumodel.parse("max").apply(everything()), 0xD).eax == ALL


def test_the_last_word_on_a_feature_counts() -> None:
    assert leaf(cpumodel.parse("max,-umip,+umip").apply(everything()), 7).ecx & 1 << 2
    assert not leaf(cpumodel.parse("max,+umip,-umip").apply(everything()), 7).ecx & 1 << 2


def test_vendor_and_address_width() -> None:
    table = cpumodel.parse("max,vendor=GenuineIntel,phys-bits=36,host-phys-bits=off").apply(everything())
    assert leaf(table, 0).ebx.to_bytes(4, "little") == b"Genu"
    assert leaf(table, 0).edx.to_bytes(4, "little") == b"ineI"
    assert leaf(table, 0x80000000).ecx.to_bytes(4, "little") == b"ntel"
    assert leaf(table, 0x80000008).eax & 0xFF == 36


def test_feature_that_the_kvm_lacks_is_told() -> None:
    model = cpumodel.parse("max,+vmx,+sse")
    table = everything()
    assert model.missing(table) == []
    leaf(table, 1).ecx &= ~(1 << 5)
    assert model.missing(table) == ["vmx"]


@pytest.mark.parametrize(
    ("option", "ignored"),
    [
        ("max,migratable=no", ["-cpu migratable=no"]),
        ("host,hv_passthrough", []),
        ("host,hv-passthrough=maybe", ["-cpu hv-passthrough=maybe"]),
        ("Pentium9", ["-cpu Pentium9"]),
        ("max,vendor=short", ["-cpu vendor=short"]),
        ("max,phys-bits=99", ["-cpu phys-bits=99"]),
        ("max,-vmx-mbec", []),
        ("max,+vmx-mbec", ["-cpu +vmx-mbec"]),
        ("max,host-phys-bits", []),
    ],
)
def test_what_means_nothing_is_named(option: str, ignored: list[str]) -> None:
    assert cpumodel.parse(option).ignored == ignored


@pytest.mark.parametrize("name", MODELS)
def test_models_name_only_known_features(name: str) -> None:
    known = {feature for names in WORDS.values() for feature in names.values()}
    assert MODELS[name].features <= known


def test_platform_of_nothing_is_the_default() -> None:
    platform = options.parse("")
    assert (platform.memory_size, platform.pit, platform.vmport, platform.cpu.name) == (
        128 * MIB,
        True,
        False,
        "qemu64",
    )


@pytest.mark.parametrize(
    ("option", "hyperv"), [("host", False), ("host,hv_passthrough", True), ("max,+hv-passthrough=off", False)]
)
def test_a_model_may_be_a_partition_of_hyper_v(option: str, hyperv: bool) -> None:
    assert cpumodel.parse(option).hyperv is hyperv


def test_the_hyper_v_test_device_is_there_when_it_is_asked_for() -> None:
    platform = options.parse("-cpu host,hv_passthrough -device hyperv-testdev")
    assert (platform.hyperv_testdev, platform.missing, platform.ignored) == (True, [], [])
    assert not options.parse("-device pci-testdev").hyperv_testdev


def test_options_that_mean_something() -> None:
    platform = options.parse(
        "-machine pit=off,vmport=on,accel=kvm -m 4g -enable-kvm -device pci-testdev -cpu max,+smep"
    )
    assert (platform.memory_size, platform.pit, platform.vmport) == (4 * GIB, False, True)
    assert platform.cpu.added == {"smep"}
    assert not platform.ignored
    assert not platform.missing


def test_options_that_mean_nothing_are_named() -> None:
    platform = options.parse("-overcommit cpu-pm=on -machine mem-merge=off -m lots")
    assert platform.ignored == ["-overcommit cpu-pm=on", "-machine mem-merge=off", "-m lots"]


def test_what_an_entry_cannot_do_without_is_missing() -> None:
    platform = options.parse("-M q35,kernel-irqchip=split -device intel-iommu,eim=off -device edu")
    assert platform.missing == [
        "-machine q35",
        "-machine kernel-irqchip=split",
        "-device intel-iommu,eim=off",
        "-device edu",
    ]
