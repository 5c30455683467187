# SPDX-License-Identifier: Apache-2.0
"""Binary statistics of VMs and vCPUs (KVM API 4.133): header, identifier, descriptors, data."""

import errno
import os
from collections.abc import Callable
from ctypes import sizeof
from dataclasses import dataclass

import pytest
from tests.support.conformance import Guest, refused

from softkvm import abi, api

HEADER = sizeof(abi.kvm_stats_header)
DESC = sizeof(abi.kvm_stats_desc)


@dataclass
class Row:
    """A descriptor and its values."""

    kind: int
    unit: int
    base: int
    exponent: int
    bucket_size: int
    offset: int
    values: list[int]


def read(owner: api.Vm | api.Vcpu) -> tuple[str, dict[str, Row]]:
    """Read everything as the document says; returns the identifier, and the statistics by name."""
    fd = owner.get_stats_fd()
    try:
        header = abi.kvm_stats_header.from_buffer_copy(os.pread(fd, HEADER, 0))
        assert header.flags == 0
        assert header.num_desc > 0
        identifier = os.pread(fd, header.name_size, header.id_offset).split(b"\0")[0].decode()
        step = DESC + header.name_size
        table = os.pread(fd, step * header.num_desc, header.desc_offset)
        rows = {}
        for start in range(0, len(table), step):
            desc = abi.kvm_stats_desc.from_buffer_copy(table, start)
            name = table[start + DESC : start + step].split(b"\0")[0].decode()
            assert name not in rows
            data = os.pread(fd, 8 * desc.size, header.data_offset + desc.offset)
            assert len(data) == 8 * desc.size
            rows[name] = Row(
                desc.flags & abi.KVM_STATS_TYPE_MASK,
                desc.flags & abi.KVM_STATS_UNIT_MASK,
                desc.flags & abi.KVM_STATS_BASE_MASK,
                desc.exponent,
                desc.bucket_size,
                desc.offset,
                [int.from_bytes(data[n : n + 8], "little") for n in range(0, len(data), 8)],
            )
        return identifier, rows
    finally:
        os.close(fd)


@pytest.fixture(params=["vm", "vcpu"])
def owner(request: pytest.FixtureRequest, guest: Guest) -> api.Vm | api.Vcpu:
    """A VM or a vCPU."""
    return guest.vm if request.param == "vm" else guest.cpu


def test_the_capability_is_there(kvm: api.Kvm) -> None:
    assert kvm.check_extension(abi.KVM_CAP_BINARY_STATS_FD) == 1


def test_the_identifier_is_the_process_and_the_vcpus_number(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=2)
    assert read(guest.vm)[0] == f"kvm-{os.getpid()}"
    assert [read(vcpu)[0] for vcpu in guest.vcpus] == [f"kvm-{os.getpid()}/vcpu-{number}" for number in (0, 1)]


def test_descriptors_are_of_known_kinds_and_their_data_apart(owner: api.Vm | api.Vcpu) -> None:
    _, rows = read(owner)
    assert all(rows)
    end = 0
    for row in sorted(rows.values(), key=lambda row: row.offset):
        assert row.offset % 8 == 0
        assert row.offset >= end
        end = row.offset + 8 * len(row.values)
        assert abi.KVM_STATS_TYPE_CUMULATIVE <= row.kind <= abi.KVM_STATS_TYPE_LOG_HIST
        assert row.unit <= abi.KVM_STATS_UNIT_BOOLEAN
        assert row.base in (abi.KVM_STATS_BASE_POW10, abi.KVM_STATS_BASE_POW2)
        histogram = row.kind in (abi.KVM_STATS_TYPE_LINEAR_HIST, abi.KVM_STATS_TYPE_LOG_HIST)
        assert (len(row.values) > 1) == histogram
        assert bool(row.bucket_size) == (row.kind == abi.KVM_STATS_TYPE_LINEAR_HIST)


def test_times_are_nanoseconds_and_halts_have_histograms(guest: Guest) -> None:
    _, rows = read(guest.cpu)
    for name in ("halt_poll_success", "halt_poll_fail", "halt_wait"):
        total, histogram = rows[f"{name}_ns"], rows[f"{name}_hist"]
        assert (total.kind, histogram.kind) == (abi.KVM_STATS_TYPE_CUMULATIVE, abi.KVM_STATS_TYPE_LOG_HIST)
        for row, size in ((total, 1), (histogram, 32)):
            assert (row.unit, row.base, row.exponent) == (abi.KVM_STATS_UNIT_SECONDS, abi.KVM_STATS_BASE_POW10, -9)
            assert len(row.values) == size
    blocking = rows["blocking"]
    assert (blocking.kind, blocking.unit) == (abi.KVM_STATS_TYPE_INSTANT, abi.KVM_STATS_UNIT_BOOLEAN)
    assert blocking.values == [0]


def test_pages_rise_and_fall(guest: Guest) -> None:
    _, rows = read(guest.vm)
    assert {rows[name].kind for name in ("pages_4k", "pages_2m", "pages_1g")} == {abi.KVM_STATS_TYPE_INSTANT}


def test_what_has_happened_is_counted(guest: Guest) -> None:
    before = read(guest.cpu)[1]
    guest.real("e680 f4")  # out 0x80, al; hlt
    guest.expect(abi.KVM_EXIT_IO)
    guest.expect(abi.KVM_EXIT_HLT)
    after = read(guest.cpu)[1]
    for name, least in (("exits", 2), ("halt_exits", 1), ("io_exits", 0)):  # kvm_pvm counts no io_exits
        assert after[name].kind == abi.KVM_STATS_TYPE_CUMULATIVE
        assert after[name].values[0] - before[name].values[0] >= least, name


def test_the_file_can_only_be_read_and_ends_with_the_data(owner: api.Vm | api.Vcpu) -> None:
    fd = owner.get_stats_fd()
    assert not os.get_inheritable(fd)
    refused((errno.EBADF, errno.EINVAL), lambda: os.write(fd, b"x"))
    header = abi.kvm_stats_header.from_buffer_copy(os.pread(fd, HEADER, 0))
    size = header.data_offset + 8 * sum(len(row.values) for row in read(owner)[1].values())
    assert len(os.pread(fd, 1 << 20, 0)) == size
    assert os.pread(fd, 8, size) == b""
    os.close(fd)


def test_it_outlives_the_vm_it_is_of(make: Callable[..., Guest]) -> None:
    guest = make()
    fd = guest.cpu.get_stats_fd()
    guest.cpu.close()
    refused(errno.EBADF, guest.cpu.get_stats_fd)
    guest.close()
    refused(errno.EBADF, guest.vm.get_stats_fd)
    assert len(os.pread(fd, HEADER, 0)) == HEADER
    os.close(fd)
