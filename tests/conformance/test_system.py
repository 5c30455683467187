# SPDX-License-Identifier: Apache-2.0
"""Version, capabilities, CPUID and MSR lists (KVM API 4.1 to 4.6, 4.18 to 4.20, 4.46)."""

import ctypes
import errno
import mmap
from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.support.conformance import Guest, refused

from softkvm import abi, api
from softkvm.devkvm.ioctl import Descriptor, ioctl_pointer

#: Capabilities that every KVM on x86 has had for years; the tests here and the monitor rely on them.
EXPECTED = [
    "KVM_CAP_IRQCHIP",
    "KVM_CAP_HLT",
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_SET_TSS_ADDR",
    "KVM_CAP_EXT_CPUID",
    "KVM_CAP_NR_VCPUS",
    "KVM_CAP_NR_MEMSLOTS",
    "KVM_CAP_PIT",
    "KVM_CAP_NOP_IO_DELAY",
    "KVM_CAP_MP_STATE",
    "KVM_CAP_SYNC_MMU",
    "KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
    "KVM_CAP_USER_NMI",
    "KVM_CAP_SET_GUEST_DEBUG",
    "KVM_CAP_REINJECT_CONTROL",
    "KVM_CAP_IRQ_ROUTING",
    "KVM_CAP_IRQ_INJECT_STATUS",
    "KVM_CAP_PCI_SEGMENT",
    "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS",
    "KVM_CAP_MCE",
    "KVM_CAP_IRQFD",
    "KVM_CAP_PIT2",
    "KVM_CAP_SET_BOOT_CPU_ID",
    "KVM_CAP_PIT_STATE2",
    "KVM_CAP_IOEVENTFD",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR",
    "KVM_CAP_ADJUST_CLOCK",
    "KVM_CAP_INTERNAL_ERROR_DATA",
    "KVM_CAP_VCPU_EVENTS",
    "KVM_CAP_DEBUGREGS",
    "KVM_CAP_X86_ROBUST_SINGLESTEP",
    "KVM_CAP_XSAVE",
    "KVM_CAP_XCRS",
    "KVM_CAP_GET_TSC_KHZ",
    "KVM_CAP_MAX_VCPUS",
    "KVM_CAP_TSC_DEADLINE_TIMER",
    "KVM_CAP_KVMCLOCK_CTRL",
    "KVM_CAP_SIGNAL_MSI",
    "KVM_CAP_READONLY_MEM",
    "KVM_CAP_IRQFD_RESAMPLE",
    "KVM_CAP_ENABLE_CAP_VM",
    "KVM_CAP_CHECK_EXTENSION_VM",
    "KVM_CAP_SPLIT_IRQCHIP",
    "KVM_CAP_X2APIC_API",
    "KVM_CAP_MAX_VCPU_ID",
    "KVM_CAP_IMMEDIATE_EXIT",
    "KVM_CAP_GET_MSR_FEATURES",
    "KVM_CAP_EXCEPTION_PAYLOAD",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
]


def test_the_api_version_is_12(kvm: api.Kvm) -> None:
    assert kvm.get_api_version() == 12


def test_the_shared_area_holds_the_run_page_and_the_port_data(kvm: api.Kvm) -> None:
    size = kvm.get_vcpu_mmap_size()
    assert size % 4096 == 0
    assert size >= max(ctypes.sizeof(abi.kvm_run), (abi.KVM_PIO_PAGE_OFFSET + 1) * 4096)


@pytest.mark.parametrize("name", EXPECTED)
def test_capability_is_there_on_system_and_vm(kvm: api.Kvm, name: str) -> None:
    cap = getattr(abi, name)
    assert kvm.check_extension(cap) > 0
    with kvm.create_vm() as vm:
        assert vm.check_extension(cap) > 0


@pytest.mark.parametrize("cap", [9999, 0x7FFF_FFFF, abi.KVM_CAP_S390_PSW, abi.KVM_CAP_PPC_SMT])
def test_unknown_capabilities_are_absent(kvm: api.Kvm, cap: int) -> None:
    assert kvm.check_extension(cap) == 0


