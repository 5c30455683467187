# SPDX-License-Identifier: Apache-2.0
"""A snapshot's manifest: what the machine is, and what the other files are to be, with checksums; its own, too."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

import softkvm
from softkvm.abi.sizes import Size
from softkvm.vmm.errors import SnapshotError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Config

FORMAT: Final = "softkvm snapshot"
VERSION: Final = 1
CONFIG: Final = ("memory_size", "vcpus", "pit", "hpet", "end_when_halted", "hyperv")
"""What a manifest says of a machine's configuration; the rest is for who restores it to choose."""

MANIFEST: Final = Size(
    "bytes of a snapshot's manifest", 1 << 20, SnapshotError, giver="file", effect="SnapshotError", where=__name__
)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_ID: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the snapshot: its size, how much of it is stored, and the SHA-256 of that."""

    size: int
    stored: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Base:
    """The snapshot whose changes an incremental one has."""

    path: str
    """From the directory that the snapshot's is in."""
    id: str


@dataclass(frozen=True, slots=True)
class UsedFile:
    """A file that the machine's devices have open: a snapshot is of the machine *with* what is in it."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` says."""

    id: str
    created: str
    machine: dict[str, Any]
    state: FileEntry
    memory: FileEntry
    base: Base | None = None
    files: tuple[UsedFile, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    """What who saved it wanted to have kept."""
    softkvm: str = softkvm.__version__

    def encode(self) -> bytes:
        """Return the file's contents."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**body, "sha256": _digest(body)}, indent=2).encode() + b"\n"

    def config(self, **changes: Any) -> Config:
        """Return the machine's configuration, with what *changes* name."""
        from softkvm.vmm.machine import Config

        return Config(**{**self.machine, **changes})


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def decode(data: bytes) -> Manifest:
    """Return what a manifest says; SnapshotError for one that is damaged, or of another version."""
    MANIFEST.check(len(data))
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise SnapshotError("manifest.json is none of a snapshot's")
        version, written_by = body.pop("version", None), body.get("softkvm")
        if version != VERSION:
            raise SnapshotError(f"snapshot of format {version!r}, expected {VERSION}")
        if body.pop("sha256", None) != _digest({"format": FORMAT, "version": VERSION, **body}):
            raise SnapshotError("manifest.json is damaged: its checksum is another")
        if written_by != softkvm.__version__:
            raise SnapshotError(f"snapshot of softkvm {written_by}, this is {softkvm.__version__}")
        return _checked(body)
    except SnapshotError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SnapshotError(f"manifest.json is damaged: {error}") from None


def _checked(body: dict[str, Any]) -> Manifest:
    """Return the manifest that *body* is: whoever wrote it, names and numbers are such as can be."""
    base = body.pop("base")
    manifest = Manifest(
        state=_entry(body.pop("state")),
        memory=_entry(body.pop("memory")),
        base=None if base is None else Base(_text(base["path"]), _text(base["id"])),
        files=tuple(UsedFile(_text(f["path"]), _number(f["size"]), _number(f["mtime_ns"])) for f in body.pop("files")),
        machine=_machine(body.pop("machine")),
        id=_text(body.pop("id")),
        created=_text(body.pop("created")),
        extra=dict(body.pop("extra")),
        softkvm=_text(body.pop("softkvm")),
    )
    if body:
        raise ValueError(f"it has {', '.join(body)}, too")
    if not _ID.fullmatch(manifest.id):
        raise ValueError(f"id {manifest.id!r}")
    if manifest.memory.size != manifest.machine["memory_size"]:
        raise ValueError("memory of two sizes")
    return manifest


def _machine(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict) or body.keys() != set(CONFIG):
        raise ValueError(f"machine: expected {', '.join(CONFIG)}")
    return body


def _entry(body: Any) -> FileEntry:
    entry = FileEntry(**{one.name: body[one.name] for one in fields(FileEntry)})
    if not _DIGEST.fullmatch(_text(entry.sha256)):
        raise ValueError(f"sha256 {entry.sha256!r}")
    return FileEntry(_number(entry.size), _number(entry.stored), entry.sha256)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r}: expected a text")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r}: expected a number")
    return value
