# SPDX-License-Identifier: Apache-2.0
"""Private memory (KVM API 4.140 KVM_SET_USER_MEMORY_REGION2 to 4.143 KVM_PRE_FAULT_MEMORY; 7.37, 8.42).

A device offers what its kernel was configured for: a VM of software-protected memory, for one, seldom.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from tests.support.conformance import CODE, PAGE, Guest, refused

from softkvm import abi, api

GPA = 0x20_0000
SIZE = 16 * PAGE
KEEP_SIZE, PUNCH_HOLE = 1, 2
PRIVATE = abi.KVM_MEMORY_ATTRIBUTE_PRIVATE

#: mov al, [0x200000]; hlt; and mov byte [0x200000], 0x22; hlt
LOAD, STORE = "8a042500002000 f4", "c6042500002000 22 f4"


@pytest.fixture
def has(kvm: api.Kvm) -> Callable[[int], None]:
    """Skips where a capability is not there."""

    def check(cap: int) -> None:
        if not kvm.check_extension(cap):
            pytest.skip("this host's /dev/kvm has no such capability")

    return check


@pytest.fixture
def guest(kvm: api.Kvm) -> Iterator[Guest]:
    """A guest whose memory may be private."""
    if not kvm.check_extension(abi.KVM_CAP_VM_TYPES) >> abi.KVM_X86_SW_PROTECTED_VM & 1:
        pytest.skip("this host's /dev/kvm has no software-protected VMs")
    with Guest(kvm, type=abi.KVM_X86_SW_PROTECTED_VM) as made:
        yield made


@pytest.fixture
def shared() -> mmap.mmap:
    return mmap.mmap(-1, SIZE)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def region2(memory: mmap.mmap, **fields: int) -> abi.kvm_userspace_memory_region2:
    values = {"slot": 1, "guest_phys_addr": GPA, "memory_size": SIZE, "userspace_addr": address_of(memory), **fields}
    return abi.kvm_userspace_memory_region2(**values)


def create(vm: api.Vm, size: int = SIZE) -> int:
    return vm.create_guest_memfd(abi.kvm_create_guest_memfd(size=size))


def set_private(vm: api.Vm, address: int, size: int, attributes: int = PRIVATE) -> None:
    vm.set_memory_attributes(abi.kvm_memory_attributes(address=address, size=size, attributes=attributes))


def with_private(guest: Guest, shared: mmap.mmap, **fields: int) -> int:
    """Give the guest a slot at GPA with memory of either kind; returns the file's descriptor."""
    fd = create(guest.vm)
    guest.vm.set_user_memory_region2(region2(shared, flags=abi.KVM_MEM_GUEST_MEMFD, guest_memfd=fd, **fields), shared)
    return fd


def faults(guest: Guest) -> tuple[int, int, int]:
    """Run until a fault that KVM leaves to userspace; returns its flags, address and size."""
    refused(errno.EFAULT, guest.run)
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_MEMORY_FAULT
    fault = guest.kvm_run.memory_fault
    return fault.flags, fault.gpa, fault.size


# --- slots --------------------------------------------------------------------------------------------------


def test_a_region2_without_a_file_is_a_slot_like_others(
    make: Callable[..., Guest], has: Callable[[int], None], shared: mmap.mmap
) -> None:
    has(abi.KVM_CAP_USER_MEMORY2)
    guest = make()
    guest.vm.set_user_memory_region2(region2(shared), shared)
    guest.long(STORE)
    guest.expect(abi.KVM_EXIT_HLT)
    assert shared[0] == 0x22
    refused(errno.EEXIST, lambda: guest.vm.set_user_memory_region2(region2(shared, slot=2)))


