# SPDX-License-Identifier: Apache-2.0
"""``softkvm run``: boot a virtual machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import softkvm
from softkvm import abi, api
from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.terminal import open_console
from softkvm.vmm.errors import ImageError, MachineError
from softkvm.vmm.guest import GuestUnavailable, TerminalProgress, demo_kernel, prepare
from softkvm.vmm.machine import Config, Machine, read_image
from softkvm.vmm.memory import GIB, KIB, MIB
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.stats import STATS_VERSION, ConsoleWatcher

DEV_KVM = "/dev/kvm"
COMMAND_LINE = "console=ttyS0"

EXIT_STATUS = {
    End.POWER_OFF: EXIT_OK,
    End.ERROR: EXIT_ERROR,
    End.PANIC: 3,
    End.TRIPLE_FAULT: 4,
    End.TIMEOUT: 5,
    End.RESET: 6,
    End.STOPPED: 7,
    End.DEBUG_EXIT: 8,
}
"""Exit status of ``softkvm run`` for every end of a machine. 2 is a usage error, 128 + n an end by signal n."""

PANIC_GRACE_S = 5.0
"""How long a guest that printed a panic may take to reset or to start its crash kernel."""

EPILOG = """\
exit status:
  0  the guest powered off
  1  internal error: the host, the KVM or softkvm failed
  2  usage: bad arguments, a kernel or an initrd that cannot be loaded
  3  the guest's kernel panicked (pvpanic device; or, a heuristic, a panic message on the console)
  4  triple fault
  5  timeout
  6  the guest reset itself
  7  ended from the console with Ctrl-A x
  8  the guest wrote the debug-exit port
  128 + n  ended by signal n

on the console:
  Ctrl-A x ends the machine, Ctrl-A h helps, Ctrl-A Ctrl-A sends Ctrl-A
