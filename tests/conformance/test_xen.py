# SPDX-License-Identifier: Apache-2.0
"""Xen's interfaces (KVM API, KVM_XEN_HVM_* and KVM_XEN_VCPU_*; Xen's public headers)."""

import errno
from collections.abc import Callable
from functools import partial

import pytest
from tests.support.conformance import CODE, Guest, refused
from tests.support.hyperv import HYPERCALL_PAGE, LINUX, GeneralProtection, HypervGuest, Left
from tests.support.xen import HYPERCALL_MSR, PAGE, VMMCALL, XenGuest

from softkvm import abi

Make = Callable[..., Guest]
VMCALL = "0f01c1"
PARAMS = [0xDEAD_BEEF_5A5A_0001 + n for n in range(6)]
#: A hypercall that no kernel carries out.
UNKNOWN = 0x3F


@pytest.fixture
def xen(make: Make) -> XenGuest:
    """One vCPU whose hypercalls are Xen's."""
    return XenGuest(make)


def _hcall(xen: HypervGuest) -> abi.kvm_xen_exit_hcall:
    """What a KVM_EXIT_XEN was for."""
    run = xen.guest.kvm_run
    assert (run.exit_reason, run.xen.type) == (abi.KVM_EXIT_XEN, abi.KVM_EXIT_XEN_HCALL)
    hcall: abi.kvm_xen_exit_hcall = run.xen.u.hcall
    return hcall


# --- KVM_XEN_HVM_CONFIG and hypercalls ---------------------------------------------------------------------


def test_the_configuration_takes_the_flags_that_there_are(xen: XenGuest) -> None:
    there = abi.KVM_XEN_HVM_CONFIG_HYPERCALL_MSR | abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
    vm = xen.guest.vm
    assert vm.check_extension(abi.KVM_CAP_XEN_HVM) & there == there
    for flags in (abi.KVM_XEN_HVM_CONFIG_HYPERCALL_MSR, abi.KVM_XEN_HVM_CONFIG_SHARED_INFO, 1 << 31):
        config = abi.kvm_xen_hvm_config(flags=flags, msr=HYPERCALL_MSR)
        refused(errno.EINVAL, partial(vm.xen_hvm_config, config))
    for blob in ("blob_addr_32", "blob_addr_64", "blob_size_32", "blob_size_64"):
        refused(errno.EINVAL, partial(xen.config, flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, **{blob: 1}))
    with pytest.raises(Left):
        xen.call(UNKNOWN)  # nothing has changed


@pytest.mark.parametrize("instruction", [VMMCALL, VMCALL])
def test_a_hypercall_is_userspaces(xen: XenGuest, instruction: str) -> None:
    with pytest.raises(Left):
        xen.call(UNKNOWN, *PARAMS, instruction=instruction)
    hcall = _hcall(xen)
    assert (hcall.longmode, hcall.cpl, hcall.input, list(hcall.params)) == (1, 0, UNKNOWN, PARAMS)
    hcall.result = 0xCAFE_F00D_FBFB_FFFF
    assert xen.finish().rax == 0xCAFE_F00D_FBFB_FFFF


def test_a_hypercall_of_a_32_bit_guest_has_its_own_registers(make: Make) -> None:
    xen = XenGuest(make)
    guest = xen.guest
    guest.protected(VMMCALL + "e6ea")
    names = ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
    regs = guest.cpu.get_regs()
    regs.rax = UNKNOWN
    for at, name in enumerate(names):
        setattr(regs, name, 0x8000_0000 + at)
    guest.cpu.set_regs(regs)
    guest.expect(abi.KVM_EXIT_XEN)
    hcall = _hcall(xen)
    assert (hcall.longmode, hcall.input) == (0, UNKNOWN)
    assert list(hcall.params) == [0x8000_0000 + at for at in range(6)]
    hcall.result = 0x1234
    guest.expect(abi.KVM_EXIT_IO)
    assert guest.cpu.get_regs().rax == 0x1234


def test_a_hypercall_from_ring_3_tells_so(xen: XenGuest) -> None:
    xen.start(VMMCALL + "e6ea", rax=abi.HYPERVISOR_xen_version)
    xen.enter_ring_3()
    with pytest.raises(Left):
        xen.finish()
    assert _hcall(xen).cpl == 3


def test_a_result_is_no_ones_where_the_guest_was_sent_elsewhere(xen: XenGuest) -> None:
    with pytest.raises(Left):
        xen.call(UNKNOWN)
    _hcall(xen).result = 1
    xen.start("e6eaf4", vcpu=0, rax=7)
    regs = xen.guest.cpu.get_regs()
    regs.rip = CODE
    xen.guest.write(CODE, bytes.fromhex("e6eaf4"))
    xen.guest.cpu.set_regs(regs)
    assert xen.finish().rax == 7