@pytest.mark.parametrize("flags", [abi.KVM_MEM_GUEST_MEMFD, 1 << 3, 1 << 31])
def test_other_vms_have_no_slots_with_files(
    make: Callable[..., Guest], has: Callable[[int], None], device_differs: Callable[[str], None], shared: mmap.mmap,
    flags: int,
) -> None:  # fmt: skip
    has(abi.KVM_CAP_USER_MEMORY2)
    guest = make()
    if flags == abi.KVM_MEM_GUEST_MEMFD:
        device_differs("every VM may have a guest_memfd since Linux 6.18, whose memory may be shared")
    refused(errno.EINVAL, lambda: guest.vm.set_user_memory_region2(region2(shared, flags=flags)))
    old = abi.kvm_userspace_memory_region(
        slot=1, flags=flags, guest_phys_addr=GPA, memory_size=SIZE, userspace_addr=address_of(shared)
    )
    refused(errno.EINVAL, lambda: guest.vm.set_user_memory_region(old))


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": abi.KVM_MEM_GUEST_MEMFD | abi.KVM_MEM_LOG_DIRTY_PAGES},
        {"flags": abi.KVM_MEM_GUEST_MEMFD | abi.KVM_MEM_READONLY},
        {"guest_memfd_offset": 1},
        {"guest_memfd_offset": PAGE},  # the slot reaches beyond the file's end
        {"guest_memfd_offset": (1 << 64) - PAGE},
    ],
    ids=str,
)
def test_impossible_slots_with_a_file_are_einval(guest: Guest, shared: mmap.mmap, fields: dict[str, int]) -> None:
    fd = create(guest.vm)
    values = {"flags": abi.KVM_MEM_GUEST_MEMFD, "guest_memfd": fd}
    refused(errno.EINVAL, lambda: guest.vm.set_user_memory_region2(region2(shared, **{**values, **fields})))
    guest.vm.set_user_memory_region2(region2(shared, **values), shared)


def test_files_that_are_none_of_the_vms_are_refused(guest: Guest, shared: mmap.mmap) -> None:
    def bind(fd: int) -> Callable[[], None]:
        fields = {"flags": abi.KVM_MEM_GUEST_MEMFD, "guest_memfd": fd}
        return lambda: guest.vm.set_user_memory_region2(region2(shared, **fields))

    fd = create(guest.vm)
    os.close(fd)
    refused(errno.EBADF, bind(fd))
    refused(errno.EBADF, bind(0xFFFF_FFFF))
    ordinary = os.memfd_create("ordinary")
    os.ftruncate(ordinary, SIZE)
    refused(errno.EINVAL, bind(ordinary))
    with guest.kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM) as other:
        refused(errno.EINVAL, bind(create(other)))


def test_a_part_of_a_file_is_in_one_slot_at_a_time(guest: Guest, shared: mmap.mmap) -> None:
    fd = with_private(guest, shared)
    fields = {"flags": abi.KVM_MEM_GUEST_MEMFD, "guest_memfd": fd}
    second = region2(shared, slot=2, guest_phys_addr=2 * GPA, **fields)
    refused(errno.EINVAL, lambda: guest.vm.set_user_memory_region2(second))
    guest.vm.set_user_memory_region2(region2(shared, memory_size=0))
    guest.vm.set_user_memory_region2(second, shared)


@pytest.mark.parametrize("fields", [{"guest_phys_addr": 2 * GPA}, {}, {"flags": abi.KVM_MEM_LOG_DIRTY_PAGES}], ids=str)
def test_a_slot_with_a_file_can_only_be_deleted(guest: Guest, shared: mmap.mmap, fields: dict[str, int]) -> None:
    fd = with_private(guest, shared)
    values = {"flags": abi.KVM_MEM_GUEST_MEMFD, "guest_memfd": fd, **fields}
    if values["flags"] == abi.KVM_MEM_GUEST_MEMFD:
        refused(errno.EINVAL, lambda: guest.vm.set_user_memory_region2(region2(shared, **values)))
    guest.vm.set_user_memory_region2(region2(shared, memory_size=0))


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"size": 0}, {"size": PAGE + 1}, {"size": PAGE, "flags": 1 << 40}], ids=str)
def test_impossible_files_are_einval(kvm: api.Kvm, has: Callable[[int], None], fields: dict[str, int]) -> None:
    has(abi.KVM_CAP_GUEST_MEMFD)
    with kvm.create_vm() as vm:
        refused(errno.EINVAL, lambda: vm.create_guest_memfd(abi.kvm_create_guest_memfd(**fields)))


def test_a_file_has_its_size_and_is_not_closed_by_exec(kvm: api.Kvm, has: Callable[[int], None]) -> None:
    has(abi.KVM_CAP_GUEST_MEMFD)
    with kvm.create_vm() as vm:
        fd = create(vm)
        assert os.fstat(fd).st_size == SIZE
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == 0
        os.close(fd)


# --- attributes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"attributes": 1 << 4},
        {"attributes": 1},
        {"flags": 1},
        {"size": 0},
        {"size": PAGE + 1},
        {"address": GPA + 1},
        {"address": (1 << 64) - PAGE, "size": 2 * PAGE},
    ],
    ids=str,
)
def test_impossible_attributes_are_einval(guest: Guest, fields: dict[str, int]) -> None:
    values = {"address": GPA, "size": SIZE, "attributes": PRIVATE, **fields}
    refused(errno.EINVAL, lambda: guest.vm.set_memory_attributes(abi.kvm_memory_attributes(**values)))


