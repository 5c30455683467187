# SPDX-License-Identifier: Apache-2.0
"""Statistics: histograms of halts, and files that are brought up to date."""

from __future__ import annotations

import os
from ctypes import sizeof

import pytest
from tests.support.tiny import CODE, Tiny

from softkvm import abi
from softkvm.kvm.vcpu import log_hist_update


def value(fd: int, wanted: str) -> int:
    """Read the one value of a statistic."""
    header = abi.kvm_stats_header.from_buffer_copy(os.pread(fd, sizeof(abi.kvm_stats_header), 0))
    size = sizeof(abi.kvm_stats_desc)
    for n in range(header.num_desc):
        row = os.pread(fd, size + header.name_size, header.desc_offset + n * (size + header.name_size))
        if row[size:].rstrip(b"\0").decode() == wanted:
            offset = abi.kvm_stats_desc.from_buffer_copy(row).offset
            return int.from_bytes(os.pread(fd, 8, header.data_offset + offset), "little")
    raise AssertionError(f"there is no {wanted}")


def test_a_file_is_brought_up_to_date_in_place() -> None:
    tiny = Tiny().real_mode()
    tiny.memory.write(CODE, b"\xe6\x80\xf4")  # out 0x80, al; hlt
    vcpu, vm = tiny.vcpu, tiny.vm
    vcpu.set_regs(abi.kvm_regs(rip=CODE, rflags=2))
    fd, vm_fd = vcpu.get_stats_fd(), vm.get_stats_fd()
    size = os.fstat(fd).st_size
    assert value(fd, "io_exits") == value(vm_fd, "pages_2m") + value(vm_fd, "pages_4k") == 0
    vcpu.run()
    vcpu.run()
    assert value(fd, "io_exits") == 0
    vcpu.refresh_stats_fd(fd)
    vm.refresh_stats_fd(vm_fd)
    assert (value(fd, "io_exits"), value(fd, "halt_exits")) == (1, 1)
    assert value(vm_fd, "pages_2m") + value(vm_fd, "pages_4k") > 0
    assert os.fstat(fd).st_size == size
    os.close(fd)
    os.close(vm_fd)


@pytest.mark.parametrize(
    ("ns", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1 << 29, 30), (1 << 30, 31), (1 << 62, 31)]
)
def test_buckets_double_and_the_last_has_all_that_is_longer(ns: int, bucket: int) -> None:
    """As kvm_stats_log_hist_update() has it: fls64, or the last."""
    histogram = [0] * 32
    log_hist_update(histogram, ns)
    assert histogram.index(1) == bucket


def test_a_kick_is_counted() -> None:
    tiny = Tiny()
    tiny.vcpu.kick()
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert tiny.vcpu.stats()["signal_exits"] == 1
