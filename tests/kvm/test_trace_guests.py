# SPDX-License-Identifier: Apache-2.0
"""Every tracepoint that there is, a guest makes happen.

``SCENARIOS`` says which guest. A tracepoint that is added needs a row; one that cannot happen needs a reason here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

import pytest
from tests.kvm.x86.paravirt.test_async_pf import GPA, INT, NMI, PF, SIZE, VECTOR
from tests.kvm.x86.paravirt.test_async_pf import enable as enable_async_pf
from tests.kvm.x86.svm.test_avic import BASE, ICR, Machine, store
from tests.support.conformance import Guest
from tests.support.hyperv import MESSAGES, HypervGuest
from tests.support.provider import Provider
from tests.support.threads import running, until
from tests.support.tiny import CODE, DATA, Tiny
from tests.support.tracing import texts, traced

import softkvm
from softkvm import abi
from softkvm.kvm import TRACEPOINTS, Params
from softkvm.kvm.state import IN_GUEST_MODE

Seen = list[tuple[str, str, tuple[object, ...]]]

HANDLER = CODE + 0x600
PV_EOI = DATA + 0x100


def enable_apic(tiny: Tiny) -> None:
    """Let the local APIC of the first vCPU accept interrupts."""
    lapic = tiny.vcpu.get_lapic()
    lapic.regs[0xF0 : 0xF0 + 2] = [0xFF, 1]
    tiny.vcpu.set_lapic(lapic)


# --- guests ------------------------------------------------------------------------------------------------


def instructions(seen: Seen) -> None:
    """CPUID, OUT, RDMSR, WRMSR, a control register, a hypercall, MMIO, a #GP and HLT."""
    tiny = Tiny().long_mode()
    tiny.gate64(13, HANDLER)
    tiny.memory.write(HANDLER, b"\xf4")
    # cpuid; out 0x80, al; mov ecx, EFER; rdmsr; wrmsr; mov rax, cr4; mov cr4, rax; vmmcall; mov [rbx], eax;
    # mov ecx, 0x12345678; rdmsr
    code = "0fa2 e680 b9800000c0 0f32 0f30 0f20e0 0f22e0 0f01d9 bb00000030 8903 b978563412 0f32 f4"
    tiny.load(bytes.fromhex(code))
    while tiny.run() != abi.KVM_EXIT_HLT:
        pass
    runs = len(texts(seen, "kvm_userspace_exit"))
    assert texts(seen, "kvm_fpu") == ["load", "unload"] * runs
    tiny.close()


def interrupts(seen: Seen) -> None:
    """A line of the i8259 and IOAPIC, an MSI, an IPI to itself, each from the wait for it to its EOI."""
    tiny = Tiny(irqchip=True, params=Params(avic=False)).long_mode(gigabytes=4)
    enable_apic(tiny)
    for vector in (0x41, 0x42, 0x43):
        tiny.gate64(vector, HANDLER)
    # inc ebx; mov dword [r8 + 0xb0], 0; iretq
    tiny.memory.write(HANDLER, bytes.fromhex("ffc3 41c780b0000000 00000000 48cf"))
    # mov r8d, APIC; mov dword [r8 + 0x300], to itself 0x43; again: sti; hlt; cli; cmp ebx, 3; jne again; out 0x10, al
    tiny.load(BASE + store(ICR, 0x4_4043) + bytes.fromhex("fb f4 fa 83fb03 75f8 e610"), rbx=0)
    pic = tiny.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    pic.chip.pic.imr = 0xFF
    tiny.vm.set_irqchip(pic)
    chip = tiny.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[5].bits = 0x41
    tiny.vm.set_irqchip(chip)
    with running(tiny.vcpu) as run:
        until(lambda: texts(seen, "kvm_eoi"))
        tiny.vm.irq_line(5, 1)
        tiny.vm.irq_line(5, 0)
        tiny.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x42))
        assert run.wait() is None
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO
    tiny.close()


