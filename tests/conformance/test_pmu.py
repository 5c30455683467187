# SPDX-License-Identifier: Apache-2.0
"""The filter of performance counters' events (KVM API 4.120) and KVM_CAP_PMU_CAPABILITY (8.35)."""

import errno

import pytest
from tests.support.conformance import Guest, refused

from softkvm import abi, api

ALLOW, DENY = abi.KVM_PMU_EVENT_ALLOW, abi.KVM_PMU_EVENT_DENY


@pytest.fixture
def filtering(guest: Guest) -> Guest:
    """A guest on a KVM that filters events."""
    if not guest.vm.check_extension(abi.KVM_CAP_PMU_EVENT_FILTER):
        pytest.skip("this KVM does not filter events")
    return guest


@pytest.mark.parametrize("action", [ALLOW, DENY])
@pytest.mark.parametrize("events", [[], [0xC0], [0xC0, 0xC2, 0x4F2E], [1 << 63], [0xC2] * 300])
def test_a_filter_of_any_events_is_taken(filtering: Guest, action: int, events: list[int]) -> None:
    assert filtering.vm.check_extension(abi.KVM_CAP_PMU_EVENT_FILTER) == 1
    filtering.vm.set_pmu_event_filter(action, events, 0xFFFF_FFFF)
    filtering.vm.set_pmu_event_filter(DENY, [])


def test_filters_that_mean_nothing_are_refused(filtering: Guest) -> None:
    vm = filtering.vm
    refused(errno.EINVAL, lambda: vm.set_pmu_event_filter(2, []))
    refused(errno.EINVAL, lambda: vm.set_pmu_event_filter(ALLOW, [], 0, 1 << 31))
    refused(errno.E2BIG, lambda: vm.set_pmu_event_filter(ALLOW, [0xC0] * 301))


def test_masked_events_have_no_other_bits(filtering: Guest) -> None:
    vm, masked = filtering.vm, abi.KVM_PMU_EVENT_FLAG_MASKED_EVENTS
    if not vm.check_extension(abi.KVM_CAP_PMU_EVENT_MASKED_EVENTS):
        refused(errno.EINVAL, lambda: vm.set_pmu_event_filter(ALLOW, [], 0, masked))
        return
    vm.set_pmu_event_filter(ALLOW, [abi.KVM_PMU_ENCODE_MASKED_ENTRY(0xC2, 0xFF, 3, True)], 0, masked)
    refused(errno.EINVAL, lambda: vm.set_pmu_event_filter(ALLOW, [0xC2 | 1 << 16], 0, masked))


def test_counters_are_taken_away_before_the_first_vcpu(kvm: api.Kvm) -> None:
    with kvm.create_vm() as vm:
        if not vm.check_extension(abi.KVM_CAP_PMU_CAPABILITY):
            refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, 0))
            return
        refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, abi.KVM_PMU_CAP_DISABLE << 1))
        vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, abi.KVM_PMU_CAP_DISABLE)
        with vm.create_vcpu(0):
            refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_PMU_CAPABILITY, 0))
