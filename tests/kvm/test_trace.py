# SPDX-License-Identifier: Apache-2.0
"""KVM's tracepoints have the kernel's names and fields, a guest shows each, and what is off is not there."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from types import FunctionType

import pytest
from tests.support.conformance import Guest
from tests.support.hyperv import HypervGuest
from tests.support.tiny import CODE, DATA, Tiny
from tests.support.tracing import texts, traced

import softkvm
from softkvm import abi
from softkvm.kvm import TRACEPOINTS, Params, trace
from softkvm.kvm.state import BLOCKING
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.exits import EXIT_HANDLERS
from softkvm.kvm.x86.vcpu import Vcpu
from softkvm.trace.cformat import compile_format

#: Tracepoints of Linux 6.12 with their fields, as /sys/kernel/tracing/events/kvm/*/format has them
#: (include/trace/events/kvm.h and arch/x86/kvm/trace.h).
LINUX = {
    "kvm_userspace_exit": "reason errno",
    "kvm_vcpu_wakeup": "ns waited valid",
    "kvm_set_irq": "gsi level irq_source_id",
    "kvm_ioapic_set_irq": "e pin coalesced",
    "kvm_msi_set_irq": "address data",
    "kvm_ack_irq": "irqchip pin",
    "kvm_mmio": "type len gpa val",
    "kvm_fpu": "load",
    "kvm_try_async_get_page": "gva gfn",
    "kvm_async_pf_repeated_fault": "gva gfn",
    "kvm_async_pf_not_present": "token gva",
    "kvm_async_pf_ready": "token gva",
    "kvm_async_pf_completed": "address gva",
    "kvm_halt_poll_ns": "grow vcpu_id new old",
    "kvm_dirty_ring_push": "index dirty_index reset_index slot offset",
    "kvm_dirty_ring_reset": "index dirty_index reset_index",
    "kvm_dirty_ring_exit": "vcpu_id",
    "kvm_vm_set_mem_attributes": "start end attr",
    "kvm_unmap_hva_range": "start end",
    "kvm_entry": "vcpu_id rip immediate_exit",
    "kvm_exit": "exit_reason guest_rip isa info1 info2 intr_info error_code vcpu_id",
    "kvm_hypercall": "nr a0 a1 a2 a3",
    "kvm_xen_hypercall": "cpl nr a0 a1 a2 a3 a4 a5",
    "kvm_pio": "rw port size count val",
    "kvm_cpuid": "function index rax rbx rcx rdx found used_max_basic",
    "kvm_apic": "rw reg val",
    "kvm_inj_virq": "vector soft reinjected",
    "kvm_inj_exception": "exception has_error error_code reinjected",
    "kvm_page_fault": "vcpu_id guest_rip fault_address error_code",
    "kvm_msr": "write ecx data exception",
    "kvm_cr": "rw cr val",
    "kvm_pic_set_irq": "chip pin elcr imr coalesced",
    "kvm_apic_ipi": "icr_low dest_id",
    "kvm_apic_accept_irq": "apicid dm tm vec",
    "kvm_eoi": "apicid vector",
    "kvm_pv_eoi": "apicid vector",
    "kvm_emulate_insn": "rip csbase len insn flags failed",
    "kvm_write_tsc_offset": "vcpu_id previous_tsc_offset next_tsc_offset",
    "kvm_update_master_clock": "use_master_clock host_clock offset_matched",
    "kvm_ple_window_update": "vcpu_id new old",
    "kvm_pvclock_update": "vcpu_id version tsc_timestamp system_time tsc_to_system_mul tsc_shift flags",
    "kvm_apicv_inhibit_changed": "reason set inhibits",
    "kvm_apicv_accept_irq": "apicid dm tm vec",
    "kvm_avic_incomplete_ipi": "vcpu icrh icrl id index",
    "kvm_avic_unaccelerated_access": "vcpu offset ft rw vec",
    "kvm_avic_doorbell": "vcpuid apicid",
    "kvm_hv_hypercall": "rep_cnt rep_idx ingpa outgpa code var_cnt fast",
    "kvm_hv_hypercall_done": "result",
    "kvm_hv_notify_acked_sint": "vcpu_id sint",
    "kvm_hv_synic_set_irq": "vcpu_id sint vector ret",
    "kvm_hv_synic_send_eoi": "vcpu_id sint vector ret",
    "kvm_hv_synic_set_msr": "vcpu_id msr data host",
    "kvm_hv_stimer_set_config": "vcpu_id timer_index config host",
    "kvm_hv_stimer_set_count": "vcpu_id timer_index count host",
    "kvm_hv_stimer_start_periodic": "vcpu_id timer_index time_now exp_time",
    "kvm_hv_stimer_start_one_shot": "vcpu_id timer_index time_now count",
    "kvm_hv_stimer_callback": "vcpu_id timer_index",
    "kvm_hv_stimer_expiration": "vcpu_id timer_index direct msg_send_result",
    "kvm_hv_stimer_cleanup": "vcpu_id timer_index",
    "kvm_hv_flush_tlb": "processor_mask address_space flags guest_mode",
    "kvm_hv_flush_tlb_ex": "valid_bank_mask format address_space flags guest_mode",
    "kvm_hv_send_ipi": "vector processor_mask",
    "kvm_hv_send_ipi_ex": "vector format valid_bank_mask",
    "kvm_hv_syndbg_set_msr": "vcpu_id vp_index msr data",
    "kvm_hv_syndbg_get_msr": "vcpu_id vp_index msr data",
}


@pytest.mark.parametrize("name", [tracepoint.event.name for tracepoint in TRACEPOINTS])
def test_names_and_fields_are_the_kernels(name: str) -> None:
    event = TRACEPOINTS[name].event
    assert event.system == "kvm" and " ".join(event.names) == LINUX[name]


def test_every_tracepoint_of_the_table_is_there() -> None:
    assert {tracepoint.event.name for tracepoint in TRACEPOINTS} == set(LINUX)


def test_every_event_prints_itself() -> None:
    for tracepoint in TRACEPOINTS:
        values = tuple(bytes(field.size) if field.array else 0 for field in tracepoint.event.fields)
        assert compile_format(tracepoint.event.print_fmt, tracepoint.event.names)(values)
        tracepoint.event.unpack(tracepoint.event.pack(1, values))


def run_until_kicked(tiny: Tiny) -> None:
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()


# --- nothing is there while all is off -----------------------------------------------------------------


def functions() -> list[FunctionType]:
    """The functions that probes are put into."""
    found = []
    for tracepoint in TRACEPOINTS:
        for probe in tracepoint._probes:
            function = probe.function
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            assert isinstance(function, FunctionType)
            found.append(function)
    return found


def test_while_all_is_off_every_function_has_its_own_code() -> None:
    before = [function.__code__ for function in functions()]
    assert all(code.co_name != "_way_in" for code in before)
    with traced("kvm:*"):
        assert all(function.__code__.co_name == "_way_in" for function in functions())
    assert all(new.__code__ is old for new, old in zip(functions(), before, strict=True))


def test_one_tracepoint_puts_nothing_into_the_way_of_others() -> None:
    handlers = {code: handler.__code__ for code, handler in EXIT_HANDLERS.items() if isinstance(handler, FunctionType)}
    with traced("kvm_hypercall"):
        assert Vcpu.arch_enter_guest.__code__.co_name != "_way_in"
        changed = {code for code, old in handlers.items() if EXIT_HANDLERS[code].__code__ is not old}
    assert not changed


# --- guests show them ----------------------------------------------------------------------------------


def test_entry_and_exit_have_where_the_guest_stood_and_why_it_left() -> None:
    tiny = Tiny().long_mode()
    tiny.load(b"\x0f\xa2\xf4", rax=0, rcx=0)  # cpuid; hlt
    with traced("kvm_entry", "kvm_exit", "kvm_cpuid", "kvm_page_fault") as seen:
        tiny.run_to_halt()
    exits = [text for text in texts(seen, "kvm_exit") if "npf" not in text]
    assert exits[0].startswith(f"vcpu 0 reason cpuid rip {CODE:#x} info1 0x0000000000000000 ")
    assert exits[1].startswith(f"vcpu 0 reason hlt rip {CODE + 2:#x} ")
    assert texts(seen, "kvm_entry")[0] == f"vcpu 0, rip {CODE:#x}"
    assert len(texts(seen, "kvm_entry")) == len(texts(seen, "kvm_exit"))
    fault = next(text for text in texts(seen, "kvm_page_fault"))
    assert fault.startswith(f"vcpu 0 rip {CODE:#x} address 0x00000000000")
    leaf = next(values for name, _, values in seen if name == "kvm_cpuid")
    regs = tiny.vcpu.get_regs()
    assert leaf == (0, 0, regs.rax, regs.rbx, regs.rcx, regs.rdx, True, False)
    tiny.close()


def test_port_io_has_port_size_and_value() -> None:
    tiny = Tiny().real_mode()
    tiny.load(
        bytes.fromhex("b0 41 e6 80  e5 81  be 00 90 b9 03 00 ba 10 03 f3 6e f4")
    )  # out 0x80,al; in ax,0x81; rep outsb
    tiny.memory.write(0x9000, b"xyz")
    with traced("kvm_pio", "kvm_userspace_exit") as seen:
        assert tiny.run() == abi.KVM_EXIT_IO
        assert tiny.run() == abi.KVM_EXIT_IO
        tiny.vcpu.shared[4096:4098] = b"\x34\x12"
        assert tiny.run() == abi.KVM_EXIT_IO
        assert tiny.run() == abi.KVM_EXIT_HLT
    assert [text.strip() for text in texts(seen, "kvm_pio")] == [
        "pio_write at 0x80 size 1 count 1 val 0x41",
        "pio_read at 0x81 size 2 count 1 val 0x1234",
        "pio_write at 0x310 size 1 count 3 val 0x78 (...)",
    ]
    assert texts(seen, "kvm_userspace_exit") == ["reason KVM_EXIT_IO (2)"] * 3 + ["reason KVM_EXIT_HLT (5)"]
    tiny.close()


def test_mmio_is_told_of_when_it_is_asked_for_and_when_it_is_answered() -> None:
    tiny = Tiny().long_mode()
    tiny.load(b"\x89\x03\x8b\x0b\xf4", rbx=0x3000_0010, rax=0xCAFE)  # mov [rbx],eax; mov ecx,[rbx]; hlt
    with traced("kvm_mmio", "kvm_emulate_insn") as seen:
        assert tiny.run() == abi.KVM_EXIT_MMIO
        assert tiny.run() == abi.KVM_EXIT_MMIO
        tiny.vcpu.kvm_run.mmio.data[0] = 0x77
        tiny.run_to_halt()
    assert texts(seen, "kvm_mmio") == [
        "mmio write len 4 gpa 0x30000010 val 0xcafe",
        "mmio unsatisfied-read len 4 gpa 0x30000010 val 0x0",
        "mmio read len 4 gpa 0x30000010 val 0x77",
    ]
    assert texts(seen, "kvm_emulate_insn") == [f"0:{CODE:x}:89 03 (prot64)", f"0:{CODE + 2:x}:8b 0b (prot64)"]
    tiny.close()


def test_msr_and_control_register_accesses() -> None:
    tiny = Tiny().long_mode()
    # rdmsr; wrmsr; mov rax,cr4; mov cr4,rax; then an MSR that isn't there
    tiny.load(bytes.fromhex("0f 32 0f 30 0f 20 e0 0f 22 e0 b9 78 56 34 12 0f 32 f4"), rcx=0xC000_0080)
    tiny.gate64(13, 0x2000)
    tiny.memory.write(0x2000, b"\xf4")
    with traced("kvm_msr", "kvm_cr", "kvm_inj_exception") as seen:
        tiny.run_to_halt()
    efer = tiny.vcpu.get_sregs().efer
    cr4 = tiny.vcpu.get_sregs().cr4
    assert texts(seen, "kvm_msr") == [
        f"msr_read c0000080 = {efer:#x}",
        f"msr_write c0000080 = {efer:#x}",
        "msr_read 12345678 = 0x0 (#GP)",
    ]
    assert texts(seen, "kvm_cr") == [f"cr_read 4 = {cr4:#x}", f"cr_write 4 = {cr4:#x}"]
    assert texts(seen, "kvm_inj_exception") == ["#GP (0x0)"]
    tiny.close()


def test_an_interrupt_from_the_line_to_its_end() -> None:
    tiny = Tiny(irqchip=True, params=Params(avic=False)).long_mode()
    # the handler: EOI, then a hypercall, then it stops
    tiny.memory.write(0x2000, bytes.fromhex("31 c0 89 04 25 b0 00 e0 fe  b8 64 00 00 00 0f 01 d9 f4 eb fd"))
    tiny.gate64(0x41, 0x2000)
    # enable the APIC; wait
    tiny.load(bytes.fromhex("b8 ff 01 00 00 89 04 25 f0 00 e0 fe  fb f4 eb fd"))
    # mov [abs32] with a sign-extended address: the page of the APIC is at the end of 4 GiB
    write = tiny.memory.write
    write(0x40000 + 8 * 511, (0x41000 | 7).to_bytes(8, "little"))
    write(0x41000 + 8 * 511, (0x43000 | 7).to_bytes(8, "little"))
    write(0x43000 + 8 * 0x1F7, (0xFEE0_0000 | 0x87).to_bytes(8, "little"))
    chip = tiny.vm.get_irqchip(2)
    chip.chip.ioapic.redirtbl[5].bits = 0x41
    tiny.vm.set_irqchip(chip)
    pic = tiny.vm.get_irqchip(0)
    pic.chip.pic.imr = 0xFF
    tiny.vm.set_irqchip(pic)
    with traced("kvm:*") as seen:
        thread = threading.Thread(target=run_until_kicked, args=(tiny,))
        thread.start()
        end = time.monotonic() + 30
        while tiny.vcpu.mode != BLOCKING and time.monotonic() < end:
            time.sleep(0.001)
        tiny.vm.irq_line_status(5, 1)
        tiny.vm.irq_line_status(5, 0)
        while not texts(seen, "kvm_hypercall") and time.monotonic() < end:
            time.sleep(0.001)
        tiny.vcpu.kick()
        thread.join(30)
    assert texts(seen, "kvm_apic")[0] == "apic_write APIC_SPIV = 0x1ff"
    assert texts(seen, "kvm_set_irq") == ["gsi 5 level 1 source 0", "gsi 5 level 0 source 0"]
    assert texts(seen, "kvm_ioapic_set_irq") == ["pin 5 dst 0 vec 65 (Fixed|physical|edge)"]
    assert texts(seen, "kvm_pic_set_irq")[0] == "chip 0 pin 5 (edge|masked)"
    assert texts(seen, "kvm_apic_accept_irq") == ["apicid 0 vec 65 (Fixed|edge)"]
    assert texts(seen, "kvm_inj_virq") == ["IRQ 0x41"]
    assert texts(seen, "kvm_eoi") == ["apicid 0 vector 65"]
    assert texts(seen, "kvm_ack_irq") == ["irqchip IOAPIC pin 5"]
    assert texts(seen, "kvm_hypercall")[0].startswith("nr 0x64 a0 0x")
    assert texts(seen, "kvm_vcpu_wakeup")[0].startswith("wait time ")
    assert texts(seen, "kvm_userspace_exit") == ["reason restart (4)"]
    tiny.close()


def test_ipis_and_msis_name_their_destination() -> None:
    tiny = Tiny(irqchip=True, vcpus=2).long_mode()
    tiny.load(b"\x0f\x30\xf4", rcx=0x830, rax=0x0004_4042, rdx=0)  # wrmsr x2APIC ICR: to itself
    sregs = tiny.vcpu.get_sregs()
    sregs.apic_base |= 0xC00
    tiny.vcpu.set_sregs(sregs)
    with traced("kvm_apic_ipi", "kvm_apic", "kvm_msi_set_irq", "kvm_apic_accept_irq") as seen:
        tiny.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_1000, data=0x55))
        thread = threading.Thread(target=run_until_kicked, args=(tiny,))
        thread.start()
        end = time.monotonic() + 30
        while not texts(seen, "kvm_apic_ipi") and time.monotonic() < end:
            time.sleep(0.001)
        tiny.vcpu.kick()
        thread.join(30)
    assert texts(seen, "kvm_msi_set_irq") == ["dst 1 vec 85 (Fixed|physical|edge)"]
    assert texts(seen, "kvm_apic") == ["apic_write APIC_ICR = 0x44042"]
    assert texts(seen, "kvm_apic_ipi") == ["dst 0 vec 66 (Fixed|physical|assert|edge|self)"]
    tiny.close()


def test_userspaces_interrupt_is_one_that_is_given_again() -> None:
    """As with the kernel: KVM_INTERRUPT queues what looks like an interrupt whose delivery did not complete."""
    tiny = Tiny().real_mode()
    tiny.memory.write(4 * 0x20, (0x2000).to_bytes(4, "little"))
    tiny.memory.write(0x2000, b"\xf4")
    tiny.load(b"\x90\xf4", rflags=0x202)
    tiny.vcpu.interrupt(0x20)
    with traced("kvm_inj_virq") as seen:
        assert tiny.run() == abi.KVM_EXIT_HLT
    assert set(texts(seen, "kvm_inj_virq")) == {"IRQ 0x20 [reinjected]"}
    tiny.close()


def test_dirty_rings_tell_whose_they_are() -> None:
    tiny = Tiny(dirty_ring=4096).long_mode()
    tiny.slot(0, 0, tiny.memory.size, tiny.memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    tiny.load(b"\x89\x03\xf4", rbx=DATA, rax=1)  # mov [rbx],eax; hlt
    with traced("kvm_dirty_ring_*") as seen:
        tiny.run_to_halt()
        tiny.vm.reset_dirty_rings()
    assert f"slot 0 offset {DATA >> 12:#x}" in "".join(texts(seen, "kvm_dirty_ring_push"))
    assert all(text.startswith("ring 0: dirty 0x") for text in texts(seen, "kvm_dirty_ring_push"))
    assert texts(seen, "kvm_dirty_ring_reset")[0].startswith("ring 0: dirty 0x")
    tiny.close()


def test_clocks() -> None:
    tiny = Tiny(irqchip=True).long_mode()
    tiny.load(b"\x0f\x30\xf4", rcx=abi.MSR_KVM_SYSTEM_TIME_NEW, rax=DATA | 1, rdx=0)
    with traced("kvm_pvclock_update", "kvm_update_master_clock", "kvm_write_tsc_offset") as seen:
        tiny.vm.set_clock(abi.kvm_clock_data(clock=5_000_000_000))
        tiny.vcpu.set_msrs([(0x10, 12345)])
        thread = threading.Thread(target=run_until_kicked, args=(tiny,))
        thread.start()
        end = time.monotonic() + 30
        while not texts(seen, "kvm_pvclock_update") and time.monotonic() < end:
            time.sleep(0.001)
        tiny.vcpu.kick()
        thread.join(30)
    assert texts(seen, "kvm_update_master_clock") == ["masterclock 1 hostclock tsc offsetmatched 1"]
    assert texts(seen, "kvm_write_tsc_offset")[0].startswith("vcpu=0 prev=")
    assert texts(seen, "kvm_pvclock_update")[0].startswith("vcpu_id 0, pvclock { version ")
    tiny.close()


# --- on and off ----------------------------------------------------------------------------------------


def vmrun_of(thread: threading.Thread) -> object:
    """What the loop that a thread is in enters the guest with; None if it is in none now."""
    assert thread.ident is not None
    frame = sys._current_frames().get(thread.ident)
    while frame is not None and frame.f_code.co_name != "arch_enter_guest":
        frame = frame.f_back
    return None if frame is None else frame.f_locals["vmrun"]


def test_a_vcpu_that_runs_is_seen_from_the_moment_on_and_no_longer_than_wanted() -> None:
    tiny = Tiny(irqchip=True).long_mode()
    tiny.load(b"\x31\xc0\x31\xc9\x0f\xa2\xeb\xf8")  # cpuid again and again
    thread = threading.Thread(target=run_until_kicked, args=(tiny,))
    thread.start()
    end = time.monotonic() + 60
    try:
        for _ in range(3):
            with traced("kvm_exit") as seen:
                while len(seen) < 100 and time.monotonic() < end:
                    time.sleep(0.001)
            assert any("reason cpuid" in text for _, text, _ in seen)
            # The loop goes on with the processor's own VMRUN, by itself: nobody else wants anything of the vCPU.
            while vmrun_of(thread) != tiny.vcpu.cpu.vmrun and time.monotonic() < end:
                time.sleep(0.001)
            count, exits = len(seen), tiny.vcpu.exit_counts[V.EXIT_CPUID]  # the exit under way was told of yet
            while tiny.vcpu.exit_counts[V.EXIT_CPUID] < exits + 100 and time.monotonic() < end:
                time.sleep(0.001)
            assert vmrun_of(thread) in (tiny.vcpu.cpu.vmrun, None) and len(seen) == count
    finally:
        tiny.vcpu.kick()
        thread.join(30)
    tiny.close()


@pytest.mark.parametrize(
    ("events", "filters", "words"),
    [
        (["kvm_nothing"], [], "kvm_nothing: there is no such tracepoint"),
        (["kvm_exit"], ["nothing == 1"], "there is no field 'nothing'"),
        (["kvm_exit"], ["kvm_exit:exit_reason =="], "unexpected"),
    ],
)
def test_bad_choices_are_one_line(events: list[str], filters: list[str], words: str) -> None:
    with pytest.raises(trace.TraceError, match=words) as raised:
        trace.start(TRACEPOINTS, events, filters)
    assert "\n" not in str(raised.value)
    assert not any(tracepoint.enabled for tracepoint in TRACEPOINTS)


def test_halt_polling_tells_of_its_changes() -> None:
    tiny = Tiny(irqchip=True, params=Params(halt_poll_ns=200_000)).long_mode()
    with traced("kvm_halt_poll_ns") as seen:
        from softkvm.kvm import halt_poll

        halt_poll.adapt(tiny.vcpu, 50_000)
    assert texts(seen, "kvm_halt_poll_ns") == ["vcpu 0: halt_poll_ns 10000 (grow 0)"]
    tiny.close()


# --- Hyper-V -------------------------------------------------------------------------------------------


def test_hypercalls_of_hyperv() -> None:
    with contextlib.ExitStack() as stack:
        kvm = stack.enter_context(softkvm.open())
        guest = HypervGuest(lambda **options: stack.enter_context(Guest(kvm, **options)))
        guest.enable_hypercalls()
        seen = stack.enter_context(traced("kvm_hv_*"))
        guest.fast(abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, abi.HV_FLUSH_ALL_PROCESSORS, 0)
        guest.fast(abi.HVCALL_SEND_IPI, 0x40, 1)
    assert texts(seen, "kvm_hv_hypercall")[0].startswith("code 0x2 fast var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0x0 ")
    assert texts(seen, "kvm_hv_hypercall_done")[0] == "result 0x0"
    assert texts(seen, "kvm_hv_flush_tlb")[0].startswith("processor_mask 0x0 address_space 0x0 flags 0x1")
    assert texts(seen, "kvm_hv_send_ipi") == ["vector 40 processor_mask 0x1"]


def test_every_exit_has_a_name() -> None:
    event = TRACEPOINTS["kvm_exit"].event
    for code in EXIT_HANDLERS:
        text = event.printer((code & 0xFFFF_FFFF, 0, 2, 0, 0, 0, 0, 0))
        assert "reason 0x" not in text, f"{code:#x}"
    assert "reason idle-halt rip" in event.printer((V.EXIT_IDLE_HLT, 0, 2, 0, 0, 0, 0, 0))
    assert "reason invalid_guest_state" in event.printer((V.EXIT_ERR & 0xFFFF_FFFF, 0, 2, 0, 0, 0, 0, 0))