def test_without_interception_hypercalls_are_kvms(make: Make) -> None:
    xen = XenGuest(make, flags=0)
    assert xen.call(UNKNOWN) == -abi.KVM_ENOSYS
    xen.config(flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr=0)
    assert xen.call(UNKNOWN) == -abi.KVM_ENOSYS, "there is no MSR: Xen's interfaces are off"


def test_the_msr_places_a_page_with_an_entry_for_each_hypercall(xen: XenGuest) -> None:
    guest = xen.guest
    xen.wrmsr(HYPERCALL_MSR, PAGE)
    for number in (0, 1, UNKNOWN, 127):
        entry = bytes(guest.memory[PAGE + 32 * number : PAGE + 32 * number + 32])
        assert entry[:5] == b"\xb8" + number.to_bytes(4, "little"), "mov eax, number"
        assert entry[5:8] in (b"\x0f\x01\xd9", b"\x0f\x01\xc1"), "VMMCALL or VMCALL"
        assert entry[8:] == b"\xc3" + b"\xcc" * 23, "ret, int3"
    with pytest.raises(Left):
        xen.execute("ffd0", rax=PAGE + 32 * UNKNOWN, rdi=5)
    assert (_hcall(xen).input, _hcall(xen).params[0]) == (UNKNOWN, 5)


def test_there_is_one_page_and_it_needs_memory(xen: XenGuest) -> None:
    for value in (PAGE | 1, 1 << 40):
        with pytest.raises(GeneralProtection):
            xen.wrmsr(HYPERCALL_MSR, value)
    with pytest.raises(GeneralProtection):
        xen.rdmsr(HYPERCALL_MSR)
    xen.config(msr=0)
    with pytest.raises(GeneralProtection):
        xen.wrmsr(HYPERCALL_MSR, PAGE)


def test_a_refused_page_is_userspaces_if_it_asks_for_that(xen: XenGuest) -> None:
    xen.guest.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, abi.KVM_MSR_EXIT_REASON_INVAL)
    with pytest.raises(Left):
        xen.wrmsr(HYPERCALL_MSR, PAGE | 1)
    run = xen.guest.kvm_run
    assert (run.exit_reason, run.msr.index, run.msr.data) == (abi.KVM_EXIT_X86_WRMSR, HYPERCALL_MSR, PAGE | 1)


def test_the_page_may_be_userspaces(make: Make) -> None:
    xen = XenGuest(make, flags=0, needs=abi.KVM_XEN_HVM_CONFIG_HYPERCALL_MSR)
    guest = xen.guest
    blob = 0x30000
    guest.write(blob, b"\x64" * 4096 + b"\x65" * 4096)
    xen.config(blob_addr_64=guest.address + blob, blob_size_64=2, blob_addr_32=1 << 46, blob_size_32=1)
    for number in (0, 1):
        xen.wrmsr(HYPERCALL_MSR, PAGE | number)
        assert bytes(guest.memory[PAGE : PAGE + 4096]) == bytes([0x64 + number]) * 4096
    with pytest.raises(GeneralProtection):
        xen.wrmsr(HYPERCALL_MSR, PAGE | 2)
    xen.config(blob_addr_64=1 << 46, blob_size_64=1)
    refused(errno.EFAULT, lambda: xen.wrmsr(HYPERCALL_MSR, PAGE))


def test_hyper_vs_hypercalls_are_beside_xens(xen: XenGuest) -> None:
    guest = xen.guest
    xen.wrmsr(abi.HV_X64_MSR_GUEST_OS_ID, LINUX)
    xen.wrmsr(abi.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | 1)
    page = bytes(guest.memory[HYPERCALL_PAGE : HYPERCALL_PAGE + 9])
    assert page[:5] == bytes.fromhex("0d00000080") and page[8:] == b"\xc3", "or eax, 0x80000000; …; ret"
    unaligned = 0x5A5A_5A5A
    assert xen.hypercall(abi.HVCALL_SIGNAL_EVENT, unaligned) == abi.HV_STATUS_INVALID_ALIGNMENT
    with pytest.raises(Left):
        xen.call(UNKNOWN)
    assert _hcall(xen).input == UNKNOWN


def test_a_register_of_hyper_vs_may_be_the_one(make: Make) -> None:
    xen = XenGuest(make)
    xen.config(flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr=abi.HV_X64_MSR_GUEST_OS_ID)
    xen.wrmsr(abi.HV_X64_MSR_GUEST_OS_ID, PAGE)
    assert xen.guest.memory[PAGE] == 0xB8
    assert xen.rdmsr(abi.HV_X64_MSR_GUEST_OS_ID) == 0, "reads are what they were"
