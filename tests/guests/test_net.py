# SPDX-License-Identifier: Apache-2.0
"""Linux's driver of the network device and the user-mode network: addresses, downloads, forwarded ports, refusals."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from tests.support.guests import linux_guest
from tests.support.hops import hop
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.devices.virtio_net import Net, parse
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.net.user.stack import UserStack
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

CONTENT = b"".join(b"%07d\n" % number for number in range(1 << 18))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the same for every path, and notes what is sent to it."""

    received: list[bytes] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    """The port of an HTTP server on the host's loopback."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_linux_gets_an_address_downloads_serves_and_is_kept_in(port: int) -> None:
    """Three devices: PCI, PCI with packed rings and two pairs of queues, MMIO; each in a network of its own."""
    guest = linux_guest()
    specs = (
        parse("user,hostfwd=tcp::0-:80,hostname=inside"),
        parse("user,net=10.0.3.0/24,queues=2,packed"),
        parse("user,net=10.0.4.0/24,transport=mmio,mtu=4000"),
    )
    commands = (
        "hostname; cat /etc/resolv.conf; for n in 0 1 2; do ip addr show eth$n; "
        f"wget -q -O - http://10.0.$((n+2)).2:{port}/ | md5sum; done; nslookup host 10.0.2.3; "
        f"wget -q -O /tmp/file http://10.0.2.2:{port}/; wget -q -O - --post-file=/tmp/file http://10.0.2.2:{port}/up; "
        "wget http://192.0.2.1/; cat /sys/class/net/eth2/mtu; ls -d /sys/class/net/eth1/queues/*; "
        "echo served > /tmp/page; httpd -p 80 -h /tmp; echo ready; read line; wget -q -O - http://127.0.0.1/page"
    )
    Handler.received.clear()
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(vcpus=2, device_specs=specs), console.output) as machine:
        console.attach(machine)
        machine.load(guest.kernel, guest.initrd, f'{guest.command_line} quiet softkvm.run="{commands}"')
        net = machine.board.virtio.transports["net0"].device
        assert isinstance(net, Net) and isinstance(net.backend, UserStack)
        machine.start()
        console.expect("^ready", 240)
        with urllib.request.urlopen(f"http://127.0.0.1:{net.backend.listeners[0].port}/page", timeout=60) as answer:
            assert answer.read() == b"served\n"
        console.send("\n")
        assert machine.wait(60).end is End.POWER_OFF
    output = console.text
    assert "inside" in output and "nameserver 10.0.4.3" in output
    for network in (2, 3, 4):
        assert f"inet 10.0.{network}.15/24 brd 10.0.{network}.255" in output
    assert output.count(f"{hashlib.md5(CONTENT).hexdigest()}  -") == 3
    assert Handler.received == [CONTENT]
    assert "Address: 10.0.2.2" in output
    assert "wget: can't connect to remote host (192.0.2.1): No route to host" in output
    assert "\n4000" in output and "/sys/class/net/eth1/queues/rx-1" in output
    assert output.count("served") == 1


def test_a_machine_that_moves_keeps_its_address_and_its_connections_are_reset(port: int) -> None:
    """A program that waits for a connection ends at once, as the guest's kernel has got a reset; new ones work."""
    guest = linux_guest()
    console = Console()
    with socket.create_server(("127.0.0.1", 0)) as server, open_soft() as kvm:
        server.settimeout(120)
        commands = (
            f"nc 10.0.2.2 {server.getsockname()[1]} </dev/ttyS0; echo nc ended; ip addr show eth0; "
            f"wget -q -O - http://10.0.2.2:{port}/ | md5sum"
        )
        machine = Machine(kvm, Config(device_specs=(parse("user"),)), console.output)
        try:
            machine.load(guest.kernel, guest.initrd, f'{guest.command_line} quiet softkvm.run="{commands}"')
            machine.start()
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"hello there\n")
                console.expect("hello there", 60)
                machine = hop(machine, kvm, console)
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
            assert machine.wait(120).end is End.POWER_OFF
        finally:
            machine.close()
    assert "nc ended" in console.text, console.text
    assert "inet 10.0.2.15/24" in console.text
    assert hashlib.md5(CONTENT).hexdigest() in console.text
