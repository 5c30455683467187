# SPDX-License-Identifier: Apache-2.0
"""State of a vCPU through the API: round trips, checks and errnos (KVM API section 4)."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Iterator

import pytest
from tests.support.tiny import CODE, DATA, Tiny

from softkvm import abi


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny()
    yield machine
    machine.close()


@pytest.fixture
def chips() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True, vcpus=2)
    yield machine
    machine.close()


def test_reset_state_is_the_manuals(tiny: Tiny) -> None:
    """SDM vol. 3, table 9-1."""
    regs, sregs = tiny.vcpu.get_regs(), tiny.vcpu.get_sregs()
    assert (regs.rip, regs.rflags, regs.rax) == (0xFFF0, 2, 0)
    assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0xF000, 0xFFFF_0000, 0xFFFF)
    assert (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer) == (0x6000_0010, 0, 0, 0, 0)
    assert (sregs.idt.base, sregs.idt.limit) == (0, 0xFFFF)
    debug = tiny.vcpu.get_debugregs()
    assert (debug.dr6, debug.dr7) == (0xFFFF_0FF0, 0x400)
    fpu = tiny.vcpu.get_fpu()
    assert (fpu.fcw, fpu.fsw, fpu.mxcsr) == (0x40, 0, 0x1F80)
    assert tiny.vcpu.get_xcrs().xcrs[0].value == 1


def test_regs_come_back(tiny: Tiny) -> None:
    regs = abi.kvm_regs()
    for n, (name, _) in enumerate(abi.kvm_regs._fields_):  # type: ignore[misc]
        setattr(regs, str(name), 0x1111_1111_1111_1111 * (n % 14 + 1))
    regs.rflags = 0x246
    tiny.vcpu.set_regs(regs)
    assert bytes(tiny.vcpu.get_regs()) == bytes(regs)


def test_sregs_come_back(tiny: Tiny) -> None:
    tiny.long_mode()
    sregs = tiny.vcpu.get_sregs()
    sregs.fs.base = 0xFFFF_8000_1234_5678
    sregs.cr2 = 0xDEAD_BEEF
    sregs.cr8 = 7
    tiny.vcpu.set_sregs(sregs)
    assert bytes(tiny.vcpu.get_sregs()) == bytes(sregs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cr0", 0x8000_0010),  # PG without PE
        ("cr0", 0x2000_0011),  # NW without CD
        ("cr0", 1 << 32),
        ("cr4", 1 << 15),
        ("efer", 0x400),  # LMA without paging
    ],
)
def test_illegal_control_registers_are_refused_whole(tiny: Tiny, field: str, value: int) -> None:
    before = bytes(tiny.vcpu.get_sregs())
    sregs = tiny.vcpu.get_sregs()
    sregs.cr2 = 5
    setattr(sregs, field, value)
    with pytest.raises(OSError) as info:
        tiny.vcpu.set_sregs(sregs)
    assert info.value.errno == errno.EINVAL
    assert bytes(tiny.vcpu.get_sregs()) == before


def test_fpu_registers_are_relative_to_the_top_of_the_stack(tiny: Tiny) -> None:
    """FXSAVE's image: ST(0) first, one tag bit per physical register (SDM vol. 1, 10.5.1)."""
    tiny.long_mode().load(bytes.fromhex("dbe3 d9e8 d9eb d9ee f4"))  # fninit; fld1; fldpi; fldz; hlt
    tiny.run_to_halt()
    fpu = tiny.vcpu.get_fpu()
    assert fpu.fsw >> 11 & 7 == 5
    assert fpu.ftwx == 0b1110_0000
    assert bytes(fpu.fpr[0][:10]) == bytes(10)
    assert bytes(fpu.fpr[2][:10]) == bytes.fromhex("0000000000000080ff3f")
    tiny.load(bytes.fromhex("dd1d00000000 f4".replace("00000000", "00000100")))
    tiny.vcpu.set_fpu(fpu)
    again = tiny.vcpu.get_fpu()
    assert bytes(again) == bytes(fpu)