def test_numbers_of_vcpus_are_in_order(kvm: api.Kvm) -> None:
    recommended = kvm.check_extension(abi.KVM_CAP_NR_VCPUS)
    most = kvm.check_extension(abi.KVM_CAP_MAX_VCPUS)
    assert 1 <= recommended <= most <= kvm.check_extension(abi.KVM_CAP_MAX_VCPU_ID)


def test_unknown_vm_types_are_refused(kvm: api.Kvm) -> None:
    types = kvm.check_extension(abi.KVM_CAP_VM_TYPES)
    assert types & 1, "the default"
    kvm.create_vm(0).close()
    for kind in (number for number in range(8) if not types >> number & 1):
        refused(errno.EINVAL, lambda kind=kind: kvm.create_vm(kind))  # type: ignore[misc]
    refused(errno.EINVAL, lambda: kvm.create_vm(0x7F))


def test_vcpu_ids_are_checked(kvm: api.Kvm) -> None:
    with kvm.create_vm() as vm:
        refused(errno.EINVAL, lambda: vm.create_vcpu(kvm.check_extension(abi.KVM_CAP_MAX_VCPU_ID)))
        with vm.create_vcpu(3):
            refused(errno.EEXIST, lambda: vm.create_vcpu(3))
        refused(errno.EEXIST, lambda: vm.create_vcpu(3))


# --- CPUID -----------------------------------------------------------------------------------------


def test_supported_cpuid_has_each_leaf_once(kvm: api.Kvm) -> None:
    entries = kvm.get_supported_cpuid()
    keys = [(entry.function, entry.index) for entry in entries]
    assert len(keys) == len(set(keys))
    assert {0, 1, 7, 0x8000_0000, 0x8000_0001, 0x4000_0000, 0x4000_0001} <= {function for function, _ in keys}
    signature = next(entry for entry in entries if entry.function == 0x4000_0000)
    text = b"".join(n.to_bytes(4, "little") for n in (signature.ebx, signature.ecx, signature.edx))
    assert text == b"KVMKVMKVM\0\0\0"
    leaf1 = next(entry for entry in entries if entry.function == 1)
    assert leaf1.ecx >> 31 & 1, "the hypervisor bit"


