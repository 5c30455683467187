# SPDX-License-Identifier: Apache-2.0
"""A client that is a Python program shares its interpreter with KVM, and ends it before its descriptors are gone."""

import subprocess
import sys
from pathlib import Path

from tests.support.clients import TIMEOUT_S, requests_of, run_client

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


OLD = """
#include <errno.h>
#include <fcntl.h>
int Py_IsInitialized(void) { return 1; }
const char *Py_GetVersion(void) { return "3.9.18 (main) [of another compiler]"; }
int main(void) { return open("/dev/kvm", O_RDWR) == -1 && errno == ENOENT ? 7 : 1; }
"""


def test_a_client_that_is_an_older_python_is_told_so(tmp_path: Path) -> None:
    client = tmp_path / "old"
    compiler: list[str | Path] = ["cc", "-rdynamic", "-x", "c", "-o", client, "-"]
    subprocess.run(compiler, check=True, input=OLD, text=True, timeout=TIMEOUT_S)
    done = run_client([client], tmp_path / "stats")
    line = "softkvm: the client is Python 3.9.18, expected 3.11 or later\n"
    assert (done.returncode, done.stdout, done.stderr) == (7, "", line)


def test_a_python_program_ends_as_it_would_without_us(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    done = run_client([sys.executable, "-c", CLIENT], stats)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")
    requests = requests_of(stats)
    assert requests["KVM_CREATE_VM"] == requests["KVM_CREATE_VCPU"] == 1


FORKS = """
import concurrent.futures, fcntl, multiprocessing, os

def version(_):
    return fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), 0xAE00, 0)  # KVM_GET_API_VERSION

if __name__ == "__main__":
    version(0)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        print(sum(threads.map(version, range(4))))
    for way in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(way).Pool(2) as processes:
            print(way, sum(processes.map(version, range(4))))
"""


def test_a_python_program_forks_as_it_would_without_us(tmp_path: Path) -> None:
    (tmp_path / "forks.py").write_text(FORKS)
    done = run_client([sys.executable, str(tmp_path / "forks.py")], tmp_path / "stats")
    assert (done.returncode, done.stdout, done.stderr) == (0, "48\nfork 48\nspawn 48\nforkserver 48\n", "")
