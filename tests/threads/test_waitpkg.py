# SPDX-License-Identifier: Apache-2.0
"""UMONITOR, UMWAIT and TPAUSE (SDM vol. 2; thread 22): a guest's whose CPUID has WAITPKG, and nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.guests import linux_guest
from tests.support.machines import open_soft
from tests.support.tiny import CODE, DATA, MIB, Tiny

from softkvm import _softcpu, abi
from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine

WAITPKG = 1 << 5  # leaf 7, ECX
MSR_IA32_UMWAIT_CONTROL = 0xE1
TPAUSE, UMWAIT, UMONITOR = b"\x66\x0f\xae\xf1", b"\xf2\x0f\xae\xf1", b"\xf3\x0f\xae\xf3"  # ecx; ecx; rbx
OUT = b"\xe6\x10"
HANDLER = 0x2000
U64 = (1 << 64) - 1
ARITHMETIC = 0x8D5
CF = 1


def give_waitpkg(tiny: Tiny) -> None:
    for vcpu in tiny.vcpus:
        entries = vcpu.get_cpuid2()
        for entry in entries:
            if (entry.function, entry.index) == (7, 0):
                entry.ecx |= WAITPKG
        vcpu.set_cpuid2(entries)


def make(*, waitpkg: bool = True, vcpus: int = 1) -> Tiny:
    tiny = Tiny(irqchip=True, vcpus=vcpus).long_mode()
    for vector in (abi.UD_VECTOR, abi.GP_VECTOR):
        handler = HANDLER + 16 * vector
        tiny.gate64(vector, handler)
        tiny.memory.write(handler, b"\x48\xc7\xc5" + vector.to_bytes(4, "little") + OUT)  # mov rbp, vector
    if waitpkg:
        give_waitpkg(tiny)
    return tiny


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = make()
    yield machine
    machine.close()


def run(tiny: Tiny, code: bytes, **registers: int) -> abi.kvm_regs:
    """Run code, or the handler of its exception, which leaves the vector in RBP."""
    tiny.load(code + OUT, **{"rbp": 0, "rbx": DATA, "rax": 0, "rdx": 0, "rcx": 0, **registers})
    assert tiny.run() == abi.KVM_EXIT_IO
    return tiny.vcpu.get_regs()


@pytest.mark.parametrize("code", [TPAUSE, UMWAIT, UMONITOR], ids=["tpause", "umwait", "umonitor"])
def test_the_instructions_are_there_with_the_guests_cpuid_only(code: bytes) -> None:
    for waitpkg in (False, True, None):
        tiny = make(waitpkg=bool(waitpkg))
        if waitpkg is None:  # given, and taken back before the vCPU runs
            give_waitpkg(tiny)
            tiny.vcpu.set_cpuid2(tiny.kvm.get_supported_cpuid())
        assert run(tiny, code).rbp == (0 if waitpkg else abi.UD_VECTOR)
        tiny.close()


def test_no_guest_gets_them_unasked(tiny: Tiny) -> None:
    """AMD's processors don't have them: KVM can give them, which is what KVM_GET_EMULATED_CPUID is for."""

    def has(entries: list[abi.kvm_cpuid_entry2]) -> bool:
        return any(e.function == 7 and e.index == 0 and e.ecx & WAITPKG for e in entries)

    assert not has(tiny.kvm.get_supported_cpuid())
    assert has(tiny.kvm.get_emulated_cpuid())


@given(value=st.integers(0, U64) | st.integers(0, 1 << 33))
@settings(max_examples=60, deadline=None)
def test_the_control_register_takes_all_but_reserved_bits(value: int) -> None:
    tiny = make()
    tiny.vcpu.set_msrs({MSR_IA32_UMWAIT_CONTROL: 4})
    reserved = bool(value >> 32 or value & 2)
    regs = run(tiny, b"\x0f\x30", rcx=MSR_IA32_UMWAIT_CONTROL, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    assert regs.rbp == (abi.GP_VECTOR if reserved else 0)
    kept = 4 if reserved else value
    assert tiny.vcpu.get_msrs([MSR_IA32_UMWAIT_CONTROL]) == [kept]
    assert tiny.vcpu.set_msrs({MSR_IA32_UMWAIT_CONTROL: value}) == (0 if reserved else 1)
    regs = run(tiny, b"\x0f\x32", rcx=MSR_IA32_UMWAIT_CONTROL)
    assert regs.rdx << 32 | regs.rax == kept
    tiny.close()


def test_the_control_register_is_saved_restored_and_reset(tiny: Tiny) -> None:
    assert MSR_IA32_UMWAIT_CONTROL in tiny.kvm.get_msr_index_list()
    tiny.vcpu.set_msrs({MSR_IA32_UMWAIT_CONTROL: 0xFFFF_FFFD})
    other = make()
    other.vcpu.set_msrs(
        dict(zip([MSR_IA32_UMWAIT_CONTROL], tiny.vcpu.get_msrs([MSR_IA32_UMWAIT_CONTROL]), strict=True))
    )
    assert other.vcpu.get_msrs([MSR_IA32_UMWAIT_CONTROL]) == [0xFFFF_FFFD]
    other.vcpu.vcpu_reset(True)
    assert other.vcpu.get_msrs([MSR_IA32_UMWAIT_CONTROL]) == [0]
    other.close()


def test_without_the_feature_the_guest_has_no_control_register() -> None:
    tiny = make(waitpkg=False)
    assert run(tiny, b"\x0f\x32", rcx=MSR_IA32_UMWAIT_CONTROL).rbp == abi.GP_VECTOR
    assert run(tiny, b"\x0f\x30", rcx=MSR_IA32_UMWAIT_CONTROL).rbp == abi.GP_VECTOR
    assert tiny.vcpu.set_msrs({MSR_IA32_UMWAIT_CONTROL: 4}) == 1  # userspace has it before it sets CPUID
    tiny.close()


@pytest.mark.parametrize("code", [TPAUSE, UMONITOR + UMWAIT], ids=["tpause", "umwait"])
def test_the_guests_own_limit_ends_a_wait_with_carry(tiny: Tiny, code: bytes) -> None:
    tiny.vcpu.set_msrs({MSR_IA32_UMWAIT_CONTROL: 100_000 & ~3})
    for state in (0, 1):
        code_with_state = UMONITOR + b"\xb9" + state.to_bytes(4, "little") + code
        regs = run(tiny, code_with_state, rax=0xFFFF_FFFF, rdx=0xFFFF_FFFF)
        assert regs.rflags & ARITHMETIC == CF
        regs = run(tiny, code_with_state, rax=0, rdx=0)
        assert regs.rflags & ARITHMETIC == 0


@pytest.mark.parametrize("khz", [_softcpu.tsc_khz(), _softcpu.tsc_khz() // 5, 3 * _softcpu.tsc_khz()])
def test_a_deadline_is_one_of_the_guests_counter(tiny: Tiny, khz: int) -> None:
    tiny.vcpu.set_tsc_khz(khz)
    # rdtsc; shl rdx, 32; or rax, rdx; add rax, rsi; mov r8, rax; mov rdx, rax; shr rdx, 32; tpause; rdtsc
    code = bytes.fromhex("0f31 48c1e220 4809d0 4801f0 4989c0 4889c2 48c1ea20") + TPAUSE + b"\x0f\x31"
    regs = run(tiny, code, rsi=2 * khz)
    assert regs.rdx << 32 | regs.rax >= regs.r8
    assert not regs.rflags & CF


def test_a_timer_of_the_guests_apic_ends_a_wait(tiny: Tiny) -> None:
    """By its interrupt, which is taken behind the instruction; also where it is masked."""
    tiny.gate64(0x40, HANDLER)
    tiny.memory.write(HANDLER, b"\x48\xff\xc5\x48\xcf")  # inc rbp; iretq
    for enabled in (True, False):
        lapic = tiny.vcpu.get_lapic()
        registers = memoryview(lapic.regs).cast("B")
        registers[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        registers[0x320:0x324] = (0x40 | 2 << 17).to_bytes(4, "little")  # TSC deadline
        tiny.vcpu.set_lapic(lapic)
        # rdtsc; add eax, 1000000; adc edx, 0; mov ecx, 0x6e0; wrmsr; xor ecx, ecx; mov eax, -1; mov edx, eax
        arm = bytes.fromhex("0f31 0540420f00 83d200 b9e0060000 0f30 31c9 83c8ff 89c2")
        regs = run(tiny, arm + TPAUSE + b"\x90", rflags=0x202 if enabled else 2)
        assert regs.rbp == (1 if enabled else 0)
        assert not regs.rflags & CF


def test_a_store_of_another_vcpu_ends_a_wait() -> None:
    """The two hand a number to and fro; nothing but the other's store ends a wait in time."""
    tiny = make(vcpus=2)
    rounds = 200
    # again: umonitor rbx; mov eax, [rbx]; cmp eax, N; jae done; mov edi, eax; and edi, 1; cmp edi, esi; je turn
    #   mov eax, -1; mov edx, eax; umwait ecx; jmp again; turn: inc dword [rbx]; jmp again; done: out
    code = bytearray()
    code += UMONITOR + bytes.fromhex("8b03 3d") + rounds.to_bytes(4, "little")
    code += b"\x73\x00"
    to_done = len(code)
    code += bytes.fromhex("89c7 83e701 39f7") + b"\x74\x00"
    to_turn = len(code)
    code += bytes.fromhex("83c8ff 89c2") + UMWAIT
    code += b"\xeb" + (256 - len(code) - 2).to_bytes(1, "little")
    code[to_turn - 1] = len(code) - to_turn
    code += b"\xff\x03"
    code += b"\xeb" + (256 - len(code) - 2).to_bytes(1, "little")
    code[to_done - 1] = len(code) - to_done
    code += OUT
    tiny.load(bytes(code))
    first, second = tiny.vcpus
    second.set_sregs(first.get_sregs())
    second.set_mp_state(abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))
    exits: list[int] = []

    def player(n: int) -> None:
        vcpu = tiny.vcpus[n]
        vcpu.set_regs(abi.kvm_regs(rip=CODE, rsp=0x8000 - 0x1000 * n, rflags=2, rbx=DATA, rsi=n))
        vcpu.run()
        exits.append(vcpu.kvm_run.exit_reason)

    threads = [threading.Thread(target=player, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exits == [abi.KVM_EXIT_IO] * 2
    assert int.from_bytes(tiny.memory.read(DATA, 4), "little") >= rounds
    tiny.close()


def test_userspaces_write_ends_a_wait() -> None:
    tiny = make()
    code = UMONITOR + b"\xc6\x43\x40\x01" + b"\x83\xc8\xff\x89\xc2" + UMWAIT  # mov byte [rbx+64], 1; ...
    # Again while nothing is stored: a wait may end for no reason.
    code += bytes.fromhex("803b00 74") + (256 - len(code) - 5).to_bytes(1, "little")
    done = threading.Event()

    def write() -> None:
        while not tiny.memory.read(DATA + 64, 1)[0] and not done.is_set():
            pass
        tiny.memory.write(DATA, b"\x01")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert run(tiny, code).rbp == 0
    finally:
        done.set()
        thread.join()
    tiny.close()


@pytest.mark.parametrize("code", [TPAUSE, UMWAIT], ids=["tpause", "umwait"])
def test_a_wait_without_end_leaves_for_userspace_when_it_is_told_to(tiny: Tiny, code: bytes) -> None:
    tiny.load(UMONITOR + code + b"\xeb\xf6", rax=U64 & 0xFFFF_FFFF, rdx=U64 >> 32, rbx=DATA, rcx=0)

    def stop() -> None:
        tiny.vcpu.kvm_run.immediate_exit = 1
        tiny.vcpu.cpu.interrupt()

    timer = threading.Timer(0.05, stop)
    timer.start()
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    timer.join()


def test_the_operands_reserved_bits_and_time_stamp_disable_are_gp(tiny: Tiny) -> None:
    for code in (TPAUSE, UMWAIT):
        assert run(tiny, code, rcx=2).rbp == abi.GP_VECTOR
        assert run(tiny, code, rcx=1 << 31).rbp == abi.GP_VECTOR
        sregs = tiny.vcpu.get_sregs()
        sregs.cr4 |= abi.X86_CR4_TSD
        tiny.vcpu.set_sregs(sregs)
        assert run(tiny, code).rbp == 0  # ring 0


@pytest.mark.guest
@pytest.mark.network
@pytest.mark.timeout(600)
def test_linux_uses_them_when_its_cpuid_has_them() -> None:
    """It waits by TPAUSE in its delays (``use_tpause_delay``), and sets the longest wait of user programs."""
    guest = linux_guest()

    def offer(entries: list[abi.kvm_cpuid_entry2]) -> list[abi.kvm_cpuid_entry2]:
        for entry in entries:
            if (entry.function, entry.index) == (7, 0):
                entry.ecx |= WAITPKG
        return entries

    console = Console()
    control = "/sys/devices/system/cpu/umwait_control"
    run = f"grep -wc waitpkg /proc/cpuinfo; cat {control}/max_time {control}/enable_c02"
    with open_soft() as kvm, Machine(kvm, Config(256 * MIB, 2, cpuid=offer), console.output) as machine:
        initrd = guest.initrd.read_bytes()
        machine.load(guest.kernel.read_bytes(), initrd, f'{guest.command_line} quiet softkvm.run="{run}"')
        console.attach(machine)
        machine.start()
        console.expect(r"^2\s+100000\s+1\s*$", timeout_s=400)
        for thread in machine.vcpus:
            assert thread.vcpu.get_msrs([MSR_IA32_UMWAIT_CONTROL]) == [100_000]
        machine.wait(60)
