# SPDX-License-Identifier: Apache-2.0
"""A snapshot in a directory: ``manifest.json``, ``state.json`` and ``memory``, written as a whole or not at all.

The directory is the user's alone, as memory holds what the guest's processes hold. It gets its name when everything is
in it and on the disk. An incremental snapshot has the memory that has changed since another one, its base, and says
which that is; restoring maps the base's memory and its own over it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from softkvm.closing import Closing
from softkvm.vmm.errors import MachineError, SnapshotError
from softkvm.vmm.memory import PAGE_SIZE, FilePart
from softkvm.vmm.snapshot import encoding, manifest, memory_file, state
from softkvm.vmm.snapshot.dirty import Ranges
from softkvm.vmm.snapshot.manifest import CONFIG, Base, FileEntry, Manifest, UsedFile
from softkvm.vmm.snapshot.tracking import track, tracked

if TYPE_CHECKING:
    from softkvm import api
    from softkvm.vmm.machine import Machine

MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
MEMORY: Final = "memory"

MOST_BASES: Final = 64
"""The longest chain of incremental snapshots."""
MOST_RANGES: Final = 900
"""Parts of an incremental snapshot's memory. Each is a mapping, of which Linux lets a process have 65530."""


# -- saving


def save(
    machine: Machine,
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    watch: bool = False,
    extra: Mapping[str, Any] | None = None,
    durable: bool = True,
    stopped: Callable[[], object] | None = None,
) -> Manifest:
    """Save *machine*, which stands meanwhile for as long as its memory is copied, to a new *directory*.

    With *watch* its changes are watched from this moment on, so that a later snapshot may have only those: *base* names
    the one before, which was saved with *watch*. *extra* is kept in the manifest; *stopped* is called while the machine
    stands. Without *durable* nothing waits for the disk. SnapshotError if it cannot be saved, or the directory not be
    written; there is none then.
    """
    target = Path(directory)
    with _writing(target) as work:
        base_manifest = None if base is None else _read_manifest(Path(base))
        identifier = os.urandom(16).hex()
        with machine.pausing.still(), _new_file(work / MEMORY) as memory:
            saved = state.save(machine)  # before memory: devices show the guest what they have done
            if base_manifest is None:
                ranges = memory_file.used_ranges(machine.memory)
            else:
                ranges = few(_changed(machine, base_manifest.id), MOST_RANGES)
            stored = memory_file.write(machine.memory, memory, ranges, zeroes=base is not None)
            files = _used_files(machine)
            if watch:
                track(machine, identifier)
            if stopped is not None:
                stopped()
        data = encoding.encode({"machine": saved, "ranges": None if base is None else [list(one) for one in ranges]})
        with _new_file(work / STATE) as file:
            memory_file.write_all(file, memoryview(data), 0)
            _sync(file, durable)
        with _opened(work / MEMORY) as memory:
            digest = memory_file.digest(memory, machine.memory.size)
            _sync(memory, durable)
        result = Manifest(
            id=identifier,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            machine={name: getattr(machine.config, name) for name in CONFIG},
            state=FileEntry(len(data), len(data), hashlib.sha256(data).hexdigest()),
            memory=FileEntry(machine.memory.size, stored, digest),
            base=None if base_manifest is None or base is None else Base(_relative(base, target), base_manifest.id),
            files=files,
            extra=dict(extra or {}),
        )
        with _new_file(work / MANIFEST) as file:
            memory_file.write_all(file, memoryview(result.encode()), 0)
            _sync(file, durable)
        _put_in_place(work, target, durable=durable)
        return result


def _changed(machine: Machine, base: str) -> Ranges:
    """Return what has changed since snapshot *base*; SnapshotError if that was not watched."""
    watching = tracked(machine)
    if watching is None or watching.base != base:
        since = "nothing" if watching is None else f"snapshot {watching.base}"
        raise SnapshotError(f"the machine's changes are watched since {since}, not since snapshot {base}")
    return watching.take()


def few(ranges: Ranges, most: int) -> Ranges:
    """Return at most *most* ranges that hold all of *ranges*: those with the least between them become one."""
    gap = PAGE_SIZE
    while len(ranges) > most:
        joined: Ranges = []
        for start, size in ranges:
            if joined and start - sum(joined[-1]) <= gap:
                joined[-1] = (joined[-1][0], start + size - joined[-1][0])
            else:
                joined.append((start, size))
        ranges, gap = joined, 2 * gap
    return ranges


