# SPDX-License-Identifier: Apache-2.0
"""The pass-through to a real /dev/kvm, by a tiny real-mode guest; skipped with the reason where there is none."""

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.threads import running, until

import softkvm
from softkvm import abi, api

MEMORY_SIZE = 0x10000
CODE = 0x1000


class Tiny:
    """One vCPU in real mode with 64 KiB of memory."""

    def __init__(self, kvm: api.Kvm) -> None:
        self.kvm = kvm
        self.vm = kvm.create_vm()
        if self.vm.check_extension(abi.KVM_CAP_SET_TSS_ADDR):
            self.vm.set_tss_addr(0xFFFBD000)
        self.memory = mmap.mmap(-1, MEMORY_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.set_region(0)
        self.vcpu = self.vm.create_vcpu(0)

    def set_region(self, flags: int) -> None:
        """Register the memory as slot 0."""
        self.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=0, flags=flags, guest_phys_addr=0, memory_size=MEMORY_SIZE, userspace_addr=self.address
            )
        )

    def load(self, code: bytes) -> None:
        """Put *code* where the vCPU will start."""
        self.memory[CODE : CODE + len(code)] = code
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(abi.kvm_regs(rip=CODE, rflags=2, rsp=0x8000))


@pytest.fixture
def kvm() -> Iterator[api.Kvm]:
    if not os.path.exists("/dev/kvm"):
        pytest.skip("there is no /dev/kvm")
    try:
        device = softkvm.open("/dev/kvm")
    except OSError as error:
        pytest.skip(f"/dev/kvm may not be opened: {error}")
    with device:
        yield device


@pytest.fixture
def tiny(kvm: api.Kvm) -> Iterator[Tiny]:
    guest = Tiny(kvm)
    yield guest
    guest.vcpu.close()
    guest.vm.close()


def test_opening_a_file_that_is_no_kvm_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a KVM device") as caught:
        softkvm.open("/dev/null")
    assert caught.value.errno in (errno.ENOTTY, errno.EINVAL)
    with pytest.raises(FileNotFoundError):
        softkvm.open(tmp_path / "kvm")


def test_system_requests(kvm: api.Kvm) -> None:
    assert kvm.get_api_version() == 12
    assert kvm.get_vcpu_mmap_size() >= ctypes.sizeof(abi.kvm_run)
    assert kvm.check_extension(abi.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(9999) == 0
    assert {entry.function for entry in kvm.get_supported_cpuid()} >= {0, 1, 0x80000000, 0x40000000}
    assert {0x174, 0xC0000081} <= set(kvm.get_msr_index_list())  # SYSENTER_CS, STAR
    features = kvm.get_msr_feature_index_list()
    assert len(kvm.get_msrs(features[:1])) == len(features[:1])


def test_real_mode_guest_does_port_io_and_halts(tiny: Tiny) -> None:
    tiny.load(bytes.fromhex("bae900 b041 ee ec fec0 ee f4"))  # mov dx,0xe9; mov al,'A'; out; in al,dx; inc al; out; hlt
    run = tiny.vcpu.kvm_run
    tiny.vcpu.run()
    assert run.exit_reason == abi.KVM_EXIT_IO
    assert (run.io.direction, run.io.size, run.io.port, run.io.count) == (abi.KVM_EXIT_IO_OUT, 1, 0xE9, 1)
    assert tiny.vcpu.shared[run.io.data_offset] == ord("A")
    tiny.vcpu.run()
    assert (run.exit_reason, run.io.direction) == (abi.KVM_EXIT_IO, abi.KVM_EXIT_IO_IN)
    tiny.vcpu.shared[run.io.data_offset] = ord("x")
    tiny.vcpu.run()
    assert tiny.vcpu.shared[run.io.data_offset] == ord("y")
    tiny.vcpu.run()
    assert run.exit_reason == abi.KVM_EXIT_HLT
    assert tiny.vcpu.get_regs().rip == CODE + 11


def test_access_outside_memory_is_an_mmio_exit(tiny: Tiny) -> None:
    # mov ax,0x2000; mov ds,ax; mov byte [0x10],0x5a; mov al,[0x11]; hlt
    tiny.load(bytes.fromhex("b80020 8ed8 c60610005a a01100 f4"))
    run = tiny.vcpu.kvm_run
    tiny.vcpu.run()
    assert run.exit_reason == abi.KVM_EXIT_MMIO
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write, run.mmio.data[0]) == (0x20010, 1, 1, 0x5A)
    tiny.vcpu.run()
    assert (run.exit_reason, run.mmio.phys_addr, run.mmio.is_write) == (abi.KVM_EXIT_MMIO, 0x20011, 0)
    run.mmio.data[0] = 0x77
    tiny.vcpu.run()
    assert run.exit_reason == abi.KVM_EXIT_HLT
    assert tiny.vcpu.get_regs().rax & 0xFF == 0x77