def test_a_vm_says_what_its_type_has(kvm: api.Kvm, has: Callable[[int], None]) -> None:
    has(abi.KVM_CAP_MEMORY_ATTRIBUTES)
    assert kvm.check_extension(abi.KVM_CAP_MEMORY_ATTRIBUTES) == PRIVATE
    with kvm.create_vm() as vm:
        assert vm.check_extension(abi.KVM_CAP_MEMORY_ATTRIBUTES) == 0
        refused(errno.EINVAL, lambda: set_private(vm, GPA, SIZE))
    with kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM) as vm:
        assert vm.check_extension(abi.KVM_CAP_MEMORY_ATTRIBUTES) == PRIVATE
        assert vm.check_extension(abi.KVM_CAP_GUEST_MEMFD) == 1


def test_types_that_there_are_not_are_einval(kvm: api.Kvm) -> None:
    types = kvm.check_extension(abi.KVM_CAP_VM_TYPES)
    for number in (1, 2, 3, 31, 32, 63, 64, 1 << 32):
        if number >= 64 or not types >> number & 1:
            refused(errno.EINVAL, partial(kvm.create_vm, number))


# --- guests -------------------------------------------------------------------------------------------------


def test_private_and_shared_frames_have_memory_of_their_own(guest: Guest, shared: mmap.mmap) -> None:
    os.close(with_private(guest, shared))  # the slot keeps the file
    shared[0] = 0x11
    guest.long(LOAD + STORE + LOAD + LOAD + LOAD)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x11
    set_private(guest.vm, GPA, SIZE)
    guest.expect(abi.KVM_EXIT_HLT)  # stores to the private page
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x22
    assert shared[0] == 0x11
    set_private(guest.vm, GPA, SIZE, 0)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x11
    set_private(guest.vm, GPA, SIZE)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x22


def test_a_hole_is_zeroes(guest: Guest, shared: mmap.mmap) -> None:
    fd = with_private(guest, shared)
    set_private(guest.vm, GPA, SIZE)
    guest.long(STORE + LOAD + LOAD)
    guest.expect(abi.KVM_EXIT_HLT)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0x22
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(PAGE)) == 0
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax & 0xFF == 0


@pytest.mark.parametrize("code", [LOAD, STORE])
@pytest.mark.parametrize("slot", [False, True])
def test_private_frames_without_a_file_are_left_to_userspace(
    guest: Guest, shared: mmap.mmap, code: str, slot: bool
) -> None:
    if slot:
        guest.vm.set_user_memory_region2(region2(shared), shared)
    set_private(guest.vm, GPA, SIZE)
    guest.long(code)
    assert faults(guest) == (abi.KVM_MEMORY_EXIT_FLAG_PRIVATE, GPA, PAGE)
    assert guest.cpu.get_regs().rip == CODE, "the instruction has not happened"
    set_private(guest.vm, GPA, SIZE, 0)
    guest.expect(abi.KVM_EXIT_HLT if slot else abi.KVM_EXIT_MMIO)


def test_memory_that_the_process_cannot_reach_is_described(
    make: Callable[..., Guest], has: Callable[[int], None], device_differs: Callable[[str], None]
) -> None:
    has(abi.KVM_CAP_MEMORY_FAULT_INFO)
    device_differs("the kernel describes faults of private memory alone (Linux 6.12)")
    guest = make()
    hole = mmap.mmap(-1, SIZE, prot=0)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(SIZE), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
    guest.vm.set_user_memory_region2(
        abi.kvm_userspace_memory_region2(slot=1, guest_phys_addr=GPA, memory_size=SIZE, userspace_addr=address)
    )
    guest.long("8a042508302000 f4")  # mov al, [0x203008]; hlt
    assert faults(guest) == (0, GPA + 3 * PAGE, PAGE)
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE)) == 0
    hole.close()


# --- conversions by the guest -------------------------------------------------------------------------------

#: mov eax, KVM_HC_MAP_GPA_RANGE; mov ebx, 0x200000; mov ecx, 3; mov edx, 0x10; vmmcall; hlt
MAP_GPA_RANGE = "b80c000000 bb00002000 b903000000 ba10000000 0f01d9 f4"


def test_a_guests_wish_to_convert_memory_is_an_exit(make: Callable[..., Guest], needs: Callable[[str], None]) -> None:
    needs("hypercalls")
    guest = make()
    guest.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << abi.KVM_HC_MAP_GPA_RANGE)
    guest.long(MAP_GPA_RANGE)
    run = guest.expect(abi.KVM_EXIT_HYPERCALL)
    assert (run.hypercall.nr, list(run.hypercall.args[:3])) == (abi.KVM_HC_MAP_GPA_RANGE, [GPA, 3, 0x10])
    assert run.hypercall.longmode == abi.KVM_EXIT_HYPERCALL_LONG_MODE
    run.hypercall.ret = (1 << 64) - 22
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == (1 << 64) - 22


