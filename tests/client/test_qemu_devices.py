# SPDX-License-Identifier: Apache-2.0
"""QEMU's virtio devices with ``-accel kvm``: a guest's drivers, ioeventfds and irqfds, and no vhost."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.support.kernels import kernel_with_modules
from tests.support.qemu import PROMPT, Machine, default_guest, machine, run, wait_for

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

MIB = 1 << 20
MEMORY_MIB = 256
#: What udhcpc calls when it has an address.
DHCP_SCRIPT = b"""#!/bin/sh
[ "$1" != bound ] || ifconfig "$interface" "$ip" netmask "$subnet"
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def resident_mib(guest: Machine) -> int:
    """The memory of QEMU's process, which has the guest's in it."""
    status = Path(f"/proc/{guest.process.pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert match
    return int(match[1]) >> 10


@pytest.fixture(scope="module")
def forwarded_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of 16 MiB that begins with a line."""
    file = tmp_path_factory.mktemp("disk") / "disk"
    file.write_bytes(b"written by the host\n".ljust(16 * MIB, b"\0"))
    return file


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory, disk: Path, forwarded_port: int) -> Iterator[Machine]:
    """The default guest with a disk, a network and a balloon, at its prompt."""
    directory = tmp_path_factory.mktemp("qemu")
    kernel = kernel_with_modules()
    initrd = directory / "initrd"
    modules = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon"]
    initrd.write_bytes(kernel.initrd(modules, {"dhcp": DHCP_SCRIPT}))
    options = [
        *("-M", "q35", "-m", str(MEMORY_MIB), "-smp", "2"),
        *("-drive", f"file={disk},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"),
        *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{forwarded_port}-:80"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-balloon-pci"),
    ]
    with machine(directory, *options, *default_guest("", initrd, kernel.image)) as machine_:
        machine_.expect(PROMPT)
        assert machine_.shell("/load; echo $?") == "0\n"
        yield machine_
        machine_.quit()


def test_disk_is_read_and_written(guest: Machine, disk: Path) -> None:
    assert guest.shell("head -n 1 /dev/vda") == "written by the host\n"
    assert guest.shell("wc -c < /dev/vda") == f"{16 * MIB}\n"
    guest.shell("seq 1 100000 | dd of=/dev/vda bs=64k seek=1 conv=fsync 2>/dev/null")
    numbers = "".join(f"{n}\n" for n in range(1, 100_001)).encode()
    with disk.open("rb") as file:
        file.seek(64 << 10)
        assert file.read(len(numbers)) == numbers
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")
    assert guest.shell("dd if=/dev/vda bs=64k skip=1 2>/dev/null | sed -n '99999p;100000q'") == "99999\n"
    assert re.search(r"PCI-MSI.*virtio\d-req", guest.shell("cat /proc/interrupts"))


def test_network_reaches_the_host_and_is_reached(guest: Machine, forwarded_port: int) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from the host: " + self.path.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    guest.shell("ifconfig eth0 up")
    assert "lease of 10.0.2.15 obtained" in guest.shell("udhcpc -i eth0 -n -q -s /dhcp 2>&1")
    assert ", 0% packet loss" in guest.shell("ping -c 3 10.0.2.2")
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = server.server_address[1]
            assert guest.shell(f"wget -q -O - http://10.0.2.2:{port}/page; echo") == "from the host: /page\n"
        finally:
            server.shutdown()
            thread.join()
    guest.shell("{ (head -c 1000000 /dev/zero; echo from the guest) | nc -l -p 80 & }")
    wait_for(lambda: ":80 " in guest.shell("netstat -ltn"))
    with socket.create_connection(("127.0.0.1", forwarded_port)) as connection, connection.makefile("rb") as file:
        assert file.read() == bytes(1_000_000) + b"from the guest\n"


def test_balloon_gives_memory_back(guest: Machine) -> None:
    guest.shell("dd if=/dev/zero of=/tmp/full bs=1M count=90 2>/dev/null; rm /tmp/full")
    full = resident_mib(guest)
    guest.do("balloon", value=96 * MIB)
    wait_for(lambda: bool(guest.do("query-balloon")["actual"] == 96 * MIB))
    total_kib = int(guest.shell("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
    assert total_kib <= 96 << 10
    assert resident_mib(guest) <= full - 70
    guest.do("balloon", value=MEMORY_MIB * MIB)
    wait_for(lambda: bool(guest.do("query-balloon")["actual"] == MEMORY_MIB * MIB))
    assert guest.shell("dd if=/dev/zero of=/tmp/full bs=1M count=90 2>/dev/null; wc -c < /tmp/full; rm /tmp/full") == (
        f"{90 * MIB}\n"
    )


def test_disk_of_a_microvm(tmp_path: Path) -> None:
    """virtio over MMIO, found by ACPI."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"written by the host\n".ljust(MIB, b"\0"))
    kernel = kernel_with_modules()
    (tmp_path / "initrd").write_bytes(kernel.initrd(["virtio_mmio", "virtio_blk"]))
    line = 'softkvm.run="/load && head -n 1 /dev/vda && echo by the guest | dd of=/dev/vda seek=1 conv=fsync"'
    done = run(
        *("-M", "microvm", "-m", "128", "-drive", f"file={disk},format=raw,if=none,id=disk"),
        *("-device", "virtio-blk-device,drive=disk", *default_guest(line, tmp_path / "initrd", kernel.image)),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "written by the host" in done.stdout.splitlines()
    assert disk.read_bytes()[512:].startswith(b"by the guest\n")
