# SPDX-License-Identifier: Apache-2.0
"""The forced-emulation prefix (``force_emulation_prefix``): any instruction through KVM's emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.conformance import watchdog
from tests.support.segments import enter_ring_3
from tests.support.tiny import CODE, DATA, Tiny

from softkvm import abi
from softkvm.kvm import Params

FEP = "0f0b6b766d"  # ud2; "kvm"
_DB_HANDLER = 0x2000
_UD_HANDLER = 0x2100
_MF_HANDLER = 0x2200


def _machine(*, enabled: bool = True, vendor: bytes = b"AuthenticAMD") -> Tiny:
    tiny = Tiny(params=Params(force_emulation_prefix=enabled))
    entries = tiny.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == 0:
            entry.ebx, entry.edx, entry.ecx = (int.from_bytes(vendor[i : i + 4], "little") for i in (0, 4, 8))
    tiny.vcpu.set_cpuid2(entries)
    tiny.long_mode()
    for vector, handler in ((1, _DB_HANDLER), (abi.UD_VECTOR, _UD_HANDLER), (abi.MF_VECTOR, _MF_HANDLER)):
        tiny.gate64(vector, handler)
        tiny.memory.write(handler, bytes((0x6A, vector, 0x5D, 0x58, 0xF4)))  # push vector; pop rbp; pop rax; hlt
    return tiny


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = _machine()
    yield machine
    machine.close()


def _run(tiny: Tiny, code: str, **registers: int) -> abi.kvm_regs:
    tiny.load(bytes.fromhex(code) + b"\xf4", **{"rbp": 0, **registers})
    return tiny.run_to_halt()


def test_the_emulator_executes_what_follows_the_prefix(tiny: Tiny) -> None:
    regs = _run(tiny, FEP + "48 01d8", rax=5, rbx=7)  # add rax, rbx
    assert (regs.rax, regs.rbp) == (12, 0)
    assert tiny.vcpu.stat_insn_emulation == 1


def test_without_the_parameter_it_is_just_ud2() -> None:
    tiny = _machine(enabled=False)
    regs = _run(tiny, FEP + "90")
    assert (regs.rbp, regs.rax) == (abi.UD_VECTOR, CODE)
    tiny.close()


@pytest.mark.parametrize("code", ["8dc0", "0fae20", "0f0b"])  # lea eax, eax; xsave [rax]; ud2
def test_unknown_instructions_are_undefined_even_in_the_kernel(tiny: Tiny, code: str) -> None:
    """Only emulation that the guest didn't ask for ends in KVM_EXIT_INTERNAL_ERROR."""
    regs = _run(tiny, FEP + code)
    assert (regs.rbp, regs.rax) == (abi.UD_VECTOR, CODE + 5)


@pytest.mark.parametrize(
    ("code", "reason"), [("0f32", abi.KVM_EXIT_X86_RDMSR), ("0f30", abi.KVM_EXIT_X86_WRMSR)], ids=["rdmsr", "wrmsr"]
)
def test_emulated_accesses_to_filtered_msrs_are_exits_too(tiny: Tiny, code: str, reason: int) -> None:
    tiny.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, abi.KVM_MSR_EXIT_REASON_FILTER)
    both = abi.KVM_MSR_FILTER_READ | abi.KVM_MSR_FILTER_WRITE
    tiny.vm.x86_set_msr_filter(0, [abi.MsrFilterRange(both, 0x174, 1, bytes(8))])
    tiny.load(bytes.fromhex(FEP + code) + b"\xf4", rax=0x33, rcx=0x174, rdx=0, rbp=0)
    assert tiny.run() == reason
    msr = tiny.vcpu.kvm_run.msr
    assert (msr.reason, msr.index, msr.error) == (abi.KVM_MSR_EXIT_REASON_FILTER, 0x174, 0)
    if reason == abi.KVM_EXIT_X86_WRMSR:
        assert msr.data == 0x33
    msr.data = 0x5_0000_0077
    regs = tiny.run_to_halt()
    assert (regs.rax, regs.rdx) == ((0x77, 5) if reason == abi.KVM_EXIT_X86_RDMSR else (0x33, 0))
    assert (regs.rip, tiny.vcpu.get_msrs([0x174])) == (CODE + 8, [0])


def test_an_emulated_access_to_a_filtered_msr_may_fault(tiny: Tiny) -> None:
    tiny.gate64(abi.GP_VECTOR, _UD_HANDLER)
    tiny.vm.x86_set_msr_filter(0, [abi.MsrFilterRange(abi.KVM_MSR_FILTER_READ, 0x174, 1, bytes(8))])
    assert _run(tiny, FEP + "0f32", rcx=0x174).rbp == abi.UD_VECTOR, "the handler of #GP"


