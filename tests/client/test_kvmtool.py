# SPDX-License-Identifier: Apache-2.0
"""kvmtool, unmodified, under ``softkvm exec``: ``lkvm`` of PATH, or a package's where the system's sources have one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.kernels import GENERIC, kernel_with_modules
from tests.support.qemu import EXEC, TIMEOUT_S, wait_for
from tests.support.systems import find_package_file

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

MIB = 1 << 20
#: Its network would want a driver, or it warns.
QUIET = ("--network", "mode=none")


@pytest.fixture(scope="module")
def lkvm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = shutil.which("lkvm")
    program = Path(found) if found else tmp_path_factory.mktemp("kvmtool") / "lkvm"
    if not found:
        file = find_package_file("kvmtool", r"usr/bin/lkvm")
        if file is None:
            pytest.skip("lkvm is not on PATH, and the system's package sources have no kvmtool")
        shutil.copy(file, program)
        program.chmod(0o755)
    done = subprocess.run([program, "version"], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"lkvm does not start: {done.stderr.strip()}")
    return program


@pytest.fixture(scope="module")
def is_old(lkvm: Path) -> bool:
    """Whether it is of before 2021, as Ubuntu 22.04's.

    That one names a processor's vendor that Linux does not know, so that Linux calls its hypervisor as it does on
    Intel's; and it ends by using what it has freed.
    """
    done = subprocess.run([lkvm, "run", "--help"], check=False, capture_output=True, text=True)
    return "--nodefaults" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def boot(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that boot a kernel with virtio and 9P, which finds its CPUs without ACPI."""
    kernel = kernel_with_modules(GENERIC)
    initrd = tmp_path_factory.mktemp("initrd") / "initrd"
    modules = ["virtio_pci", "virtio_blk", "9p", "9pnet_virtio", "virtio_balloon"]
    initrd.write_bytes(kernel.initrd(modules))
    return ["--kernel", str(kernel.image), "--initrd", str(initrd), *QUIET]


def append(commands: str) -> list[str]:
    """The kernel's command line; without paravirtual spinlocks, which would need the right vendor (:func:`is_old`)."""
    return ["--params", f'console=ttyS0 quiet nopvspin softkvm.run="{commands}"']


def ends_well(status: int, is_old: bool) -> bool:
    return status == 0 or (is_old and status == -signal.SIGSEGV)


def test_linux_with_two_cpus_a_disk_and_a_directory(lkvm: Path, is_old: bool, boot: list[str], tmp_path: Path) -> None:
    disk, directory = tmp_path / "disk", tmp_path / "directory"
    disk.write_bytes(b"written by the host\n".ljust(MIB, b"\0"))
    directory.mkdir()
    (directory / "file").write_text("a file of the host\n")
    commands = (
        "/load; grep -c ^processor /proc/cpuinfo; head -n 1 /dev/vda; "
        "echo by the guest | dd of=/dev/vda seek=1 conv=fsync;"
        " mkdir /host; mount -t 9p -o trans=virtio,version=9p2000.L host /host; cat /host/file;"
        " echo by the guest > /host/other; reboot -f"
    )
    done = subprocess.run(
        [
            *EXEC, "--", lkvm, "run", *boot, "--cpus", "2", "--mem", "256",
            "--disk", disk, "--9p", f"{directory},host", *append(commands),
        ],
        check=False, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert ends_well(done.returncode, is_old), done.stderr + done.stdout
    assert {"2", "written by the host", "a file of the host"} <= set(lines), done.stdout
    assert disk.read_bytes()[512:].startswith(b"by the guest\n")
    assert (directory / "other").read_text() == "by the guest\n"


@contextmanager
def running(lkvm: Path, directory: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A machine whose console is a file, and that file."""
    console = directory / "console"
    with console.open("wb") as output:
        process = subprocess.Popen(
            [*EXEC, "--", lkvm, "run", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            env={**os.environ, "HOME": str(directory)},
        )
    try:
        yield process, console
    finally:
        process.kill()
        process.wait()


def test_commands_to_a_machine_that_runs(lkvm: Path, is_old: bool, boot: list[str], tmp_path: Path) -> None:
    def tell(command: str, *options: str) -> str:
        done = subprocess.run(
            [lkvm, command, *options],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout + done.stderr

    free = "awk '/MemFree/ { print $2 }' /proc/meminfo"
    count = f"/load; n=0; while :; do n=$((n + 1)); echo count $n $({free}).; sleep 0.1; done"
    options = [*boot, "--cpus", "1", "--mem", "256", "--balloon", "--name", "tested", *append(count)]
    with running(lkvm, tmp_path, *options) as (process, console):

        def counts() -> list[tuple[int, int]]:
            """What has been counted, and how much memory was free then, in KiB."""
            text = console.read_text(errors="replace")
            return [(int(n), int(free)) for n, free in re.findall(r"^count (\d+) (\d+)\.", text, re.MULTILINE)]

        wait_for(lambda: len(counts()) >= 3)
        assert re.search(rf"{process.pid}\s+tested\s+running", tell("list"))

        tell("pause", "--name", "tested")
        assert re.search(r"tested\s+paused", tell("list"))
        stands = len(counts())
        time.sleep(1)
        assert len(counts()) == stands
        tell("resume", "--name", "tested")
        wait_for(lambda: len(counts()) >= stands + 3)

        before = counts()[-1][1]
        tell("balloon", "--name", "tested", "--inflate", "64")
        wait_for(lambda: counts()[-1][1] < before - (60 << 10))
        assert re.search(r"memory.*\(in bytes\):[1-9]\d{6}", tell("stat", "--memory", "--name", "tested"))
        tell("balloon", "--name", "tested", "--deflate", "64")
        wait_for(lambda: counts()[-1][1] > before - (10 << 10))

        tell("stop", "--name", "tested")
        assert ends_well(process.wait(TIMEOUT_S), is_old)
