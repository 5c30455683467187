# SPDX-License-Identifier: Apache-2.0
"""The user-mode network beside QEMU's (``-netdev user``, libslirp): TCP both ways, round trips, connections.

Both sides boot the default guest with one virtio-net device on PCI and run the same program in it (``net.c``); a server
on the host's loopback is its peer, in a process of its own. The guest's clock measures. Aim: at least QEMU's rates.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import threading
from io import BytesIO
from multiprocessing import Process, Queue
from pathlib import Path
from typing import Any

from benchmarks import common
from softkvm.progress import TerminalProgress
from softkvm.vmm.guest import GuestUnavailable, prepare
from softkvm.vmm.guest.cpio import CpioWriter

_SOURCE = Path(__file__).with_suffix(".c")
GATEWAY = "10.0.2.2"
CASES = {"receive": 64, "send": 64, "round": 2000, "datagram": 2000, "connect": 200}
"""Amounts: MiB, or rounds."""

UNITS = {
    "receive": "TCP to the guest, MB/s",
    "send": "TCP from the guest, MB/s",
    "round": "TCP round trip, µs",
    "datagram": "UDP round trip, µs",
    "connect": "TCP connection, µs",
}
FASTER_IS_MORE = ("receive", "send")


def _serve_tcp(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answer(connection)


def answer(connection: socket.socket) -> None:
    """Answer one connection: by its first byte, send without end, swallow, or echo."""
    with connection:
        try:
            kind = connection.recv(1)
            if kind == b"r":
                data = bytes(1 << 20)
                while True:
                    connection.sendall(data)
            if kind == b"s":
                while connection.recv(1 << 20):
                    pass
                connection.sendall(b".")
            if kind == b"e":
                while data := connection.recv(1):
                    connection.sendall(data)
        except OSError:
            pass


def _serve(ports: Queue[int]) -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port = listening.getsockname()[1]
    datagrams.bind(("127.0.0.1", port))

    def echo() -> None:
        while True:
            data, address = datagrams.recvfrom(2048)
            datagrams.sendto(data, address)

    threading.Thread(target=echo, daemon=True).start()
    ports.put(port)
    while True:
        threading.Thread(target=_serve_tcp, args=(listening.accept()[0],), daemon=True).start()


def initrd(directory: Path, base: bytes) -> Path:
    """The default guest's initramfs, and the program."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise common.BenchmarkError("no gcc to compile the guest's program with")
    program = directory / "net"
    subprocess.run([compiler, "-O2", "-static", "-o", program, _SOURCE], check=True)
    out = BytesIO()
    archive = CpioWriter(out)
    archive.directory("bin", 0o755)
    archive.file("bin/net", program.read_bytes(), 0o755)
    archive.close()
    path = directory / "initrd"
    path.write_bytes(base + bytes(-len(base) % 4) + out.getvalue())
    return path


def measure() -> None:
    """Boot, measure, print, save."""
    parser = common.arguments(__doc__ or "", runs=3)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: all)")
    args = parser.parse_args()
    cases = [name for name in CASES if name in args.cases.split(",")]
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        raise common.BenchmarkError(str(error)) from None
    ports: Queue[int] = Queue()
    server = Process(target=_serve, args=(ports,), daemon=True)
    server.start()
    found: dict[str, dict[str, list[float]]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as directory:
            port = ports.get(timeout=20)
            commands = "; ".join(f"net {GATEWAY} {port} {name} {CASES[name]}" for name in cases)
            image = common.Image(
                guest.kernel,
                initrd(Path(directory), guest.initrd.read_bytes()),
                f'{guest.command_line} quiet softkvm.run="{commands}"',
                options=("--net", "user"),
                qemu_options=("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="),
            )
            for _ in range(args.runs):
                for side in common.chosen_sides(args):
                    run = common.run(side, image)
                    figures = found.setdefault(side, {})
                    for _, line in run.lines:
                        if match := re.match(r"net (\w+) (\d+) ([\d.]+)", line):
                            name, amount, seconds = match[1], int(match[2]), float(match[3])
                            scale = amount * 1.048576 / seconds if name in FASTER_IS_MORE else seconds / amount * 1e6
                            figures.setdefault(name, []).append(scale)
                    if missing := [name for name in cases if name not in figures]:
                        raise common.BenchmarkError(f"{side}: no {', '.join(missing)}:\n{run.tail()}")
    finally:
        server.kill()
        server.join()
    medians: dict[str, dict[str, float]] = {
        side: {name: common.median(values) for name, values in figures.items()} for side, figures in found.items()
    }
    rows = []
    for name in cases:
        ours, theirs = (medians.get(side, {}).get(name) for side in (common.SOFTKVM, common.QEMU))
        rate = common.ratio(ours, theirs) if name in FASTER_IS_MORE else common.ratio(theirs, ours)
        rows.append((UNITS[name], common.number(ours), common.number(theirs), rate))
    common.table("User-mode networks (the last column is ours in theirs: more is better)",
                 ("", "softkvm", "QEMU TCG", "rate"), rows)  # fmt: skip
    results: dict[str, Any] = {"guest": guest.kernel_package, "runs": args.runs, "cases": CASES, "medians": medians}
    common.save("net", results)


if __name__ == "__main__":
    common.main(measure)
