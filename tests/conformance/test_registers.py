# SPDX-License-Identifier: Apache-2.0
"""State in and out (KVM API 4.11 to 4.15, 4.22, 4.23, 4.31 to 4.34, 4.42 to 4.45, 4.131)."""

import ctypes
import errno
import struct
from collections.abc import Callable

import pytest
from tests.support.conformance import TABLES, Guest, refused
from tests.support.segments import enter_ring_3

from softkvm import abi, api

U64 = (1 << 64) - 1
GPRS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


# --- after reset (SDM vol. 3, table 9-1) -----------------------------------------------------------


def test_state_after_reset(make: Callable[..., Guest]) -> None:
    guest = make()
    regs, sregs = guest.cpu.get_regs(), guest.cpu.get_sregs()
    assert (regs.rip, regs.rflags) == (0xFFF0, 2)
    assert (sregs.cs.base, sregs.cs.selector, sregs.cs.limit) == (0xFFFF_0000, 0xF000, 0xFFFF)
    assert sregs.cr0 == 0x6000_0010
    assert (sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer) == (0, 0, 0, 0)
    assert (sregs.gdt.base, sregs.gdt.limit, sregs.idt.limit) == (0, 0xFFFF, 0xFFFF)
    for name in ("ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        assert (segment.base, segment.selector, segment.limit, segment.present) == (0, 0, 0xFFFF, 1), name
    assert sregs.tr.type == 11
    debug = guest.cpu.get_debugregs()
    assert (list(debug.db), debug.dr6, debug.dr7) == ([0] * 4, 0xFFFF_0FF0, 0x400)
    assert guest.cpu.get_xcrs().xcrs[0].value == 1


# --- general registers -----------------------------------------------------------------------------


def test_general_registers_round_trip(guest: Guest) -> None:
    regs = abi.kvm_regs(rip=0x1234_5678_9ABC, rflags=0x246)
    for n, name in enumerate(GPRS):
        setattr(regs, name, U64 - n * 0x0101_0101_0101)
    guest.cpu.set_regs(regs)
    assert bytes(guest.cpu.get_regs()) == bytes(regs)


def test_rflags_bit_1_is_always_set(guest: Guest) -> None:
    guest.cpu.set_regs(abi.kvm_regs(rflags=0))
    assert guest.cpu.get_regs().rflags == 2


# --- special registers -----------------------------------------------------------------------------


def test_special_registers_round_trip(guest: Guest) -> None:
    sregs = guest.cpu.get_sregs()
    for n, name in enumerate(("ds", "es", "fs", "gs", "ss")):
        segment = getattr(sregs, name)
        segment.base, segment.selector, segment.limit = 0x1000 * (n + 1), 0x100 * (n + 1), 0xFFFF
    sregs.gdt = abi.kvm_dtable(base=0x5000, limit=0x27)
    sregs.idt = abi.kvm_dtable(base=0x6000, limit=0x3FF)
    sregs.ldt = abi.kvm_segment(base=0x7000, limit=0x17, selector=0x20, type=2, present=1)
    sregs.cr2, sregs.cr3 = 0xDEAD_B000, 0x1_0000
    guest.cpu.set_sregs(sregs)
    assert bytes(guest.cpu.get_sregs()) == bytes(sregs)


def test_long_mode_round_trips(guest: Guest) -> None:
    guest.long("f4")
    sregs = guest.cpu.get_sregs()
    assert sregs.cs.l == 1 and sregs.cs.db == 0
    assert sregs.efer & (abi.EFER_LME | abi.EFER_LMA) == abi.EFER_LME | abi.EFER_LMA
    sregs.fs.base, sregs.gs.base = 0x7FFF_1234_5678, 0xFFFF_8000_0000_1000
    sregs.cr8 = 9
    guest.cpu.set_sregs(sregs)
    again = guest.cpu.get_sregs()
    assert (again.fs.base, again.gs.base, again.cr8) == (0x7FFF_1234_5678, 0xFFFF_8000_0000_1000, 9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("efer", abi.EFER_LMA),
        ("cr0", abi.X86_CR0_PG),
        ("cr0", 1 << 29 | abi.X86_CR0_PE),
        ("cr4", 1 << 31),
        ("cr4", 1 << 40),
        ("cr0", 1 << 40),
        ("cs.l", 1),
    ],
    ids=str,
)
def test_illegal_special_registers_are_einval(guest: Guest, field: str, value: int) -> None:
    before = guest.cpu.get_sregs()
    sregs = guest.cpu.get_sregs()
    if field == "cs.l":
        sregs.cs.l = value
    else:
        setattr(sregs, field, value)
    refused(errno.EINVAL, lambda: guest.cpu.set_sregs(sregs))
    assert bytes(guest.cpu.get_sregs()) == bytes(before)