def _used_files(machine: Machine) -> tuple[UsedFile, ...]:
    """Return the files that the machine's devices have, as they are now."""
    return tuple(used_file(path) for path in sorted(machine.board.files()))


def used_file(path: str) -> UsedFile:
    """Return what a file is now; SnapshotError if it is not there."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None
    return UsedFile(os.path.abspath(path), found.st_size, found.st_mtime_ns)


def _relative(base: str | os.PathLike[str], target: Path) -> str:
    return os.path.relpath(os.path.realpath(base), os.path.realpath(target.parent))


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """Make a directory beside *target* to work in, which is gone afterwards; SnapshotError for what goes wrong."""
    if os.path.lexists(target):
        raise SnapshotError(f"{target}: it exists, expected a name for a new directory")
    work = target.parent / f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        _clean_up(target)
        work.mkdir(mode=0o700)
        yield work
    except OSError as error:
        raise SnapshotError(f"{target}: {error.strerror or error}") from None
    finally:
        _remove(work)


def _remove(directory: Path) -> None:
    import shutil  # saving needs it, restoring does not

    shutil.rmtree(directory, ignore_errors=True)


def _clean_up(target: Path) -> None:
    """Take away what processes have left behind that were killed while they saved to *target*."""
    for path in target.parent.iterdir():
        if not (path.name.startswith(f".{target.name}.") and path.name.endswith(".tmp")):
            continue
        process = path.name.removeprefix(f".{target.name}.").partition(".")[0]
        if process.isdecimal() and not os.path.exists(f"/proc/{process}"):
            _remove(path)


def _put_in_place(work: Path, target: Path, *, durable: bool) -> None:
    with _opened(work, os.O_DIRECTORY) as directory:
        _sync(directory, durable)
    os.rename(work, target)
    with _opened(target.parent, os.O_DIRECTORY) as parent:
        _sync(parent, durable)


def _sync(fd: int, durable: bool) -> None:
    if durable:
        os.fsync(fd)


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


# -- restoring


@dataclass(frozen=True, slots=True)
class _Layer:
    """One snapshot of a chain: its directory, what it says, and its memory's file."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    memory: int


class Snapshot(Closing):
    """A snapshot that was saved to *directory*; SnapshotError if it is not whole, or cannot be restored here.

    Its files are held open, so what becomes of the directory does not matter any more. Memory's checksums are left
    alone (:meth:`verify`): restoring is to take as long for any size.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._layers: list[_Layer] = []
        try:
            self._open(Path(directory))
        except BaseException:
            self.close()
            raise
        self.manifest = self._layers[0].manifest

    def _open(self, path: Path) -> None:
        expected: str | None = None
        while True:
            layer = _open_layer(path)
            self._layers.append(layer)
            found = layer.manifest
            if expected is not None and found.id != expected:
                raise SnapshotError(f"{path}: it is another snapshot than the base was")
            if found.machine != self._layers[0].manifest.machine:
                raise SnapshotError(f"{path}: the base is of another machine")
            if found.base is None:
                return
            if len(self._layers) > MOST_BASES:
                raise SnapshotError(f"{path}: a chain of more than {MOST_BASES} snapshots")
            path, expected = path.parent / found.base.path, found.base.id

    @property
    def paths(self) -> list[Path]:
        """The directory, and those of its bases."""
        return [layer.path for layer in self._layers]

    def verify(self) -> None:
        """Compare memory with its checksums; SnapshotError if it is damaged."""
        for layer in self._layers:
            try:
                digest = memory_file.digest(layer.memory, layer.manifest.memory.size)
            except (OSError, EOFError) as error:
                raise SnapshotError(f"{layer.path}: memory cannot be read: {error}") from None
            if digest != layer.manifest.memory.sha256:
                raise SnapshotError(f"{layer.path}: memory is damaged: its checksum is another")

    def _memory_parts(self) -> Iterator[FilePart]:
        size = self.manifest.memory.size
        for layer in reversed(self._layers):
            if layer.manifest.base is None:
                yield FilePart(layer.memory, 0, size)
                continue
            for offset, length in _ranges(layer, size):
                yield FilePart(layer.memory, offset, length)

    def restore(
        self,
        kvm: api.Kvm,
        console: Callable[[bytes], None] | None = None,
        *,
        step_time: bool = True,
        identity: int | None = 0,
        watch: bool = False,
        **changes: Any,
    ) -> Machine:
        """Return a new machine in the saved state, for the caller to start and close.

        Its memory is the files', copied page by page as it is written. With *step_time* its clocks have gone on
        meanwhile. The guest is told that it may have a twin, unless *identity* is None; a number above 0 says which of
        several clones it is, and gives it addresses of its own. *watch* as in :func:`save`. *changes* are
        fields of :class:`softkvm.vmm.machine.Config`: what a manifest cannot say. SnapshotError for another KVM,
        another processor, or files that have changed; there is no machine then.
        """
        from softkvm.vmm.machine import Machine

        self._check_files()
        try:
            parts = tuple(self._memory_parts())
            machine = Machine(kvm, self.manifest.config(memory_files=parts, **changes), console)
        except (MachineError, TypeError, OSError) as error:
            raise SnapshotError(f"{self._layers[0].path}: {error}") from None
        try:
            state.restore(machine, self._layers[0].state["machine"], step_time=step_time)
            if identity is not None:
                machine.board.new_identity(identity)
            if watch:
                track(machine, self.manifest.id)
        except SnapshotError as error:
            machine.close()
            raise SnapshotError(f"{self._layers[0].path}: {error}") from None
        except BaseException:
            machine.close()
            raise
        return machine

    def _check_files(self) -> None:
        """Raise SnapshotError if the devices' files have changed."""
        for entry in self.manifest.files:
            if used_file(entry.path) != entry:
                raise SnapshotError(f"{entry.path}: it has changed since the snapshot was saved")

    def close(self) -> None:
        """Close the files; machines go on."""
        while self._layers:
            os.close(self._layers.pop().memory)