def test_in_32_bit_mode_the_answer_has_32_bits(make: Callable[..., Guest], needs: Callable[[str], None]) -> None:
    needs("hypercalls")
    guest = make()
    guest.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << abi.KVM_HC_MAP_GPA_RANGE)
    guest.protected(MAP_GPA_RANGE)
    run = guest.expect(abi.KVM_EXIT_HYPERCALL)
    assert run.hypercall.longmode == 0
    run.hypercall.ret = 0x1_2345_6789
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == 0x2345_6789


@pytest.mark.parametrize(
    ("gpa", "npages", "enabled", "answer"),
    [
        (GPA, 1, 0, abi.KVM_ENOSYS),
        (GPA + 1, 1, 1, abi.KVM_EINVAL),
        (GPA, 0, 1, abi.KVM_EINVAL),
        (GPA, (1 << 64) - 1, 1, abi.KVM_EINVAL),
    ],
)
def test_impossible_conversions_are_answered_by_kvm(
    make: Callable[..., Guest], needs: Callable[[str], None], gpa: int, npages: int, enabled: int, answer: int
) -> None:
    needs("hypercalls")
    guest = make()
    guest.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, enabled << abi.KVM_HC_MAP_GPA_RANGE)
    guest.long("0f01d9 f4")  # vmmcall; hlt
    regs = guest.cpu.get_regs()
    regs.rax, regs.rbx, regs.rcx, regs.rdx = abi.KVM_HC_MAP_GPA_RANGE, gpa, npages, 0x10
    guest.cpu.set_regs(regs)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == (1 << 64) - answer


def test_hypercalls_that_never_exit_cannot_be_enabled(kvm: api.Kvm) -> None:
    assert kvm.check_extension(abi.KVM_CAP_EXIT_HYPERCALL) & 1 << abi.KVM_HC_MAP_GPA_RANGE
    with kvm.create_vm() as vm:
        refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << abi.KVM_HC_KICK_CPU))


# --- pre-faulting -------------------------------------------------------------------------------------------


@pytest.fixture
def faulting(make: Callable[..., Guest], has: Callable[[int], None]) -> Guest:
    has(abi.KVM_CAP_PRE_FAULT_MEMORY)
    guest: Guest = make()
    return guest


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 1},
        {"size": 0},
        {"size": 1},
        {"gpa": 1},
        {"gpa": (1 << 64) - PAGE, "size": PAGE},
        {"gpa": PAGE, "size": (1 << 64) - PAGE},
    ],
    ids=str,
)
def test_impossible_ranges_are_einval(faulting: Guest, fields: dict[str, int]) -> None:
    wanted = abi.kvm_pre_fault_memory(**{"gpa": 0, "size": PAGE, **fields})
    refused(errno.EINVAL, lambda: faulting.cpu.pre_fault_memory(wanted))


def test_what_is_left_of_a_range_is_told(faulting: Guest) -> None:
    wanted = abi.kvm_pre_fault_memory(gpa=3 * PAGE, size=5 * PAGE)
    faulting.cpu.pre_fault_memory(wanted)
    assert (wanted.gpa, wanted.size) == (8 * PAGE, 0)
    wanted = abi.kvm_pre_fault_memory(gpa=(1 << 20) - 2 * PAGE, size=5 * PAGE)
    faulting.cpu.pre_fault_memory(wanted)  # the slot ends, which is told next time
    assert (wanted.gpa, wanted.size) == (1 << 20, 3 * PAGE)
    refused(errno.ENOENT, lambda: faulting.cpu.pre_fault_memory(wanted))
    assert (wanted.gpa, wanted.size) == (1 << 20, 3 * PAGE)


def test_what_was_faulted_before_takes_no_fault_of_the_guests(faulting: Guest, kind: str) -> None:
    if kind == "device":
        pytest.skip("the device counts other faults as well")
    faulting.cpu.pre_fault_memory(abi.kvm_pre_fault_memory(gpa=0, size=1 << 20))
    before = faulting.cpu.stats()["pf_taken"]  # type: ignore[attr-defined]
    faulting.long("8a042500000800 f4")  # mov al, [0x80000]; hlt
    faulting.expect(abi.KVM_EXIT_HLT)
    assert faulting.cpu.stats()["pf_taken"] == before  # type: ignore[attr-defined]