def test_long_mode_without_pae_or_lma_is_einval(guest: Guest) -> None:
    guest.long("f4")
    for field, value in (("cr4", 0), ("efer", abi.EFER_LME)):
        sregs = guest.cpu.get_sregs()
        setattr(sregs, field, value)
        refused(errno.EINVAL, lambda: guest.cpu.set_sregs(sregs))  # noqa: B023
    assert guest.cpu.get_sregs().cr4 & abi.X86_CR4_PAE


def test_sregs2_have_the_pdptes_of_pae_paging(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("paging outside long mode")
    if not guest.kvm.check_extension(abi.KVM_CAP_SREGS2):
        pytest.skip("no KVM_CAP_SREGS2")
    pdptes = [TABLES + 0x1001 + n * 0x1000 for n in range(4)]
    guest.write(TABLES + 0x20, struct.pack("<4Q", *pdptes))
    guest.protected("f4")
    sregs = guest.cpu.get_sregs2()
    assert sregs.flags == 0
    sregs.cr3, sregs.cr4, sregs.cr0 = TABLES + 0x20, sregs.cr4 | abi.X86_CR4_PAE, sregs.cr0 | abi.X86_CR0_PG
    guest.cpu.set_sregs2(sregs)
    sregs = guest.cpu.get_sregs2()
    assert (sregs.flags, list(sregs.pdptrs)) == (abi.KVM_SREGS2_FLAGS_PDPTRS_VALID, pdptes)
    guest.cpu.set_sregs2(sregs)


def test_an_impossible_task_priority_changes_nothing(guest: Guest) -> None:
    sregs = guest.cpu.get_sregs()
    sregs.cr8 = 5
    guest.cpu.set_sregs(sregs)
    sregs.cr8 = 16
    guest.cpu.set_sregs(sregs)
    assert guest.cpu.get_sregs().cr8 == 5


def test_lma_is_no_bit_that_an_msr_write_changes(guest: Guest) -> None:
    efer = 0xC000_0080
    assert guest.cpu.set_msrs({efer: abi.EFER_LME | abi.EFER_LMA}) == 1
    assert guest.cpu.get_msrs([efer]) == [abi.EFER_LME]
    guest.long("f4")
    assert guest.cpu.set_msrs({efer: abi.EFER_LME | abi.EFER_SCE}) == 1
    assert guest.cpu.get_msrs([efer]) == [abi.EFER_LME | abi.EFER_LMA | abi.EFER_SCE]


def test_sregs2_agree_with_sregs(guest: Guest) -> None:
    if not guest.kvm.check_extension(abi.KVM_CAP_SREGS2):
        pytest.skip("no KVM_CAP_SREGS2")
    guest.long("f4")
    one, two = guest.cpu.get_sregs(), guest.cpu.get_sregs2()
    for name in (*SEGMENTS, "gdt", "idt"):
        assert bytes(getattr(one, name)) == bytes(getattr(two, name)), name
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"):
        assert getattr(one, name) == getattr(two, name), name
    two.cr2 = 0x1234
    guest.cpu.set_sregs2(two)
    assert guest.cpu.get_sregs().cr2 == 0x1234
    two.flags = 2
    refused(errno.EINVAL, lambda: guest.cpu.set_sregs2(two))
    two.flags = abi.KVM_SREGS2_FLAGS_PDPTRS_VALID  # long mode has none
    refused(errno.EINVAL, lambda: guest.cpu.set_sregs2(two))


def test_the_interrupt_bitmap_carries_an_interrupt_on_its_way(guest: Guest) -> None:
    sregs = guest.cpu.get_sregs()
    sregs.interrupt_bitmap[0x61 // 64] = 1 << 0x61 % 64
    guest.cpu.set_sregs(sregs)
    assert list(guest.cpu.get_sregs().interrupt_bitmap) == [0, 1 << 0x21, 0, 0]
    events = guest.cpu.get_vcpu_events()
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 0x61)


def test_translation_follows_the_guest_tables(guest: Guest) -> None:
    guest.long("f4")
    entry = TABLES + 0x8000
    guest.write(TABLES + 2 * 4096 + 8, (entry | 7).to_bytes(8, "little"))  # 0x200000 by a page table
    guest.write(entry + 5 * 8, (0x7000 | 7).to_bytes(8, "little"))
    found = guest.cpu.translate(0x20_5123)
    assert (found.valid, found.physical_address) == (1, 0x7123)
    assert guest.cpu.translate(0x20_6000).valid == 0
    assert guest.cpu.translate(0x1234).physical_address == 0x1234


# --- x87, SSE, XSAVE -------------------------------------------------------------------------------


def test_fpu_round_trips(guest: Guest) -> None:
    fpu = abi.kvm_fpu(fcw=0x27F, fsw=0x3841, ftwx=0x81, last_opcode=0x123, last_ip=0x1000, last_dp=0x2000)
    for n in range(8):
        fpu.fpr[n][:10] = list(range(n * 10, n * 10 + 10))
    for n in range(16):
        fpu.xmm[n][:] = list(range(n, n + 16))
    guest.cpu.set_fpu(fpu)
    got = guest.cpu.get_fpu()
    got.mxcsr = 0
    assert bytes(got) == bytes(fpu)


def test_the_mxcsr_of_kvm_fpu_is_not_loaded(guest: Guest) -> None:
    fpu = guest.cpu.get_fpu()
    fpu.mxcsr = 0
    guest.cpu.set_fpu(fpu)
    assert struct.unpack_from("<I", bytes(guest.cpu.get_xsave()), 24) == (0x1F80,)


def test_xsave_shows_the_same_state_as_fpu(guest: Guest) -> None:
    area = bytearray(bytes(guest.cpu.get_xsave()))
    struct.pack_into("<Q", area, 512, 3)  # components in use: a new vCPU has them in their initial state
    guest.cpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    fpu = guest.cpu.get_fpu()
    fpu.fcw = 0x27F
    fpu.xmm[3][:] = list(range(16))
    guest.cpu.set_fpu(fpu)
    got = bytes(guest.cpu.get_xsave())
    assert struct.unpack_from("<H", got, 0) == (0x27F,)
    assert struct.unpack_from("<I", got, 24) == (0x1F80,)
    assert got[160 + 48 : 160 + 64] == bytes(range(16))
    assert struct.unpack_from("<Q", got, 512)[0] & 3 == 3


def test_the_second_request_for_xsave_state_gives_the_same(guest: Guest) -> None:
    assert guest.vm.check_extension(abi.KVM_CAP_XSAVE2) >= ctypes.sizeof(abi.kvm_xsave)
    area = bytearray(bytes(guest.cpu.get_xsave()))
    area[160:176] = b"0123456789abcdef"
    struct.pack_into("<Q", area, 512, 3)
    guest.cpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    assert bytes(guest.cpu.get_xsave2()) == bytes(guest.cpu.get_xsave())
    assert bytes(guest.cpu.get_xsave2())[160:176] == b"0123456789abcdef"


def test_nested_state_without_a_nested_guest_is_a_header(guest: Guest) -> None:
    if not guest.vm.check_extension(abi.KVM_CAP_NESTED_STATE):
        refused(errno.EINVAL, guest.cpu.get_nested_state)
        return
    header = ctypes.sizeof(abi.kvm_nested_state)
    assert guest.vm.check_extension(abi.KVM_CAP_NESTED_STATE) > header
    state = guest.cpu.get_nested_state()
    assert (state.size, state.flags & abi.KVM_STATE_NESTED_GUEST_MODE) == (header, 0)
    guest.cpu.set_nested_state(state)
    assert bytes(guest.cpu.get_nested_state()) == bytes(state)
    state.size = header - 1
    refused(errno.EINVAL, lambda: guest.cpu.set_nested_state(state))
    state.size = header
    state.flags |= abi.KVM_STATE_NESTED_RUN_PENDING  # of which guest?
    refused(errno.EINVAL, lambda: guest.cpu.set_nested_state(state))


def test_xsave_round_trips(guest: Guest) -> None:
    area = bytearray(bytes(guest.cpu.get_xsave()))
    area[160:176] = b"0123456789abcdef"
    struct.pack_into("<H", area, 0, 0x37F)
    struct.pack_into("<Q", area, 512, 3)
    guest.cpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    assert bytes(guest.cpu.get_xsave())[160:176] == b"0123456789abcdef"
    assert bytes(guest.cpu.get_fpu().xmm[0]) == b"0123456789abcdef"


def test_xsave_components_left_out_are_in_their_initial_state(guest: Guest) -> None:
    area = bytearray(bytes(guest.cpu.get_xsave()))
    struct.pack_into("<H", area, 0, 0x27F)
    area[160:176] = bytes([9] * 16)
    struct.pack_into("<Q", area, 512, 3)
    guest.cpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    struct.pack_into("<Q", area, 512, 0)
    guest.cpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    after = bytes(guest.cpu.get_xsave())
    assert struct.unpack_from("<H", after, 0) == (0x37F,)
    assert after[160:176] == bytes(16)


@pytest.mark.parametrize(
    ("offset", "value"), [(512, 1 << 62), (24, 0xFFFF_0000), (520, 1)], ids=["bv", "mxcsr", "comp"]
)
def test_illegal_xsave_areas_are_einval(guest: Guest, offset: int, value: int) -> None:
    before = bytes(guest.cpu.get_xsave())
    area = bytearray(before)
    struct.pack_into("<Q", area, 512, 3)
    struct.pack_into("<I" if offset == 24 else "<Q", area, offset, value)
    refused(errno.EINVAL, lambda: guest.cpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area)))
    assert bytes(guest.cpu.get_xsave()) == before


