# SPDX-License-Identifier: Apache-2.0
"""The file of KVM_GET_STATS_FD that a client has: as of each read, and as long as it is open."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
from softkvm import _softcpu as softcpu
from softkvm import abi
from softkvm.client.files import SystemFile
from softkvm.kvm import Kvm

def stats(fd):
    header = abi.kvm_stats_header.from_buffer_copy(os.pread(fd, 24, 0))
    return os.pread(fd, 1 << 16, header.data_offset)

made = []
real = softcpu.client_file
def client_file(file, *arguments):
    made.append(file)
    return real(file, *arguments)
softcpu.client_file = client_file

system = SystemFile(Kvm(), None)
system.ioctl(abi.KVM_CREATE_VM, 0)
vm = made[-1]
vm.ioctl(abi.KVM_CREATE_VCPU, 0)
vcpu = made[-1]
fd = vcpu.ioctl(abi.KVM_GET_STATS_FD, 0)
statistics = made[-1]
before = stats(fd)
vcpu.object.kick()
try:
    vcpu.run()
except InterruptedError:
    pass
assert stats(fd) == before
statistics.refresh()
assert stats(fd) != before
vcpu.release()
vm.release()
assert not vm.object.closed  # the statistics have it, too
statistics.refresh()
statistics.release()
assert vm.object.closed
try:
    statistics.ioctl(abi.KVM_RUN, 0)
except OSError as error:
    print(error.errno)
"""


def test_a_statistics_file_is_up_to_date_when_it_is_read_and_keeps_its_vm() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("25\n", "")  # ENOTTY