def test_misaligned_exception_mask_is_there_and_kept(tiny: Tiny) -> None:
    """MisAlignSse (APM vol. 3, E.4.2, Fn8000_0001_ECX) is MXCSR.MM, which MXCSR_MASK shows (APM vol. 2, 11.3.1)."""
    extended = next(entry for entry in tiny.kvm.get_supported_cpuid() if entry.function == 0x8000_0001)
    assert extended.ecx >> 7 & 1
    area = bytearray(bytes(tiny.vcpu.get_xsave()))
    assert struct.unpack_from("<II", area, 24) == (0x1F80, 0x2_FFFF)
    struct.pack_into("<I", area, 24, 0x2_1F80)
    area[512] |= 2  # XSTATE_BV: SSE
    tiny.vcpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
    assert tiny.vcpu.get_fpu().mxcsr == 0x2_1F80
    tiny.protected_mode().load(b"\x0f\xae\x1d" + DATA.to_bytes(4, "little") + b"\xf4")  # stmxcsr [DATA]; hlt
    sregs = tiny.vcpu.get_sregs()
    sregs.cr4 |= 1 << 9  # OSFXSR
    tiny.vcpu.set_sregs(sregs)
    tiny.run_to_halt()
    assert tiny.memory.read(DATA, 4) == (0x2_1F80).to_bytes(4, "little")


def test_fpu_and_xsave_show_the_same_state(tiny: Tiny) -> None:
    rng = random.Random(1)
    fpu = abi.kvm_fpu(fcw=0x27F, fsw=0x3800, ftwx=0xA5, last_opcode=0x123, last_ip=0x1000, last_dp=0x2000)
    fpu.mxcsr = 0x1F80  # KVM_SET_FPU doesn't load it, KVM_SET_XSAVE does
    for n in range(8):
        fpu.fpr[n][:10] = list(rng.randbytes(10))
    for n in range(16):
        fpu.xmm[n][:] = list(rng.randbytes(16))
    tiny.vcpu.set_fpu(fpu)
    xsave = tiny.vcpu.get_xsave()
    area = bytes(xsave)
    assert struct.unpack_from("<HHB", area, 0) == (0x27F, 0x3800, 0xA5)
    assert area[160:176] == bytes(fpu.xmm[0])
    tiny.vcpu.set_fpu(abi.kvm_fpu())
    tiny.vcpu.set_xsave(xsave)
    assert bytes(tiny.vcpu.get_fpu()) == bytes(fpu)
    assert bytes(tiny.vcpu.get_xsave()) == area


def test_xsave_refuses_components_and_mxcsr_bits_that_do_not_exist(tiny: Tiny) -> None:
    for offset, value in ((512, 1 << 40), (24, 1 << 20)):
        area = bytearray(bytes(tiny.vcpu.get_xsave()))
        struct.pack_into("<Q" if offset == 512 else "<I", area, offset, value)
        with pytest.raises(OSError) as info:
            tiny.vcpu.set_xsave(abi.kvm_xsave.from_buffer_copy(area))
        assert info.value.errno == errno.EINVAL


def test_xcr0_needs_x87(tiny: Tiny) -> None:
    xcrs = tiny.vcpu.get_xcrs()
    xcrs.xcrs[0].value = 3
    tiny.vcpu.set_xcrs(xcrs)
    xcrs.xcrs[0].value = 2
    with pytest.raises(OSError) as info:
        tiny.vcpu.set_xcrs(xcrs)
    assert info.value.errno == errno.EINVAL
    assert tiny.vcpu.get_xcrs().xcrs[0].value == 3


def test_events_come_back(chips: Tiny) -> None:
    events = chips.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 13
    events.exception.has_error_code, events.exception.error_code = 1, 0x18
    events.interrupt.shadow = 1
    events.nmi.pending, events.nmi.masked = 1, 1
    chips.vcpu.set_vcpu_events(events)
    after = chips.vcpu.get_vcpu_events()
    assert (after.exception.injected, after.exception.nr, after.exception.error_code) == (1, 13, 0x18)
    assert after.interrupt.shadow
    assert (after.nmi.pending, after.nmi.masked) == (1, 1)


def test_an_init_that_waits_comes_back(chips: Tiny) -> None:
    for latched in (1, 0):
        events = chips.vcpu.get_vcpu_events()
        events.flags = abi.KVM_VCPUEVENT_VALID_SMM
        events.smi.latched_init = latched
        chips.vcpu.set_vcpu_events(events)
        assert chips.vcpu.get_vcpu_events().smi.latched_init == latched


