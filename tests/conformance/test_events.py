# SPDX-License-Identifier: Apache-2.0
"""Interrupts from userspace, NMI, MP states, guest debugging (KVM API 4.16, 4.38, 4.39, 4.64, 4.87)."""

import errno
import threading
from collections.abc import Callable

import pytest
from tests.support.conformance import CODE, STACK, Guest, pio_data, refused
from tests.support.threads import beside, running

from softkvm import abi

HANDLER = CODE + 0x100

# --- KVM_INTERRUPT and the interrupt window --------------------------------------------------------


def test_an_interrupt_from_userspace_is_taken(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    guest.ivt(0x40, HANDLER)
    guest.write(HANDLER, bytes.fromhex("b042 e6e9 cf"))  # mov al, 0x42; out 0xe9, al; iret
    guest.real("90 f4", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    guest.cpu.interrupt(0x40)
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert pio_data(guest.cpu) == b"\x42"
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rip == CODE + 2


def test_impossible_vectors_are_einval(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: guest.cpu.interrupt(256))
    refused(errno.EINVAL, lambda: guest.cpu.interrupt(0xFFFF_FFFF))


def test_a_second_interrupt_before_the_first_was_taken_is_eexist(
    guest: Guest, device_differs: Callable[[str], None]
) -> None:
    guest.cpu.interrupt(0x40)
    device_differs("KVM_INTERRUPT replaces a vector that waits, where the API document has EEXIST")
    refused(errno.EEXIST, lambda: guest.cpu.interrupt(0x41))


def test_an_interrupt_waits_for_if(guest: Guest, device_differs: Callable[[str], None]) -> None:
    device_differs("KVM_INTERRUPT with RFLAGS.IF clear is injected at once: clients have to look at the window first")
    guest.ivt(0x40, HANDLER)
    guest.write(HANDLER, bytes.fromhex("e6ea cf"))  # out 0xea, al; iret
    guest.real("e6e9 fb 90 90 f4")  # out 0xe9, al; sti; nop; nop; hlt
    guest.cpu.interrupt(0x40)
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xEA
    saved_ip = guest.word(guest.cpu.get_regs().rsp, 2)
    assert saved_ip == CODE + 4, "behind the instruction after STI"
    guest.expect(abi.KVM_EXIT_HLT)


def test_an_interrupt_on_its_way_is_part_of_the_events(guest: Guest) -> None:
    guest.real("90 f4", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    guest.cpu.interrupt(0x61)
    events = guest.cpu.get_vcpu_events()
    assert (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) == (1, 0x61, 0)
    assert list(guest.cpu.get_sregs().interrupt_bitmap) == [0, 1 << 0x21, 0, 0]


def test_the_interrupt_window_opens_after_the_shadow_of_sti(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupt windows in real mode")
    guest.real("90 fb 90 90 f4")  # nop; sti; nop; nop; hlt
    guest.kvm_run.request_interrupt_window = 1
    run = guest.expect(abi.KVM_EXIT_IRQ_WINDOW_OPEN)
    assert (run.ready_for_interrupt_injection, run.if_flag) == (1, 1)
    assert guest.cpu.get_regs().rip == CODE + 3
    run.request_interrupt_window = 0
    guest.expect(abi.KVM_EXIT_HLT)


def test_the_interrupt_window_is_shut_while_if_is_clear(guest: Guest) -> None:
    guest.real("90 f4")
    guest.kvm_run.request_interrupt_window = 1
    run = guest.expect(abi.KVM_EXIT_HLT)
    assert run.ready_for_interrupt_injection == 0


def test_an_open_window_takes_one_interrupt_after_another(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    guest.ivt(0x40, HANDLER)
    guest.write(HANDLER, bytes.fromhex("fec3 cf"))  # inc bl; iret
    guest.real("ebfe", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    for count in range(1, 4):
        guest.kvm_run.request_interrupt_window = 1
        guest.expect(abi.KVM_EXIT_IRQ_WINDOW_OPEN)
        assert guest.cpu.get_regs().rbx == count - 1
        guest.cpu.interrupt(0x40)


def test_a_soft_exception_on_its_way_is_no_event(guest: Guest) -> None:
    guest.vm.enable_cap(abi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    for vector, shown in ((abi.BP_VECTOR, 0), (abi.UD_VECTOR, 1)):
        events = guest.cpu.get_vcpu_events()
        events.exception.pending, events.exception.nr = 1, vector
        guest.cpu.set_vcpu_events(events)
        after = guest.cpu.get_vcpu_events().exception
        assert (after.pending, after.nr) == (shown, vector), "an INT3 is executed again instead"


# --- NMI -------------------------------------------------------------------------------------------


def test_an_nmi_is_taken_with_if_clear(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    guest.ivt(2, HANDLER)
    guest.write(HANDLER, bytes.fromhex("b042 e6e9 cf"))
    guest.real("90 f4")
    guest.cpu.nmi()
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert guest.cpu.get_vcpu_events().nmi.masked == 1
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_vcpu_events().nmi.masked == 0


def test_a_second_nmi_waits_for_iret(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("a second NMI in real mode")
    guest.ivt(2, HANDLER)
    guest.write(HANDLER, bytes.fromhex("e6e9 e6ea cf"))  # out 0xe9, al; out 0xea, al; iret
    guest.real("90 f4")
    guest.cpu.nmi()
    ports = [guest.expect(abi.KVM_EXIT_IO).io.port]
    guest.cpu.nmi()
    guest.cpu.nmi()
    guest.cpu.nmi()  # one is kept while the first is handled
    while guest.run() == abi.KVM_EXIT_IO:
        ports.append(guest.kvm_run.io.port)
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert ports == [0xE9, 0xEA, 0xE9, 0xEA]


# --- MP states -------------------------------------------------------------------------------------


def test_mp_states_of_new_vcpus(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True, vcpus=2)
    assert guest.vcpus[0].get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE
    assert guest.vcpus[1].get_mp_state().mp_state == abi.KVM_MP_STATE_UNINITIALIZED


def test_without_chips_there_is_runnable_only(guest: Guest) -> None:
    assert guest.cpu.get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE
    guest.cpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
    refused(errno.EINVAL, lambda: guest.cpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_UNINITIALIZED)))


@pytest.mark.parametrize("state", [0, 1, 2, 3])
def test_mp_state_round_trips(make: Callable[..., Guest], state: int) -> None:
    guest = make(irqchip=True)
    guest.cpu.set_mp_state(abi.kvm_mp_state(mp_state=state))
    assert guest.cpu.get_mp_state().mp_state == state


@pytest.mark.parametrize("state", [abi.KVM_MP_STATE_STOPPED, abi.KVM_MP_STATE_SUSPENDED, 99])
def test_states_of_other_architectures_are_einval(make: Callable[..., Guest], state: int) -> None:
    guest = make(irqchip=True)
    refused(errno.EINVAL, lambda: guest.cpu.set_mp_state(abi.kvm_mp_state(mp_state=state)))
    assert guest.cpu.get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE


def test_a_halted_vcpu_wakes_for_an_interrupt(make: Callable[..., Guest], needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    guest = make(irqchip=True)
    chip = guest.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    chip.chip.pic.irq_base, chip.chip.pic.imr = 0x20, 0
    guest.vm.set_irqchip(chip)
    guest.ivt(0x24, HANDLER)
    guest.write(HANDLER, bytes.fromhex("e6e9 cf"))
    guest.real("f4 f4", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    with beside(threading.Timer(0.05, lambda: guest.vm.irq_line(4, 1))):
        assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert guest.word(guest.cpu.get_regs().rsp, 2) == CODE + 1
    assert guest.cpu.get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE


def test_an_application_processor_starts_with_init_and_sipi(
    make: Callable[..., Guest], needs: Callable[[str], None]
) -> None:
    needs("interrupts in real mode")
    guest = make(irqchip=True, vcpus=2)
    second = guest.vcpus[1]
    second.set_lapic(second.get_lapic())  # the kernel finds a new vCPU by its APIC id only after this
    guest.write(0x2000, bytes.fromhex("8cc8 e6e9 ebfe"))  # mov ax, cs; out 0xe9, al; jmp $

    def run_second() -> None:
        while True:
            try:
                return second.run()
            except BlockingIOError:  # it waits for its start-up IPI
                continue

    with running(second, run_second) as other:
        for code in (0x4500, 0x4602):  # INIT, then a start-up IPI to page 2, both to APIC 1
            guest.protected(
                b"\xc7\x05"
                + (0xFEE0_0310).to_bytes(4, "little")
                + (1 << 24).to_bytes(4, "little")  # mov dword [0xfee00310], 1 << 24
                + b"\xc7\x05"
                + (0xFEE0_0300).to_bytes(4, "little")
                + code.to_bytes(4, "little")  # mov dword [0xfee00300], code
                + bytes.fromhex("e6ea")  # out 0xea, al
            )
            assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xEA
        assert other.wait() is None
    assert second.kvm_run.exit_reason == abi.KVM_EXIT_IO
    assert (second.kvm_run.io.port, pio_data(second)) == (0xE9, b"\0")
    assert second.get_sregs().cs.base == 0x2000
    assert second.get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE


# --- guest debugging -------------------------------------------------------------------------------


def debug(guest: Guest, control: int, breakpoints: dict[int, int] | None = None, dr7: int = 0) -> None:
    request = abi.kvm_guest_debug(control=control)
    for n, address in (breakpoints or {}).items():
        request.arch.debugreg[n] = address
    request.arch.debugreg[7] = dr7
    guest.cpu.set_guest_debug(request)


@pytest.mark.parametrize("mode", ["real", "long"])
def test_single_steps(guest: Guest, mode: str) -> None:
    getattr(guest, mode)("90 b001 90 eb00 f4")  # nop; mov al, 1; nop; jmp +0; hlt
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP)
    for address in (1, 3, 4, 6):
        run = guest.expect(abi.KVM_EXIT_DEBUG)
        assert (run.debug.arch.exception, run.debug.arch.pc) == (abi.DB_VECTOR, CODE + address)
        assert run.debug.arch.dr6 & 1 << 14, "BS"
        assert guest.cpu.get_regs().rflags & 0x100 == 0, "the guest's own TF"
    debug(guest, 0)
    guest.expect(abi.KVM_EXIT_HLT)


def test_a_step_goes_over_an_emulated_instruction(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("single steps over emulated instructions")
    guest.real("e6e9 90 f4")  # out 0xe9, al; nop; hlt
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP)
    guest.expect(abi.KVM_EXIT_IO)
    for pc in (CODE + 2, CODE + 3):
        debugged = guest.expect(abi.KVM_EXIT_DEBUG).debug.arch
        # DR6.BS beside the bits that read as one (SDM vol. 3, 18.2.3), whoever has executed the instruction
        assert (debugged.pc, debugged.exception, debugged.dr6) == (pc, abi.DB_VECTOR, 0xFFFF_4FF0)


def test_a_steps_dr6_is_its_own_and_the_guests_stays(guest: Guest, needs: Callable[[str], None]) -> None:
    """Whatever the guest has in DR6, and whatever breakpoint came before."""
    needs("hardware breakpoints")
    guest.long("90 90 90 90 f4")
    guest.cpu.set_debugregs(abi.kvm_debugregs(dr6=0xFFFF_2FF4, dr7=0x400))
    enable = abi.KVM_GUESTDBG_ENABLE
    debug(guest, enable | abi.KVM_GUESTDBG_USE_HW_BP, {0: CODE + 1}, 0x402)
    assert guest.expect(abi.KVM_EXIT_DEBUG).debug.arch.dr6 == 0xFFFF_0FF1
    assert guest.cpu.get_debugregs().dr6 == 0xFFFF_2FF4
    debug(guest, enable | abi.KVM_GUESTDBG_SINGLESTEP)
    for _ in range(2):
        assert guest.expect(abi.KVM_EXIT_DEBUG).debug.arch.dr6 == 0xFFFF_4FF0
    assert guest.cpu.get_debugregs().dr6 == 0xFFFF_2FF4
    debug(guest, 0)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_debugregs().dr6 == 0xFFFF_2FF4


@pytest.mark.parametrize("access", ["0f21f0", "0f23f0"])
def test_a_stepped_guest_has_its_own_dr6(guest: Guest, needs: Callable[[str], None], access: str) -> None:
    """Reads it (mov rax, dr6) and writes it (mov dr6, rax)."""
    needs("single steps over emulated instructions")
    needs("hardware breakpoints")
    guest.long("90" + access + "90 f4")
    guest.cpu.set_debugregs(abi.kvm_debugregs(dr6=0xFFFF_2FF4, dr7=0x400))
    regs = guest.cpu.get_regs()
    regs.rax = 0xFFFF_0FF8
    guest.cpu.set_regs(regs)
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP)
    for pc in (CODE + 1, CODE + 4, CODE + 5):
        debugged = guest.expect(abi.KVM_EXIT_DEBUG).debug.arch
        assert (debugged.pc, debugged.dr6) == (pc, 0xFFFF_4FF0)
    expected = 0xFFFF_2FF4 if access == "0f21f0" else 0xFFFF_0FF8
    assert guest.cpu.get_regs().rax == guest.cpu.get_debugregs().dr6 == expected


def test_a_software_breakpoint_is_an_exit_at_the_instruction(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("exceptions in long mode")
    guest.long("90 cc 90 f4")  # nop; int3; nop; hlt
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_SW_BP)
    run = guest.expect(abi.KVM_EXIT_DEBUG)
    assert (run.debug.arch.exception, run.debug.arch.pc) == (abi.BP_VECTOR, CODE + 1)
    regs = guest.cpu.get_regs()
    assert regs.rip == CODE + 1
    regs.rip = CODE + 2
    guest.cpu.set_regs(regs)
    guest.expect(abi.KVM_EXIT_HLT)


def test_a_hardware_breakpoint_is_an_exit_before_the_instruction(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("hardware breakpoints")
    guest.long("90 90 90 f4")
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP, {0: CODE + 2}, 0x402)
    run = guest.expect(abi.KVM_EXIT_DEBUG)
    assert (run.debug.arch.exception, run.debug.arch.pc) == (abi.DB_VECTOR, CODE + 2)
    assert run.debug.arch.dr6 & 0xF == 1
    assert guest.cpu.get_debugregs().db[0] == 0, "the guest's own"
    debug(guest, 0)
    guest.expect(abi.KVM_EXIT_HLT)


def test_a_watchpoint_is_an_exit_behind_the_access(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("watchpoints")
    guest.long("c6042500600000 11 90 f4")  # mov byte [0x6000], 0x11; nop; hlt
    # DR7: L1, R/W1 = writes, LEN1 = 1 byte
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP, {1: 0x6000}, 0x404 | 1 << 20)
    run = guest.expect(abi.KVM_EXIT_DEBUG)
    assert run.debug.arch.pc == CODE + 8
    assert run.debug.arch.dr6 & 0xF == 2
    assert guest.memory[0x6000] == 0x11


def test_the_guest_keeps_its_own_breakpoint_without_a_debugger(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    guest.ivt(1, HANDLER)
    guest.write(HANDLER, bytes.fromhex("e6e9 cf"))  # out 0xe9, al; iret
    guest.real("90 90 f4", rflags=abi.X86_EFLAGS_FIXED | 0x100)
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert guest.word(STACK - 6, 2) == CODE + 1


def test_injection_meets_a_pending_exception_with_ebusy(guest: Guest) -> None:
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_INJECT_DB)
    refused(errno.EBUSY, lambda: debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_INJECT_BP))


def test_an_injected_breakpoint_reaches_the_guest(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    guest.ivt(3, HANDLER)
    guest.write(HANDLER, bytes.fromhex("e6e9 cf"))
    guest.real("90 f4")
    debug(guest, abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_INJECT_BP)
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0xE9
