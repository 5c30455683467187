# SPDX-License-Identifier: Apache-2.0
"""The system's package client, with lists and caches of our own: nothing here needs root or changes the system.

The sources, keys and the proxy are the system's (``Dir::Etc`` stays), so packages are authenticated as usual.
"""

import contextlib
import errno
import io
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from softkvm.progress import Progress
from softkvm.vmm.guest.errors import GuestUnavailable

STALL_S: Final = 120.0
"""How long apt-get may report no progress."""

_ARCHITECTURE: Final = "amd64"
_ROOM_LEFT: Final = 1 << 20  # a disk with less free is full
_CLEARED: Final = (
    "APT::Update::Pre-Invoke",
    "APT::Update::Post-Invoke",
    "APT::Update::Post-Invoke-Success",
    "APT::Architectures",
    # indexes that other programs had added: the package lists alone are wanted
    "Acquire::IndexTargets::deb::DEP-11",
    "Acquire::IndexTargets::deb::DEP-11-icons-small",
    "Acquire::IndexTargets::deb::DEP-11-icons",
    "Acquire::IndexTargets::deb::DEP-11-icons-hidpi",
    "Acquire::IndexTargets::deb::Contents-deb",
    "Acquire::IndexTargets::deb::CNF",
)
_URI_LINE: Final = re.compile(r"'(?P<uri>[^']+)' (?P<name>\S+) (?P<size>\d+) (?P<hash>\S+)")
_URI_PACKAGE: Final = re.compile(r"^'[^']+' ([^_\s]+)_", re.MULTILINE)  # some sources' lines have no hash
_DEPENDS: Final = re.compile(r"^Depends: (?P<list>.*)$", re.MULTILINE)
_KERNEL: Final = re.compile(r"^linux-image-(?:unsigned-)?\d+\.")  # not linux-image-686


@dataclass(frozen=True)
class Package:
    """A package file that apt downloaded and checked."""

    path: Path
    name: str
    sha256: str | None


