# SPDX-License-Identifier: Apache-2.0
"""``softkvm snapshot``: save a running machine to a directory, go on from there, say what is in it."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from typing import Any, Final

from softkvm.cli import EXIT_OK, Command, CommandError
from softkvm.cli.arguments import count, file_name, seconds
from softkvm.vmm.errors import SnapshotError

EPILOG = """\
A snapshot is a directory: manifest.json, state.json and memory, which is sparse, the user's alone (memory holds what
the guest's processes hold), and there as a whole or not at all. The machine stands while its memory is copied.

Restoring maps memory copy-on-write, so it takes as long for any size, and any number of machines may go on from one
snapshot: they share what they don't write. The guest's clocks have gone on meanwhile (--time stand: they have not), and
it is told that it may have a twin: Linux reseeds its random generator. Refused, with the reason: another processor,
another version of softkvm, disks that have changed, damage. Memory's checksum is looked at by `info --verify` only.

--watch has changes watched from then on, so that the next snapshot may have only those: --base DIR. The guest is slower
meanwhile.

exit status of restore: that of `softkvm run`; with clones 0 if it is 0 for all, else that of the first other
exit status of save and info: 0; 1 if it cannot be saved, or is damaged; 2 usage; 128 + n ended by signal n

examples:
  softkvm snapshot save guest-4711 before
  softkvm snapshot restore before
  softkvm snapshot restore before --clones 20 --console file:log
  softkvm snapshot info before --verify
"""

CLONES_MOST: Final = 1000
STEP, STAND = "step", "stand"
_SAVE_S: Final = 600.0


def _add_arguments(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    save = commands.add_parser("save", help="save a running machine", allow_abbrev=False)
    save.add_argument("machine", metavar="NAME|PID", help="which machine")
    save.add_argument("directory", metavar="DIR", type=file_name, help="where to; it must not be there yet")
    save.add_argument("--base", metavar="DIR", type=file_name, help="save what has changed since this snapshot alone")
    save.add_argument("--watch", action="store_true", help="watch what changes, for a next snapshot with --base")
    save.add_argument("--end", action="store_true", help="end the machine when it is saved")
    restore = commands.add_parser("restore", help="go on from a snapshot", allow_abbrev=False)
    add = restore.add_argument
    add("directory", metavar="DIR", type=file_name, help="the snapshot")
    add("--clones", metavar="N", help=f"so many machines, 1 to {CLONES_MOST}; a line's number is its machine's")
    add("--console", metavar="WHERE", help="stdio (default), pty, file:PATH (of clones: PATH.1, PATH.2, …) or none")
    add("--accel", choices=("soft", "kvm", "auto"), help="as of `softkvm run` (default: as it was)")
    add("--time", choices=(STEP, STAND), default=STEP, help="the guest's clocks have gone on (default), or stood")
    add("--timeout", metavar="SECONDS", help="end the machine after this long")
    add("--watch", action="store_true", help="watch what changes, for a next snapshot with --base")
    add("--name", metavar="NAME", help="what the machine is called; of clones NAME-1, NAME-2, … (default: guest-PID)")
    info = commands.add_parser("info", help="say what a snapshot is of", allow_abbrev=False)
    info.add_argument("directory", metavar="DIR", type=file_name, help="the snapshot")
    info.add_argument("--verify", action="store_true", help="compare memory with its checksum")
    info.add_argument("--json", action="store_true", help="print JSON")


def _run(args: Namespace) -> int:
    if args.action == "restore":
        from softkvm.cli.snapshot_restore import Restoring, restore

        return restore(
            Restoring(
                args.directory,
                clones=None if args.clones is None else count("--clones", args.clones, 1, CLONES_MOST),
                console=args.console,
                accel=args.accel,
                step_time=args.time == STEP,
                timeout_s=None if args.timeout is None else seconds("--timeout", args.timeout),
                watch=args.watch,
                name=args.name,
            )
        )
    return _info(args) if args.action == "info" else _save(args)


def _save(args: Namespace) -> int:
    from softkvm.cli.live import connected
    from softkvm.cli.output import say

    with connected(args.machine) as running:
        answer = running.ask_long(
            "snapshot",
            _SAVE_S,
            directory=os.path.abspath(args.directory),
            base=None if args.base is None else os.path.abspath(args.base),
            watch=args.watch,
            end=args.end,
        )
    say(f"{running.name} is saved to {args.directory}: {_size(answer['stored_bytes'])} of memory")
    return EXIT_OK


def _info(args: Namespace) -> int:
    from softkvm.cli.output import say
    from softkvm.vmm.snapshot.directory import Snapshot

    try:
        with Snapshot(args.directory) as snapshot:
            if args.verify:
                snapshot.verify()
            manifest, paths = snapshot.manifest, snapshot.paths
    except SnapshotError as error:
        raise CommandError(str(error), 1) from None
    if args.json:
        say(json.dumps(json.loads(manifest.encode()), indent=2))
        return EXIT_OK
    machine = manifest.machine
    rows: list[tuple[str, Any]] = [
        ("snapshot", f"{manifest.id}, {manifest.created}, softkvm {manifest.softkvm}"),
        ("machine", f"{_size(machine['memory_size'])}, {machine['vcpus']} vCPU{'s' * (machine['vcpus'] > 1)}"),
        ("memory", f"{_size(manifest.memory.stored)} stored" + (", checksum as it should be" if args.verify else "")),
        *(("base", path) for path in paths[1:]),
        *(("file", entry.path) for entry in manifest.files),
        *((name, value) for name, value in sorted(manifest.extra.items()) if isinstance(value, str) and value),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name.ljust(width)}  {value}")
    return EXIT_OK


def _size(size: int) -> str:
    mib = size / (1 << 20)
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:.4g} MiB"


command = Command(_add_arguments, _run, "Save a running machine, and go on from there.", EPILOG)
