# SPDX-License-Identifier: Apache-2.0
"""The ring of coalesced writes in the files of several vCPUs: nothing goes where nobody would look."""

from __future__ import annotations

import mmap
import os

import pytest
from tests.support.tiny import CODE, Tiny

from softkvm import abi
from softkvm.kvm.memfd import mapping_address

PAGE = 4096
SIZE = 3 * PAGE
RING = abi.KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE
PORT = 0x500


@pytest.fixture
def tiny() -> Tiny:
    tiny = Tiny(vcpus=2)
    tiny.vm.register_coalesced_mmio(PORT, 4, 1)
    return tiny


def write_a_port(tiny: Tiny, number: int) -> int:
    """One OUT by a vCPU; returns the exit's reason."""
    tiny.memory.write(CODE, bytes.fromhex("ba0005 ee f4"))  # mov dx, PORT; out dx, al; hlt
    vcpu = tiny.vcpus[number]
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.kvm_regs(rip=CODE, rflags=2, rax=number))
    vcpu.run()
    return int(vcpu.kvm_run.exit_reason)


def entries(pages: mmap.mmap) -> int:
    return int.from_bytes(pages[RING + 4 : RING + 8], "little")


def test_a_write_is_an_exit_until_every_vcpus_mappings_are_known(tiny: Tiny) -> None:
    with mmap.mmap(tiny.vcpus[0].shared_fd, SIZE) as first, mmap.mmap(tiny.vcpus[1].shared_fd, SIZE) as second:
        assert write_a_port(tiny, 0) == abi.KVM_EXIT_IO  # the second's client may be about to map its pages
        assert write_a_port(tiny, 1) == abi.KVM_EXIT_HLT
        assert write_a_port(tiny, 0) == abi.KVM_EXIT_HLT
        assert entries(first) == entries(second) == 2


def test_whoever_tells_of_his_mappings_has_the_ring_at_once(tiny: Tiny) -> None:
    with mmap.mmap(tiny.vcpus[0].shared_fd, SIZE) as first, mmap.mmap(tiny.vcpus[1].shared_fd, SIZE) as second:
        for vcpu, pages in zip(tiny.vcpus, (first, second), strict=True):
            vcpu.shared_fd_mapped(mapping_address(pages), SIZE)
        assert write_a_port(tiny, 0) == abi.KVM_EXIT_HLT
        assert entries(first) == entries(second) == 1


def test_a_mapping_of_the_ring_alone_is_the_ring_too(tiny: Tiny) -> None:
    fd = tiny.vcpus[0].shared_fd
    with mmap.mmap(fd, PAGE, offset=RING) as ring:
        tiny.vcpus[0].shared_fd_mapped(mapping_address(ring), PAGE, RING)
        assert write_a_port(tiny, 1) == abi.KVM_EXIT_HLT
        assert ring[4] == 1
    with mmap.mmap(fd, PAGE) as page:
        tiny.vcpus[0].shared_fd_mapped(mapping_address(page), PAGE)
        assert page[:PAGE] == tiny.vcpus[0].shared[:PAGE]


def test_a_mapping_that_may_only_be_read_stays_one(tiny: Tiny) -> None:
    with mmap.mmap(tiny.vcpus[0].shared_fd, SIZE, prot=mmap.PROT_READ) as pages:
        assert write_a_port(tiny, 0) == abi.KVM_EXIT_HLT
        assert entries(pages) == 1
        with open("/proc/self/maps") as maps:
            ring = [line for line in maps if "/memfd:kvm-coalesced-mmio" in line]
        assert any(line.split()[1] == "r--s" for line in ring)


def test_a_ring_that_userspace_has_broken_takes_nothing(tiny: Tiny) -> None:
    ring = tiny.vcpus[0].shared[RING : RING + PAGE].cast("I")
    for last in (170, 1 << 31, (1 << 32) - 1):
        ring[1] = last
        assert write_a_port(tiny, 0) == abi.KVM_EXIT_IO
        assert ring[1] == last
    ring[1], ring[0] = 0, 12345
    assert write_a_port(tiny, 0) == abi.KVM_EXIT_HLT


def test_what_a_string_output_has_no_room_for_is_an_exit(tiny: Tiny) -> None:
    tiny.memory.write(CODE, bytes.fromhex("ba0005 be0020 b90400 f36e f4"))  # ...; mov si, 0x2000; mov cx, 4; rep outsb
    tiny.memory.write(0x2000, b"abcd")
    vcpu = tiny.vcpus[0]
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.kvm_regs(rip=CODE, rflags=2))
    ring = vcpu.shared[RING : RING + PAGE].cast("I")
    ring[0], ring[1] = 5, 3  # room for one
    vcpu.run()
    io = vcpu.kvm_run.io
    assert (vcpu.kvm_run.exit_reason, io.port, io.size, io.count) == (abi.KVM_EXIT_IO, PORT, 1, 3)
    assert bytes(vcpu.shared[io.data_offset : io.data_offset + 3]) == b"bcd"
    assert ring[1] == 4
    vcpu.run()
    assert (vcpu.kvm_run.exit_reason, vcpu.get_regs().rcx) == (abi.KVM_EXIT_HLT, 0)


def test_the_rings_descriptor_is_given_back(tiny: Tiny) -> None:
    fd = tiny.vm.coalesced.fd
    tiny.close()
    with pytest.raises(OSError):
        os.fstat(fd)
