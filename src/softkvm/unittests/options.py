# SPDX-License-Identifier: Apache-2.0
"""The QEMU options of an entry, as far as they mean something here: the platform that it wants.

Nothing is dropped silently: what means nothing here is in ``ignored``, what the entry cannot do without is in
``missing``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

from softkvm.unittests import cpumodel
from softkvm.unittests.cpumodel import CpuModel
from softkvm.vmm.memory import GIB, KIB, MIB

DEFAULT_MEMORY = 128 * MIB
PRESENT_DEVICES = ("pc-testdev", "isa-debug-exit", "pci-testdev", "testdev")
HYPERV_TESTDEV = "hyperv-testdev"
MACHINES = ("pc", "i440fx")
_UNITS = {"": MIB, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}


@dataclass(slots=True)
class Platform:
    """The machine that an entry asks for."""

    memory_size: int = DEFAULT_MEMORY
    cpu: CpuModel = field(default_factory=CpuModel)
    pit: bool = True
    vmport: bool = False
    hyperv_testdev: bool = False
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def _cpu(platform: Platform, value: str) -> None:
    platform.cpu = cpumodel.parse(value)
    platform.ignored += platform.cpu.ignored


def _memory(platform: Platform, value: str) -> None:
    size = re.fullmatch(r"(?:size=)?(\d{1,9})([kmgt]?)", value, re.IGNORECASE)
    if size is None:
        platform.ignored.append(f"-m {value}")
    else:
        platform.memory_size = int(size[1]) * _UNITS[size[2].lower()]


def _machine(platform: Platform, value: str) -> None:
    for part in value.split(","):
        key, equals, setting = part.partition("=")
        if not equals or key == "type":
            kind = setting or key
            if kind not in MACHINES:
                platform.missing.append(f"-machine {kind}")
        elif key == "pit" and setting in ("on", "off"):
            platform.pit = setting == "on"
        elif key == "vmport" and setting in ("on", "off"):
            platform.vmport = setting == "on"
        elif key == "kernel-irqchip" and setting != "on":
            platform.missing.append(f"-machine {part}")
        elif key != "accel":
            platform.ignored.append(f"-machine {part}")


def _device(platform: Platform, value: str) -> None:
    name = value.split(",")[0]
    if name == HYPERV_TESTDEV:
        platform.hyperv_testdev = True
    elif name not in PRESENT_DEVICES:
        platform.missing.append(f"-device {value}")


_OPTIONS: dict[str, Callable[[Platform, str], None]] = {
    "-cpu": _cpu,
    "-m": _memory,
    "-machine": _machine,
    "-M": _machine,
    "-device": _device,
}
_FLAGS = ("-enable-kvm", "--enable-kvm", "-nodefaults", "-no-reboot", "--no-reboot")
"""Options without a value that say what we do anyway."""


def parse(text: str) -> Platform:
    """Return the platform that the options in *text* describe."""
    platform = Platform()
    words = shlex.split(text)
    at = 0
    while at < len(words):
        option = words[at]
        at += 1
        if option in _FLAGS:
            continue
        value = ""
        if at < len(words) and not words[at].startswith("-"):
            value = words[at]
            at += 1
        handler = _OPTIONS.get(option)
        if handler is not None and value:
            handler(platform, value)
        else:
            platform.ignored.append(f"{option} {value}".rstrip())
    return platform