def test_xcr0_round_trips_before_the_vcpu_has_a_cpuid(kvm: api.Kvm) -> None:
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_xcrs(vcpu.get_xcrs())
        assert vcpu.get_xcrs().xcrs[0].value == 1


def test_xcr0_round_trips_and_is_checked(guest: Guest) -> None:
    xcrs = guest.cpu.get_xcrs()
    assert xcrs.nr_xcrs == 1 and xcrs.xcrs[0].xcr == 0
    xcrs.xcrs[0].value = 3
    guest.cpu.set_xcrs(xcrs)
    assert guest.cpu.get_xcrs().xcrs[0].value == 3
    for bad in (0, 2, 1 << 62 | 3, 4 | 1):
        xcrs.xcrs[0].value = bad
        refused(errno.EINVAL, lambda: guest.cpu.set_xcrs(xcrs))
    assert guest.cpu.get_xcrs().xcrs[0].value == 3
    refused(errno.EINVAL, lambda: guest.cpu.set_xcrs(abi.kvm_xcrs(nr_xcrs=17)))
    refused(errno.EINVAL, lambda: guest.cpu.set_xcrs(abi.kvm_xcrs(nr_xcrs=1, flags=1)))


# --- events ----------------------------------------------------------------------------------------


def test_nothing_is_pending_after_reset(guest: Guest) -> None:
    events = guest.cpu.get_vcpu_events()
    assert (events.exception.injected, events.exception.pending) == (0, 0)
    assert (events.interrupt.injected, events.nmi.injected, events.nmi.pending, events.nmi.masked) == (0, 0, 0, 0)
    wanted = abi.KVM_VCPUEVENT_VALID_NMI_PENDING | abi.KVM_VCPUEVENT_VALID_SHADOW
    assert events.flags & wanted == wanted