def _arm(tiny: Tiny, address: int) -> None:
    debug = tiny.vcpu.get_debugregs()
    debug.db[0], debug.dr7 = address, 0x402
    tiny.vcpu.set_debugregs(debug)


def test_an_emulated_instruction_hits_its_breakpoint(tiny: Tiny) -> None:
    _arm(tiny, CODE + 5)
    regs = _run(tiny, FEP + "90")
    assert (regs.rbp, regs.rax) == (1, CODE + 5)
    assert tiny.vcpu.get_debugregs().dr6 & 0xF == 1


@pytest.mark.parametrize(("vendor", "vector"), [(b"AuthenticAMD", 1), (b"GenuineIntel", 0)])
def test_the_shadow_of_mov_ss_inhibits_breakpoints_on_intels_alone(vendor: bytes, vector: int) -> None:
    tiny = _machine(vendor=vendor)
    _arm(tiny, CODE)
    tiny.load(b"\x90")
    events = tiny.vcpu.get_vcpu_events()
    events.interrupt.shadow = abi.KVM_X86_SHADOW_INT_MOV_SS
    tiny.vcpu.set_vcpu_events(events)
    assert tiny.vcpu.emulator.emulate(forced=True) == 1
    assert tiny.vcpu.exception.pending == bool(vector)
    tiny.close()


def test_breakpoints_on_data_are_none_on_code(tiny: Tiny) -> None:
    debug = tiny.vcpu.get_debugregs()
    debug.db[0], debug.dr7 = CODE + 5, 0x402 | 3 << 16
    tiny.vcpu.set_debugregs(debug)
    assert _run(tiny, FEP + "90").rbp == 0


def test_the_debuggers_breakpoint_leaves_for_userspace(tiny: Tiny) -> None:
    debug = abi.kvm_guest_debug(control=abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP)
    debug.arch.debugreg[0], debug.arch.debugreg[7] = CODE + 5, 0x402
    tiny.vcpu.set_guest_debug(debug)
    tiny.load(bytes.fromhex(FEP + "90f4"))
    assert tiny.run() == abi.KVM_EXIT_DEBUG
    assert (tiny.vcpu.kvm_run.debug.arch.pc, tiny.vcpu.kvm_run.debug.arch.dr6 & 0xF) == (CODE + 5, 1)


@pytest.mark.parametrize("code", ["0f6f03", "0f7f03", "9b", "d9d0"])  # movq mm0, [rbx]; movq [rbx], mm0; wait; fnop
def test_a_pending_x87_exception_is_raised(tiny: Tiny, code: str) -> None:
    fpu = tiny.vcpu.get_fpu()
    fpu.fcw, fpu.fsw = 0, 0x81
    tiny.vcpu.set_fpu(fpu)
    assert _run(tiny, FEP + code, rbx=DATA).rbp == abi.MF_VECTOR
    fpu.fcw, fpu.fsw = 0x37F, 0
    tiny.vcpu.set_fpu(fpu)
    assert _run(tiny, FEP + code, rbx=DATA).rbp == 0


def test_mmx_moves_take_the_x87_registers(tiny: Tiny) -> None:
    """All tags valid and TOP zero afterwards (APM vol. 2, 11.4)."""
    fpu = tiny.vcpu.get_fpu()
    fpu.fcw, fpu.fsw, fpu.ftwx = 0x37F, 0x2800, 0
    tiny.vcpu.set_fpu(fpu)
    _run(tiny, FEP + "0f6f03", rbx=DATA)
    after = tiny.vcpu.get_fpu()
    assert (after.fsw >> 11 & 7, after.ftwx) == (0, 0xFF)


def test_a_forced_cpuid_faults_outside_of_ring_0_when_the_guest_asks_for_it(tiny: Tiny) -> None:
    misc_features_enables = 0x140
    assert tiny.vcpu.set_msrs({misc_features_enables: 1}) == 1
    assert _run(tiny, FEP + "0fa2", rax=0).rbp == 0
    sregs = tiny.vcpu.get_sregs()
    enter_ring_3(sregs)
    tiny.vcpu.set_sregs(sregs)
    tiny.load(bytes.fromhex(FEP + "0fa2") + b"\xeb\xfe")
    with watchdog(tiny.vcpu, 5):
        assert tiny.run() == abi.KVM_EXIT_SHUTDOWN  # #GP, which has no gate