@pytest.mark.parametrize(("nr", "flags"), [(2, 0), (32, 0), (13, 1 << 20)])
def test_events_that_cannot_be_are_refused(tiny: Tiny, nr: int, flags: int) -> None:
    events = tiny.vcpu.get_vcpu_events()
    events.flags |= flags
    events.exception.injected, events.exception.nr = 1, nr
    with pytest.raises(OSError) as info:
        tiny.vcpu.set_vcpu_events(events)
    assert info.value.errno == errno.EINVAL


def test_an_injected_exception_reaches_the_guest(tiny: Tiny) -> None:
    tiny.long_mode()
    tiny.gate64(14, 0x2000)
    tiny.memory.write(0x2000, b"\x5d\xf4")  # pop rbp: the error code; hlt
    tiny.load(b"\x90\xf4")
    events = tiny.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 14
    events.exception.has_error_code, events.exception.error_code = 1, 0x15
    tiny.vcpu.set_vcpu_events(events)
    assert tiny.run_to_halt().rbp == 0x15


def test_mp_states_follow_the_irqchip(tiny: Tiny, chips: Tiny) -> None:
    assert tiny.vcpu.get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE
    with pytest.raises(OSError) as info:
        tiny.vcpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_HALTED))
    assert info.value.errno == errno.EINVAL
    first, second = chips.vcpus
    assert first.get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE
    assert second.get_mp_state().mp_state == abi.KVM_MP_STATE_UNINITIALIZED
    second.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_HALTED))
    assert second.get_mp_state().mp_state == abi.KVM_MP_STATE_HALTED
    with pytest.raises(OSError):
        second.set_mp_state(abi.kvm_mp_state(mp_state=7))


def test_translate_walks_the_guests_tables(tiny: Tiny) -> None:
    tiny.long_mode()
    found = tiny.vcpu.translate(0x123456)
    assert (found.valid, found.physical_address) == (1, 0x123456)
    assert tiny.vcpu.translate(0x4000_0000).valid == 0
    assert tiny.vcpu.translate(1 << 50).valid == 0


def test_translate_has_no_physical_address_of_all_ones(tiny: Tiny) -> None:
    tiny.real_mode()  # without paging, an address is its own translation
    assert tiny.vcpu.translate((1 << 64) - 2).valid == 1
    assert tiny.vcpu.translate((1 << 64) - 1).valid == 0


def test_cpuid_cannot_change_once_the_vcpu_ran(tiny: Tiny) -> None:
    entries = tiny.vcpu.get_cpuid2()
    tiny.real_mode().load(b"\xf4")
    tiny.run_to_halt()
    tiny.vcpu.set_cpuid2(tiny.kvm.get_supported_cpuid())
    with pytest.raises(OSError) as info:
        tiny.vcpu.set_cpuid2(entries[:3])
    assert info.value.errno == errno.EINVAL


def test_too_many_cpuid_entries_are_refused(tiny: Tiny) -> None:
    with pytest.raises(OSError) as info:
        tiny.vcpu.set_cpuid2([abi.kvm_cpuid_entry2()] * 257)
    assert info.value.errno == errno.E2BIG


def _cpuid(tiny: Tiny, function: int, index: int = 0) -> tuple[int, int, int, int]:
    tiny.load(b"\x0f\xa2\xf4", rax=function, rcx=index)
    regs = tiny.run_to_halt()
    return regs.rax, regs.rbx, regs.rcx, regs.rdx


def test_the_guest_sees_its_table_and_zeros_beyond_it(tiny: Tiny) -> None:
    tiny.protected_mode()
    assert _cpuid(tiny, abi.KVM_CPUID_SIGNATURE)[1:] == struct.unpack("<3I", abi.KVM_SIGNATURE)
    assert _cpuid(tiny, 0x20) == (0, 0, 0, 0)  # AMD: no redirection
    assert _cpuid(tiny, 1)[2] >> 31 == 1  # hypervisor present
    assert not _cpuid(tiny, 1)[2] >> 27 & 1  # OSXSAVE follows CR4
    sregs = tiny.vcpu.get_sregs()
    sregs.cr4 |= 1 << 18
    tiny.vcpu.set_sregs(sregs)
    assert _cpuid(tiny, 1)[2] >> 27 & 1


