# SPDX-License-Identifier: Apache-2.0
"""Linux's own drivers find virtio devices behind every transport, and their interrupts come."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.examples import examples
from tests.support.guests import linux_guest
from tests.support.hops import hop
from tests.support.machines import open_soft

from softkvm.vmm.block.files import create_qcow2, open_image
from softkvm.vmm.console import Console
from softkvm.vmm.devices.spec import MMIO, Placement
from softkvm.vmm.devices.virtio_blk import DiskSpec
from softkvm.vmm.devices.virtio_rng import RngSpec
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

READ = (
    "cd /sys/class/misc/hw_random; for rng in $(cat rng_available); do echo $rng > rng_current; "
    "dd if=/dev/hwrng of=/tmp/$rng bs=512 count=8 2>/dev/null; done; wc -c /tmp/virtio_rng.*; "
    "cat /tmp/virtio_rng.* | gzip | wc -c; cat /sys/bus/virtio/devices/*/features; grep virtio /proc/interrupts"
)


def test_linux_reads_entropy_through_every_transport() -> None:
    guest = linux_guest()
    devices = (
        RngSpec(Placement()),
        RngSpec(Placement(packed=True)),
        RngSpec(Placement(transport=MMIO)),
        RngSpec(Placement(transport=MMIO, packed=True)),
    )
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(device_specs=devices), console.output) as machine:
        machine.load(guest.kernel, guest.initrd, f'{guest.command_line} quiet softkvm.run="{READ}"')
        assert machine.run(timeout_s=240).end is End.POWER_OFF
    output = console.text
    assert len(re.findall(r"4096 /tmp/virtio_rng", output)) == 4, output
    assert re.search(r"^16[34]\d\d\s*$", output, re.MULTILINE), output  # which no compression makes less
    bits = re.findall(r"^[01]{64}\s*$", output, re.MULTILINE)
    assert [line[34] for line in bits] == ["0", "1", "0", "1"]  # VIRTIO_F_RING_PACKED
    counts = [int(count) for count in re.findall(r"^ *\d+: +(\d+) .*virtio\d(?:-input)?\s*$", output, re.MULTILINE)]
    assert len(counts) >= 3, output
    assert all(counts), output


FILE_SYSTEM = (
    "for disk in vda vdb vdc; do mke2fs /dev/$disk > /dev/null && mkdir /$disk && mount /dev/$disk /$disk && "
    "dd if=/dev/urandom of=/$disk/file bs=64k count=40 conv=fsync 2>/dev/null; md5sum /$disk/file | tee /tmp/$disk; "
    "umount /$disk; echo 3 > /proc/sys/vm/drop_caches; mount -o ro /dev/$disk /$disk && md5sum -c /tmp/$disk; "
    "umount /$disk; blkdiscard -o 0 -l 1048576 /dev/$disk && echo discarded; cat /sys/block/$disk/serial; echo; done; "
    "grep virtio /proc/interrupts"
)


def test_linux_keeps_a_file_system_on_each_kind_of_disk(tmp_path: Path) -> None:
    guest = linux_guest()
    raw, kept, qcow2 = tmp_path / "disk.raw", tmp_path / "kept.raw", tmp_path / "disk.qcow2"
    for file in (raw, kept):
        file.write_bytes(bytes(16 << 20))
    create_qcow2(str(qcow2), 16 << 20)
    devices = (
        DiskSpec(str(raw), serial="raw"),
        DiskSpec(str(qcow2), serial="qcow2", queues=2, placement=Placement(packed=True)),
        DiskSpec(str(kept), overlay=True, serial="overlay", placement=Placement(transport=MMIO)),
    )
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(vcpus=2, device_specs=devices), console.output) as machine:
        command_line = f'{guest.command_line} quiet pci=nomsi softkvm.run="{FILE_SYSTEM}"'
        machine.load(guest.kernel, guest.initrd, command_line)
        assert machine.run(timeout_s=240).end is End.POWER_OFF
    output = console.text
    assert len(re.findall(r"/vd\w/file: OK", output)) == 3, output
    assert output.count("discarded") == 3, output
    assert len(re.findall(r"IO-APIC +1[01]-fasteoi +virtio", output)) == 2, output  # INTx
    assert len(re.findall(r"IO-APIC +16-edge +virtio", output)) == 1, output
    assert re.findall(r"^(raw|qcow2|overlay)\s*$", output, re.MULTILINE) == ["raw", "qcow2", "overlay"], output
    assert not re.search(r"I/O error|EXT[24]-fs error|BUG:|Call Trace", output), output
    assert kept.read_bytes() == bytes(16 << 20)
    assert raw.read_bytes() != bytes(16 << 20)


WORK = (
    "for disk in vda vdb vdc; do (mke2fs /dev/$disk > /dev/null && mkdir /$disk && mount /dev/$disk /$disk && "
    "for n in 1 2 3 4; do (dd if=/dev/urandom bs=64k count=4; dd if=/dev/hwrng bs=512 count=2) 2>&- > /$disk/$n; "
    "sync; done; cd /$disk; "
    "md5sum * > /tmp/$disk; cd /; umount /$disk; mount -o ro /dev/$disk /$disk && cd /$disk && md5sum -c /tmp/$disk) & "
    "done; wait"
)


def test_disks_go_on_with_a_machine_that_is_saved_and_restored(tmp_path: Path) -> None:
    """At any moment: requests under way, interrupts pending, a queue that has not been looked at."""
    guest = linux_guest()
    raw, kept, qcow2 = tmp_path / "disk.raw", tmp_path / "kept.raw", tmp_path / "disk.qcow2"
    for file in (raw, kept):
        file.write_bytes(bytes(16 << 20))
    create_qcow2(str(qcow2), 16 << 20)
    devices = (
        DiskSpec(str(raw)),
        DiskSpec(str(qcow2), queues=2, placement=Placement(packed=True)),
        DiskSpec(str(kept), overlay=True, placement=Placement(transport=MMIO)),
        RngSpec(),
    )
    moments, console = random.Random(1), Console()
    with open_soft() as kvm:
        machine = Machine(kvm, Config(96 << 20, 2, device_specs=devices), console.output)
        try:
            machine.load(guest.kernel, guest.initrd, f'{guest.command_line} quiet softkvm.run="{WORK}"')
            machine.start()
            hops = 0
            console.attach(machine)
            console.expect("softkvm: init reached", 120)
            while hops < 4 and not machine.ended.wait(moments.uniform(0.2, 1.5)):
                machine.pause()  # what is on the disks stays what it was when the machine was saved
                machine = hop(machine, kvm, console)
                hops += 1
            outcome = machine.wait(240)
        finally:
            machine.close()
    output = console.text
    assert outcome.end is End.POWER_OFF, output[-2000:]
    assert hops >= 1
    assert len(re.findall(r"^\d: OK\s*$", output, re.MULTILINE)) == 12, output
    assert not re.search(r"I/O error|EXT[24]-fs error|BUG:|Call Trace", output), output
    assert kept.read_bytes() == bytes(16 << 20)


def test_the_pages_examples_of_disks_do_what_it_says(tmp_path: Path) -> None:
    linux_guest()
    ((_, script),) = examples("disks.md", "sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert re.search(r"^kept\s*$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert b"kept\n" in (tmp_path / "disk.raw").read_bytes()  # what was removed, was in the layer alone


SYNCED = (
    "n=0; while :; do printf %0512d $n | dd of=/dev/vda bs=512 seek=$n conv=fsync,notrunc 2>/dev/null && echo done $n; "
    "n=$((n+1)); done"
)


def test_what_a_guest_has_synced_survives_kill_9(tmp_path: Path) -> None:
    guest = linux_guest()
    disk = tmp_path / "disk.qcow2"
    create_qcow2(str(disk), 1 << 20, cluster_bits=9)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "softkvm.cli.main",
        "run",
        "--kernel",
        guest.kernel,
        "--initrd",
        guest.initrd,
    ]
    command += ["--disk", disk, "--append", f'{guest.command_line} quiet softkvm.run="{SYNCED}"', "--timeout", "240"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    synced = -1
    for line in process.stdout:
        if match := re.match(r"done (\d+)", line):
            synced = int(match[1])
            if synced == 20:
                os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert synced >= 20
    with open_image(str(disk)) as image:
        for number in range(synced + 1):
            data = bytearray(512)
            image.readv([memoryview(data)], 512 * number)
            assert data == b"%0512d" % number
