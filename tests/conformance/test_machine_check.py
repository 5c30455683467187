# SPDX-License-Identifier: Apache-2.0
"""Machine checks (KVM API 4.104 to 4.106; SDM vol. 3, 17.3)."""

import errno

import pytest
from tests.support.conformance import Guest, refused

from softkvm import abi, api

MCG_CAP, MCG_STATUS, MCG_CTL, MC0_CTL = 0x179, 0x17A, 0x17B, 0x400
CTL_P, SER_P = 1 << 8, 1 << 24
VALID, OVERFLOW, UNCORRECTED, SIGNALED = 1 << 63, 1 << 62, 1 << 61, 1 << 56
MACHINE_CHECK_IN_PROGRESS = 1 << 2
ALL = (1 << 64) - 1


def bank(guest: Guest, number: int) -> list[int]:
    """Return CTL, STATUS, ADDR and MISC of a bank."""
    return guest.cpu.get_msrs([MC0_CTL + 4 * number + n for n in range(4)])


def catching(guest: Guest) -> None:
    """Bring the guest into protected mode with CR4.MCE set."""
    guest.protected("f4")
    sregs = guest.cpu.get_sregs()
    sregs.cr4 |= abi.X86_CR4_MCE
    guest.cpu.set_sregs(sregs)


def test_a_new_vcpu_has_banks_that_report_nothing(guest: Guest) -> None:
    banks = guest.kvm.check_extension(abi.KVM_CAP_MCE)
    assert guest.cpu.get_msrs([MCG_CAP, MCG_STATUS, MCG_CTL]) == [banks, 0, 0]
    assert bank(guest, 0) == [0, 0, 0, 0]


def test_set_up_enables_the_banks(guest: Guest) -> None:
    supported = guest.kvm.x86_get_mce_cap_supported()
    assert supported & CTL_P
    guest.cpu.x86_setup_mce(10 | CTL_P)
    assert guest.cpu.get_msrs([MCG_CAP, MCG_STATUS, MCG_CTL]) == [10 | CTL_P, 0, ALL]
    assert bank(guest, 9) == [ALL, 0, 0, 0]
    assert guest.cpu.get_msrs([MC0_CTL + 4 * 10]) == []


@pytest.mark.parametrize("mcg_cap", [0, CTL_P, 33, 10 | 1 << 63])
def test_impossible_set_ups_are_einval(guest: Guest, mcg_cap: int) -> None:
    refused(errno.EINVAL, lambda: guest.cpu.x86_setup_mce(mcg_cap))


def test_control_registers_take_all_or_nothing_but_for_two_bits(guest: Guest) -> None:
    for value in (0, ALL, ALL & ~(1 << 10), ALL & ~1, ALL & ~(1 << 10 | 1)):
        assert guest.cpu.set_msrs({MC0_CTL: value}) == 1, hex(value)
    assert guest.cpu.set_msrs({MC0_CTL: 1}) == 0


def test_a_corrected_error_is_recorded_and_a_second_one_overflows(guest: Guest) -> None:
    guest.cpu.x86_setup_mce(10)
    guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=2, status=VALID | 5, addr=0x1000, misc=7))
    assert bank(guest, 2) == [ALL, VALID | 5, 0x1000, 7]
    guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=2, status=VALID | 6, addr=0x2000, misc=8))
    assert bank(guest, 2) == [ALL, VALID | OVERFLOW | 6, 0x2000, 8]
    assert guest.cpu.get_vcpu_events().exception.injected == 0


def test_an_uncorrected_error_is_a_machine_check(guest: Guest) -> None:
    guest.cpu.x86_setup_mce(10)
    catching(guest)
    event = abi.kvm_x86_mce(bank=1, status=VALID | UNCORRECTED, addr=0x3000, mcg_status=MACHINE_CHECK_IN_PROGRESS)
    guest.cpu.x86_set_mce(event)
    assert bank(guest, 1) == [ALL, VALID | UNCORRECTED, 0x3000, 0]
    assert guest.cpu.get_msrs([MCG_STATUS]) == [MACHINE_CHECK_IN_PROGRESS]
    exception = guest.cpu.get_vcpu_events().exception
    assert (exception.injected, exception.nr, exception.has_error_code) == (1, abi.MC_VECTOR, 0)
    # What is there is worse than a corrected error that follows.
    guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=1, status=VALID, addr=0x4000))
    assert bank(guest, 1) == [ALL, VALID | UNCORRECTED | OVERFLOW, 0x3000, 0]


def test_an_uncorrected_error_that_needs_no_action_is_recorded_only(guest: Guest) -> None:
    guest.cpu.x86_setup_mce(10)
    guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=0, status=VALID | UNCORRECTED, addr=0x5000))
    assert bank(guest, 0) == [ALL, VALID | UNCORRECTED, 0x5000, 0]
    assert guest.cpu.get_vcpu_events().exception.injected == 0


def test_a_disabled_bank_reports_no_uncorrected_error(guest: Guest) -> None:
    guest.cpu.x86_setup_mce(10)
    catching(guest)
    assert guest.cpu.set_msrs({MC0_CTL: 0}) == 1
    guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=0, status=VALID | UNCORRECTED | SIGNALED))
    assert bank(guest, 0) == [0, 0, 0, 0]
    assert guest.cpu.get_vcpu_events().exception.injected == 0


def test_a_machine_check_without_cr4_mce_shuts_the_guest_down(guest: Guest) -> None:
    guest.cpu.x86_setup_mce(10)
    guest.protected("ebfe")
    guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=0, status=VALID | UNCORRECTED | SIGNALED))
    guest.expect(abi.KVM_EXIT_SHUTDOWN)


def test_impossible_errors_are_einval(guest: Guest) -> None:
    guest.cpu.x86_setup_mce(4)
    refused(errno.EINVAL, lambda: guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=4, status=VALID)))
    refused(errno.EINVAL, lambda: guest.cpu.x86_set_mce(abi.kvm_x86_mce(bank=0, status=1)))


def test_the_supported_bits_are_those_that_can_be_set_up(kvm: api.Kvm, guest: Guest) -> None:
    guest.cpu.x86_setup_mce(1 | kvm.x86_get_mce_cap_supported() & (CTL_P | SER_P))
