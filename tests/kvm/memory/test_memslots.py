# SPDX-License-Identifier: Apache-2.0
"""KVM_SET_USER_MEMORY_REGION: the rules of KVM API 4.35 and their errnos."""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi
from softkvm.kvm.memory.memslots import MemorySlot, Memslots

PAGE = 4096


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(vcpus=1)
    yield machine
    machine.close()


@pytest.fixture
def memory() -> Memory:
    return Memory(4 * MIB)


def _errno(tiny: Tiny, **fields: int) -> int | None:
    values = {"slot": 1, "flags": 0, "gpa": 16 * MIB, "size": MIB, "hva": 0, **fields}
    try:
        tiny.slot(values["slot"], values["gpa"], values["size"], values["hva"], values["flags"])
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"flags": 1 << 7}, errno.EINVAL),
        ({"slot": 32764}, errno.EINVAL),
        ({"slot": 1 << 16}, errno.EINVAL),
        ({"gpa": 16 * MIB + 1}, errno.EINVAL),
        ({"size": 4097}, errno.EINVAL),
        ({"hva": 1}, errno.EINVAL),
        ({"hva": 1 << 63}, errno.EINVAL),
        ({"gpa": (1 << 64) - MIB}, errno.EINVAL),
        ({"size": 0}, errno.EINVAL),  # nothing there to delete
        ({"gpa": MIB}, errno.EEXIST),  # overlaps slot 0
        ({"gpa": 1 << 52}, errno.EINVAL),  # beyond the physical address width
        ({"size": 1 << 44, "hva": 0}, errno.EINVAL),  # 2**32 pages
    ],
)
def test_bad_regions_have_the_documented_errno(
    tiny: Tiny, memory: Memory, fields: dict[str, int], expected: int
) -> None:
    values = {"hva": memory.address, **fields}
    if "hva" in fields:
        values["hva"] = fields["hva"] if fields["hva"] == 0 else memory.address | fields["hva"]
    generation = tiny.vm.memslots.generation
    assert _errno(tiny, **values) == expected
    assert tiny.vm.memslots.generation == generation


def test_an_existing_slot_can_move_and_change_flags_but_not_size_address_or_readonly(
    tiny: Tiny, memory: Memory
) -> None:
    hva = memory.address
    assert _errno(tiny, hva=hva) is None
    assert _errno(tiny, hva=hva, size=2 * MIB) == errno.EINVAL
    assert _errno(tiny, hva=hva + PAGE) == errno.EINVAL
    assert _errno(tiny, hva=hva, flags=abi.KVM_MEM_READONLY) == errno.EINVAL
    assert _errno(tiny, hva=hva, flags=abi.KVM_MEM_LOG_DIRTY_PAGES) is None
    assert _errno(tiny, hva=hva, gpa=32 * MIB) is None
    assert tiny.vm.memslots.gfn_to_memslot(16 * MIB >> 12) is None
    slot = tiny.vm.memslots.gfn_to_memslot(32 * MIB >> 12)
    assert slot is not None and slot.id == 1
    assert _errno(tiny, hva=hva, gpa=MIB) == errno.EEXIST


def test_setting_the_same_region_again_changes_nothing(tiny: Tiny, memory: Memory) -> None:
    assert _errno(tiny, hva=memory.address) is None
    generation = tiny.vm.memslots.generation
    assert _errno(tiny, hva=memory.address) is None
    assert tiny.vm.memslots.generation == generation


def test_every_change_is_a_new_generation(tiny: Tiny, memory: Memory) -> None:
    first = tiny.vm.memslots.generation
    _errno(tiny, hva=memory.address)
    _errno(tiny, size=0)
    assert tiny.vm.memslots.generation == first + 2


