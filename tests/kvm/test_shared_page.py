# SPDX-License-Identifier: Apache-2.0
"""The file behind a vCPU's shared pages."""

from __future__ import annotations

import errno
import gc
import os

import pytest
from tests.support.descriptors import open_descriptors
from tests.support.tiny import Tiny


def test_nobody_can_cut_off_the_pages_under_those_who_map_them() -> None:
    tiny = Tiny()
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError) as caught:
            os.ftruncate(tiny.vcpu.shared_fd, size)
        assert caught.value.errno == errno.EPERM
    assert not os.get_inheritable(tiny.vcpu.shared_fd)
    tiny.close()


def test_descriptors_are_given_back_by_a_close_and_without_one() -> None:
    gc.collect()
    before = open_descriptors()
    tiny = Tiny(vcpus=3)
    closed = tiny.vcpus[0].shared_fd
    tiny.vcpus[0].close()
    tiny.vcpus[0].close()
    with pytest.raises(OSError) as caught:
        os.fstat(closed)
    assert caught.value.errno == errno.EBADF
    tiny.close()
    del tiny
    gc.collect()
    assert open_descriptors() == before
