# SPDX-License-Identifier: Apache-2.0
"""Memory slots (KVM API 4.35 KVM_SET_USER_MEMORY_REGION)."""

import ctypes
import errno
import gc
import mmap
from collections.abc import Callable, Iterator

import pytest
from tests.support.conformance import CODE, PAGE, Guest, describe, refused

from softkvm import abi, api

SIZE = 16 * PAGE
GPA = 0x40_0000


@pytest.fixture
def vm(kvm: api.Kvm) -> Iterator[api.Vm]:
    with kvm.create_vm() as machine:
        yield machine


@pytest.fixture
def hva() -> int:
    memory = mmap.mmap(-1, 4 * SIZE)
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def region(hva: int, **fields: int) -> abi.kvm_userspace_memory_region:
    values = {"slot": 1, "guest_phys_addr": GPA, "memory_size": SIZE, "userspace_addr": hva, **fields}
    return abi.kvm_userspace_memory_region(**values)


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 1 << 5},
        {"flags": 0xFFFF_FFFF},
        {"memory_size": SIZE + 1},
        {"memory_size": PAGE // 2},
        {"guest_phys_addr": GPA + 1},
        {"guest_phys_addr": GPA + 0x800},
        {"slot": 0x7FFF},
        {"slot": 0xFFFF},
        {"slot": 7 << 16},
        {"guest_phys_addr": (1 << 64) - PAGE},
        {"guest_phys_addr": (1 << 64) - SIZE},
        {"guest_phys_addr": 1 << 52},
        {"memory_size": 1 << 44},
        {"userspace_addr": 0xFFFF_8000_0000_0000},
    ],
    ids=str,
)
def test_impossible_slots_are_einval(vm: api.Vm, hva: int, fields: dict[str, int]) -> None:
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, **fields)))
    vm.set_user_memory_region(region(hva))  # and nothing is in the way


def test_unaligned_host_addresses_are_einval(vm: api.Vm, hva: int) -> None:
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva + 1)))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva + 0x200)))


def test_the_number_of_slots_is_the_first_bad_slot(kvm: api.Kvm, vm: api.Vm, hva: int) -> None:
    slots = kvm.check_extension(abi.KVM_CAP_NR_MEMSLOTS)
    vm.set_user_memory_region(region(hva, slot=slots - 1))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, slot=slots, guest_phys_addr=0)))


def test_address_spaces_that_do_not_exist_are_einval(kvm: api.Kvm, vm: api.Vm, hva: int) -> None:
    spaces = kvm.check_extension(abi.KVM_CAP_MULTI_ADDRESS_SPACE) or 1
    vm.set_user_memory_region(region(hva, slot=1 | (spaces - 1) << 16))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, slot=1 | spaces << 16)))
    refused(errno.EINVAL, lambda: vm.get_dirty_log(1 | spaces << 16))


def test_deleting_what_is_not_there_is_einval(vm: api.Vm, hva: int) -> None:
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, memory_size=0)))
    vm.set_user_memory_region(region(hva))
    vm.set_user_memory_region(region(hva, memory_size=0))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, memory_size=0)))


@pytest.mark.parametrize("gpa", [GPA, GPA + SIZE - PAGE, GPA - SIZE + PAGE, GPA + PAGE])
def test_overlaps_are_eexist(vm: api.Vm, hva: int, gpa: int) -> None:
    vm.set_user_memory_region(region(hva))
    refused(errno.EEXIST, lambda: vm.set_user_memory_region(region(hva, slot=2, guest_phys_addr=gpa)))
    vm.set_user_memory_region(region(hva, slot=2, guest_phys_addr=GPA + SIZE))
    vm.set_user_memory_region(region(hva, slot=3, guest_phys_addr=GPA - SIZE))


def test_size_and_host_address_of_a_slot_stay(vm: api.Vm, hva: int) -> None:
    vm.set_user_memory_region(region(hva))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, memory_size=2 * SIZE)))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, memory_size=SIZE // 2)))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva + SIZE)))
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(hva, flags=abi.KVM_MEM_READONLY)))


def test_setting_a_slot_again_changes_nothing(vm: api.Vm, hva: int) -> None:
    vm.set_user_memory_region(region(hva))
    vm.set_user_memory_region(region(hva))


def test_a_slot_moves_but_not_onto_another(vm: api.Vm, hva: int) -> None:
    vm.set_user_memory_region(region(hva))
    vm.set_user_memory_region(region(hva, slot=2, guest_phys_addr=GPA + SIZE))
    refused(errno.EEXIST, lambda: vm.set_user_memory_region(region(hva, guest_phys_addr=GPA + SIZE)))
    vm.set_user_memory_region(region(hva, guest_phys_addr=GPA + 2 * SIZE))
    vm.set_user_memory_region(region(hva, slot=3))  # its old place is free


def test_two_slots_may_share_host_memory(vm: api.Vm, hva: int) -> None:
    vm.set_user_memory_region(region(hva))
    vm.set_user_memory_region(region(hva, slot=2, guest_phys_addr=GPA + SIZE))
    vm.set_user_memory_region(region(hva, memory_size=0))
    vm.set_user_memory_region(region(hva, slot=2, memory_size=0))


def test_guest_sees_memory_at_its_new_place(guest: Guest) -> None:
    guest.region(1, 0x20_0000, PAGE, offset=0x4000)
    guest.write(0x4000, b"\x5a")
    guest.long("8a042500002000 f4 8a042500003000 f4")  # mov al, [0x200000]; hlt; mov al, [0x300000]; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x5A
    guest.region(1, 0x30_0000, PAGE, offset=0x4000)
    guest.write(0x4000, b"\x77")
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x77