"""

_UNITS = {"": MIB, "K": KIB, "M": MIB, "G": GIB}


@dataclass(frozen=True, slots=True)
class _Image:
    """What to boot."""

    kernel: Path
    initrd: Path | None
    command_line: str
    raw: bool = False


def parse_size(text: str) -> int:
    """Return the bytes that ``256M``, ``1G``, ``65536K`` or ``256`` (MiB) name; CommandError if it names none."""
    match = re.fullmatch(r"(\d{1,12})([KMG]?)B?", text, re.IGNORECASE)
    if match is None:
        raise CommandError(f"--mem {text}: expected a size such as 256M or 2G")
    return int(match[1]) * _UNITS[match[2].upper()]


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--kernel",
        metavar="FILE",
        help="bzImage or ELF kernel with a PVH note; flat:FILE is raw real-mode code (default: the default guest)",
    )
    add("--initrd", metavar="FILE", type=Path, help="initial RAM disk")
    add("--append", metavar="TEXT", help=f"kernel command line (default: {COMMAND_LINE})")
    add("--mem", metavar="SIZE", default="256M", help="guest memory, MiB without a unit (default: 256M)")
    add("--vcpus", metavar="N", default="1", help="virtual processors, 1 to 16 (default: 1)")
    add(
        "--accel",
        choices=("soft", "kvm", "auto"),
        default="soft",
        help="soft: KVM in Python on the software CPU (default); kvm: /dev/kvm; auto: kvm if usable, else soft",
    )
    add("--console", metavar="WHERE", default="stdio", help="stdio (default), pty, file:PATH or none")
    add("--timeout", metavar="SECONDS", help="end the machine after this long")
    add("--stats", metavar="FILE", type=Path, help="write statistics as JSON")


def _choose_image(args: Namespace) -> _Image:
    """Return what the arguments name, or the default guest, or the built-in demonstration."""
    if args.kernel is not None:
        raw = args.kernel.startswith("flat:")
        if raw and (args.initrd or args.append):
            raise CommandError("--kernel flat:FILE takes neither --initrd nor --append")
        return _Image(
            Path(args.kernel.removeprefix("flat:")),
            args.initrd,
            COMMAND_LINE if args.append is None else args.append,
            raw,
        )
    if args.initrd is not None:
        raise CommandError("--initrd needs --kernel")
    more = f" {args.append}" if args.append else ""
    try:
        guest = prepare(TerminalProgress())
        return _Image(guest.kernel, guest.initrd, guest.command_line + more)
    except GuestUnavailable as error:
        print(
            f"softkvm: {error}; booting the built-in demonstration guest (--kernel and --initrd boot your own)",
            file=sys.stderr,
        )
    try:
        return _Image(demo_kernel(), None, COMMAND_LINE + more)
    except GuestUnavailable as error:
        raise CommandError(str(error), EXIT_ERROR) from None


def _open_soft() -> api.Kvm:
    try:
        return softkvm.open()
    except ImportError as error:
        raise CommandError(f"the software CPU is not built: {error}", EXIT_ERROR) from None


def _open_device() -> api.Kvm:
    kvm = softkvm.open(DEV_KVM)
    missing = [name for name in ("IRQCHIP", "USER_MEMORY", "PIT2", "IMMEDIATE_EXIT") if not _has(kvm, name)]
    if missing:
        kvm.close()
        raise OSError(f"{DEV_KVM} lacks {', '.join(missing)}")
    return kvm


def _has(kvm: api.Kvm, capability: str) -> int:
    number: int = getattr(abi, f"KVM_CAP_{capability}")
    return kvm.check_extension(number)


def _open_kvm(accel: str) -> tuple[api.Kvm, str]:
    """Return the KVM that ``--accel`` names, and which it is."""
    if accel == "soft":
        return _open_soft(), "soft"
    try:
        return _open_device(), "kvm"
    except OSError as error:
        if accel == "kvm":
            raise CommandError(f"--accel kvm: {error}", EXIT_ERROR) from None
    return _open_soft(), "soft"


class _StatsFile:
    """The file of ``--stats``: a temporary file beside it from the start, renamed when it is complete."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._temporary: str | None = None
        if path is None:
            return
        try:
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory")
            fd, self._temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.fchmod(fd, 0o666 & ~_umask())
            os.close(fd)
        except OSError as error:
            raise CommandError(f"--stats {path}: {error.strerror}") from None

    def write(self, stats: dict[str, Any]) -> None:
        """Write *stats*; CommandError if the disk does not take it."""
        if self._path is None or self._temporary is None:
            return
        try:
            Path(self._temporary).write_text(json.dumps(stats, indent=2) + "\n")
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise CommandError(f"--stats {self._path}: {error.strerror}", EXIT_ERROR) from None
        self._temporary = None

    def close(self) -> None:
        """Leave nothing half-written."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _PanicWatch:
    """Ends a machine whose kernel printed a panic and then neither resets nor goes on (a heuristic)."""

    def __init__(self, watcher: ConsoleWatcher) -> None:
        self._watcher = watcher
        self._seen = threading.Event()
        self._machine: Machine | None = None

    def attach(self, machine: Machine) -> None:
        """Watch over *machine*."""
        self._machine = machine

    def output(self, data: bytes) -> None:
        """Take output, after the watcher did."""
        if self._machine is None:
            return
        if self._watcher.reached("panic_end"):
            self._machine.end(self._outcome())
        elif self._watcher.reached("panic") and not self._seen.is_set():
            self._seen.set()
            timer = threading.Timer(PANIC_GRACE_S, lambda m: m.end(self._outcome()), (self._machine,))
            timer.daemon = True
            timer.start()

    def _outcome(self) -> Outcome:
        milestone = self._watcher.reached("panic")
        return Outcome(End.PANIC, f"on the console: {milestone.line}" if milestone else "on the console")

    def judge(self, outcome: Outcome) -> Outcome:
        """A reset after a panic message (``panic=-1``) is a panic."""
        if outcome.end is End.RESET and self._watcher.reached("panic"):
            return self._outcome()
        return outcome


@contextlib.contextmanager
def _signals_end(machine: Machine) -> Iterator[list[int]]:
    """Let signals end the machine instead of the process; yields the list that they are noted in."""
    caught: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        machine.end(Outcome(End.STOPPED, signal.Signals(number).name))

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _instructions(stats: dict[str, Any]) -> int | None:
    """Sum the instructions that the vCPUs retired, if their KVM counts them."""
    counts = [vcpu.get("kvm", {}).get("instructions") for vcpu in stats["vcpus"]]
    return sum(counts) if counts and None not in counts else None


def _collect(
    args: Namespace, machine: Machine, image: _Image, accel: str, outcome: Outcome, watcher: ConsoleWatcher
) -> dict[str, Any]:
    """Return the contents of the statistics file."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    stats = machine.stats()
    exits: dict[str, dict[str, int]] = {}
    for vcpu in stats["vcpus"]:
        for reason, entry in vcpu["exits"].items():
            total = exits.setdefault(reason, {"count": 0, "handler_ns": 0})
            total["count"] += entry["count"]
            total["handler_ns"] += entry["handler_ns"]
    return {
        "version": STATS_VERSION,
        "softkvm": softkvm.__version__,
        "accel": accel,
        "kernel": str(image.kernel),
        "initrd": str(image.initrd) if image.initrd else None,
        "command_line": None if image.raw else image.command_line,
        "memory_bytes": machine.config.memory_size,
        "vcpu_count": machine.config.vcpus,
        "end": outcome.end.value,
        "detail": outcome.detail,
        "exit_status": EXIT_STATUS[outcome.end],
        "debug_exit_status": outcome.status if outcome.end is End.DEBUG_EXIT else None,
        "milestones": watcher.as_dict(),
        "wall_ns": stats["wall_ns"],
        "cpu_ns": int((usage.ru_utime + usage.ru_stime) * 1e9),
        "max_rss_bytes": usage.ru_maxrss * KIB,
        "instructions": _instructions(stats),
        "exits": exits,
        "vcpus": stats["vcpus"],
    }