def eoi_in_memory(seen: Seen) -> None:
    """A guest that ends an interrupt by the bit in its memory, and leaves."""
    tiny = Tiny(irqchip=True, params=Params(avic=False)).long_mode()
    enable_apic(tiny)
    tiny.vcpu.set_msrs({abi.MSR_KVM_PV_EOI_EN: PV_EOI | 1})
    tiny.gate64(0x41, HANDLER)
    # btr dword [PV_EOI], 0; setc al; out 0x11, al; iretq
    tiny.memory.write(
        HANDLER, bytes.fromhex("0fba3425") + PV_EOI.to_bytes(4, "little") + bytes.fromhex("00 0f92c0 e611")
    )
    tiny.load(bytes.fromhex("fb 90 f4"))
    tiny.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x41))
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rax & 0xFF == 1, "it was offered"
    isr = bytes(tiny.vcpu.get_lapic().regs)[0x100:0x180]
    assert not any(isr) and texts(seen, "kvm_pv_eoi") == ["apicid 0 vector 65"]
    tiny.close()


def halts(seen: Seen) -> None:
    """Halts that are over a moment after the wait for them: polling grows."""
    params = Params(avic=False, halt_poll_ns=2_000_000_000)
    tiny = Tiny(irqchip=True, params=params).long_mode(gigabytes=4)
    enable_apic(tiny)
    tiny.gate64(0x41, HANDLER)
    tiny.memory.write(HANDLER, bytes.fromhex("41c780b0000000 00000000 48cf"))
    tiny.load(BASE + bytes.fromhex("fb f4 ebfc"))
    with running(tiny.vcpu):
        msi = abi.kvm_msi(address_lo=0xFEE0_0000, data=0x41)
        until(lambda: tiny.vm.signal_msi(msi) >= 0 and texts(seen, "kvm_halt_poll_ns"))
    tiny.close()


def pauses(seen: Seen) -> None:
    """A guest that spins: each time it leaves for it, it may spin longer."""
    tiny = Tiny().long_mode()
    tiny.load(bytes.fromhex("b900000100 f390 e2fc f4"))  # mov ecx, 0x10000; again: pause; loop again; hlt
    tiny.run_to_halt()
    assert all(text.startswith("vcpu 0 old ") for text in texts(seen, "kvm_ple_window_update"))
    tiny.close()


def full_ring(seen: Seen) -> None:
    """Writes to more pages than a ring has room for; it is collected and reset, and the guest goes on."""
    tiny = Tiny(dirty_ring=4096).long_mode()
    tiny.slot(0, 0, tiny.memory.size, tiny.memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    # mov [rbx], eax; add rbx, 4096; loop; hlt
    tiny.load(bytes.fromhex("8903 4881c300100000 e2f5 f4"), rbx=0x8_0000, rcx=240, rax=1)
    assert tiny.run() == abi.KVM_EXIT_DIRTY_RING_FULL
    assert texts(seen, "kvm_dirty_ring_exit") == ["vcpu 0"]
    tiny.vm.reset_dirty_rings()
    tiny.close()


def clocks(seen: Seen) -> None:
    """The guest enables its clock and writes its counter; userspace sets the time."""
    tiny = Tiny().long_mode()
    # wrmsr; mov ecx, IA32_TSC; mov eax, 1234; wrmsr; out 0x80, al
    tiny.load(
        bytes.fromhex("0f30 b910000000 b8d2040000 31d2 0f30 e680"),
        rcx=abi.MSR_KVM_SYSTEM_TIME_NEW,
        rax=DATA | 1,
        rdx=0,
    )
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.vm.set_clock(abi.kvm_clock_data(clock=5_000_000_000))
    tiny.close()


def memory(seen: Seen) -> None:
    """A range becomes private; memory goes that a guest used."""
    with softkvm.open() as kvm, kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM) as vm:
        vm.set_memory_attributes(abi.kvm_memory_attributes(address=0x1000, size=0x2000, attributes=8))
    tiny = Tiny().long_mode()
    tiny.load(b"\xf4")
    tiny.run_to_halt()
    tiny.vm.host_unmapped(tiny.memory.address, 0x1000)
    tiny.close()