class Apt:
    """apt-get with its state in ``directory``, for packages of ``architecture``.

    Raises GuestUnavailable if the system has no apt-get.
    """

    def __init__(self, directory: Path, architecture: str = _ARCHITECTURE) -> None:
        for command in ("apt-get", "apt-cache"):
            if shutil.which(command) is None:
                raise GuestUnavailable(
                    f"the default guest comes from Debian's packages, and there is no {command} here"
                )
        self._directory = directory
        for part in ("lists/partial", "cache/archives/partial", "state"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()
        options = {
            "Dir::State": directory / "state",
            "Dir::State::lists": directory / "lists",
            "Dir::State::status": directory / "status",
            "Dir::Cache": directory / "cache",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "",  # the directories are the caller's own
            "Acquire::Languages": "none",
            "Acquire::GzipIndexes": "true",
            "Acquire::PDiffs": "false",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
        }
        # Read after the system's configuration, whose hooks (apt.conf.d) must not run for us and whose lists
        # (options ending in "::") only #clear empties.
        self._configuration = directory / "apt.conf"
        self._configuration.write_text(
            "".join(f"#clear {name};\n" for name in _CLEARED)
            + "".join(f'{name} "{value}";\n' for name, value in options.items())
        )

    def update(self, progress: Progress, *, all_sources: bool = True) -> None:
        """Fetch the package lists; without ``all_sources`` those that can be had are enough."""
        progress.step("package lists")
        try:
            self._fetch(progress, "update", "-o", "APT::Update::Error-Mode=any")
        except GuestUnavailable:
            if all_sources:
                raise

    def resolve_kernel(self, meta_packages: Sequence[str]) -> str:
        """Return the concrete kernel package that the first known one of ``meta_packages`` depends on."""
        for name in meta_packages:
            seen: set[str] = set()
            while name not in seen:
                seen.add(name)
                result = self._run("apt-cache", "show", "--no-all-versions", name)
                match = _DEPENDS.search(result.stdout)
                if result.returncode != 0:
                    break
                if _KERNEL.match(name):
                    return name
                names = [part.split()[0] for part in match["list"].split(", ") if part] if match else []
                name = next((part for part in names if part.startswith("linux-image")), name)
        raise GuestUnavailable(f"the system's package sources have none of {', '.join(meta_packages)}")

    def download(self, package: str, directory: Path, progress: Progress) -> Package:
        """Download ``package`` into ``directory``."""
        progress.step(package)
        where = self._run("apt-get", "-qq", "download", "--print-uris", package)
        if where.returncode != 0:
            raise _failure("download", where.stderr)
        match = _URI_LINE.search(where.stdout)
        if match is None:
            raise GuestUnavailable(f"apt-get does not say where package {package} is")
        self._fetch(progress, "download", package, cwd=directory)
        files = sorted(directory.glob(f"{package}_*.deb"))
        if not files:
            raise GuestUnavailable(f"apt-get downloaded no file for package {package}")
        kind, _, digest = match["hash"].partition(":")
        return Package(files[-1], files[-1].name, digest if kind == "SHA256" else None)

    def download_with_dependencies(self, package: str, directory: Path, progress: Progress) -> None:
        """Download ``package`` and all that it depends on into ``directory``."""
        progress.step(package)
        where = self._run("apt-get", "-qq", "install", "--no-install-recommends", "--print-uris", package)
        if where.returncode != 0:
            raise _failure("install", where.stderr)
        names = _URI_PACKAGE.findall(where.stdout)
        self._fetch(progress, "download", *names, cwd=directory)

    # -- running apt

    def _command(self, command: str, *arguments: str) -> list[str]:
        return [command, "-c", str(self._configuration), *arguments]

    def _run(self, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self._command(command, *arguments),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def _fetch(self, progress: Progress, *arguments: str, cwd: Path | None = None) -> None:
        """Run an apt-get command that must succeed, following its own report of how far it is."""
        status_read, status_write = os.pipe()
        with (self._directory / "apt.log").open("w+b") as log, os.fdopen(status_read, "rb", buffering=0) as status:
            try:
                process = subprocess.Popen(
                    self._command("apt-get", "-q", "-o", f"APT::Status-Fd={status_write}", *arguments),
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    cwd=cwd,
                    pass_fds=[status_write],
                    start_new_session=True,  # its helpers end with it
                )
            finally:
                os.close(status_write)
            try:
                self._follow(status, progress, arguments[0])
                status_code = process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            if status_code != 0:
                log.seek(0)
                raise _failure(arguments[0], log.read().decode(errors="replace"))

    def _follow(self, status: io.FileIO, progress: Progress, command: str) -> None:
        """Read apt-get's status lines to their end. It is known to hang on a full disk: a stall is a failure."""
        lines, rest, moved_s = "", b"", time.monotonic()
        while True:
            if select.select([status], [], [], 1.0)[0]:
                data = status.read(4096)
                if not data:
                    return
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    fields = line.decode(errors="replace").split(":")  # dlstatus:<item>:<percent>:<text>
                    if fields[0] == "dlstatus" and len(fields) > 2:
                        progress.fraction(float(fields[2]) / 100)
                        if ":".join(fields[:3]) != lines:  # the text counts the seconds
                            lines, moved_s = ":".join(fields[:3]), time.monotonic()
            free = shutil.disk_usage(self._directory).free
            if free < _ROOM_LEFT:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
            if time.monotonic() - moved_s > STALL_S:
                raise GuestUnavailable(f"apt-get {command} made no progress for {STALL_S:g} s")


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _failure(command: str, text: str) -> GuestUnavailable:
    """The line of apt-get's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E: ")] or lines[-1:] or ["no message"]
    return GuestUnavailable(f"apt-get {command} failed: {errors[0].removeprefix('E: ')}")
