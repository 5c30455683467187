# SPDX-License-Identifier: Apache-2.0
"""A Linux with virtio devices is saved and restored, and moves: its drivers don't notice."""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm import api
from softkvm.cli.devices import specs_of
from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.migration.source import Migration
from softkvm.vmm.migration.stream import Channel
from softkvm.vmm.migration.target import Incoming
from softkvm.vmm.outcome import End
from softkvm.vmm.snapshot.directory import Snapshot, save

pytestmark = pytest.mark.guest

#: What each device does; `said N` counts the times.
WORK = (
    "dd if=/dev/urandom of=/tmp/part bs=64k count=8 2>/dev/null; dd if=/tmp/part of=/dev/vda bs=64k seek=3 conv=fsync "
    "2>/dev/null; dd if=/dev/vda bs=64k skip=3 count=8 iflag=direct 2>/dev/null | cmp - /tmp/part && "
    "[ $(head -c 8 /dev/hwrng | wc -c) = 8 ] && ping -c 1 -W 5 10.0.2.2 > /dev/null && "
    "[ $(cat /mnt/share/name) = shared ]; echo worked $?"
)


def works(console: Console) -> None:
    console.send("\n")
    console.expect("# ", 60)
    console.send(f"{WORK}\n")
    console.expect(r"worked 0\r", 60)


def move(machine: Machine, kvm: api.Kvm, options: list[list[str]], console: Console) -> Machine:
    here, there = socket.socketpair()
    arrived: list[Machine] = []

    def receive() -> None:
        def new_machine(config: Config, extra: dict[str, object]) -> Machine:
            return Machine(kvm, replace(config, device_specs=specs_of(extra["devices"])), console.output)

        with Channel(there) as channel, Incoming(channel, new_machine) as incoming:
            arrived.append(incoming.receive())

    thread = threading.Thread(target=receive)
    thread.start()
    with Channel(here) as channel:
        Migration(machine, channel, extra={"devices": options}).run()
    thread.join(60)
    return arrived[0]


def test_devices_go_on_in_a_restored_machine_and_in_one_that_has_moved(tmp_path: Path) -> None:
    guest = linux_guest()
    (tmp_path / "disk").write_bytes(bytes(8 * MIB))
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "name").write_text("shared\n")
    options = [
        ["--disk", f"{tmp_path}/disk"],
        ["--net", "user"],
        ["--rng", ""],
        ["--share", f"{tmp_path}/share:share"],
        ["--balloon", ""],
        ["--vsock", ""],
    ]
    console = Console()
    with open_soft() as kvm:
        machine = Machine(kvm, Config(128 * MIB, 2, device_specs=specs_of(options)), console.output)
        try:
            console.attach(machine)
            machine.load(guest.kernel, guest.initrd, f"{guest.command_line} quiet softkvm.share=share")
            machine.start()
            console.expect("# ", 120)
            works(console)
            other = move(machine, kvm, options, console)
            assert machine.wait(20).end is End.MIGRATED
            machine.close()
            machine = other
            console.attach(machine)
            machine.start()
            works(console)
            machine.pause()
            save(machine, tmp_path / "one")
            machine.close()
            with Snapshot(tmp_path / "one") as snapshot:
                assert {Path(file.path).name for file in snapshot.manifest.files} == {"disk"}
                machine = snapshot.restore(kvm, console.output, device_specs=specs_of(options))
            console.attach(machine)
            machine.start()
            works(console)
            console.send("dmesg | grep -cE 'BUG|Call Trace|stall|I/O error|timed out'; echo looked\n")
            console.expect(r"^0\r\nlooked", 30)
        finally:
            machine.close()
    assert not re.search("Oops|panic", console.text)