def test_intels_out_of_range_leaves_answer_as_the_highest_basic_leaf() -> None:
    tiny = Tiny()
    entries = tiny.kvm.get_supported_cpuid()
    vendor = struct.unpack("<3I", b"GenuntelineI")
    for entry in entries:
        if entry.function == 0:
            entry.eax, entry.ebx, entry.ecx, entry.edx = 1, *vendor
    tiny.vcpu.set_cpuid2(entries)
    tiny.protected_mode()
    assert _cpuid(tiny, 0x20) == _cpuid(tiny, 1)
    tiny.close()


# --- MSRs -----------------------------------------------------------------------------------------


def test_the_msr_list_can_be_read_and_written_back(chips: Tiny) -> None:
    indices = chips.kvm.get_msr_index_list()
    values = chips.vcpu.get_msrs(indices)
    assert len(values) == len(indices)
    saved = dict(zip(indices, values, strict=True))
    assert chips.vcpu.set_msrs(saved) == len(indices)


def test_get_msrs_stops_at_the_first_unknown(tiny: Tiny) -> None:
    assert len(tiny.vcpu.get_msrs([0x10, 0x1234_5678, 0x10])) == 1
    assert tiny.vcpu.set_msrs({0xC000_0081: 5, 0x1234_5678: 0, 0xC000_0082: 6}) == 1


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (0x277, 0x0202_0202_0202_0202),  # PAT: reserved memory type
        (0x2FF, 1 << 20),  # MTRRdefType: reserved bit
        (0x250, 0x02),  # fixed MTRR: reserved type
        (0xC000_0082, 1 << 60),  # LSTAR: not canonical
        (abi.MSR_KVM_STEAL_TIME, 0x3F),  # reserved bits
        (abi.MSR_KVM_PV_EOI_EN, 2),
    ],
)
def test_values_that_an_msr_cannot_have_are_refused(chips: Tiny, msr: int, value: int) -> None:
    before = chips.vcpu.get_msrs([msr])
    assert chips.vcpu.set_msrs({msr: value}) == 0
    assert chips.vcpu.get_msrs([msr]) == before


def test_efer_writes_follow_the_manual(tiny: Tiny) -> None:
    tiny.long_mode()
    tiny.gate64(13, 0x2000)
    tiny.memory.write(0x2000, b"\x48\xc7\xc5\x0d\x00\x00\x00\xf4")
    for value, faults in ((0xD01, False), (0xC01, True), (1 << 20, True)):  # same; LME off under paging; reserved
        tiny.load(b"\x0f\x30\xf4", rcx=0xC000_0080, rax=value, rdx=0, rbp=0)
        assert (tiny.run_to_halt().rbp == 0x0D) == faults
    assert tiny.vcpu.get_sregs().efer == 0xD01


def test_the_tsc_runs_from_what_was_written(tiny: Tiny) -> None:
    tiny.vcpu.set_msrs({0x10: 1_000_000_000_000})
    tiny.protected_mode().load(b"\x0f\x31\xf4")
    regs = tiny.run_to_halt()
    tsc = regs.rdx << 32 | regs.rax
    assert 1_000_000_000_000 < tsc < 1_060_000_000_000


def test_tsc_adjust_moves_the_tsc(tiny: Tiny) -> None:
    tiny.protected_mode().load(b"\x0f\x30\x0f\x31\xf4", rcx=0x3B, rax=0, rdx=0x1000)  # wrmsr; rdtsc
    assert tiny.run_to_halt().rdx >= 0x1000
    assert tiny.vcpu.get_msrs([0x3B]) == [0x1000 << 32]


def test_vcpus_share_one_time(chips: Tiny) -> None:
    """Writing the same TSC to every vCPU one after the other means one counter (KVM API, KVM_SET_MSRS of the TSC)."""
    for vcpu in chips.vcpus:
        vcpu.set_msrs({0x10: 5000})
    assert chips.vcpus[0].tsc_offset == chips.vcpus[1].tsc_offset


# --- paravirtual clock ------------------------------------------------------------------------------------


def _read_clock(tiny: Tiny, gpa: int) -> tuple[int, ...]:
    return struct.unpack("<IIQQIbBxx", tiny.memory.read(gpa, 32))


