# SPDX-License-Identifier: Apache-2.0
"""Xen's hypercalls on the ways that an instruction may take: the silicon's exit, the emulator, a guest that counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.threads import running, until
from tests.support.tiny import DATA, Tiny

from softkvm import abi
from softkvm.kvm import Params

FEP = "0f0b6b766d"  # ud2; "kvm": the emulator executes what follows
VMMCALL = "0f01d9"
MSR = 0x4000_0200
UNKNOWN = 0x3F
_EVENT_SELECT_0, _COUNTER_0 = 0xC001_0000, 0xC001_0004
_RETIRED_INSTRUCTIONS = 0x53_00C0  # enabled in all rings


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(params=Params(force_emulation_prefix=True))
    machine.long_mode()
    configure(machine)
    yield machine
    machine.close()


def configure(tiny: Tiny, flags: int = abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL) -> None:
    tiny.vm.xen_hvm_config(abi.kvm_xen_hvm_config(msr=MSR, flags=flags))


def answered(tiny: Tiny, result: int) -> abi.kvm_regs:
    """Run up to KVM_EXIT_XEN, answer that, and run to the guest's HLT."""
    assert tiny.run() == abi.KVM_EXIT_XEN
    tiny.vcpu.kvm_run.xen.u.hcall.result = result
    return tiny.run_to_halt()


def test_an_emulated_hypercall_is_userspaces(tiny: Tiny) -> None:
    tiny.load(bytes.fromhex(FEP + VMMCALL + "f4"), rax=UNKNOWN, rdi=17)
    assert answered(tiny, 0x1234).rax == 0x1234
    assert tiny.vcpu.kvm_run.xen.u.hcall.params[0] == 17
    assert tiny.vcpu.stat_insn_emulation


def test_an_emulated_write_places_the_page(tiny: Tiny) -> None:
    tiny.load(bytes.fromhex(FEP + "0f30f4"), rcx=MSR, rax=DATA, rdx=0)
    tiny.run_to_halt()
    assert tiny.memory.read(DATA + 32, 9) == bytes.fromhex("b801000000 0f01d9 c3")


@pytest.mark.parametrize("prefix", ["", FEP])
def test_a_hypercall_counts_as_one_instruction(tiny: Tiny, prefix: str) -> None:
    tiny.vcpu.set_msrs({_COUNTER_0: 0, _EVENT_SELECT_0: _RETIRED_INSTRUCTIONS})
    tiny.load(bytes.fromhex("90" + prefix + VMMCALL + "90f4"), rax=UNKNOWN)
    answered(tiny, 0)
    assert tiny.vcpu.get_msrs([_COUNTER_0]) == [4]


def test_a_vcpu_that_runs_has_the_interfaces_from_the_configuration_on() -> None:
    tiny = Tiny()
    tiny.long_mode()
    # again: mov eax, UNKNOWN; vmmcall; jmp again
    tiny.load(bytes.fromhex("b83f000000 0f01d9 ebf6"))
    with running(tiny.vcpu) as thread:
        until(lambda: tiny.vcpu.stat_hypercalls)  # KVM's, which has none of the number
        configure(tiny)
        assert thread.wait() is None
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_XEN
    tiny.vm.xen_hvm_config(abi.kvm_xen_hvm_config())
    count = tiny.vcpu.stat_hypercalls
    with running(tiny.vcpu):
        until(lambda: tiny.vcpu.stat_hypercalls > count)
    tiny.close()
