# SPDX-License-Identifier: Apache-2.0
"""Performance counters as guests and userspace see them: AMD's and Intel's registers, counts, interrupts, filters.

What the silicon counts: cpu/tests/system/pmu.rs.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from tests.support.tiny import CODE, Tiny

from softkvm import abi
from softkvm.kvm import Kvm
from softkvm.kvm.params import Params
from softkvm.kvm.x86.msrs import PMU_MSRS_TO_SAVE, get_msr, set_msr
from softkvm.kvm.x86.pmu.perf_event import PMC_ENABLE_Q, PerfEvent
from softkvm.kvm.x86.requests import KVM_REQ_PMU

K7_EVNTSEL0, K7_PERFCTR0 = 0xC001_0000, 0xC001_0004
PERF_CTL0, PERF_CTR0 = 0xC001_0200, 0xC001_0201
GLOBAL_STATUS, GLOBAL_CTL, GLOBAL_STATUS_CLR = 0xC000_0300, 0xC000_0301, 0xC000_0302
PERFCTR0, EVNTSEL0, PMC0 = 0xC1, 0x186, 0x4C1
FIXED_CTR0, FIXED_CTR_CTRL = 0x309, 0x38D
CORE_GLOBAL_STATUS, CORE_GLOBAL_CTRL, CORE_GLOBAL_OVF_CTRL = 0x38E, 0x38F, 0x390

USR, OS, INT, EN = 1 << 16, 1 << 17, 1 << 20, 1 << 22
INSTRUCTIONS, BRANCHES = 0xC0, 0xC2
INTEL_CYCLES, INTEL_INSTRUCTIONS, INTEL_BRANCHES = 0x3C, 0xC0, 0xC4
TOP = 1 << 48
LVTPC = 0x340
NMI = 0x400


#: mov ecx, 10; again: dec ecx; jnz again; hlt: 21 instructions and 10 branches before HLT.
LOOP64 = bytes.fromhex("b90a000000 ffc9 75fc f4")


def long(**options: object) -> Tiny:
    return Tiny(**options).long_mode()  # type: ignore[arg-type]


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = long()
    yield machine
    machine.close()


def intel(tiny: Tiny, *, version: int = 2, gp: int = 8, fixed: int = 3, width: int = 48, pdcm: bool = True) -> Tiny:
    """Give the vCPU, which has not run, the CPUID of an Intel processor."""
    entries = [e for e in tiny.kvm.get_supported_cpuid() if e.function != 0xA]
    for e in entries:
        if e.function == 0:
            e.ebx, e.edx, e.ecx = (int.from_bytes(t, "little") for t in (b"Genu", b"ineI", b"ntel"))
        if e.function == 1 and pdcm:
            e.ecx |= 1 << 15
    leaf = abi.kvm_cpuid_entry2(function=0xA, eax=version | gp << 8 | width << 16 | 7 << 24, edx=fixed | width << 5)
    tiny.vcpu.set_cpuid2([*entries, leaf])
    return tiny


def wrmsr(tiny: Tiny, index: int, value: int) -> bool:
    """Write an MSR as the guest does; False for #GP."""
    return set_msr(tiny.vcpu, index, value, host=False)


def rdmsr(tiny: Tiny, index: int) -> int | None:
    return get_msr(tiny.vcpu, index, host=False)


# --- counting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ctl", "ctr"), [(K7_EVNTSEL0, K7_PERFCTR0), (PERF_CTL0 + 10, PERF_CTR0 + 10)])
@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (INSTRUCTIONS | OS, 22),
        (INSTRUCTIONS | USR, 0),
        (INSTRUCTIONS | USR | OS, 22),
        (BRANCHES | OS, 10),
        (0x3C | OS, 0),
    ],
)
def test_amds_counters_count_what_the_guest_does(tiny: Tiny, ctl: int, ctr: int, event: int, expected: int) -> None:
    assert wrmsr(tiny, ctl, event | EN)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, ctr) == expected, "HLT, which KVM carries out, is an instruction too"
    assert tiny.vcpu.get_msrs([ctr, ctl]) == [expected, event | EN]


def test_the_k7s_registers_are_the_first_four_of_the_six(tiny: Tiny) -> None:
    for n in range(4):
        assert wrmsr(tiny, K7_EVNTSEL0 + n, INSTRUCTIONS | n << 24)
        assert wrmsr(tiny, K7_PERFCTR0 + n, 1000 + n)
        assert rdmsr(tiny, PERF_CTL0 + 2 * n) == INSTRUCTIONS | n << 24
        assert rdmsr(tiny, PERF_CTR0 + 2 * n) == 1000 + n
    assert rdmsr(tiny, PERF_CTL0 + 12) is None


