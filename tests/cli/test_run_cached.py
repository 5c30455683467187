# SPDX-License-Identifier: Apache-2.0
"""``softkvm run`` of the default guest goes on from where a run like it had booted to, or boots if anything differs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm import abi, api
from softkvm.cli import run_cached
from softkvm.cli.run import command
from softkvm.cli.run_cached import BootCache, Keeping
from softkvm.cli.run_image import GuestImage
from softkvm.vmm.guest import cache_directory
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB

RUN = (sys.executable, "-m", "softkvm.cli.main", "run")
SAID = "softkvm: going on from the guest that booted at "


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose guest is prepared, and who has never booted it."""
    linux_guest()
    (tmp_path / "softkvm").mkdir()
    (tmp_path / "softkvm" / "guest").symlink_to(cache_directory())
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}


def run(environment: dict[str, str], text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, "--timeout", "150", *arguments],
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.guest
def test_the_second_run_goes_on_from_the_firsts_prompt(cache: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").write_text("from the host\n")
    options = ("--mem", "128M", "--share", str(tmp_path / "shared"))
    commands = "echo first $((1 + 1)) > /tmp/said; cat /tmp/said /mnt/shared/file; exit\n"
    first = run(cache, commands, *options)
    assert first.returncode == 0, first.stderr
    assert "first 2" in first.stdout and "from the host" in first.stdout
    assert "Linux version" in first.stdout
    assert SAID not in first.stderr
    assert len(list((tmp_path / "softkvm" / "booted").iterdir())) == 1
    for number in range(2):
        before = time.time()
        (tmp_path / "shared" / "file").write_text(f"run {number}\n")
        shared = f"cat /mnt/shared/file; echo > /mnt/shared/{number}"
        second = run(cache, f"echo second $((1 + 2)); ls /tmp; {shared}; date +%s; exit\n", *options)
        assert second.returncode == 0, second.stderr
        assert second.stderr.startswith(SAID)
        assert second.stderr.endswith("(--no-cache boots)\n")
        assert second.stdout.startswith("root@softkvm:~# ")  # and nothing of the boot
        assert "second 3" in second.stdout
        assert "said" not in second.stdout  # nothing of the other run is in it
        assert f"\nrun {number}\n" in second.stdout.replace("\r", "")  # but what is shared is the host's of now
        assert (tmp_path / "shared" / str(number)).exists()
        times = [int(line) for line in second.stdout.splitlines() if line.isdecimal() and len(line) > 8]
        assert before - 5 <= times[0] <= time.time() + 5  # the guest's clock has gone on meanwhile


# -- what makes a run another


def arguments(*texts: str) -> Namespace:
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_intermixed_args(texts)


@pytest.fixture
def kvm() -> Iterator[api.Kvm]:
    with open_soft() as opened:
        yield opened


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GuestImage:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).write_bytes(name.encode())
    return GuestImage(tmp_path / "vmlinuz", (str(tmp_path / "initrd"),), "console=ttyS0")


def place(image: GuestImage, kvm: Any, *texts: str, accel: str = "soft", **config: Any) -> Path | None:
    found = BootCache.of(arguments(*texts), image, Config(**config), kvm, accel)
    return None if found is None else found._directory


def test_whatever_the_boot_depends_on_makes_it_another(image: GuestImage, kvm: api.Kvm, tmp_path: Path) -> None:
    class WithoutAes:
        def get_supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
            entries = kvm.get_supported_cpuid()
            for entry in entries:
                if entry.function == 1:
                    entry.ecx &= ~(1 << 25)
            return entries

    other = GuestImage(image.kernel, image.initrd, "console=ttyS0 softkvm.terminal=xterm:24x80")
    places = [
        place(image, kvm),
        place(image, kvm, memory_size=128 * MIB),
        place(image, kvm, vcpus=2),
        place(image, kvm, hyperv=True),
        place(image, kvm, "--rng"),
        place(image, kvm, "--share", "/tmp"),
        place(image, kvm, "--share", "/tmp:tag,ro"),
        place(image, kvm, accel="kvm"),
        place(image, WithoutAes()),
        place(other, kvm),
    ]
    (tmp_path / "initrd").write_bytes(b"another one")
    places.append(place(image, kvm))
    assert None not in places
    assert len(set(places)) == len(places)
    assert place(image, kvm, "--timeout", "5", "--cpu-quota", "50") == places[-1]


@pytest.mark.parametrize(
    "texts",
    [
        ("--no-cache",),
        ("--append", "quiet"),
        ("--stats", "-"),
        ("--trace", "file"),
        ("--plugin", "file.py"),
        ("--param", "avic=0"),
        ("--pin-memory",),
        ("--net", "user"),
        ("--disk", "file"),
        ("--console", "virtio"),
        ("--kernel", "file"),
    ],
)
def test_runs_that_are_about_the_boot_do_boot(image: GuestImage, kvm: api.Kvm, texts: tuple[str, ...]) -> None:
    assert place(image, kvm, *texts) is None


def test_what_is_too_old_or_damaged_is_booted_anew(image: GuestImage, kvm: api.Kvm) -> None:
    found = BootCache.of(arguments(), image, Config(), kvm, "soft")
    assert found is not None
    assert found.restore(kvm, lambda data: None, Config()) is None
    found._directory.mkdir(parents=True)
    manifest = found._directory / "manifest.json"
    manifest.write_bytes(b"{}")
    assert found.restore(kvm, lambda data: None, Config()) is None
    os.utime(manifest, (0, time.time() - run_cached.FRESH_S - 60))
    assert found.restore(kvm, lambda data: None, Config()) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / str(number)).mkdir()
        os.utime(tmp_path / str(number), (number, number))
    run_cached._forget_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "5", "6"]


class Line:
    """Takes input."""

    pending_input = 0

    def __init__(self) -> None:
        self.data = b""

    def feed(self, data: bytes) -> None:
        self.data += data

    def wait_for_room(self, timeout_s: float) -> bool:
        return True


def test_input_waits_until_the_guest_is_kept_and_comes_in_its_order(kvm: api.Kvm, tmp_path: Path) -> None:
    with Machine(kvm, Config(32 * MIB)) as machine, Keeping(tmp_path / "booted" / "one", machine) as keeping:
        line = Line()
        held = keeping.hold(line)
        assert keeping.hold(line) is held
        held.feed(b"typed ")
        keeping.output(b"softkvm: init reached\r\n")
        assert (line.data, held.pending_input) == (b"", 6)
        assert not held.wait_for_room(0.01)
        keeping.output(b"root@softkvm:~# \x1b[6n[    5.7] a kernel's message\r\n")
        assert held.wait_for_room(60)
        held.feed(b"later")
        assert line.data == b"typed later"
        assert (tmp_path / "booted" / "one" / "manifest.json").exists()


def test_a_machine_that_ends_before_lets_input_through(kvm: api.Kvm, tmp_path: Path) -> None:
    with Machine(kvm, Config(32 * MIB)) as machine:
        keeping = Keeping(tmp_path / "booted" / "one", machine)
        keeping.close()
        line = Line()
        keeping.hold(line).feed(b"through")
        assert line.data == b"through"
        assert not (tmp_path / "booted").exists()
