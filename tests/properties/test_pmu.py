# SPDX-License-Identifier: Apache-2.0
"""Performance counters whatever is written to them: documented results, and no more counters than there are."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softkvm import abi
from softkvm.kvm import Kvm
from softkvm.kvm.x86.msrs import PMU_MSRS_TO_SAVE, get_msr, set_msr
from softkvm.kvm.x86.pmu.event_filter import PmuEventFilter
from softkvm.kvm.x86.pmu.perf_event import PMC_ENABLE_Q
from softkvm.kvm.x86.vcpu_ioctls import VcpuIoctls

U64 = st.integers(0, (1 << 64) - 1)
#: Values with the bits that matter more often than others.
VALUES = U64 | st.builds(lambda event, bits: event | bits << 16, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
INDICES = st.sampled_from([*PMU_MSRS_TO_SAVE, 0x390, *range(0x4C1, 0x4C9), 0x345, 0xC001_020C, 0xC000_0303])
WRITES = st.lists(st.tuples(INDICES, VALUES, st.booleans()), max_size=40)


@pytest.fixture(params=["amd", "intel", "k7"], scope="module")
def vcpu(request: pytest.FixtureRequest) -> Iterator[VcpuIoctls]:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as created:
        entries = [] if request.param == "k7" else kvm.get_supported_cpuid()
        if request.param == "intel":
            for entry in entries:
                if entry.function == 0:
                    entry.ebx = 0
                elif entry.function == 0xA:
                    entry.eax, entry.edx = 2 | 8 << 8 | 40 << 16, 3 | 48 << 5
                elif entry.function == 1:
                    entry.ecx |= 1 << 15
        created.set_cpuid2(entries)
        yield created


@settings(deadline=None)
@given(writes=WRITES)
def test_registers_take_any_value_or_refuse_it(vcpu: VcpuIoctls, writes: list[tuple[int, int, bool]]) -> None:
    for index, value, host in writes:
        before = get_msr(vcpu, index, host=True)
        done = set_msr(vcpu, index, value, host=host)
        after = get_msr(vcpu, index, host=True)
        assert done or before == after, "what is refused changes nothing"
    for pmc in vcpu.pmu.all_pmcs.values():
        assert 0 <= pmc.read() < 1 << pmc.width
    pmcs = vcpu.pmu.all_pmcs.values()
    assert vcpu.rq[PMC_ENABLE_Q].bit_count() == sum(pmc.current != 0 for pmc in pmcs)
    assert sum(e is not None for e in vcpu.pmu.host.events) == sum(pmc.event is not None for pmc in pmcs)
    for index in PMU_MSRS_TO_SAVE:
        assert get_msr(vcpu, index, host=True) is not None


@settings(deadline=None)
@given(
    action=st.integers(0, 2),
    events=st.lists(VALUES, max_size=5) | st.integers(299, 302).map(lambda n: [0xC0] * n),
    bitmap=st.integers(0, (1 << 32) - 1),
    flags=st.integers(0, 3),
    eventsel=st.integers(0, 0xFFFF),
)
def test_a_filter_is_made_or_refused(action: int, events: list[int], bitmap: int, flags: int, eventsel: int) -> None:
    try:
        made = PmuEventFilter(action, events, bitmap, flags)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.E2BIG):
            raise
        return
    assert action < 2 and flags < 2 and len(events) <= 300
    allow = action == abi.KVM_PMU_EVENT_ALLOW
    if not flags:
        assert made.allows(eventsel) == ((eventsel in events) == allow)
    assert [made.allows_fixed(n) for n in range(3)] == [(bitmap >> n & 1 == 1) == allow for n in range(3)]
