# SPDX-License-Identifier: Apache-2.0
"""Boots whole guests for tests."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softkvm import api
from softkvm.bench.sides import SideError, guest_image
from softkvm.vmm.console import Console
from softkvm.vmm.guest import Guest, GuestUnavailable, demo_kernel, prepare
from softkvm.vmm.machine import Config, Machine

ROOT = Path(__file__).resolve().parents[2]


def missing(reason: str) -> None:
    """Skip; on CI fail."""
    if os.environ.get("SOFTKVM_CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def linux_guest() -> Guest:
    """The default guest; skips where it cannot be prepared, which CI does not accept."""
    try:
        return prepare()
    except GuestUnavailable as error:
        missing(str(error))
        raise AssertionError from error


def demo_image() -> Path:
    """The demonstration guest."""
    try:
        return demo_kernel()
    except GuestUnavailable as error:
        missing(str(error))
        raise AssertionError from error


def bench_image() -> Path:
    """The benchmark guest."""
    path = ROOT / "guests" / "build" / "bench.elf"
    if not path.exists():
        missing("guests/build/bench.elf is not built: make guests")
    return path


def exits_image() -> Path:
    """The guest of ``softkvm bench vmexit``."""
    try:
        return guest_image()
    except SideError as error:
        missing(str(error))
        raise AssertionError from error


@contextmanager
def booted(
    kvm: api.Kvm,
    kernel: Path,
    initrd: Path | None = None,
    command_line: str = "",
    *,
    memory_mib: int = 256,
    vcpus: int = 1,
) -> Iterator[tuple[Machine, Console]]:
    """A running machine and its console."""
    console = Console()
    with kvm, Machine(kvm, Config(memory_mib << 20, vcpus), console.output) as machine:
        console.attach(machine)
        machine.load(kernel.read_bytes(), initrd.read_bytes() if initrd else None, command_line)
        machine.start()
        yield machine, console


def run_in_qemu(kernel: Path, command_line: str, *, memory_mib: int = 256, vcpus: int = 1) -> str:
    """What ``kernel`` prints under QEMU until it powers off; skips where there is no QEMU."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 to compare with")
    machine = ["-accel", "tcg", "-m", str(memory_mib), "-smp", str(vcpus), "-no-reboot"]
    devices = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    return subprocess.run(
        [qemu, *machine, *devices, "-kernel", kernel, "-append", command_line],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