def _read_manifest(directory: Path) -> Manifest:
    try:
        data = _read(directory / MANIFEST, manifest.MANIFEST.most)
    except FileNotFoundError:
        raise SnapshotError(f"{directory}: it is no snapshot: there is no {MANIFEST}") from None
    except OSError as error:
        raise SnapshotError(f"{directory}: {error.strerror}") from None
    try:
        return manifest.decode(data)
    except SnapshotError as error:
        raise SnapshotError(f"{directory}: {error}") from None


def _read(path: Path, most: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(most + 1)


def _open_layer(path: Path) -> _Layer:
    """Open a snapshot and check all that takes no time; SnapshotError if it is damaged."""
    found = _read_manifest(path)
    try:
        data = _read(path / STATE, encoding.ENCODED.most)
        if len(data) != found.state.size or hashlib.sha256(data).hexdigest() != found.state.sha256:
            raise SnapshotError(f"{path}: {STATE} is damaged: its checksum is another")
        decoded = encoding.decode(data)
        if not isinstance(decoded, dict) or not isinstance(decoded.get("machine"), dict):
            raise SnapshotError(f"{path}: {STATE} is none of a machine's")
        memory = os.open(path / MEMORY, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.filename or path}: {error.strerror}") from None
    size = os.fstat(memory).st_size
    if size != found.memory.size:
        os.close(memory)
        raise SnapshotError(f"{path}: {MEMORY} is damaged: {size} bytes, expected {found.memory.size}")
    return _Layer(path, found, decoded, memory)


def _ranges(layer: _Layer, size: int) -> Ranges:
    """Return the ranges of an incremental snapshot's memory; SnapshotError if they are none."""
    ranges: Ranges = []
    at = 0
    for one in layer.state.get("ranges") or ():
        if not (isinstance(one, list) and len(one) == 2 and all(type(value) is int for value in one)):
            raise SnapshotError(f"{layer.path}: ranges: expected pairs of an offset and a size")
        offset, length = one
        if offset < at or length <= 0 or offset % PAGE_SIZE or length % PAGE_SIZE or offset + length > size:
            raise SnapshotError(f"{layer.path}: {offset:#x}+{length:#x} is no range of its memory")
        at = offset + length
        ranges.append((offset, length))
    if len(ranges) > MOST_RANGES:
        raise SnapshotError(f"{layer.path}: {len(ranges)} ranges, expected at most {MOST_RANGES}")
    return ranges
