# SPDX-License-Identifier: Apache-2.0
"""Runs an entry on QEMU's TCG instead, to compare with: the same image, arguments and options.

The machine is the one that the suite's programs expect: serial port on standard output, ``pc-testdev``,
``pci-testdev``, and ``isa-debug-exit`` at port 0xF4, whose status ``value << 1 | 1`` is QEMU's exit status.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

from softkvm import qemu
from softkvm.reports.result import Result, Status
from softkvm.unittests import config, options
from softkvm.unittests.config import Entry, SuiteError
from softkvm.unittests.result import judge, read_log
from softkvm.unittests.runner import Settings, arguments_of, note_limits, skip_reason, smp_of, timeout_of

ACCEL = "tcg"

_DEVICES = ("pc-testdev", "isa-debug-exit,iobase=0xf4,iosize=0x4", "pci-testdev")


def command(program: str, image: Path, entry: Entry, environment: Path | None = None) -> list[str]:
    """Return the command line for *entry*; *environment* is a file of ``NAME=value`` lines.

    SuiteError if the entry's texts cannot be read.
    """
    arguments, _ = arguments_of(entry)
    parameters, _ = config.expand(entry.qemu_params)
    try:
        extra = shlex.split(parameters)
    except ValueError as error:
        raise SuiteError(f"[{entry.name}]: {error}") from None
    _, *more = smp_of(entry)
    return [
        program,
        "-no-reboot",
        "-nodefaults",
        *("-display", "none"),
        *("-serial", "stdio"),
        *(word for device in _DEVICES for word in ("-device", device)),
        *qemu.TCG,
        *("-kernel", str(image)),
        *("-smp", entry.smp.split()[0], *more),
        *(("-append", arguments) if arguments else ()),
        *(("-initrd", str(environment)) if environment else ()),
        *extra,
    ]


def run_entry(
    directory: Path,
    entry: Entry,
    settings: Settings,
    console: Callable[[bytes], None] | None = None,
    *,
    program: str = qemu.PROGRAM,
) -> Result:
    """Run *entry* on the QEMU *program*; *settings* hold the time limit and the environment."""
    result = Result(entry.name, Status.SKIP, file=entry.file, accel=ACCEL)
    result.reason = skip_reason(directory, entry, settings, ACCEL)
    if result.reason:
        return result
    if entry.check:
        result.notes.append(f"{entry.check} taken as given: it is about KVM or the host")
    result.arguments, result.ignored = arguments_of(entry)
    result.vcpus = int(smp_of(entry)[0])
    result.memory_bytes = options.parse(config.expand(entry.qemu_params)[0]).memory_size
    timeout_s = timeout_of(entry, settings)
    note_limits(entry, settings, result)
    image = config.find(directory) / entry.file
    with tempfile.NamedTemporaryFile(prefix="softkvm-environment-") as environment:
        environment.write("".join(f"{name}={value}\n" for name, value in settings.environment.items()).encode())
        environment.flush()
        words = command(program, image, entry, Path(environment.name) if settings.environment else None)
        try:
            ended = qemu.run(words, timeout_s or None, console or (lambda data: None))
        except OSError as error:
            result.status, result.reason = Status.FAIL, f"{program}: {error.strerror}"
            return result
    result.time_s, result.log = ended.time_s, ended.output
    result.subtests, result.summary = read_log(result.log)
    result.ignored += [line.strip() for line in ended.errors.splitlines() if "warning:" in line]
    _judge(ended, result, timeout_s)
    return result


def _judge(ended: qemu.Ended, result: Result, timeout_s: float) -> None:
    result.exit_status = ended.status
    if ended.status is None:
        result.status, result.reason = Status.FAIL, f"timeout; duration={timeout_s:g}s"
    elif not ended.output and ended.errors:
        # It never started the program: its own status 1 must not be taken for the program's.
        result.status, result.reason = Status.FAIL, ended.errors.strip().splitlines()[-1]
    elif ended.status < 0 or ended.status & 1 == 0:
        result.status, result.reason = Status.FAIL, f"QEMU ended with status {ended.status}"
    else:
        result.status, result.reason = judge(ended.status)