def test_reserved_bits_of_amds_registers_are_dropped(tiny: Tiny) -> None:
    assert wrmsr(tiny, PERF_CTL0, (1 << 64) - 1)
    assert rdmsr(tiny, PERF_CTL0) == ~0xFFFF_FFF0_0028_0000 & (1 << 64) - 1
    assert wrmsr(tiny, PERF_CTR0, (1 << 64) - 1)
    assert rdmsr(tiny, PERF_CTR0) == TOP - 1
    assert wrmsr(tiny, GLOBAL_CTL, (1 << 64) - 1)
    assert rdmsr(tiny, GLOBAL_CTL) == 0x3F


def test_perfmonv2_enables_and_tells_of_overflows(tiny: Tiny) -> None:
    assert rdmsr(tiny, GLOBAL_CTL) == 0x3F, "enabled by a reset"
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | EN)
    wrmsr(tiny, PERF_CTL0 + 2, INSTRUCTIONS | OS | EN)
    wrmsr(tiny, PERF_CTR0, TOP - 5)
    wrmsr(tiny, PERF_CTR0 + 2, TOP - 5)
    wrmsr(tiny, GLOBAL_CTL, 1)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, PERF_CTR0) == 22 - 5
    assert rdmsr(tiny, PERF_CTR0 + 2) == TOP - 5
    assert rdmsr(tiny, GLOBAL_STATUS) == 1
    assert wrmsr(tiny, GLOBAL_STATUS, 0), "read-only: ignored"
    assert rdmsr(tiny, GLOBAL_STATUS) == 1
    assert rdmsr(tiny, GLOBAL_STATUS_CLR) == 0
    wrmsr(tiny, GLOBAL_STATUS_CLR, 1)
    assert rdmsr(tiny, GLOBAL_STATUS) == 0


def test_a_guest_without_the_features_has_the_k7s_four_alone() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        assert get_msr(vcpu, K7_PERFCTR0 + 3, host=False) == 0
        assert get_msr(vcpu, PERF_CTL0, host=False) is None
        assert get_msr(vcpu, GLOBAL_CTL, host=False) is None
        assert len(vcpu.pmu.gp) == 4
        vcpu.set_cpuid2([abi.kvm_cpuid_entry2(function=0x8000_0001, ecx=1 << 23)])
        assert len(vcpu.pmu.gp) == 6
        assert get_msr(vcpu, PERF_CTL0, host=False) == 0
        assert get_msr(vcpu, GLOBAL_CTL, host=False) is None


# --- interrupts ----------------------------------------------------------------------------------------------


def with_apic(lvtpc: int, setup: Callable[[Tiny], Tiny] = lambda tiny: tiny) -> Tiny:
    """A guest with a local APIC whose NMI handler halts, and with this in LVTPC."""
    tiny = setup(Tiny(irqchip=True)).long_mode()
    tiny.gate64(2, 0x5000)
    # The handler counts RBX up, notes the return address in RSI and stops the machine by a shutdown (no IDT).
    tiny.memory.write(0x5000, bytes.fromhex("ffc3 488b3424 48cf"))
    assert tiny.vcpu.apic is not None
    tiny.vcpu.apic.set_spiv(0x1FF)
    tiny.vcpu.apic.mmio_write(LVTPC, 4, lvtpc)
    return tiny


#: nops, then OUT to a port that nobody has.
NOPS = b"\x90" * 40 + b"\xe6\x80"


@pytest.mark.parametrize("period", [1, 2, 17, 39, 40])
@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_a_counters_interrupt_comes_behind_the_very_instruction(vendor: str, period: int) -> None:
    if vendor == "amd":
        tiny = with_apic(NMI)
        wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | INT | EN)
        wrmsr(tiny, PERF_CTR0, TOP - period)
    else:
        tiny = with_apic(NMI, intel)
        wrmsr(tiny, EVNTSEL0, INTEL_INSTRUCTIONS | OS | INT | EN)
        wrmsr(tiny, PERFCTR0, -period & 0xFFFF_FFFF)
    tiny.load(NOPS, rbx=0, rsi=0)
    assert tiny.run() == abi.KVM_EXIT_IO
    regs = tiny.vcpu.get_regs()
    assert (regs.rbx, regs.rsi) == (1, CODE + period)
    assert tiny.vcpu.apic is not None
    masked = bool(tiny.vcpu.apic.mmio_read(LVTPC, 4) >> 16 & 1)
    assert masked == (vendor == "intel")
    tiny.close()


