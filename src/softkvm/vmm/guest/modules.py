# SPDX-License-Identifier: Apache-2.0
"""The default guest's kernel modules: the drivers of the machine's devices, taken out of the kernel's package.

A Debian kernel has nearly all of them as modules. They are an archive of their own behind the initial file system's,
with ``modules.dep`` and ``modules.alias`` (depmod(8)) made of what each module says of itself. ``/init`` loads a driver
when its device is there, so a machine without devices boots as quickly as without modules.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from softkvm.vmm.guest.cpio import CpioWriter
from softkvm.vmm.guest.deb import DebError, read_files

WANTED: Final = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "af_packet",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "vsock_diag",
    "vsock_loopback",
    "9pnet_virtio",
    "9p",
    "virtiofs",
    "ptp_kvm",
    "vmgenid",
    "i6300esb",
    "pvpanic_pci",
    "button",
    "evdev",
)
"""Drivers of our devices, by their module's name; a kernel that has one built in, or not at all, does without."""

_NEEDED: Final = frozenset(
    {
        "9pnet",
        "failover",
        "fscache",
        "fuse",
        "net_failover",
        "netfs",
        "pps_core",
        "ptp",
        "pvpanic",
        "rng_core",
        "virtio",
        "virtio_pci_legacy_dev",
        "virtio_pci_modern_dev",
        "virtio_ring",
        "vmw_vsock_virtio_transport_common",
        "vsock",
        "watchdog",
    }
)
"""What these are known to need: so that a package has to be read once only. What else they need is found."""

_MODULE: Final = re.compile(r"(?:usr/)?lib/modules/(?P<release>[^/]+)/kernel/.*/(?P<file>[^/]+)\.ko(?P<suffix>\.\w+)?")
_MOST_MODULES: Final = 1 << 14


class Module:
    """A kernel module: its name, its place below ``/lib/modules/RELEASE``, contents, needs and aliases."""

    def __init__(self, release: str, path: str, data: bytes) -> None:
        self.release = release
        self.path = path
        self.data = data
        self.name = module_name(path)
        self.needs: list[str] = []
        self.aliases: list[str] = []
        try:
            section = ELFFile(BytesIO(data)).get_section_by_name(".modinfo")
        except (ELFError, ValueError) as error:
            raise DebError(f"kernel module {path} is damaged: {error}") from None
        for entry in section.data().split(b"\0") if section is not None else ():
            key, _, value = entry.decode("utf-8", "replace").partition("=")
            if key == "depends":
                self.needs = [module_name(name) for name in value.split(",") if name]
            elif key == "alias":
                self.aliases.append(value)


def module_name(path: str) -> str:
    """Return the module's name of a file's: dashes are underscores."""
    return PurePosixPath(path).name.partition(".")[0].replace("-", "_")


def read_modules(package: Path, wanted: Iterable[str] = WANTED) -> list[Module]:
    """Return those of the *wanted* modules that a kernel's package has, and all that they need, each behind its needs.

    Raises DebError for a damaged package or module.
    """
    found: dict[str, Module] = {}
    missing = {*wanted, *_NEEDED}
    tried: set[str] = set()
    while missing:
        tried |= missing
        for path, data in read_files(package, _names(missing), count=_MOST_MODULES).items():
            match = _MODULE.fullmatch(path)
            assert match is not None
            place = path[match.end("release") + 1 : match.end() - len(match["suffix"] or "")]
            module = Module(match["release"], place, _plain(path, match["suffix"], data))
            found[module.name] = module
        missing = {need for module in found.values() for need in module.needs} - tried
    order: list[Module] = []
    for name in wanted:
        _visit(name, found, order)
    return order


def _names(missing: set[str]) -> Callable[[str], bool]:
    def is_one(path: str) -> bool:
        match = _MODULE.fullmatch(path)
        return match is not None and module_name(match["file"]) in missing

    return is_one


def _visit(name: str, found: dict[str, Module], order: list[Module]) -> None:
    module = found.get(name)
    if module is None or module in order:
        return
    for need in module.needs:
        _visit(need, found, order)
    order.append(module)


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


_DECOMPRESS: Final[dict[str | None, Callable[[bytes], Any]]] = {
    None: bytes,
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".zst": _zstd,
}


def _plain(path: str, suffix: str | None, data: bytes) -> bytes:
    decompress = _DECOMPRESS.get(suffix)
    if decompress is None:
        raise DebError(f"kernel module {path} has an unknown compression")
    try:
        return bytes(decompress(data))
    except Exception as error:  # each library has its own
        raise DebError(f"kernel module {path} is damaged: {error}") from error


def archive(modules: list[Module]) -> bytes:
    """Return an initial file system with ``/lib/modules``; nothing of no modules."""
    if not modules:
        return b""
    out = BytesIO()
    writer = CpioWriter(out)
    release = modules[0].release
    top = f"lib/modules/{release}"
    made: set[str] = set()

    def directory(path: PurePosixPath) -> None:
        if path.parts and str(path) not in made:
            directory(path.parent)
            made.add(str(path))
            writer.directory(str(path))

    directory(PurePosixPath(top))
    by_name = {module.name: module for module in modules}
    for module in modules:
        place = PurePosixPath(top) / module.path
        directory(place.parent)
        writer.file(str(place), module.data)
    writer.file(f"{top}/modules.dep", _dependencies(modules, by_name).encode())
    aliases = (f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases)
    writer.file(f"{top}/modules.alias", "".join(aliases).encode())
    writer.close()
    return out.getvalue()


def _dependencies(modules: list[Module], by_name: dict[str, Module]) -> str:
    """Return ``modules.dep``: of each module all that it needs, what is needed first at the end."""
    lines = []
    for module in modules:
        needed: list[Module] = []
        for need in module.needs:
            _visit(need, by_name, needed)
        lines.append(f"{module.path}: {' '.join(other.path for other in reversed(needed))}".rstrip() + "\n")
    return "".join(lines)