def _parse_timeout(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < threading.TIMEOUT_MAX:
        raise CommandError(f"--timeout {text}: expected a number of seconds above 0")
    return value


def _run(args: Namespace) -> int:
    timeout_s = _parse_timeout(args.timeout)
    if not re.fullmatch(r"\d{1,6}", args.vcpus):
        raise CommandError(f"--vcpus {args.vcpus}: expected a number from 1 to 16")
    try:
        config = Config(parse_size(args.mem), int(args.vcpus))
        image = _choose_image(args)
        kernel = read_image(image.kernel, "kernel")
        initrd = read_image(image.initrd, "initrd") if image.initrd else None
    except MachineError as error:
        raise CommandError(str(error)) from None
    console = open_console(args.console)
    with contextlib.ExitStack() as stack:
        stats_file = _StatsFile(args.stats)
        stack.callback(stats_file.close)
        kvm, accel = _open_kvm(args.accel)
        stack.enter_context(kvm)
        watcher = ConsoleWatcher()
        panic = _PanicWatch(watcher)

        def output(data: bytes) -> None:
            watcher(data)
            console.output(data)
            panic.output(data)

        try:
            machine = stack.enter_context(Machine(kvm, config, output))
            machine.load(kernel, initrd, image.command_line, raw=image.raw)
        except MachineError as error:
            raise CommandError(_name_file(error, image)) from None
        except (OSError, MemoryError) as error:
            raise CommandError(f"the machine cannot be built: {error}", EXIT_ERROR) from None
        del kernel, initrd
        panic.attach(machine)
        with (
            _signals_end(machine) as caught,
            console.attach(machine.serial.feed, lambda: machine.end(Outcome(End.STOPPED, "from the console"))),
        ):
            watcher.started_ns = time.monotonic_ns()
            outcome = panic.judge(machine.run(timeout_s))
        if outcome.end is not End.POWER_OFF:
            print(f"softkvm: {outcome}", file=sys.stderr)
        stats_file.write(_collect(args, machine, image, accel, outcome, watcher))
        return 128 + caught[0] if caught else EXIT_STATUS[outcome.end]


def _name_file(error: MachineError, image: _Image) -> str:
    """Put the file's name before what is wrong with it."""
    text = str(error)
    if isinstance(error, ImageError) and text.startswith(("kernel", "ELF", "flat", "boot protocol")):
        return f"{image.kernel}: {text}"
    return text


command = Command(_add_arguments, _run, "Boot a virtual machine.", EPILOG)