def test_without_int_there_is_no_interrupt() -> None:
    tiny = with_apic(NMI)
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | EN)
    wrmsr(tiny, PERF_CTR0, TOP - 3)
    tiny.load(NOPS, rbx=0)
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rbx == 0
    assert rdmsr(tiny, GLOBAL_STATUS) == 1
    tiny.close()


def test_a_counter_of_few_bits_overflows_each_time() -> None:
    """Intel's CPUID says how wide the counters are; the silicon's own are wider."""
    tiny = with_apic(NMI, lambda tiny: intel(tiny, width=32))
    wrmsr(tiny, EVNTSEL0, INTEL_INSTRUCTIONS | OS | INT | EN)
    wrmsr(tiny, PERFCTR0, (1 << 32) - 3)
    tiny.load(NOPS, rbx=0)
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rbx == 1
    assert rdmsr(tiny, PERFCTR0) == 40 - 3 + 3, "the handler's three instructions"
    tiny.close()


# --- instructions that KVM carries out -----------------------------------------------------------------------


def test_instructions_that_kvm_carries_out_count(tiny: Tiny) -> None:
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | EN)
    # cpuid; cpuid; out 0x80, al; in al, 0x80; hlt: the two in the middle are userspace's.
    tiny.load(bytes.fromhex("0fa2 0fa2 e680 e480 f4"))
    assert tiny.run() == abi.KVM_EXIT_IO
    assert rdmsr(tiny, PERF_CTR0) == 2
    assert tiny.run() == abi.KVM_EXIT_IO
    assert rdmsr(tiny, PERF_CTR0) == 3
    tiny.run_to_halt()
    assert rdmsr(tiny, PERF_CTR0) == 5


def test_emulated_branches_count_too() -> None:
    """By the forced-emulation prefix: jmp to the next instruction, jz that isn't taken."""
    tiny = long(params=Params(force_emulation_prefix=True))
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | EN)
    wrmsr(tiny, PERF_CTL0 + 2, BRANCHES | OS | EN)
    prefix = b"\x0f\x0bkvm"
    tiny.load(prefix + b"\xeb\x00" + prefix + b"\x74\x00" + prefix + b"\x90\xf4", rflags=2)
    tiny.run_to_halt()
    assert [rdmsr(tiny, PERF_CTR0), rdmsr(tiny, PERF_CTR0 + 2)] == [4, 2]
    tiny.close()


def test_an_instruction_that_kvm_carries_out_makes_a_counter_overflow() -> None:
    tiny = with_apic(NMI)
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | INT | EN)
    wrmsr(tiny, PERF_CTR0, TOP - 2)
    tiny.load(b"\x90\x0f\xa2" + NOPS, rbx=0)
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rsi == CODE + 3
    tiny.close()


def test_a_vcpu_that_counts_nothing_has_the_plain_handlers(tiny: Tiny) -> None:
    vcpu = tiny.vcpu
    plain = vcpu._loop, type(vcpu.emulator)
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | EN)
    assert (vcpu._loop, type(vcpu.emulator)) != plain
    wrmsr(tiny, GLOBAL_CTL, 0)
    assert (vcpu._loop, type(vcpu.emulator)) != plain, "a guest does that in each of its interrupts"
    assert vcpu.rq[PMC_ENABLE_Q] == 0
    wrmsr(tiny, GLOBAL_CTL, 0x3F)
    wrmsr(tiny, PERF_CTL0, 0x76 | OS | EN)
    assert (vcpu._loop, type(vcpu.emulator)) == plain
    wrmsr(tiny, PERF_CTL0, 0)
    assert vcpu.rq[PMC_ENABLE_Q] == 0, "no counter of the silicon runs"


# --- bookkeeping ---------------------------------------------------------------------------------------------


def test_nothing_is_programmed_anew_when_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = with_apic(NMI)
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | INT | EN)
    wrmsr(tiny, PERF_CTR0, TOP - 3)
    programmed: list[int] = []
    monkeypatch.setattr(PerfEvent, "enable", lambda event, select, period: programmed.append(select))
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | INT | EN)
    wrmsr(tiny, GLOBAL_CTL, 0x3F)
    tiny.vcpu.take_request(KVM_REQ_PMU)
    tiny.load(NOPS, rbx=0)
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rbx == 1, "it has overflowed"
    assert not programmed
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | USR | INT | EN)
    assert programmed == [INSTRUCTIONS | OS | USR | INT | EN]
    tiny.close()


