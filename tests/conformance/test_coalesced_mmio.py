# SPDX-License-Identifier: Apache-2.0
"""Coalesced MMIO and port writes: a ring instead of exits (KVM API 4.116)."""

import errno
import mmap
import threading
from collections.abc import Callable
from ctypes import sizeof

import pytest
from tests.support.conformance import CODE, PAGE, Guest, pio_data, refused
from tests.support.threads import beside

from softkvm import abi, api

ZONE = 0x20_0000
PORT = 0x1234
_HEADER = sizeof(abi.kvm_coalesced_mmio_ring)
_ENTRY = sizeof(abi.kvm_coalesced_mmio)
CAPACITY = (PAGE - _HEADER) // _ENTRY - 1  # one place stays empty

Write = tuple[int, int, bytes]


def drain(pages: memoryview) -> list[Write]:
    """Empty the ring as userspace does: pio, address and data of each write."""
    page = pages[abi.KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE :][:PAGE]
    ring = page.cast("I")  # first and last
    writes = []
    while ring[0] != ring[1]:
        entry = abi.kvm_coalesced_mmio.from_buffer_copy(page, _HEADER + ring[0] * _ENTRY)
        writes.append((entry.pio, entry.phys_addr, bytes(entry.data[: entry.len])))
        ring[0] = (ring[0] + 1) % (CAPACITY + 1)
    ring.release()
    page.release()
    return writes


def test_the_capabilities_say_where_the_ring_is(kvm: api.Kvm) -> None:
    assert kvm.check_extension(abi.KVM_CAP_COALESCED_MMIO) == abi.KVM_COALESCED_MMIO_PAGE_OFFSET == 2
    assert kvm.check_extension(abi.KVM_CAP_COALESCED_PIO) == 1
    assert kvm.get_vcpu_mmap_size() == 3 * PAGE


def test_writes_into_a_zone_are_collected_in_their_order(guest: Guest) -> None:
    guest.vm.register_coalesced_mmio(ZONE, 0x1000)
    guest.protected("b844332211 a200002000 66a302002000 a3fc0f2000 f4")  # mov [..00], al; [..02], ax; [..ffc], eax; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    assert drain(guest.cpu.shared) == [
        (0, ZONE, b"\x44"),
        (0, ZONE + 2, b"\x44\x33"),
        (0, ZONE + 0xFFC, b"\x44\x33\x22\x11"),
    ]
    assert drain(guest.cpu.shared) == []


def test_reads_and_writes_not_wholly_inside_are_exits(guest: Guest) -> None:
    guest.vm.register_coalesced_mmio(ZONE, 0x10)
    guest.protected("a300002000 a30e002000 a100002000 f4")  # mov [..00], eax; mov [..0e], eax; mov eax, [..00]; hlt
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (ZONE + 0xE, 4, 1)
    assert len(drain(guest.cpu.shared)) == 1
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, run.mmio.is_write) == (ZONE, 0)
    guest.expect(abi.KVM_EXIT_HLT)
    assert drain(guest.cpu.shared) == []


def test_a_write_that_the_ring_has_no_room_for_is_an_exit(guest: Guest) -> None:
    """How many fit depends on the kernel: before 6.12 a ring that begins in its first half is full too early."""
    guest.vm.register_coalesced_mmio(ZONE, 0x1000)
    guest.protected("31c0 40 a300002000 ebf8")  # xor eax, eax; 1: inc eax; mov [ZONE], eax; jmp 1b
    expected = 1
    for _ in range(5):
        run = guest.expect(abi.KVM_EXIT_MMIO)
        numbers = [int.from_bytes(data, "little") for _, _, data in drain(guest.cpu.shared)]
        assert 0 < len(numbers) <= CAPACITY
        numbers.append(int.from_bytes(bytes(run.mmio.data[:4]), "little"))
        assert numbers == list(range(expected, expected + len(numbers)))
        expected += len(numbers)


def test_port_writes_are_collected_and_marked(guest: Guest) -> None:
    guest.vm.register_coalesced_mmio(PORT, 4, 1)
    guest.write(0x2000, b"abcdef")
    # mov dx, PORT; mov eax, 0x11223344; out dx, eax; mov esi, 0x2000; mov ecx, 3; rep outsw; hlt
    guest.protected("66ba3412 b844332211 ef be00200000 b903000000 f3666f f4")
    guest.expect(abi.KVM_EXIT_HLT)
    assert drain(guest.cpu.shared) == [
        (1, PORT, b"\x44\x33\x22\x11"),
        (1, PORT, b"ab"),
        (1, PORT, b"cd"),
        (1, PORT, b"ef"),
    ]


def test_a_zone_of_ports_is_none_of_memory(guest: Guest) -> None:
    guest.vm.register_coalesced_mmio(PORT, 4)
    guest.vm.register_coalesced_mmio(ZONE, 4, 1)
    guest.protected("66ba3412 ee a200002000 f4")  # mov dx, PORT; out dx, al; mov [ZONE], al; hlt
    guest.expect(abi.KVM_EXIT_IO)
    guest.expect(abi.KVM_EXIT_MMIO)
    guest.expect(abi.KVM_EXIT_HLT)
    assert drain(guest.cpu.shared) == []


