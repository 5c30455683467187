# SPDX-License-Identifier: Apache-2.0
"""Sockets between host and guest (virtio-vsock) beside TCP over the user-mode networks, ours and QEMU's.

One guest has both devices and runs the same program over either (``net.c``); its peer is a process of the host's,
behind the device's UNIX socket or on the loopback. The guest's clock measures. QEMU has virtio-vsock only with the
kernel's vhost-vsock, where the host has that: it is not compared, as its data never comes through QEMU.
"""

from __future__ import annotations

import re
import socket
import tempfile
import threading
from multiprocessing import Process, Queue
from pathlib import Path
from typing import Any

from benchmarks import common, net
from softkvm.progress import TerminalProgress
from softkvm.vmm.guest import GuestUnavailable, prepare

PORT = 5000
VSOCK, TCP = "host", net.GATEWAY
CASES = {name: net.CASES[name] for name in ("receive", "send", "round", "connect")}
UNITS = {
    "receive": "to the guest, MB/s",
    "send": "from the guest, MB/s",
    "round": "round trip, µs",
    "connect": "connection, µs",
}


def _serve(path: str, ports: Queue[int]) -> None:
    by_vsock = socket.socket(socket.AF_UNIX)
    by_vsock.bind(path)
    by_vsock.listen(1024)
    by_tcp = socket.create_server(("127.0.0.1", 0), backlog=1024)
    ports.put(by_tcp.getsockname()[1])

    def accept(listening: socket.socket) -> None:
        while True:
            threading.Thread(target=_answer, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, args=(by_vsock,), daemon=True).start()
    accept(by_tcp)


def _answer(connection: socket.socket) -> None:
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    net.answer(connection)


def measure() -> None:
    """Boot, measure, print, save."""
    args = common.arguments(__doc__ or "", runs=3).parse_args()
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        raise common.BenchmarkError(str(error)) from None
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as directory:
        path = f"{directory}/v"
        ports: Queue[int] = Queue()
        server = Process(target=_serve, args=(f"{path}_{PORT}", ports), daemon=True)
        server.start()
        try:
            port = ports.get(timeout=20)
            initrd = net.initrd(Path(directory), guest.initrd.read_bytes())
            for _ in range(args.runs):
                for side in common.chosen_sides(args):
                    peers = {VSOCK: PORT, TCP: port} if side == common.SOFTKVM else {TCP: port}
                    commands = "; ".join(
                        f"echo by {address}; net {address} {number} {name} {CASES[name]}"
                        for address, number in peers.items()
                        for name in CASES
                    )
                    image = common.Image(
                        guest.kernel,
                        initrd,
                        f'{guest.command_line} quiet softkvm.run="{commands}"',
                        options=("--net", "user", "--vsock", f"path={path}"),
                        qemu_options=("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="),
                    )
                    _take(common.run(side, image), side, figures)
        finally:
            server.kill()
            server.join()
    medians = {way: {name: common.median(values) for name, values in found.items()} for way, found in figures.items()}
    ways = [f"{common.SOFTKVM} {VSOCK}", f"{common.SOFTKVM} {TCP}", f"{common.QEMU} {TCP}"]
    rows = [(UNITS[name], *(common.number(medians.get(way, {}).get(name)) for way in ways)) for name in CASES]
    common.table("Sockets between host and guest", ("", "vsock", "softkvm TCP", "QEMU TCG TCP"), rows)
    results: dict[str, Any] = {"guest": guest.kernel_package, "runs": args.runs, "cases": CASES, "medians": medians}
    common.save("vsock", results)


def _take(run: common.Run, side: str, figures: dict[str, dict[str, list[float]]]) -> None:
    way = ""
    count = 0
    for _, line in run.lines:
        if match := re.match(r"by (\S+)", line):
            way = f"{side} {match[1]}"
        elif match := re.match(r"net (\w+) (\d+) ([\d.]+)", line):
            name, amount, seconds = match[1], int(match[2]), float(match[3])
            scale = amount * 1.048576 / seconds if name in net.FASTER_IS_MORE else seconds / amount * 1e6
            figures.setdefault(way, {}).setdefault(name, []).append(scale)
            count += 1
    if count % len(CASES) or not count:
        raise common.BenchmarkError(f"{side}: {count} figures:\n{run.tail()}")


if __name__ == "__main__":
    common.main(measure)