def test_a_counter_that_is_stopped_keeps_its_count(tiny: Tiny) -> None:
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | EN)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, PERF_CTR0) == 22
    wrmsr(tiny, PERF_CTL0, INSTRUCTIONS | OS | EN)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, PERF_CTR0) == 44


# --- RDPMC ---------------------------------------------------------------------------------------------------


def rdpmc(tiny: Tiny, index: int) -> int | None:
    """What RDPMC gives the guest; None for #GP."""
    tiny.load(bytes.fromhex("0f33 f4"), rcx=index)
    if tiny.run() == abi.KVM_EXIT_SHUTDOWN:
        return None
    regs = tiny.vcpu.get_regs()
    return regs.rdx << 32 | regs.rax


@pytest.mark.parametrize(("index", "there"), [(0, True), (5, True), (6, False), (1 << 30, False), (1 << 31, False)])
def test_rdpmc_reads_amds_counters_by_their_number(tiny: Tiny, index: int, there: bool) -> None:
    for n in range(6):
        wrmsr(tiny, PERF_CTR0 + 2 * n, 0x1234_0000_0000 + n)
    assert rdpmc(tiny, index) == (0x1234_0000_0000 + index if there else None)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, 100),
        (7, 107),
        (8, None),
        (1 << 30, 200),
        (1 << 30 | 2, 202),
        (1 << 30 | 3, None),
        (1 << 31, None),
        (1 << 16, None),
    ],
)
def test_rdpmc_reads_intels_counters_by_type_and_number(index: int, expected: int | None) -> None:
    tiny = intel(Tiny()).long_mode()
    for n in range(8):
        wrmsr(tiny, PERFCTR0 + n, 100 + n)
    for n in range(3):
        wrmsr(tiny, FIXED_CTR0 + n, 200 + n)
    assert rdpmc(tiny, index) == expected
    tiny.close()


@pytest.mark.parametrize("pce", [False, True])
def test_rdpmc_in_ring_3_needs_cr4_pce(tiny: Tiny, pce: bool) -> None:
    sregs = tiny.vcpu.get_sregs()
    sregs.cr4 |= 0x100 if pce else 0
    sregs.cs.dpl = sregs.ss.dpl = 3
    sregs.cs.selector, sregs.ss.selector = 0x0B, 0x13
    tiny.vcpu.set_sregs(sregs)
    wrmsr(tiny, PERF_CTR0, 77)
    tiny.load(bytes.fromhex("0f33 0f0b"), rcx=0)  # rdpmc; ud2, which shuts down as #GP does
    assert tiny.run() == abi.KVM_EXIT_SHUTDOWN
    assert tiny.vcpu.exit_counts.get(0x6F, 0) == int(pce), "without, #GP comes before the exit"


# --- Intel's -------------------------------------------------------------------------------------------------


def test_intels_architectural_events_are_counted() -> None:
    tiny = intel(Tiny()).long_mode()
    events = [INTEL_INSTRUCTIONS, INTEL_CYCLES, INTEL_BRANCHES, 0x13C, 0xC5, 0x4F2E, 0x412E]
    for n, event in enumerate(events):
        assert wrmsr(tiny, EVNTSEL0 + n, event | OS | EN)
    assert wrmsr(tiny, FIXED_CTR_CTRL, 0x121)
    assert wrmsr(tiny, CORE_GLOBAL_CTRL, 0xFF | 7 << 32)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert [rdmsr(tiny, PERFCTR0 + n) for n in range(len(events))] == [22, 21, 10, 21, 0, 0, 0]
    assert [rdmsr(tiny, FIXED_CTR0 + n) for n in range(3)] == [22, 0, 21]
    tiny.close()