def test_several_slots_may_name_the_same_host_memory(tiny: Tiny, memory: Memory) -> None:
    hva = memory.address
    assert _errno(tiny, slot=1, hva=hva) is None
    assert _errno(tiny, slot=2, hva=hva, gpa=32 * MIB) is None
    assert _errno(tiny, slot=3, hva=hva + MIB // 2, gpa=48 * MIB) is None  # half of it
    assert _errno(tiny, slot=1, size=0) is None
    tiny.vm.machine.read(hva, 8)
    assert _errno(tiny, slot=2, size=0) is None
    assert _errno(tiny, slot=3, size=0) is None
    with pytest.raises(ValueError):
        tiny.vm.machine.read(hva, 8)


def test_a_slot_that_is_deleted_gives_all_of_its_memory_back(tiny: Tiny, memory: Memory) -> None:
    hva, half = memory.address, memory.size // 2
    assert _errno(tiny, slot=1, hva=hva + half, size=half) is None
    assert _errno(tiny, slot=2, hva=hva, size=2 * half, gpa=32 * MIB) is None
    assert _errno(tiny, slot=1, size=0) is None
    for at in (hva, hva + half):
        tiny.vm.machine.read(at, half)
    assert _errno(tiny, slot=2, size=0) is None
    for at in range(hva, hva + 2 * half, 4096):
        with pytest.raises(ValueError):
            tiny.vm.machine.read(at, 1)


def test_a_vm_says_how_much_memory_it_has(tiny: Tiny, memory: Memory) -> None:
    assert _errno(tiny, slot=1, hva=memory.address, size=MIB) is None
    assert "1 vCPUs, 3072 KiB of memory" in repr(tiny.vm)


def test_a_guest_loses_sight_of_a_deleted_slot(tiny: Tiny, memory: Memory) -> None:
    tiny.protected_mode()
    memory.write(0, b"\x42")
    assert _errno(tiny, hva=memory.address) is None
    tiny.load(b"\xa0\x00\x00\x00\x01\xf4", rax=0)  # mov al, [0x1000000]; hlt
    assert tiny.run_to_halt().rax == 0x42
    assert _errno(tiny, size=0) is None
    tiny.registers(rip=0x1000)
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert tiny.vcpu.kvm_run.mmio.phys_addr == 16 * MIB


def test_a_slot_created_over_an_mmio_hole_is_seen_at_once(tiny: Tiny, memory: Memory) -> None:
    tiny.protected_mode()
    tiny.load(b"\xa0\x00\x00\x00\x01\xf4")
    assert tiny.run() == abi.KVM_EXIT_MMIO
    memory.write(0, b"\x37")
    assert _errno(tiny, hva=memory.address) is None
    tiny.vcpu.complete_userspace_io = None
    tiny.registers(rip=0x1000, rax=0)
    assert tiny.run_to_halt().rax == 0x37


def test_writes_to_a_readonly_slot_are_mmio_and_reads_are_not(tiny: Tiny, memory: Memory) -> None:
    tiny.protected_mode()
    memory.write(0, b"\x99")
    assert _errno(tiny, hva=memory.address, flags=abi.KVM_MEM_READONLY) is None
    # mov al, [0x1000000]; mov [0x1000000], ah; hlt
    tiny.load(b"\xa0\x00\x00\x00\x01\x88\x25\x00\x00\x00\x01\xf4", rax=0x5500)
    assert tiny.run() == abi.KVM_EXIT_MMIO
    mmio = tiny.vcpu.kvm_run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (16 * MIB, 1, 1, 0x55)
    assert tiny.run_to_halt().rax == 0x5599
    assert memory.read(0, 1) == b"\x99"


#: A slot of a TiB whose pages the process has no memory to keep account of: what is refused, and what is left then.
_HUGE = """
import errno, mmap, resource
import softkvm
from softkvm import abi
from tests.support.tiny import MIB, Memory
size = 1 << 40
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
import ctypes
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
vm = softkvm.open().create_vm()
def slot(size, flags=0):
    vm.set_user_memory_region(
        abi.kvm_userspace_memory_region(slot=0, flags=flags, memory_size=size, userspace_addr=address)
    )
limits = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
for flags in 0, abi.KVM_MEM_LOG_DIRTY_PAGES:
    resource.setrlimit(resource.RLIMIT_AS, (used + 16 * MIB, limits[1]))
    try:
        slot(size, flags)
    except OSError as error:
        assert error.errno == errno.ENOMEM, error
    else:
        raise SystemExit("accepted")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert vm.memslots.generation == 0 and not list(vm.memslots)
slot(size)
assert vm.memslots.gfn_to_memslot((size >> 12) - 1)
"""


def test_a_slot_that_there_is_no_memory_for_is_enomem_and_changes_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", _HUGE], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_slot_over_nothing_leaves_room_for_what_kvm_needs(tiny: Tiny) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    hole, flags = 1 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    address = libc.mmap(None, hole, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    libc.munmap(address, hole)
    tiny.slot(1, 16 * MIB, hole, address)
    own = [tiny.vm.machine.alloc_page() for _ in range(600)]
    assert all(not address <= page.address < address + hole for page in own)
    with pytest.raises(OSError) as refused:
        tiny.slot(2, 2 << 30, PAGE, own[-1].address)
    assert refused.value.errno == errno.EINVAL


def test_what_is_known_of_holes_is_forgotten_when_their_generation_comes_again(tiny: Tiny, memory: Memory) -> None:
    # MMIO SPTEs hold the generation's lower bits alone: every 2**18 changes of the slots an old one looks valid.
    wrap = 1 << 18
    tiny.protected_mode()
    tiny.load(b"\xa0\x00\x00\x00\x02\xf4")  # mov al, [0x2000000]; hlt
    assert tiny.run() == abi.KVM_EXIT_MMIO
    gfn, vm = 0x2000, tiny.vm
    known = vm.memslots.generation
    assert vm.mmu.lookup_mmio(gfn, known)
    assert vm.mmu.lookup_mmio(gfn, known + wrap)
    vm.memslots.generation = wrap - 1
    assert _errno(tiny, hva=memory.address) is None  # elsewhere
    assert vm.memslots.generation == wrap
    assert not vm.mmu.lookup_mmio(gfn, known + wrap)


def test_thousands_of_slots_come_go_and_move_in_any_order() -> None:
    count = 1500
    order = random.Random(7).sample(range(count), count)
    slots = Memslots()
    known: dict[int, MemorySlot] = {}

    def put(number: int, gfn: int | None, flags: int = 0) -> None:
        nonlocal slots
        new = None if gfn is None else MemorySlot(number, gfn, 3, flags, gfn << 12)
        before = slots
        slots = slots.replaced(known.get(number), new)
        assert slots.generation == before.generation + 1
        # A change copies what is near: the rest is the generation before's.
        assert len({id(chunk) for chunk in slots._chunks} - {id(chunk) for chunk in before._chunks}) <= 3
        known.pop(number, None)
        if new is not None:
            known[number] = new

    def check() -> None:
        assert list(slots) == sorted(known.values(), key=lambda slot: slot.base_gfn)
        assert all(slots.by_id(number) is known.get(number) for number in range(count + 1))
        for slot in known.values():
            inside = [slots.gfn_to_memslot(slot.base_gfn + n) is slot for n in (-1, 0, 2, 3)]
            assert inside == [False, True, True, False]
            assert list(slots.meeting(slot.base_gfn + 2, slot.base_gfn + 4)) == [slot]

    for number in order:
        put(number, 10 * number)
    check()
    for number in order[::3]:
        put(number, 10 * number + 5)
    check()
    assert list(slots.meeting(0, 1 << 40)) == list(slots)
    for number in order[: count - 5]:
        put(number, None)
    check()
    for number in order:
        if number in known:
            put(number, None)
    assert list(slots) == [] and not slots._chunks and slots.gfn_to_memslot(0) is None
