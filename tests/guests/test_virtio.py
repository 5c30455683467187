# SPDX-License-Identifier: Apache-2.0
"""Linux's own drivers find virtio devices behind every transport, and their interrupts come."""

import re

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.devices.spec import MMIO, Placement
from softkvm.vmm.devices.virtio_rng import RngSpec
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

READ = (
    "cd /sys/class/misc/hw_random; for rng in $(cat rng_available); do echo $rng > rng_current; "
    "dd if=/dev/hwrng of=/tmp/$rng bs=512 count=8 2>/dev/null; done; wc -c /tmp/virtio_rng.*; "
    "cat /tmp/virtio_rng.* | gzip | wc -c; cat /sys/bus/virtio/devices/*/features; grep virtio /proc/interrupts"
)


@pytest.mark.parametrize("options", ["", "pci=nomsi"])
def test_linux_reads_entropy_through_every_transport(options: str) -> None:
    guest = linux_guest()
    devices = (
        RngSpec(Placement()),
        RngSpec(Placement(packed=True)),
        RngSpec(Placement(transport=MMIO)),
        RngSpec(Placement(transport=MMIO, packed=True)),
    )
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(device_specs=devices), console.output) as machine:
        command_line = f'{guest.command_line} quiet {options} softkvm.run="{READ}"'
        machine.load(guest.kernel, guest.initrd, command_line)
        assert machine.run(timeout_s=240).end is End.POWER_OFF
    output = console.text
    assert len(re.findall(r"4096 /tmp/virtio_rng", output)) == 4, output
    assert re.search(r"^16[34]\d\d\s*$", output, re.MULTILINE), output  # which no compression makes less
    bits = re.findall(r"^[01]{64}\s*$", output, re.MULTILINE)
    assert [line[34] for line in bits] == ["0", "1", "0", "1"]  # VIRTIO_F_RING_PACKED
    counts = [int(count) for count in re.findall(r"^ *\d+: +(\d+) .*virtio\d(?:-input)?\s*$", output, re.MULTILINE)]
    assert len(counts) >= 3, output
    assert all(counts), output