def test_a_deleted_slot_is_mmio_at_once(guest: Guest) -> None:
    guest.region(1, 0x20_0000, PAGE, offset=0x4000)
    # mov al, [0x200000]; hlt; mov al, [0x200000]; hlt
    guest.long("8a042500002000 f4 8a042500002000 f4")
    guest.expect(abi.KVM_EXIT_HLT)
    guest.region(1, 0x20_0000, 0, offset=0x4000)
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (0x20_0000, 1, 0)
    run.mmio.data[0] = 0x99
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x99


def test_mmio_becomes_memory_when_a_slot_appears(guest: Guest) -> None:
    # mov al, [0x200000]; hlt; mov al, [0x200000]; hlt
    guest.long("8a042500002000 f4 8a042500002000 f4")
    guest.expect(abi.KVM_EXIT_MMIO)
    guest.expect(abi.KVM_EXIT_HLT)
    guest.write(0x4000, b"\x42")
    guest.region(1, 0x20_0000, PAGE, offset=0x4000)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x42


def test_writes_to_a_read_only_slot_are_mmio_and_reads_are_not(guest: Guest) -> None:
    guest.region(1, 0x20_0000, PAGE, offset=0x4000, flags=abi.KVM_MEM_READONLY)
    guest.write(0x4000, b"\x11")
    # mov bl, [0x200000]; mov byte [0x200000], 0x22; mov cl, [0x200000]; hlt
    guest.long("8a1c2500002000 c6042500002000 22 8a0c2500002000 f4")
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write, run.mmio.data[0]) == (0x20_0000, 1, 1, 0x22)
    guest.expect(abi.KVM_EXIT_HLT)
    regs = guest.cpu.get_regs()
    assert (regs.rbx & 0xFF, regs.rcx & 0xFF, guest.memory[0x4000]) == (0x11, 0x11, 0x11)


@pytest.mark.parametrize("protection", [0, mmap.PROT_READ], ids=["none", "read"])
@pytest.mark.parametrize("code", ["8a042500002000", "c6042500002000 22"], ids=["load", "store"])
def test_host_memory_that_the_process_cannot_reach_is_efault_when_it_is_used(
    guest: Guest, device_differs: Callable[[str], None], protection: int, code: str
) -> None:
    hole = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), protection) == 0
    guest.vm.set_user_memory_region(
        abi.kvm_userspace_memory_region(slot=1, guest_phys_addr=0x20_0000, memory_size=PAGE, userspace_addr=address)
    )
    guest.long(bytes.fromhex(code) + b"\xf4")  # mov al, [0x200000] or mov byte [0x200000], 0x22; hlt
    if protection == mmap.PROT_READ and code.startswith("8a"):
        guest.expect(abi.KVM_EXIT_HLT)
    else:
        error = 0
        try:
            guest.run()
        except OSError as refusal:
            error = refusal.errno or -1
        if not error and guest.kvm_run.exit_reason == abi.KVM_EXIT_MMIO:
            device_differs("an access that KVM emulates (here: all of them) takes unreachable memory for MMIO")
        assert error == errno.EFAULT, describe(guest.kvm_run)
        assert guest.cpu.get_regs().rip == CODE, "the instruction has not happened"
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 3) == 0
        guest.expect(abi.KVM_EXIT_HLT)


# --- memory that a slot holds ----------------------------------------------------------------------


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_memory_is_held_until_its_slot_is_deleted(vm: api.Vm) -> None:
    memory = mmap.mmap(-1, SIZE)
    hva = address_of(memory)
    vm.set_user_memory_region(region(hva), memory)
    with pytest.raises(BufferError):
        memory.close()
    vm.set_user_memory_region(region(hva, flags=abi.KVM_MEM_LOG_DIRTY_PAGES))
    vm.set_user_memory_region(region(hva, guest_phys_addr=2 * GPA))
    vm.set_user_memory_region(region(hva, guest_phys_addr=2 * GPA))  # nothing changes
    with pytest.raises(BufferError):
        memory.close()
    vm.set_user_memory_region(region(hva, memory_size=0))
    memory.close()


def test_memory_may_be_held_later_and_by_several_slots(vm: api.Vm) -> None:
    memory = mmap.mmap(-1, SIZE)
    hva = address_of(memory)
    vm.set_user_memory_region(region(hva))
    vm.set_user_memory_region(region(hva), memory)
    vm.set_user_memory_region(region(hva, slot=2, guest_phys_addr=2 * GPA), memory)
    vm.set_user_memory_region(region(hva, memory_size=0))
    with pytest.raises(BufferError):
        memory.close()
    vm.set_user_memory_region(region(hva, slot=2, memory_size=0))
    memory.close()


def test_refused_memory_is_not_held(vm: api.Vm) -> None:
    memory = mmap.mmap(-1, SIZE)
    refused(errno.EINVAL, lambda: vm.set_user_memory_region(region(address_of(memory), flags=1 << 5), memory))
    memory.close()


def test_closing_the_vm_lets_its_memory_go(kvm: api.Kvm) -> None:
    memory = mmap.mmap(-1, SIZE)
    vm = kvm.create_vm()
    vm.set_user_memory_region(region(address_of(memory)), memory)
    vm.close()
    memory.close()


def test_held_memory_outlives_its_names(guest: Guest) -> None:
    memory = mmap.mmap(-1, PAGE)
    memory[0] = 0x5A
    guest.vm.set_user_memory_region(
        abi.kvm_userspace_memory_region(
            slot=1, guest_phys_addr=0x20_0000, memory_size=PAGE, userspace_addr=address_of(memory)
        ),
        memory,
    )
    del memory
    gc.collect()
    guest.long("8a042500002000 f4")  # mov al, [0x200000]; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x5A