def test_dirty_log_names_the_written_page(tiny: Tiny) -> None:
    tiny.set_region(abi.KVM_MEM_LOG_DIRTY_PAGES)
    tiny.load(bytes.fromhex("c606003001 f4"))  # mov byte [0x3000],1; hlt
    tiny.vm.get_dirty_log(0)
    tiny.vcpu.run()
    log = tiny.vm.get_dirty_log(0)
    assert len(log) == 8
    assert int.from_bytes(log, "little") == 1 << 3


def test_kick_ends_a_run_on_another_thread(tiny: Tiny) -> None:
    tiny.load(bytes.fromhex("ebfe"))  # jmp $
    outcomes: list[str] = []

    def spin() -> None:
        for _ in range(3):
            try:
                tiny.vcpu.run()
                outcomes.append(f"exit {tiny.vcpu.kvm_run.exit_reason}")
            except InterruptedError:
                outcomes.append("interrupted")

    with running(tiny.vcpu, spin) as other:
        while len(outcomes) < 3:
            ended = len(outcomes)
            time.sleep(0.02)
            tiny.vcpu.kick()
            until(lambda before=ended: len(outcomes) > before)  # type: ignore[misc]
        other.wait()
    assert outcomes == ["interrupted"] * 3


def test_kick_before_run_is_not_lost(tiny: Tiny) -> None:
    tiny.load(b"\xf4")
    tiny.vcpu.kick()
    tiny.vcpu.kick()
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert tiny.vcpu.kvm_run.immediate_exit == 0
    tiny.vcpu.run()
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_HLT


def test_immediate_exit_stays_set_until_the_client_clears_it(tiny: Tiny) -> None:
    tiny.load(b"\xf4")
    tiny.vcpu.kvm_run.immediate_exit = 1
    for _ in range(2):
        with pytest.raises(InterruptedError):
            tiny.vcpu.run()
    tiny.vcpu.kick()
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert tiny.vcpu.kvm_run.immediate_exit == 1


def test_state_round_trips(tiny: Tiny) -> None:
    vcpu = tiny.vcpu
    vcpu.set_cpuid2(tiny.kvm.get_supported_cpuid())
    assert len(vcpu.get_cpuid2()) > 10
    regs = abi.kvm_regs(rax=1, r15=0xFFFF_FFFF_FFFF_FFFF, rflags=2)
    vcpu.set_regs(regs)
    assert bytes(vcpu.get_regs()) == bytes(regs)
    assert vcpu.set_msrs({0x174: 0x10, 0x175: 0x1234}) == 2
    assert vcpu.get_msrs([0x174, 0x175]) == [0x10, 0x1234]
    fpu = vcpu.get_fpu()
    fpu.xmm[15][0] = 9
    vcpu.set_fpu(fpu)
    assert vcpu.get_fpu().xmm[15][0] == 9
    assert vcpu.get_xcrs().nr_xcrs == 1
    vcpu.set_xsave(vcpu.get_xsave())
    events = vcpu.get_vcpu_events()
    events.flags = 0
    vcpu.set_vcpu_events(events)
    debugregs = vcpu.get_debugregs()
    debugregs.db[0] = 0x1000
    vcpu.set_debugregs(debugregs)
    assert vcpu.get_debugregs().db[0] == 0x1000
    assert vcpu.get_tsc_khz() > 0
    assert vcpu.translate(0x1234).physical_address == 0x1234


def test_irqchip_and_pit_state(kvm: api.Kvm) -> None:
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        chip = vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
        assert chip.chip.ioapic.base_address == 0xFEC00000
        vm.set_irqchip(chip)
        vm.set_pit2(vm.get_pit2())
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_lapic(vcpu.get_lapic())
            assert vcpu.get_mp_state().mp_state == abi.KVM_MP_STATE_RUNNABLE
            assert vm.irq_line_status(4, 1) <= 1
            vm.irq_line(4, 0)
            entry = abi.kvm_irq_routing_entry(gsi=5, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
            entry.u.irqchip.irqchip = abi.KVM_IRQCHIP_IOAPIC
            entry.u.irqchip.pin = 5
            vm.set_gsi_routing([entry])
            clock = vm.get_clock()
            assert clock.clock > 0


def test_bad_arguments_raise_the_documented_errno(kvm: api.Kvm) -> None:
    with kvm.create_vm() as vm:
        with pytest.raises(OSError) as caught:
            vm.create_vcpu(1 << 20)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError) as caught:
            vm.get_dirty_log(3)
        assert caught.value.errno in (errno.ENOENT, errno.EINVAL)
        vcpu = vm.create_vcpu(0)
        with pytest.raises(OSError) as caught:
            vm.create_vcpu(0)
        assert caught.value.errno == errno.EEXIST
        vcpu.close()
        vcpu.close()