def test_an_exception_on_its_way_round_trips(guest: Guest) -> None:
    guest.protected("f4")  # real mode has no error codes
    events = guest.cpu.get_vcpu_events()
    events.flags = 0
    events.exception.injected, events.exception.nr = 1, abi.GP_VECTOR
    events.exception.has_error_code, events.exception.error_code = 1, 0x18
    guest.cpu.set_vcpu_events(events)
    got = guest.cpu.get_vcpu_events().exception
    assert (got.injected, got.nr, got.has_error_code, got.error_code) == (1, abi.GP_VECTOR, 1, 0x18)


def test_nmi_state_round_trips(guest: Guest) -> None:
    events = guest.cpu.get_vcpu_events()
    events.flags = abi.KVM_VCPUEVENT_VALID_NMI_PENDING
    events.nmi.pending, events.nmi.masked = 1, 1
    guest.cpu.set_vcpu_events(events)
    got = guest.cpu.get_vcpu_events().nmi
    assert (got.pending, got.masked) == (1, 1)


def test_the_interrupt_shadow_round_trips_and_ends_with_the_instruction(guest: Guest) -> None:
    # The device tried has the flag without the capability.
    assert guest.cpu.get_vcpu_events().flags & abi.KVM_VCPUEVENT_VALID_SHADOW or not guest.vm.check_extension(
        abi.KVM_CAP_INTR_SHADOW
    )
    guest.real("90 f4")  # nop; hlt
    events = guest.cpu.get_vcpu_events()
    assert events.interrupt.shadow == 0
    events.flags, events.interrupt.shadow = abi.KVM_VCPUEVENT_VALID_SHADOW, abi.KVM_X86_SHADOW_INT_STI
    guest.cpu.set_vcpu_events(events)
    assert guest.cpu.get_vcpu_events().interrupt.shadow & abi.KVM_X86_SHADOW_INT_STI
    events.flags, events.interrupt.shadow = 0, 0
    guest.cpu.set_vcpu_events(events)
    assert guest.cpu.get_vcpu_events().interrupt.shadow, "stays without its flag"
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_vcpu_events().interrupt.shadow == 0


