# SPDX-License-Identifier: Apache-2.0
"""A client that is a Python program shares its interpreter with KVM, and ends it before its descriptors are gone."""

import sys
from pathlib import Path

from tests.support.clients import requests_of, run_client

CLIENT = """
import fcntl, os, threading
system = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(system, 0xAE01, 0)  # KVM_CREATE_VM
vcpu = fcntl.ioctl(vm, 0xAE41, 0)  # KVM_CREATE_VCPU
file = os.fdopen(os.dup(vm), "rb", buffering=0)  # closed by the interpreter as it ends
thread = threading.Thread(target=fcntl.ioctl, args=(vm, 0xAE03, 0))  # KVM_CHECK_EXTENSION
thread.start()
thread.join()
print(fcntl.ioctl(system, 0xAE00, 0))  # KVM_GET_API_VERSION
"""


def test_a_python_program_ends_as_it_would_without_us(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    done = run_client([sys.executable, "-c", CLIENT], stats)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")
    requests = requests_of(stats)
    assert requests["KVM_CREATE_VM"] == requests["KVM_CREATE_VCPU"] == 1
