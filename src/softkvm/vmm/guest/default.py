# SPDX-License-Identifier: Apache-2.0
"""The default Linux guest: Debian's cloud kernel and a busybox initramfs, kept in a per-user cache."""

import errno
import fcntl
import hashlib
import json
import os
import pwd
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from softkvm.progress import NoProgress, Progress
from softkvm.vmm.guest import initramfs, modules
from softkvm.vmm.guest.apt import Apt, Package
from softkvm.vmm.guest.deb import DebError, read_files
from softkvm.vmm.guest.errors import GuestUnavailable

KERNEL_PACKAGES: Final = ("linux-image-cloud-amd64", "linux-image-amd64", "linux-image-virtual")
"""Where the kernel comes from: the first of these that the package sources know."""

BUSYBOX_PACKAGE: Final = "busybox-static"

COMMAND_LINE: Final = "console=ttyS0"
"""The kernel command line that the guest needs."""

_FORMAT: Final = 2
_FILES: Final = ("vmlinuz", "busybox", "modules", "initrd")
UNUSED_S: Final = 14 * 24 * 3600.0
"""How long a guest of another version of softkvm is kept that nobody asks for."""
_VMLINUZ: Final = re.compile(r"(usr/lib/modules/[^/]+|boot)/vmlinuz[^/]*")
_BUSYBOX: Final = re.compile(r"(usr/)?bin/busybox")


@dataclass(frozen=True)
class Guest:
    """A Linux guest ready to boot."""

    kernel: Path
    initrd: Path
    command_line: str
    kernel_package: str
    busybox_package: str


def cache_directory() -> Path:
    """Where the guest is kept: ``$XDG_CACHE_HOME/softkvm/guest``, by default below ``~/.cache``.

    Raises GuestUnavailable for a user without a home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    root = Path(base) if os.path.isabs(base) else _home() / ".cache"
    return root / "softkvm" / "guest"


def _home() -> Path:
    """The home directory: ``$HOME``, or what the user database says; GuestUnavailable if neither names one."""
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise GuestUnavailable(
                "the default guest has no place to be kept: this user has no home directory, "
                "and neither HOME nor XDG_CACHE_HOME names a directory"
            ) from None
    return Path(home)


def cached(directory: Path | None = None) -> Guest | None:
    """Return the guest that was prepared before, if it is whole and of this version of softkvm."""
    directory = directory or cache_directory()
    path = directory / _manifest_name()
    manifest = _read_manifest(path)
    if manifest is None or manifest["init_sha256"] != _init_digest():
        return None
    with suppress(OSError):  # whose file it isn't, or on a disk that takes no writes
        os.utime(path)
    return _guest(directory, manifest)


def _manifest_name() -> str:
    """The file that says what this version's guest is: other versions, side by side, have theirs."""
    return f"guest-{_FORMAT}-{_init_digest()[:12]}.json"


def prepare(progress: Progress | None = None, *, force: bool = False, directory: Path | None = None) -> Guest:
    """Return the default guest, downloading and building it where the cache does not have it.

    ``force`` downloads anew. Raises GuestUnavailable with one line that says what is missing: no apt, no network, no
    room. Whatever happens, the cache holds either the old guest or the new one.
    """
    progress = progress or NoProgress()
    directory = directory or cache_directory()
    if not force and (guest := cached(directory)) is not None:
        return guest
    try:
        with _locked(directory, progress):
            # Another process may have done it while we waited.
            guest = None if force else cached(directory)
            guest = guest or _build(directory, progress, force)
        progress.done()
        return guest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GuestUnavailable(f"no room for the default guest in {directory}: {error.strerror}") from error
        where = f" ({error.filename})" if error.filename else ""
        raise GuestUnavailable(f"the default guest cannot be kept in {directory}: {error.strerror}{where}") from error
    finally:
        progress.close()