def test_ports_and_memory_share_the_ring_in_their_order(guest: Guest) -> None:
    guest.vm.register_coalesced_mmio(PORT, 1, 1)
    guest.vm.register_coalesced_mmio(ZONE, 4)
    guest.protected("66ba3412 b001 ee b002 a200002000 b003 ee f4")
    guest.expect(abi.KVM_EXIT_HLT)
    assert drain(guest.cpu.shared) == [(1, PORT, b"\x01"), (0, ZONE, b"\x02"), (1, PORT, b"\x03")]


def test_the_ring_is_the_same_in_every_vcpus_pages(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=2)
    guest.vm.register_coalesced_mmio(0x500, 4, 1)
    first, second = guest.vcpus
    guest.real("ba0005 b001 ee f4")  # mov dx, 0x500; mov al, 1; out dx, al; hlt
    guest.write(CODE + 0x100, bytes.fromhex("ba0005 b002 ee f4"))
    guest.expect(abi.KVM_EXIT_HLT)
    sregs, regs = first.get_sregs(), first.get_regs()
    second.set_sregs(sregs)
    regs.rip = CODE + 0x100
    second.set_regs(regs)
    guest.expect(abi.KVM_EXIT_HLT, second)
    assert drain(first.shared) == [(1, 0x500, b"\x01"), (1, 0x500, b"\x02")]
    assert drain(second.shared) == []


def test_writes_of_many_vcpus_are_all_there_and_each_ones_in_order(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=3)
    guest.vm.register_coalesced_mmio(0x500, 0x10, 1)
    guest.real("31c0 40 ef 3d6400 75f9 f4")  # xor ax, ax; 1: inc ax; out dx, ax; cmp ax, 100; jne 1b; hlt
    sregs, regs = guest.cpu.get_sregs(), guest.cpu.get_regs()
    for number, vcpu in enumerate(guest.vcpus):
        vcpu.set_sregs(sregs)
        regs.rdx = 0x500 + 2 * number
        vcpu.set_regs(regs)

    left: dict[int, list[int]] = {}

    def until_halt(number: int) -> None:
        """Note what leaves for userspace because the ring is full."""
        vcpu, out = guest.vcpus[number], left.setdefault(number, [])
        while guest.run(vcpu) == abi.KVM_EXIT_IO:
            out.append(int.from_bytes(pio_data(vcpu), "little"))

    with beside(*(threading.Thread(target=until_halt, args=(number,)) for number in range(3))):
        pass
    assert [vcpu.kvm_run.exit_reason for vcpu in guest.vcpus] == [abi.KVM_EXIT_HLT] * 3
    seen = drain(guest.vcpus[2].shared)
    for number in range(3):
        values = [int.from_bytes(data, "little") for _, port, data in seen if port == 0x500 + 2 * number]
        assert values + left[number] == list(range(1, 101))


@pytest.mark.parametrize("mapped_first", [True, False])
def test_others_who_map_a_vcpus_pages_find_the_ring_there(guest: Guest, mapped_first: bool) -> None:
    if not mapped_first:
        guest.vm.register_coalesced_mmio(0x500, 4, 1)
    with mmap.mmap(guest.cpu.shared_fd, guest.kvm.get_vcpu_mmap_size()) as pages:
        if mapped_first:
            guest.vm.register_coalesced_mmio(0x500, 4, 1)
        guest.real("ba0005 b001 ee b002 ee f4")  # mov dx, 0x500; mov al, 1; out dx, al; mov al, 2; out dx, al; hlt
        guest.expect(abi.KVM_EXIT_HLT)
        with memoryview(pages) as view:
            assert drain(view) == [(1, 0x500, b"\x01"), (1, 0x500, b"\x02")]
        assert drain(guest.cpu.shared) == []


def test_unregistering_takes_every_zone_that_holds_the_range(guest: Guest) -> None:
    vm = guest.vm
    for addr, size in ((ZONE, 0x1000), (ZONE, 0x1000), (ZONE + 0x10, 4), (ZONE + 0x800, 0x10)):
        vm.register_coalesced_mmio(addr, size)
    vm.unregister_coalesced_mmio(ZONE + 0x10, 4)  # the two large ones, and the one of its size
    guest.protected("a200002000 a210002000 a200082000 f4")
    for offset in (0, 0x10):
        assert guest.expect(abi.KVM_EXIT_MMIO).mmio.phys_addr == ZONE + offset
    guest.expect(abi.KVM_EXIT_HLT)
    assert drain(guest.cpu.shared) == [(0, ZONE + 0x800, b"\0")]
    vm.unregister_coalesced_mmio(ZONE, 4)  # there is none: no error


@pytest.mark.parametrize("name", ["register_coalesced_mmio", "unregister_coalesced_mmio"])
def test_a_zone_is_of_memory_or_of_ports(guest: Guest, name: str) -> None:
    refused(errno.EINVAL, lambda: getattr(guest.vm, name)(ZONE, 4, 2))


def test_there_are_not_more_than_a_thousand_zones(guest: Guest) -> None:
    for n in range(1000):
        guest.vm.register_coalesced_mmio(ZONE + n * 4, 4)
    refused(errno.ENOSPC, lambda: guest.vm.register_coalesced_mmio(ZONE + 4000, 4))
    guest.vm.register_coalesced_mmio(0x500, 4, 1)  # ports have their own bus
    guest.vm.unregister_coalesced_mmio(ZONE, 4)
    guest.vm.register_coalesced_mmio(ZONE + 4000, 4)