def test_indexed_leaves_carry_the_flag(kvm: api.Kvm) -> None:
    for entry in kvm.get_supported_cpuid():
        indexed = bool(entry.flags & abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
        if entry.function in (4, 7, 0xB, 0xD):
            assert indexed, hex(entry.function)
        if entry.function in (0, 1, 0x8000_0000, 0x8000_0001):
            assert not indexed and entry.index == 0


def test_emulated_cpuid_can_be_read(kvm: api.Kvm) -> None:
    entries = kvm.get_emulated_cpuid()
    assert len(entries) <= 256
    assert kvm.check_extension(abi.KVM_CAP_EXT_EMUL_CPUID) or not entries
    registers = {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in entries}
    assert len(registers) == len(entries)
    for function, index in registers:
        assert function <= registers[0, 0][0], (function, index)


def test_cpuid_comes_back_as_set(guest: Guest) -> None:
    wanted = guest.kvm.get_supported_cpuid()
    for entry in wanted:
        if entry.function == 0x8000_0002:
            entry.eax, entry.ebx = 0x74736574, 0x21
    guest.cpu.set_cpuid2(wanted)
    got = {(e.function, e.index): (e.eax, e.ebx) for e in guest.cpu.get_cpuid2()}
    assert got[0x8000_0002, 0] == (0x74736574, 0x21)
    assert set(got) == {(e.function, e.index) for e in wanted}


def test_more_than_256_cpuid_entries_are_e2big(guest: Guest) -> None:
    entries = [abi.kvm_cpuid_entry2(function=0x4000_1000 + n) for n in range(257)]
    refused(errno.E2BIG, lambda: guest.cpu.set_cpuid2(entries))
    assert guest.cpu.get_cpuid2(), "the table from before is still there"


def test_leaves_without_subleaves_may_be_set_in_the_old_way(guest: Guest) -> None:
    leaves = [(0, 0xD, 1, 2, 3), (2, 1, 2, 3, 4), (0x4000_0000, 4, 5, 6, 7)]
    names = ("function", "eax", "ebx", "ecx", "edx")
    guest.cpu.set_cpuid([abi.kvm_cpuid_entry(**dict(zip(names, leaf, strict=True))) for leaf in leaves])
    got = [tuple(getattr(e, name) for name in ("index", "flags", *names)) for e in guest.cpu.get_cpuid2()]
    assert [row[:4] for row in got] == [(0, 0, leaf[0], leaf[1]) for leaf in leaves]
    assert got[2][2:] == leaves[2]
    refused(errno.E2BIG, lambda: guest.cpu.set_cpuid([abi.kvm_cpuid_entry()] * 257))


def test_cpuid_of_49_address_bits_is_refused(guest: Guest) -> None:
    entries = guest.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == 0x8000_0008:
            entry.eax = entry.eax & ~0xFF00 | 49 << 8
    refused(errno.EINVAL, lambda: guest.cpu.set_cpuid2(entries))


def test_the_guest_reads_what_was_set(guest: Guest) -> None:
    entries = guest.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == 0x8000_0003:
            entry.eax, entry.ebx, entry.ecx, entry.edx = 0x11111111, 0x22222222, 0x33333333, 0x44444444
    guest.cpu.set_cpuid2(entries)
    guest.real("66b803000080 0fa2 f4")  # mov eax, 0x80000003; cpuid; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    regs = guest.cpu.get_regs()
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (0x11111111, 0x22222222, 0x33333333, 0x44444444)


@pytest.mark.parametrize("function", [0, 1, 0xB, 0x4000_0000, 0x8000_0000, 0xFFFF_FFFF])
def test_cpuid_before_there_is_a_table_is_zero(make: Callable[..., Guest], function: int) -> None:
    guest = make(vcpus=0)
    vcpu = guest.vm.create_vcpu(0)
    guest.real(b"\x66\xb8" + function.to_bytes(4, "little") + bytes.fromhex("0fa2 f4"), vcpu=vcpu)
    assert guest.run(vcpu) == abi.KVM_EXIT_HLT
    regs = vcpu.get_regs()
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (0, 0, 0, 0)
    vcpu.close()


INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # EBX, ECX, EDX of leaf 0


@pytest.mark.parametrize(
    ("function", "index", "leaf"),
    [
        (0xB, 1, (1, 2, 0x201, 7)),
        (0xB, 5, (0, 0, 5, 7)),  # CL passed through, EDX the x2APIC id
        (0xC, 1, (1, 2, 0x201, 7)),  # beyond the range: as the highest basic leaf, subleaf as asked for
        (0xC, 5, (0, 0, 5, 7)),
        (0x4000_0100, 1, (1, 2, 0x201, 7)),  # a class that isn't there
        (0x4000_0001, 0, (0x51, 0, 0, 0)),
        (0x4000_0002, 1, (1, 2, 0x201, 7)),
        (0x8000_0000, 0, (0x8000_0008, 0, 0, 0)),
        (0x8000_0005, 1, (0, 0, 0, 0)),  # within the range of its class, not there
        (0x8000_0009, 1, (1, 2, 0x201, 7)),
        (3, 0, (0, 0, 0, 0)),
    ],
)
def test_intels_leaves_out_of_range(
    make: Callable[..., Guest], function: int, index: int, leaf: tuple[int, ...]
) -> None:
    guest = make(vcpus=0)
    vcpu = guest.vm.create_vcpu(0)
    entry, indexed = abi.kvm_cpuid_entry2, abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    ebx, ecx, edx = INTEL
    vcpu.set_cpuid2(
        [
            entry(function=0, eax=0xB, ebx=ebx, ecx=ecx, edx=edx),
            entry(function=0xB, index=0, flags=indexed, eax=0, ebx=1, ecx=0x100, edx=7),
            entry(function=0xB, index=1, flags=indexed, eax=1, ebx=2, ecx=0x201, edx=7),
            entry(function=0x4000_0000, eax=0x4000_0001),
            entry(function=0x4000_0001, eax=0x51),
            entry(function=0x8000_0000, eax=0x8000_0008),
        ]
    )
    code = b"\x66\xb8" + function.to_bytes(4, "little") + b"\x66\xb9" + index.to_bytes(4, "little")
    guest.real(code + bytes.fromhex("0fa2 f4"), vcpu=vcpu)
    assert guest.run(vcpu) == abi.KVM_EXIT_HLT
    regs = vcpu.get_regs()
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == leaf
    vcpu.close()


def test_cpuid_cannot_change_after_the_first_run(guest: Guest) -> None:
    entries = guest.cpu.get_cpuid2()
    guest.real("f4")
    guest.expect(abi.KVM_EXIT_HLT)
    guest.cpu.set_cpuid2(guest.cpu.get_cpuid2())
    entries[0].ebx ^= 1
    refused(errno.EINVAL, lambda: guest.cpu.set_cpuid2(entries))


# --- MSRs ------------------------------------------------------------------------------------------

#: Registers of every x86-64 KVM (KVM_GET_MSR_INDEX_LIST).
SAVED_MSRS = {
    0x10: "TSC",
    0x174: "SYSENTER_CS",
    0x175: "SYSENTER_ESP",
    0x176: "SYSENTER_EIP",
    0x277: "PAT",
    0xC000_0081: "STAR",
    0xC000_0082: "LSTAR",
    0xC000_0083: "CSTAR",
    0xC000_0084: "SFMASK",
    0xC000_0102: "KERNEL_GS_BASE",
    abi.MSR_KVM_WALL_CLOCK_NEW: "KVM_WALL_CLOCK_NEW",
    abi.MSR_KVM_SYSTEM_TIME_NEW: "KVM_SYSTEM_TIME_NEW",
}


def test_the_msr_list_has_what_has_to_be_saved(kvm: api.Kvm) -> None:
    indices = kvm.get_msr_index_list()
    assert len(indices) == len(set(indices))
    assert set(SAVED_MSRS) <= set(indices)


def test_every_listed_msr_can_be_read(guest: Guest) -> None:
    indices = guest.kvm.get_msr_index_list()
    unreadable = [hex(index) for index in indices if not guest.cpu.get_msrs([index])]
    assert not unreadable


def test_feature_msrs_can_be_read_on_the_system(kvm: api.Kvm) -> None:
    for index in kvm.get_msr_feature_index_list():
        assert len(kvm.get_msrs([index])) == 1, hex(index)


@pytest.mark.parametrize("index", [0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0084, 0xC000_0102])
def test_msr_round_trip(guest: Guest, index: int) -> None:
    assert guest.cpu.set_msrs({index: 0x1234_5000}) == 1
    assert guest.cpu.get_msrs([index]) == [0x1234_5000]


def test_msr_lists_stop_at_the_first_unknown_register(guest: Guest) -> None:
    assert len(guest.cpu.get_msrs([0x174, 0x1234_5678, 0x175])) == 1
    assert guest.cpu.set_msrs({0x174: 0x18, 0x1234_5678: 1, 0x175: 0x99}) == 1
    assert guest.cpu.get_msrs([0x174, 0x175]) == [0x18, 0]


def test_256_msrs_in_one_call_are_e2big(guest: Guest) -> None:
    refused(errno.E2BIG, lambda: guest.cpu.get_msrs([0x174] * 256))
    refused(errno.E2BIG, lambda: guest.cpu.set_msrs({0x4000_0000 + n: 0 for n in range(256)}))
    assert guest.cpu.get_msrs([0x174] * 255) == [0] * 255


@pytest.mark.parametrize("request_name", ["KVM_GET_SUPPORTED_CPUID", "KVM_GET_EMULATED_CPUID"])
def test_a_short_cpuid_buffer_is_e2big(kind: str, kvm: api.Kvm, request_name: str) -> None:
    if kind == "soft":
        pytest.skip("the Python API returns lists of any length: there is no buffer to be too short")
    if request_name == "KVM_GET_EMULATED_CPUID" and not kvm.get_emulated_cpuid():
        pytest.skip("this host emulates no feature")
    table: Any = abi.flexible(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, 1)(nent=0)
    refused(errno.E2BIG, lambda: ioctl_pointer(cast(Descriptor, kvm).fd, getattr(abi, request_name), table))


def test_a_short_msr_list_is_e2big_and_tells_the_length(kind: str, kvm: api.Kvm) -> None:
    if kind == "soft":
        pytest.skip("the Python API returns lists of any length: there is no buffer to be too short")
    table: Any = abi.flexible(abi.kvm_msr_list, ctypes.c_uint32, 1, "indices")(nmsrs=0)
    refused(errno.E2BIG, lambda: ioctl_pointer(cast(Descriptor, kvm).fd, abi.KVM_GET_MSR_INDEX_LIST, table))
    assert table.nmsrs == len(kvm.get_msr_index_list())


def test_requests_to_what_is_closed_are_ebadf(kvm: api.Kvm) -> None:
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.close()
    requests: list[Callable[[], object]] = [vcpu.run, vcpu.get_regs, lambda: vcpu.set_regs(abi.kvm_regs()), vcpu.nmi]
    for request in requests:
        refused(errno.EBADF, request)
    vcpu.kick()  # a signal may come late
    vcpu.close()
    vm.close()
    requests = [lambda: vm.create_vcpu(1), vm.get_clock, vm.create_irqchip, lambda: vm.get_dirty_log(0)]
    for request in requests:
        refused(errno.EBADF, request)
    vm.close()
    kvm.close()
    requests = [kvm.create_vm, kvm.get_api_version, kvm.get_supported_cpuid, lambda: kvm.get_msrs([0x10])]
    for request in requests:
        refused(errno.EBADF, request)


def test_what_cpuid_is_after_a_run_can_be_set_again_and_nothing_else(guest: Guest) -> None:
    guest.long("f4")
    sregs = guest.cpu.get_sregs()
    sregs.cr4 |= abi.X86_CR4_OSXSAVE
    guest.cpu.set_sregs(sregs)
    guest.expect(abi.KVM_EXIT_HLT)
    entries = guest.cpu.get_cpuid2()
    (features,) = (entry for entry in entries if entry.function == 1)
    assert features.ecx >> 27 & 1, "OSXSAVE follows CR4"
    guest.cpu.set_cpuid2(entries)
    features.eax ^= 1
    refused(errno.EINVAL, lambda: guest.cpu.set_cpuid2(entries))
    refused(errno.E2BIG, lambda: guest.cpu.set_cpuid2([abi.kvm_cpuid_entry2()] * 257))


@pytest.mark.parametrize("index", [0xCD, 0xFE, 0x198], ids=["FSB_FREQ", "MTRRcap", "PERF_STATUS"])
def test_registers_of_the_platform_cannot_be_written(guest: Guest, index: int) -> None:
    (value,) = guest.cpu.get_msrs([index])
    assert guest.cpu.set_msrs({index: value ^ 1}) == 0
    assert guest.cpu.get_msrs([index]) == [value]


def test_others_may_map_the_shared_area_by_its_descriptor(guest: Guest) -> None:
    guest.real("e680 ebfc")  # out 0x80, al; jmp
    with mmap.mmap(guest.cpu.shared_fd, guest.kvm.get_vcpu_mmap_size()) as other:
        page = abi.kvm_run.from_buffer_copy(other)
        guest.expect(abi.KVM_EXIT_IO)
        page = abi.kvm_run.from_buffer_copy(other)
        assert (page.exit_reason, page.io.port) == (abi.KVM_EXIT_IO, 0x80)
        other[abi.kvm_run.immediate_exit.offset] = 1  # type: ignore[attr-defined]
        refused(errno.EINTR, guest.cpu.run)
        guest.cpu.close()
        assert guest.cpu.shared_fd == -1
        assert other[abi.kvm_run.immediate_exit.offset] == 1  # type: ignore[attr-defined]
