# SPDX-License-Identifier: Apache-2.0
"""The Makefile: what is up to date is not made again, what is not is."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None or not (ROOT / "Makefile").exists(), reason="no make, or no checkout")


def make(directory: Path, *arguments: str) -> str:
    assert MAKE is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        [MAKE, "--no-print-directory", *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the guests built and the rest recorded as done, every stamp newer than every source."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.split(b"\0")
    if not names[0]:
        pytest.skip("not a git checkout")
    directory = tmp_path_factory.mktemp("checkout")
    for name in map(os.fsdecode, names[:-1]):
        if not name.startswith(("cpu/", "guests/")) and name not in ("Makefile", "Cargo.toml", "pyproject.toml"):
            continue
        if (ROOT / name).exists():  # not while a file is being taken away
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    make(directory, "guests")
    environment = directory / ".venv" / "bin"
    environment.mkdir(parents=True)
    (directory / "src" / "softkvm" / "_softcpu.abi3.so").touch()
    for stamp in (".ready", ".built", ".dev"):
        (environment / stamp).touch()
    return directory


@pytest.fixture
def checkout(built: Path, tmp_path: Path) -> Path:
    """A copy of it with the same times."""
    copy = tmp_path / "checkout"
    shutil.copytree(built, copy, copy_function=shutil.copy2)
    ready = copy / ".venv" / "bin" / ".ready"
    times = ready.stat()
    ready.write_text(f"{copy}/.venv\n")
    os.utime(ready, ns=(times.st_atime_ns, times.st_mtime_ns))
    return copy


def steps(checkout: Path, *arguments: str) -> Sequence[str]:
    """What make would run."""
    return [line for line in make(checkout, "--dry-run", *arguments).splitlines() if "-C guests" not in line]


def test_nothing_to_do_is_nothing_done(checkout: Path) -> None:
    assert make(checkout, "build") == ""
    assert make(checkout, "guests") == ""


@pytest.mark.parametrize("source", ["cpu/src/lib.rs", "cpu/python/Cargo.toml", "Cargo.toml", "pyproject.toml"])
def test_newer_source_of_the_extension_builds_it(checkout: Path, source: str) -> None:
    os.utime(checkout / source, (2**31, 2**31))
    assert any("maturin develop" in step for step in steps(checkout, "build"))


def test_missing_extension_is_built(checkout: Path) -> None:
    (checkout / "src" / "softkvm" / "_softcpu.abi3.so").unlink()
    assert any("maturin develop" in step for step in steps(checkout, "build"))


def test_newer_source_of_a_guest_builds_that_guest(checkout: Path) -> None:
    os.utime(checkout / "guests" / "demo" / "main.c", (2**31, 2**31))
    text = make(checkout / "guests", "--dry-run")
    assert "demo/main.c" in text
    assert "multiboot" not in text


def test_header_and_flags_of_the_guests_build_what_uses_them(checkout: Path) -> None:
    os.utime(checkout / "guests" / "lib" / "guest.h", (2**31, 2**31))
    text = make(checkout / "guests", "--dry-run")
    assert "lib/apic.c" in text
    assert "multiboot/main.c" not in text
    os.utime(checkout / "guests" / "Makefile", (2**31, 2**31))
    assert "multiboot/main.c" in make(checkout / "guests", "--dry-run")


def test_environment_that_was_moved_is_made_anew(checkout: Path) -> None:
    moved = checkout.with_name("moved")
    checkout.rename(moved)
    assert any("venv --clear .venv" in step for step in steps(moved, "build"))
