# SPDX-License-Identifier: Apache-2.0
"""``softkvm run --incoming``: wait for a machine that moves here, and run it."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from dataclasses import replace
from typing import Any

from softkvm.cli import CommandError
from softkvm.cli.accel import SOFT, open_kvm
from softkvm.cli.arguments import seconds
from softkvm.cli.devices import DEVICE_OPTIONS
from softkvm.cli.output import warn
from softkvm.cli.restored import Ends, How, accel_of, console_of, device_specs, open_end, run
from softkvm.cli.run_control import checked_name
from softkvm.vmm.errors import MigrationError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.migration.stream import Listener
from softkvm.vmm.migration.target import Incoming

_OTHERS = ("image", "kernel", "initrd", "append", "entry", "detach", "gdb", "trace", "plugin", "stats", "reboot")
"""Options of a machine that boots here."""


def run_incoming(args: Namespace) -> int:
    """Do it; return the exit status."""
    for other in (*_OTHERS, *(option.name for option in DEVICE_OPTIONS)):
        if getattr(args, other, None):
            raise CommandError(f"--incoming: the machine comes as it is; --{other.replace('_', '-')} is there, too")
    choice, name = console_of(args.console), checked_name(args)
    timeout_s = None if args.timeout is None else seconds("--timeout", args.timeout)
    ends = Ends(open_end(choice))
    said: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:

        def new_machine(config: Config, extra: dict[str, Any]) -> Machine:
            said.update(extra)
            accel = accel_of(extra, args.accel if args.accel != SOFT else None)
            kvm = stack.enter_context(open_kvm(accel)[0])
            with device_specs(extra) as specs:
                return Machine(kvm, replace(config, device_specs=specs), ends.output)

        try:
            with Listener(args.incoming) as listener:
                warn(f"waiting for a machine at {listener.where}")
                channel = stack.enter_context(listener.accept())
            with Incoming(channel, new_machine) as incoming:
                machine = stack.enter_context(incoming.receive())
        except MigrationError as error:
            raise CommandError(f"--incoming: {error}", 1) from None
        return run(machine, ends, How(said, name, timeout_s))