def missing_page(seen: Seen) -> None:
    """A page that is not there: the guest is told, touches it again, and is told when it has come."""
    provider = Provider(SIZE)
    tiny = Tiny(irqchip=True).long_mode(gigabytes=4)
    # The handler of #PF touches the page again: sti; nop; mov al, [rbx]; add rsp, 8; iretq
    tiny.memory.write(PF, bytes.fromhex("fb 90 8a03 4883c408 48cf"))
    # The interrupt's: clear the token; acknowledge it; the EOI
    tiny.memory.write(
        INT,
        bytes.fromhex(
            "505152 c7042504900000 00000000 b9074d564b b801000000 31d2 0f30 b9b000e0fe c701 00000000 5a5958 48cf"
        ),
    )
    for vector, handler in ((14, PF), (2, NMI), (VECTOR, INT)):
        tiny.gate64(vector, handler)
    enable_apic(tiny)
    tiny.slot(1, GPA, SIZE, provider.memory.address)
    tiny.load(bytes.fromhex("fb 90 8a03 e610 f4"), rbx=GPA)
    enable_async_pf(tiny)
    with running(tiny.vcpu) as run:
        until(lambda: texts(seen, "kvm_async_pf_repeated_fault"))
        provider.provide(0, 0x5A)
        assert run.wait() is None
    provider.uffd.close()
    tiny.close()


def avic(seen: Seen) -> None:
    """What the processor leaves to KVM, messages to a running guest, and an inhibition."""
    machine = Machine()
    machine.load(BASE + store(0x380, 0) + store(ICR + 0x10, 7 << 24) + store(ICR, 0x4051) + b"\xfb\xeb\xfe", rbx=0)
    with running(machine.vcpu):
        until(lambda: texts(seen, "kvm_avic_incomplete_ipi"))
        until(lambda: machine.vcpu.mode == IN_GUEST_MODE and machine.msi(0x51) and texts(seen, "kvm_avic_doorbell"))
        machine.vcpu.kick()
    machine.vcpu.set_guest_debug(abi.kvm_guest_debug(control=abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_BLOCKIRQ))
    machine.close()


def hyperv(seen: Seen) -> None:
    """Hypercalls, sources, timers and the debugger's registers."""
    with contextlib.ExitStack() as stack:
        kvm = stack.enter_context(softkvm.open())
        hv = HypervGuest(lambda **options: stack.enter_context(Guest(kvm, **options)))
        hv.enable_hypercalls()
        hv.enable_apic()
        hv.fast(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, abi.HV_FLUSH_ALL_PROCESSORS, 0)
        hv.slow(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, 0, 0, abi.HV_GENERIC_SET_SPARSE_4K, 1, 1, var=1)
        hv.fast(abi.HVCALL_SEND_IPI, 0x40, 1)
        hv.slow(abi.HVCALL_SEND_IPI_EX, 0x40, abi.HV_GENERIC_SET_SPARSE_4K, 1, 1, var=1)
        # A source that a GSI is routed to, its interrupt, and its end.
        entry = abi.kvm_irq_routing_entry(gsi=30, type=abi.KVM_IRQ_ROUTING_HV_SINT)
        entry.u.hv_sint.vcpu, entry.u.hv_sint.sint = 0, 2
        hv.guest.vm.set_gsi_routing([entry])
        hv.wrmsr(abi.HV_X64_MSR_SINT0 + 2, 0x70)
        hv.wrmsr(abi.HV_X64_MSR_SINT0 + 3, 0x71)
        for vector in (0x40, 0x70, 0x71):
            hv.handler(vector, bytes.fromhex("b970000040 31c0 31d2 0f30 48cf"))  # the EOI's register; iretq
        hv.guest.vm.irq_line(30, 1)
        hv.execute("fb 90 90 fa")
        # A timer that has expired, and a periodic one.
        hv.wrmsr(abi.HV_X64_MSR_SIMP, MESSAGES | 1)
        sint = 3 << abi.HV_STIMER_SINT_SHIFT
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT, 1)
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG, sint | abi.HV_STIMER_ENABLE)
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_COUNT + 2, 10_000)
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG + 2, sint | abi.HV_STIMER_PERIODIC | abi.HV_STIMER_ENABLE)
        until(lambda: hv.execute("90") and texts(seen, "kvm_hv_stimer_callback"))
        hv.wrmsr(abi.HV_X64_MSR_STIMER0_CONFIG + 2, 0)
        hv.wrmsr(abi.HV_X64_MSR_SYNDBG_SEND_BUFFER, 0x5000)
        assert hv.rdmsr(abi.HV_X64_MSR_SYNDBG_SEND_BUFFER) == 0x5000