def _build(directory: Path, progress: Progress, force: bool) -> Guest:
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=directory))
    try:
        manifest = None if force else _other_manifest(directory)
        if manifest is not None:  # only init is another
            old = directory / manifest["directory"]
            packages = dict(manifest["packages"])
            vmlinuz, busybox, drivers = ((old / name).read_bytes() for name in _FILES[:3])
        else:
            vmlinuz, busybox, drivers, packages = _download(work, progress)
        progress.step("initramfs")
        initrd = initramfs.build(busybox) + drivers
        files = dict(zip(_FILES, (vmlinuz, busybox, drivers, initrd), strict=True))
        result = work / "guest"
        result.mkdir()
        for done, (name, data) in enumerate(files.items(), 1):
            _write_synced(result / name, data)
            progress.fraction(done / len(files))
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        name = f"linux-{digests['vmlinuz'][:12]}-{digests['initrd'][:12]}"
        if (directory / name).exists():  # damaged, or we would not be here
            os.replace(directory / name, work / "damaged")
        os.replace(result, directory / name)
        new_manifest = {
            "format": _FORMAT,
            "directory": name,
            "packages": packages,
            "init_sha256": _init_digest(),
            "modules": list(modules.WANTED),
            "sha256": digests,
        }
        _write_synced(work / "manifest", json.dumps(new_manifest, indent=2).encode() + b"\n")
        os.replace(work / "manifest", directory / _manifest_name())
        _forget_unused(directory)
        return _guest(directory, new_manifest)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _other_manifest(directory: Path) -> dict[str, Any] | None:
    """What another version of softkvm has kept, newest first, if it is of the same packages' same files."""
    for path in sorted(directory.glob(f"guest-{_FORMAT}-*.json"), key=_used, reverse=True):
        manifest = _read_manifest(path)
        if manifest is not None and manifest["modules"] == list(modules.WANTED):
            return manifest
    return None


def _used(path: Path) -> float:
    """When a manifest was last asked for."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _forget_unused(directory: Path) -> None:
    """Remove the guests of other versions that nobody has asked for in a long time, and what belongs to none."""
    kept = set()
    for path in directory.glob("guest*.json"):
        if path.name != _manifest_name() and _used(path) < time.time() - UNUSED_S:
            path.unlink(missing_ok=True)
            continue
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            kept.add(json.loads(path.read_bytes())["directory"])
    for other in directory.glob("linux-*"):
        if other.name not in kept:
            shutil.rmtree(other, ignore_errors=True)


def _download(work: Path, progress: Progress) -> tuple[bytes, bytes, bytes, dict[str, dict[str, str]]]:
    apt = Apt(work / "apt")
    apt.update(progress)
    kernel = apt.download(apt.resolve_kernel(KERNEL_PACKAGES), work, progress)
    busybox = apt.download(BUSYBOX_PACKAGE, work, progress)
    for package in (kernel, busybox):
        _check_digest(package)
    progress.step("unpacking")
    contents = (_take(kernel, _VMLINUZ), _take(busybox, _BUSYBOX), _take_modules(kernel))
    packages = {
        role: {"file": package.name, "sha256": _file_digest(package.path)}
        for role, package in (("kernel", kernel), ("busybox", busybox))
    }
    return *contents, packages


def _take(package: Package, path: re.Pattern[str]) -> bytes:
    try:
        files = read_files(package.path, lambda name: path.fullmatch(name) is not None, count=1)
    except DebError as error:
        raise GuestUnavailable(str(error)) from error
    if not files:
        raise GuestUnavailable(f"package {package.name} has no file {path.pattern}")
    return next(iter(files.values()))


def _take_modules(kernel: Package) -> bytes:
    try:
        return modules.archive(modules.read_modules(kernel.path))
    except DebError as error:
        raise GuestUnavailable(str(error)) from error


def _check_digest(package: Package) -> None:
    if package.sha256 is not None and _file_digest(package.path) != package.sha256:
        raise GuestUnavailable(f"package {package.name} is damaged: its SHA-256 is not what the package list says")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _init_digest() -> str:
    """Identifies how this version builds the initramfs."""
    parts = (initramfs.scripts(), initramfs.DIRECTORIES, initramfs.DEVICES, initramfs.FILES, modules.WANTED)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, if it is one of this format and all its files are what it says."""
    directory = path.parent
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != _FORMAT or "/" in manifest["directory"]:
            return None
        for name in _FILES:
            if _file_digest(directory / manifest["directory"] / name) != manifest["sha256"][name]:
                return None
        list(manifest["modules"])
        _guest(directory, manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(manifest)


def _guest(directory: Path, manifest: dict[str, Any]) -> Guest:
    files = directory / manifest["directory"]
    return Guest(
        kernel=files / "vmlinuz",
        initrd=files / "initrd",
        command_line=COMMAND_LINE,
        kernel_package=manifest["packages"]["kernel"]["file"],
        busybox_package=manifest["packages"]["busybox"]["file"],
    )


@contextmanager
def _locked(directory: Path, progress: Progress) -> Iterator[None]:
    """One process at a time prepares a guest."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.step("waiting for another softkvm that prepares the guest")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # What a killed process left behind.
        for stale in directory.glob(".work-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield
