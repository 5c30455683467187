# SPDX-License-Identifier: Apache-2.0
"""``softkvm run`` of the default guest starts where the guest had come to before: at its prompt.

The first run boots, and keeps a snapshot of the guest when it waits at its prompt for the first time, or when its
agent waits for a command; input waits until then. A later one goes on from there if nothing is different: kernel,
initial file system, command line, memory, vCPUs, devices, softkvm itself, and what the KVM offers of a processor.
Runs that are about the boot itself, or have devices whose other end is not part of a snapshot, boot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import softkvm
from softkvm import api
from softkvm.cli.output import warn
from softkvm.cli.run_image import GuestImage
from softkvm.closing import Closing
from softkvm.threads import start_quiet
from softkvm.vmm.errors import MachineError
from softkvm.vmm.guest import GuestUnavailable, cache_directory
from softkvm.vmm.snapshot.directory import Snapshot, save

if TYPE_CHECKING:
    from softkvm.cli.streams import InputLine
    from softkvm.vmm.machine import Config, Machine

KEPT: Final = 4
"""Booted guests that are kept, each some 100 MB."""
FRESH_S: Final = 24 * 3600
"""Older ones are booted anew: a Linux whose clock jumps by weeks takes seconds to get over it."""

_PROMPT: Final = re.compile(rb"root@softkvm:[^\r\n]*# (\x1b\[6n)?")
_TAIL: Final = 1000
_QUIET_S: Final = 0.25
"""So long there has to be no output behind the prompt."""
_PATIENCE_S: Final = 120.0
"""Input waits no longer for a prompt."""

#: Options with which a run boots: what they look at, or lead to, is not in a snapshot.
_BOOTING: Final = (
    "dry_run",
    "append",
    "stats",
    "trace",
    "plugin",
    "param",
    "gdb",
    "pin_memory",
    "port",
    "net",
    "disk",
)


class BootCache:
    """The booted guest of runs like this one, in *directory*."""

    def __init__(self, directory: Path, *, quiet: bool = False) -> None:
        self._directory = directory
        self._quiet = quiet

    @classmethod
    def of(cls, args: Namespace, image: GuestImage, config: Config, kvm: api.Kvm, accel: str) -> BootCache | None:
        """Return it; None if this run is to boot."""
        from softkvm.cli.devices import option_texts

        booting = any(getattr(args, name, None) for name in _BOOTING)
        if args.no_cache or booting or args.image or args.kernel or not image.initrd or args.console[:6] == "virtio":
            return None
        try:
            place = cache_directory().parent / "booted"
            parts = [
                softkvm.__version__,
                _code(),
                [_file(str(path)) for path in (image.kernel, *image.initrd)],
                image.command_line,
                [config.memory_size, config.vcpus, config.hyperv],
                option_texts(args),
                accel,
                [bytes(entry).hex() for entry in kvm.get_supported_cpuid()],
            ]
        except (GuestUnavailable, OSError):
            return None
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return cls(place / key, quiet=args.quiet)

    def restore(self, kvm: api.Kvm, output: Callable[[bytes], None], config: Config) -> Machine | None:
        """Return a machine at its prompt, which is shown; None if there is none, or it cannot be had any more."""
        try:
            age_s = time.time() - (self._directory / "manifest.json").stat().st_mtime
            if not 0 <= age_s < FRESH_S:
                return None
            with Snapshot(self._directory) as snapshot:
                prompt = str(snapshot.manifest.extra.get("prompt", ""))
                machine = snapshot.restore(
                    kvm,
                    output,
                    device_specs=config.device_specs,
                    cpu_time_limit_s=config.cpu_time_limit_s,
                    cpu_quota=config.cpu_quota,
                    reboot=config.reboot,
                )
        except (OSError, MachineError):
            return None
        booted = time.strftime("%H:%M:%S", time.localtime(time.time() - age_s))
        if not self._quiet:
            warn(f"going on from the guest that booted at {booted} (--no-cache boots)")
        output(prompt.encode("utf-8", "surrogateescape"))
        return machine

    def keep(self, machine: Machine) -> Keeping:
        """Keep *machine* when it is at its prompt."""
        return Keeping(self._directory, machine)

    def keep_now(self, machine: Machine) -> None:
        """Keep *machine* as it is: its agent waits for a command. Nothing happens if that cannot be."""
        with contextlib.suppress(MachineError, OSError):
            _save(self._directory, machine, b"")


class Keeping(Closing):
    """Waits for the prompt of *machine*, keeps it then, and lets input through afterwards."""

    def __init__(self, directory: Path, machine: Machine) -> None:
        self._directory = directory
        self._machine = machine
        self._line: _HeldLine | None = None
        self._through = False
        self._tail = b""
        self._prompt = b""  # kernel messages may follow
        self._changed = threading.Condition()
        self._last_ns = time.monotonic_ns()
        self._closed = False
        self._thread = start_quiet(self._wait, "booted guest")

    def hold(self, line: InputLine) -> InputLine:
        """Return what stands before *line*, the same each time."""
        with self._changed:
            if self._line is None:
                self._line = _HeldLine(line)
                if self._through:
                    self._line.release()
            return self._line

    def output(self, data: bytes) -> None:
        """The guest has printed *data*."""
        with self._changed:
            if not self._prompt:
                self._tail = (self._tail + data)[-_TAIL:]
                found = _PROMPT.search(self._tail)
                self._prompt = found[0] if found else b""
            self._last_ns = time.monotonic_ns()
            self._changed.notify_all()

    def close(self) -> None:
        """The machine has ended: keep nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _wait(self) -> None:
        end = time.monotonic() + _PATIENCE_S
        try:
            with self._changed:
                while not self._closed and time.monotonic() < end:
                    quiet_s = (time.monotonic_ns() - self._last_ns) / 1e9
                    if self._prompt and quiet_s >= _QUIET_S:
                        break
                    self._changed.wait(_QUIET_S if self._prompt else 1.0)
                else:
                    return
                prompt = self._prompt
            with contextlib.suppress(MachineError, OSError):
                _save(self._directory, self._machine, prompt)
        finally:
            with self._changed:
                self._through = True
                if self._line is not None:
                    self._line.release()


class _HeldLine:
    """A machine's line, on which input waits until :meth:`release`."""

    def __init__(self, line: InputLine) -> None:
        self._line = line
        self._held: bytearray | None = bytearray()
        self._changed = threading.Condition()

    @property
    def pending_input(self) -> int:
        """Bytes that the guest has not taken."""
        with self._changed:
            held = len(self._held or b"")
        return held + self._line.pending_input

    def feed(self, data: bytes) -> None:
        """Take *data*."""
        with self._changed:
            if self._held is not None:
                self._held += data
                return
        self._line.feed(data)

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until not much is waiting."""
        with self._changed:
            if self._held and not self._changed.wait_for(lambda: self._held is None, timeout_s):
                return False
        return self._line.wait_for_room(timeout_s)

    def release(self) -> None:
        """Let everything through from now on."""
        with self._changed:
            held, self._held = self._held, None
            if held:
                self._line.feed(bytes(held))
            self._changed.notify_all()


def _save(directory: Path, machine: Machine, prompt: bytes) -> None:
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)  # too old, or of no use
    extra = {"prompt": prompt.decode("utf-8", "surrogateescape")}
    save(machine, directory, extra=extra, durable=False)
    _forget_old(directory.parent)


def _forget_old(place: Path) -> None:
    """Keep the newest booted guests alone."""
    found = sorted(place.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _file(path: str) -> list[str | int]:
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]


def _code() -> str:
    """Return what changes with every change of softkvm's own files."""
    hash = hashlib.sha256()
    pending = [os.path.dirname(os.path.abspath(softkvm.__file__))]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.is_dir():
                    if entry.name != "__pycache__":
                        pending.append(entry.path)
                elif entry.name.endswith((".py", ".so", ".sh")):
                    status = entry.stat()
                    hash.update(
                        f"{entry.path} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape")
                    )
    return hash.hexdigest()