def xen(seen: Seen) -> None:
    """A guest that calls what takes Xen for its hypervisor."""
    tiny = Tiny().long_mode()
    tiny.vm.xen_hvm_config(abi.kvm_xen_hvm_config(msr=0x4000_0200, flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL))
    # vmmcall; hlt
    tiny.load(bytes.fromhex("0f01d9 f4"), rax=0x3F, rdi=1, rsi=2, rdx=3, r10=4, r8=5, r9=6)
    assert tiny.run() == abi.KVM_EXIT_XEN
    assert texts(seen, "kvm_xen_hypercall") == ["cpl 0 nr 0x3f a0 0x1 a1 0x2 a2 0x3 a3 0x4 a4 0x5 a5 6"]
    tiny.close()


Scenario = Callable[[Seen], None]
SCENARIOS: Final[dict[Scenario, tuple[str, ...]]] = {
    instructions: (
        "kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_fpu", "kvm_page_fault", "kvm_cpuid", "kvm_pio", "kvm_msr",
        "kvm_cr", "kvm_hypercall", "kvm_mmio", "kvm_emulate_insn", "kvm_inj_exception",
    ),
    interrupts: (
        "kvm_set_irq", "kvm_ioapic_set_irq", "kvm_pic_set_irq", "kvm_msi_set_irq", "kvm_apic", "kvm_apic_ipi",
        "kvm_apic_accept_irq", "kvm_inj_virq", "kvm_eoi", "kvm_ack_irq", "kvm_vcpu_wakeup",
    ),
    eoi_in_memory: ("kvm_pv_eoi",),
    halts: ("kvm_halt_poll_ns",),
    pauses: ("kvm_ple_window_update",),
    full_ring: ("kvm_dirty_ring_push", "kvm_dirty_ring_exit", "kvm_dirty_ring_reset"),
    clocks: ("kvm_pvclock_update", "kvm_write_tsc_offset", "kvm_update_master_clock"),
    memory: ("kvm_vm_set_mem_attributes", "kvm_unmap_hva_range"),
    missing_page: (
        "kvm_try_async_get_page", "kvm_async_pf_not_present", "kvm_async_pf_repeated_fault", "kvm_async_pf_completed",
        "kvm_async_pf_ready",
    ),
    avic: (
        "kvm_apicv_inhibit_changed", "kvm_apicv_accept_irq", "kvm_avic_incomplete_ipi", "kvm_avic_unaccelerated_access",
        "kvm_avic_doorbell",
    ),
    hyperv: (
        "kvm_hv_hypercall", "kvm_hv_hypercall_done", "kvm_hv_flush_tlb", "kvm_hv_flush_tlb_ex", "kvm_hv_send_ipi",
        "kvm_hv_send_ipi_ex", "kvm_hv_synic_set_msr", "kvm_hv_synic_set_irq", "kvm_hv_synic_send_eoi",
        "kvm_hv_notify_acked_sint", "kvm_hv_stimer_set_config", "kvm_hv_stimer_set_count",
        "kvm_hv_stimer_start_one_shot", "kvm_hv_stimer_start_periodic", "kvm_hv_stimer_callback",
        "kvm_hv_stimer_expiration", "kvm_hv_stimer_cleanup", "kvm_hv_syndbg_set_msr", "kvm_hv_syndbg_get_msr",
    ),
    xen: ("kvm_xen_hypercall",),
}  # fmt: skip


def test_every_tracepoint_is_one_that_some_guest_makes_happen() -> None:
    named = [name for names in SCENARIOS.values() for name in names]
    assert sorted(named) == sorted(tracepoint.event.name for tracepoint in TRACEPOINTS)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_guest_makes_tracepoints_happen(scenario: Scenario) -> None:
    names = SCENARIOS[scenario]
    with traced(*names) as seen:
        scenario(seen)
    assert set(names) == {name for name, _, _ in seen}
    assert all(text for _, text, _ in seen)