def test_the_nmi_count_stays_without_its_flag(guest: Guest) -> None:
    guest.cpu.nmi()
    events = guest.cpu.get_vcpu_events()
    assert events.nmi.pending == 1
    events.flags, events.nmi.pending = 0, 0
    guest.cpu.set_vcpu_events(events)
    assert guest.cpu.get_vcpu_events().nmi.pending == 1


@pytest.mark.parametrize(
    "fields",
    [{"flags": 1 << 12}, {"flags": abi.KVM_VCPUEVENT_VALID_PAYLOAD}, {"nr": 2}, {"nr": 32}, {"nr": 255}],
    ids=str,
)
def test_illegal_events_are_einval(guest: Guest, fields: dict[str, int]) -> None:
    events = guest.cpu.get_vcpu_events()
    before = bytes(events)
    events.flags = fields.get("flags", 0)
    if "nr" in fields:
        events.exception.injected, events.exception.nr = 1, fields["nr"]
    refused(errno.EINVAL, lambda: guest.cpu.set_vcpu_events(events))
    assert bytes(guest.cpu.get_vcpu_events()) == before


def test_payloads_are_seen_with_the_capability(guest: Guest) -> None:
    guest.vm.enable_cap(abi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    events = guest.cpu.get_vcpu_events()
    assert events.flags & abi.KVM_VCPUEVENT_VALID_PAYLOAD
    events.flags = abi.KVM_VCPUEVENT_VALID_PAYLOAD
    events.exception.pending, events.exception.nr = 1, abi.PF_VECTOR
    events.exception.has_error_code, events.exception.error_code = 1, 4
    events.exception_has_payload, events.exception_payload = 1, 0xABC_D000
    guest.cpu.set_vcpu_events(events)
    got = guest.cpu.get_vcpu_events()
    assert (got.exception.pending, got.exception.injected, got.exception.nr) == (1, 0, abi.PF_VECTOR)
    assert (got.exception_has_payload, got.exception_payload) == (1, 0xABC_D000)


# --- debug registers -------------------------------------------------------------------------------


def test_debug_registers_round_trip(guest: Guest) -> None:
    wanted = abi.kvm_debugregs(dr6=0xFFFF_0FF1, dr7=0x401)
    wanted.db[:] = [0x1000, 0x2000, 0x7FFF_FFFF_F000, 0x4000]
    guest.cpu.set_debugregs(wanted)
    assert bytes(guest.cpu.get_debugregs()) == bytes(wanted)


@pytest.mark.parametrize(("field", "value"), [("flags", 1), ("dr6", 1 << 32), ("dr7", 1 << 32 | 0x400)])
def test_illegal_debug_registers_are_einval(guest: Guest, field: str, value: int) -> None:
    before = bytes(guest.cpu.get_debugregs())
    regs = guest.cpu.get_debugregs()
    setattr(regs, field, value)
    refused(errno.EINVAL, lambda: guest.cpu.set_debugregs(regs))
    assert bytes(guest.cpu.get_debugregs()) == before


# --- the rest --------------------------------------------------------------------------------------


def test_the_tsc_frequency_can_be_read_and_set_to_itself(guest: Guest) -> None:
    khz = guest.cpu.get_tsc_khz()
    assert khz > 100_000
    guest.cpu.set_tsc_khz(khz)
    assert guest.cpu.get_tsc_khz() == khz


def test_the_tsc_may_tick_at_another_frequency(make: Callable[..., Guest], needs: Callable[[str], None]) -> None:
    guest = make()
    host = guest.cpu.get_tsc_khz()
    if not guest.vm.check_extension(abi.KVM_CAP_TSC_CONTROL):
        refused(errno.EINVAL, lambda: guest.cpu.set_tsc_khz(host // 2))
        return
    needs("TSC offsets")
    refused(errno.EINVAL, lambda: guest.cpu.set_tsc_khz(0xFFFF_FFFF))
    guest.cpu.set_tsc_khz(2 * host)
    assert guest.cpu.get_tsc_khz() == 2 * host
    guest.cpu.set_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET, 0)
    (doubled,) = guest.cpu.get_msrs([0x10])
    guest.cpu.set_tsc_khz(0)
    (plain,) = guest.cpu.get_msrs([0x10])
    assert 2 * plain >= doubled > plain


def test_vcpus_have_the_tsc_frequency_of_their_vm(make: Callable[..., Guest]) -> None:
    guest = make()
    if not guest.vm.check_extension(abi.KVM_CAP_VM_TSC_CONTROL):
        return
    host = guest.vm.get_tsc_khz()
    guest.vm.set_tsc_khz(host // 2)
    assert guest.vm.get_tsc_khz() == host // 2
    with guest.vm.create_vcpu(1) as vcpu:
        assert vcpu.get_tsc_khz() == host // 2
    assert guest.cpu.get_tsc_khz() == host


def test_the_clock_runs_and_can_be_set(guest: Guest) -> None:
    first = guest.vm.get_clock().clock
    assert guest.vm.get_clock().clock >= first
    guest.vm.set_clock(abi.kvm_clock_data(clock=1 << 40))
    assert 0 <= guest.vm.get_clock().clock - (1 << 40) < 10**9
    refused(errno.EINVAL, lambda: guest.vm.set_clock(abi.kvm_clock_data(flags=1 << 20)))


def test_kvmclock_ctrl_without_a_clock_is_einval(guest: Guest) -> None:
    refused(errno.EINVAL, guest.cpu.kvmclock_ctrl)


def test_signal_masks_are_8_bytes(guest: Guest) -> None:
    guest.cpu.set_signal_mask(bytes(8))
    refused(errno.EINVAL, lambda: guest.cpu.set_signal_mask(bytes(16)))
    guest.cpu.set_signal_mask(None)


def test_boot_cpu_is_chosen_before_the_first_vcpu(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    guest.vm.set_boot_cpu_id(1)
    guest.vm.create_vcpu(0).close()
    refused(errno.EBUSY, lambda: guest.vm.set_boot_cpu_id(0))


def test_the_identity_map_comes_before_the_first_vcpu(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    guest.vm.set_identity_map_addr(0xFFFB_C000)
    guest.vm.create_vcpu(0).close()
    refused(errno.EINVAL, lambda: guest.vm.set_identity_map_addr(0xFFFB_C000))


def test_unknown_capabilities_cannot_be_enabled(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(9999, 1))
    refused(errno.EINVAL, lambda: guest.cpu.enable_cap(9999, 1))


def test_the_apic_base_without_chips_is_that_of_reset(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=2)
    assert [vcpu.get_sregs().apic_base for vcpu in guest.vcpus] == [0xFEE0_0900, 0xFEE0_0800]


def test_cpuid_faults_outside_of_ring_0_when_the_guest_asks_for_it(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("exceptions in long mode")
    misc_features_enables, platform_info = 0x140, 0xCE
    assert guest.cpu.get_msrs([misc_features_enables, platform_info]) == [0, 1 << 31]
    assert guest.cpu.set_msrs({misc_features_enables: 2}) == 0
    assert guest.cpu.set_msrs({misc_features_enables: 1}) == 1
    assert guest.cpu.set_msrs({platform_info: 0}) == 0, "while it is in use"
    guest.long("0fa2 f4")  # cpuid; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    guest.long("0fa2 ebfe")
    sregs = guest.cpu.get_sregs()
    enter_ring_3(sregs)
    guest.cpu.set_sregs(sregs)
    guest.expect(abi.KVM_EXIT_SHUTDOWN)  # #GP, and there is no IDT


def test_msrs_are_written_in_their_order_and_an_index_may_come_twice(guest: Guest) -> None:
    # KVM API 4.19: "If an error occurs in setting an MSR, then the number of MSRs set so far is returned"
    lstar, unknown = 0xC000_0082, 0x1234_5678
    assert guest.cpu.set_msrs([(lstar, 1), (lstar, 2)]) == 2
    assert guest.cpu.get_msrs([lstar]) == [2]
    assert guest.cpu.set_msrs(iter([(lstar, 3), (lstar, 4), (unknown, 0), (lstar, 5)])) == 2
    assert guest.cpu.get_msrs([lstar]) == [4]
    refused(errno.E2BIG, lambda: guest.cpu.set_msrs([(lstar, n) for n in range(256)]))


@pytest.mark.parametrize("irqchip", [True, False], ids=["in the kernel", "in userspace"])
@pytest.mark.parametrize(
    ("value", "legal"),
    [
        (0xFEE0_0900, True),
        (0xFEE0_0100, True),
        (0xFEE0_0D00, True),  # x2APIC
        (0xFEE0_0901, False),
        (0xFEE0_0B00, False),
        (0xFEE0_0500, False),  # x2APIC without the enable bit
        (0xFEE0_0900 | 1 << 52, False),  # more than any physical address
    ],
)
def test_the_apic_base_takes_what_the_processor_takes_wherever_the_apic_is(
    make: Callable[..., Guest], irqchip: bool, value: int, legal: bool
) -> None:
    guest = make(irqchip=irqchip)
    sregs = guest.cpu.get_sregs()
    before = sregs.apic_base
    sregs.apic_base = value
    if legal:
        guest.cpu.set_sregs(sregs)
    else:
        refused(errno.EINVAL, lambda: guest.cpu.set_sregs(sregs))
        assert guest.cpu.set_msrs({0x1B: value}) == 0
    assert guest.cpu.get_sregs().apic_base == (value if legal else before)


@pytest.mark.parametrize("irqchip", [True, False], ids=["in the kernel", "in userspace"])
def test_cpuid_shows_whether_the_apic_is_enabled(make: Callable[..., Guest], irqchip: bool) -> None:
    guest = make(irqchip=irqchip)

    def shown() -> list[int]:
        return [entry.edx >> 9 & 1 for entry in guest.cpu.get_cpuid2() if entry.function == 1]

    assert shown() == [1]
    assert guest.cpu.set_msrs({0x1B: 0xFEE0_0100}) == 1
    assert shown() == [0]
    assert guest.cpu.set_msrs({0x1B: 0xFEE0_0900}) == 1
    assert shown() == [1]


@pytest.mark.parametrize("msr", [0x1FC, 0x34])
def test_power_control_and_the_smi_count_are_userspaces_to_keep(guest: Guest, msr: int) -> None:
    assert msr in guest.kvm.get_msr_index_list()
    assert guest.cpu.get_msrs([msr]) == [0]
    assert guest.cpu.set_msrs({msr: 5}) == 1
    assert guest.cpu.get_msrs([msr]) == [5]


@pytest.mark.parametrize("bit", [0, 1, 2, 5])
def test_debugctl_reads_back_no_feature_that_is_not_there(guest: Guest, bit: int) -> None:
    # mov ecx, 0x1d9; mov eax, bit; mov edx, 0; wrmsr; mov eax, -1; rdmsr; hlt
    write = bytes.fromhex("66b9d9010000 66b8") + (1 << bit).to_bytes(4, "little") + bytes.fromhex("66ba00000000 0f30")
    guest.real(write + bytes.fromhex("66b8ffffffff 0f32 f4"))
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFFFF_FFFF == 0


def test_bits_that_debugctl_does_not_have_are_refused(guest: Guest, device_differs: Callable[[str], None]) -> None:
    assert guest.cpu.set_msrs({0x1D9: 0}) == 1
    device_differs("without LBR virtualization every value of DEBUGCTL is taken, and none kept")
    assert guest.cpu.set_msrs({0x1D9: 1 << 6}) == 0
