# SPDX-License-Identifier: Apache-2.0
"""``softkvm run --dry-run``: the machine, built and not started."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from softkvm.cli import EXIT_OK
from softkvm.cli.output import one_line, say
from softkvm.vmm.devices import pci

if TYPE_CHECKING:
    from softkvm.cli.run_image import GuestImage, OpenedImage
    from softkvm.vmm.bus import Bus
    from softkvm.vmm.machine import Machine


def add_dry_run(parser: ArgumentParser) -> None:
    """Add ``--dry-run`` and ``--json``."""
    parser.add_argument("--dry-run", action="store_true", help="build the machine, print what it is, don't start it")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")


def _ranges(bus: Bus) -> list[dict[str, Any]]:
    return [{"start": one.start, "end": one.end - 1, "name": one.name} for one in bus.ranges]


def _functions(machine: Machine) -> list[dict[str, Any]]:
    found = []
    for (device, number), function in machine.board.pci_config.functions.items():
        found.append(
            {
                "address": f"00:{device:02x}.{number}",
                "vendor": function.read(pci.VENDOR_ID, 2),
                "device": function.read(pci.DEVICE_ID, 2),
                "class": function.read(pci.CLASS, 3),
                "line": function.read(pci.INTERRUPT_LINE, 1),
                "bars": [function.read(pci.BAR_0 + 4 * index, 4) for index in range(pci.BAR_COUNT)],
            }
        )
    return found


def about(machine: Machine, image: GuestImage, loaded: OpenedImage, accel: str) -> dict[str, Any]:
    """Return what the machine is."""
    config = machine.config
    return {
        "accel": accel,
        "vcpus": config.vcpus,
        "memory": [{"start": ram.start, "end": ram.end - 1} for ram in machine.memory.ranges],
        "kernel": str(image.kernel),
        "initrd": list(image.initrd),
        "command_line": None if image.raw else loaded.command_line,
        "interfaces": "hv" if config.hyperv else "kvm",
        "reboot": config.reboot,
        "cpu_quota": config.cpu_quota,
        "cpu_time_limit_s": config.cpu_time_limit_s,
        "ports": _ranges(machine.pio),
        "mmio": _ranges(machine.mmio),
        "pci": _functions(machine),
        "virtio": [
            {
                "name": name,
                "type": transport.device.type,
                "transport": type(transport).__name__.removesuffix("Transport").lower(),
                "queues": list(transport.device.queue_sizes),
                "features": transport.device.features,
            }
            for name, transport in machine.board.virtio.transports.items()
        ],
    }


def tell_machine(args: Namespace, machine: Machine, image: GuestImage, loaded: OpenedImage, accel: str) -> int:
    """Print it."""
    told = about(machine, image, loaded, accel)
    if args.json:
        say(json.dumps(told, indent=2))
        return EXIT_OK
    lines = [
        f"accel         {told['accel']}",
        f"vCPUs         {told['vcpus']}",
        *(f"memory        {ram['start']:#x} to {ram['end']:#x}" for ram in told["memory"]),
        f"kernel        {told['kernel']}",
        *(f"initrd        {path}" for path in told["initrd"]),
    ]
    if told["command_line"] is not None:
        lines.append(f"command line  {told['command_line']}")
    lines += [f"port          {one['start']:#06x} to {one['end']:#06x}  {one['name']}" for one in told["ports"]]
    lines += [f"MMIO          {one['start']:#x} to {one['end']:#x}  {one['name']}" for one in told["mmio"]]
    lines += [
        f"PCI           {one['address']}  {one['vendor']:04x}:{one['device']:04x}  class {one['class']:06x}"
        for one in told["pci"]
    ]
    for one in told["virtio"]:
        queues = " ".join(map(str, one["queues"]))
        lines.append(f"virtio        {one['name']}: type {one['type']} on {one['transport']}, queues {queues}")
    say("\n".join(map(one_line, lines)))
    return EXIT_OK