def test_intels_reserved_bits_raise_gp() -> None:
    tiny = intel(Tiny(), fixed=2)
    assert rdmsr(tiny, CORE_GLOBAL_CTRL) == 0xFF
    assert not wrmsr(tiny, CORE_GLOBAL_CTRL, 1 << 34)
    assert not wrmsr(tiny, FIXED_CTR_CTRL, 1 << 8)
    assert not wrmsr(tiny, FIXED_CTR_CTRL, 4), "AnyThread"
    assert not wrmsr(tiny, EVNTSEL0, 1 << 21)
    assert not wrmsr(tiny, EVNTSEL0, 1 << 32)
    assert not wrmsr(tiny, CORE_GLOBAL_STATUS, 0)
    assert not wrmsr(tiny, CORE_GLOBAL_OVF_CTRL, 1 << 8)
    assert wrmsr(tiny, CORE_GLOBAL_OVF_CTRL, 1 << 63 | 0xFF)
    assert rdmsr(tiny, FIXED_CTR0 + 2) is None
    assert rdmsr(tiny, PERFCTR0 + 8) is None
    tiny.close()


def test_a_guest_writes_32_bits_of_intels_counters_unless_it_may_write_all() -> None:
    tiny = intel(Tiny())
    assert rdmsr(tiny, PMC0) is None
    assert wrmsr(tiny, PERFCTR0, 0x1_8000_0000)
    assert rdmsr(tiny, PERFCTR0) == TOP - 0x8000_0000
    assert tiny.vcpu.set_msrs({PERFCTR0: 0x1_8000_0000}) == 1
    assert rdmsr(tiny, PERFCTR0) == 0x1_8000_0000, "userspace restores what it has saved"
    assert tiny.vcpu.set_msrs({0x345: 1 << 13}) == 1
    assert wrmsr(tiny, PMC0, 0x1234_5678_9ABC)
    assert rdmsr(tiny, PERFCTR0) == 0x1234_5678_9ABC
    assert not wrmsr(tiny, PMC0, 1 << 48)
    tiny.close()


def test_version_1_has_neither_fixed_counters_nor_global_control() -> None:
    tiny = intel(Tiny(), version=1).long_mode()
    assert [rdmsr(tiny, index) for index in (FIXED_CTR0, FIXED_CTR_CTRL, CORE_GLOBAL_CTRL)] == [None] * 3
    wrmsr(tiny, EVNTSEL0, INTEL_BRANCHES | OS | EN)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, PERFCTR0) == 10
    tiny.close()


# --- the filter ----------------------------------------------------------------------------------------------

MASKED = abi.KVM_PMU_EVENT_FLAG_MASKED_EVENTS
ALLOW, DENY = abi.KVM_PMU_EVENT_ALLOW, abi.KVM_PMU_EVENT_DENY
masked = abi.KVM_PMU_ENCODE_MASKED_ENTRY


@pytest.mark.parametrize(
    ("action", "events", "flags", "counts"),
    [
        (ALLOW, [], 0, False),
        (DENY, [], 0, True),
        (ALLOW, [BRANCHES], 0, True),
        (DENY, [BRANCHES], 0, False),
        (ALLOW, [INSTRUCTIONS], 0, False),
        (DENY, [BRANCHES | 0x100], 0, True),
        (DENY, [BRANCHES | 1 << 32], 0, True),
        (DENY, [BRANCHES | 1 << 40], 0, True),
        (ALLOW, [masked(0xC2, 0, 0, False)], MASKED, True),
        (ALLOW, [masked(0xC2, 0xFF, 1, False)], MASKED, False),
        (ALLOW, [masked(0xC2, 0xFE, 0, False)], MASKED, True),
        (ALLOW, [masked(0xC2, 0, 0, False), masked(0xC2, 0xFF, 0, True)], MASKED, False),
        (ALLOW, [masked(0xC2, 0, 0, False), masked(0xC2, 0xFF, 2, True)], MASKED, True),
        (DENY, [masked(0xC2, 0, 0, False), masked(0xC2, 0xFF, 0, True)], MASKED, True),
    ],
)
def test_a_filter_says_what_is_counted(tiny: Tiny, action: int, events: list[int], flags: int, counts: bool) -> None:
    wrmsr(tiny, PERF_CTL0, BRANCHES | OS | EN)
    tiny.vm.set_pmu_event_filter(action, events, 0, flags)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, PERF_CTR0) == (10 if counts else 0)
    tiny.vm.set_pmu_event_filter(DENY, [])
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, PERF_CTR0) == (20 if counts else 10)