def test_kvmclock_tells_the_vms_time(tiny: Tiny) -> None:
    """pvclock_vcpu_time_info: time = system_time + ((tsc - tsc_timestamp) << shift) * mul >> 32 (msr.rst)."""
    tiny.vcpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: DATA | 1})
    tiny.protected_mode().load(b"\x0f\x31\xf4")
    regs = tiny.run_to_halt()
    version, _, tsc_timestamp, system_time, mul, shift, flags = _read_clock(tiny, DATA)
    assert version % 2 == 0 and version
    assert flags & abi.PVCLOCK_TSC_STABLE_BIT
    delta = (regs.rdx << 32 | regs.rax) - tsc_timestamp
    guest_ns = system_time + ((delta << shift if shift >= 0 else delta >> -shift) * mul >> 32)
    host_ns = tiny.vm.get_clock().clock
    assert 0 <= host_ns - guest_ns < 1_000_000_000


def test_set_clock_moves_the_guests_time(tiny: Tiny) -> None:
    tiny.vm.set_clock(abi.kvm_clock_data(clock=10**15))
    assert 0 <= tiny.vm.get_clock().clock - 10**15 < 10**9
    with pytest.raises(OSError) as info:
        tiny.vm.set_clock(abi.kvm_clock_data(flags=1))
    assert info.value.errno == errno.EINVAL


def test_kvmclock_ctrl_tells_that_the_guest_was_stopped(tiny: Tiny) -> None:
    with pytest.raises(OSError):
        tiny.vcpu.kvmclock_ctrl()
    tiny.vcpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: DATA | 1})
    tiny.vcpu.kvmclock_ctrl()
    tiny.real_mode().load(b"\xf4")
    tiny.run_to_halt()
    assert _read_clock(tiny, DATA)[6] & abi.PVCLOCK_GUEST_STOPPED


def test_the_wall_clock_is_the_time_of_the_guests_boot(tiny: Tiny) -> None:
    import time

    tiny.vcpu.set_msrs({abi.MSR_KVM_WALL_CLOCK_NEW: DATA})
    version, seconds, _ = struct.unpack("<III", tiny.memory.read(DATA, 12))
    assert version == 2
    assert abs(time.time() - seconds) < 60


# --- hypercalls ---------------------------------------------------------------------------------------------


def _hypercall(tiny: Tiny, number: int, *args: int, code: str = "0f01d9") -> int:
    names = ("rbx", "rcx", "rdx", "rsi")
    tiny.load(bytes.fromhex(code) + b"\xf4", rax=number, **dict(zip(names, args, strict=False)))
    regs = tiny.run_to_halt()
    return regs.rax - (1 << 64) if regs.rax >> 63 else regs.rax


def test_hypercalls_answer_by_number(tiny: Tiny) -> None:
    tiny.long_mode()
    assert _hypercall(tiny, 999) == -abi.KVM_ENOSYS
    assert _hypercall(tiny, abi.KVM_HC_VAPIC_POLL_IRQ) == 0
    assert _hypercall(tiny, abi.KVM_HC_CLOCK_PAIRING, DATA, 7) == -abi.KVM_EOPNOTSUPP
    assert _hypercall(tiny, abi.KVM_HC_CLOCK_PAIRING, DATA, 0) == 0
    seconds, nanoseconds, tsc = struct.unpack("<qqQ", tiny.memory.read(DATA, 24))
    assert seconds > 1_600_000_000 and 0 <= nanoseconds < 10**9 and tsc
    assert _hypercall(tiny, abi.KVM_HC_CLOCK_PAIRING, 1 << 40, 0) == -abi.KVM_EFAULT


def test_the_other_vendors_hypercall_is_patched(tiny: Tiny) -> None:
    tiny.long_mode()
    assert _hypercall(tiny, 999, code="0f01c1") == -abi.KVM_ENOSYS
    assert tiny.memory.read(CODE, 3) == bytes.fromhex("0f01d9")


def test_features_can_be_enforced(tiny: Tiny) -> None:
    tiny.long_mode()
    entries = tiny.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == abi.KVM_CPUID_FEATURES:
            entry.eax = 0
    tiny.vcpu.set_cpuid2(entries)
    tiny.vcpu.enable_cap(abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    assert _hypercall(tiny, abi.KVM_HC_KICK_CPU, 0, 0) == -abi.KVM_ENOSYS
    tiny.gate64(13, 0x2000)
    tiny.memory.write(0x2000, b"\x48\xc7\xc5\x0d\x00\x00\x00\xf4")
    tiny.load(b"\x0f\x30\xf4", rcx=abi.MSR_KVM_SYSTEM_TIME_NEW, rax=DATA | 1, rdx=0, rbp=0)
    assert tiny.run_to_halt().rbp == 0x0D