@pytest.mark.parametrize(("action", "bitmap", "counts"), [(ALLOW, 0, 0), (ALLOW, 1, 22), (DENY, 1, 0), (DENY, 2, 22)])
def test_fixed_counters_are_filtered_by_a_bitmap(action: int, bitmap: int, counts: int) -> None:
    tiny = intel(Tiny()).long_mode()
    tiny.vm.set_pmu_event_filter(action, [], bitmap)
    wrmsr(tiny, FIXED_CTR_CTRL, 1)
    wrmsr(tiny, CORE_GLOBAL_CTRL, 1 << 32)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    assert rdmsr(tiny, FIXED_CTR0) == counts
    tiny.close()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((2, []), errno.EINVAL),
        ((ALLOW, [], 0, 2), errno.EINVAL),
        ((ALLOW, [0] * 301), errno.E2BIG),
        ((ALLOW, [1 << 16], 0, MASKED), errno.EINVAL),
        ((ALLOW, [1 << 36], 0, MASKED), errno.EINVAL),
    ],
)
def test_filters_that_mean_nothing_are_refused(tiny: Tiny, arguments: tuple[int, ...], code: int) -> None:
    with pytest.raises(OSError) as raised:
        tiny.vm.set_pmu_event_filter(*arguments)  # type: ignore[arg-type]
    assert raised.value.errno == code


def test_300_events_are_a_filter(tiny: Tiny) -> None:
    tiny.vm.set_pmu_event_filter(ALLOW, [BRANCHES] * 300)


# --- none ----------------------------------------------------------------------------------------------------


def test_without_enable_pmu_there_are_no_counters() -> None:
    tiny = long(params=Params(enable_pmu=False))
    assert not any(e.function == 0x8000_0001 and e.ecx >> 23 & 1 for e in tiny.kvm.get_supported_cpuid())
    assert not any(e.function == 0x8000_0022 and e.eax for e in tiny.kvm.get_supported_cpuid())
    assert not {PERF_CTL0, K7_EVNTSEL0, GLOBAL_CTL, EVNTSEL0} & set(tiny.kvm.get_msr_index_list())
    assert tiny.vm.check_extension(abi.KVM_CAP_PMU_CAPABILITY) == 0
    with pytest.raises(OSError, match="enable_pmu"):
        tiny.vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, 0)
    assert wrmsr(tiny, K7_EVNTSEL0, INSTRUCTIONS | OS | EN), "ignored"
    assert rdmsr(tiny, K7_EVNTSEL0) == 0
    assert rdmsr(tiny, PERF_CTL0) is None
    assert rdpmc(tiny, 0) is None
    tiny.close()


def test_userspace_takes_the_counters_away_before_the_first_vcpu() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        assert vm.check_extension(abi.KVM_CAP_PMU_CAPABILITY) == abi.KVM_PMU_CAP_DISABLE
        for bad in (2, 3):
            with pytest.raises(OSError) as raised:
                vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, bad)
            assert raised.value.errno == errno.EINVAL
        vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, abi.KVM_PMU_CAP_DISABLE)
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(kvm.get_supported_cpuid())
            assert get_msr(vcpu, PERF_CTL0, host=False) is None
            with pytest.raises(OSError):
                vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, 0)


# --- saving and restoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_counters_are_saved_and_restored(vendor: str) -> None:
    def machine() -> Tiny:
        return (intel(Tiny()) if vendor == "intel" else Tiny()).long_mode()

    tiny = machine()
    counter, select = (PERF_CTR0, PERF_CTL0) if vendor == "amd" else (PERFCTR0, EVNTSEL0)
    wrmsr(tiny, select, INSTRUCTIONS | OS | EN)
    tiny.load(LOOP64)
    tiny.run_to_halt()
    indices = tiny.kvm.get_msr_index_list()
    assert {counter, select} <= set(indices)
    saved = tiny.vcpu.get_msrs(indices)
    assert len(saved) == len(indices), "each register of the list can be read, whatever the guest has"
    counters = {index: value for index, value in zip(indices, saved, strict=True) if index in PMU_MSRS_TO_SAVE}
    other = machine()
    assert other.vcpu.set_msrs(counters) == len(counters)
    other.load(LOOP64)
    other.run_to_halt()
    assert rdmsr(other, counter) == 44
    tiny.close()
    other.close()


def test_cpuid_decides_anew() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        assert set_msr(vcpu, PERF_CTL0, INSTRUCTIONS | EN | OS, host=False)
        assert vcpu.pmu.gp[0].event is not None
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        assert vcpu.pmu.gp[0].event is None
        assert get_msr(vcpu, PERF_CTL0, host=False) == 0
        assert not any(vcpu.pmu.host.events)
