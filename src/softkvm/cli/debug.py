# SPDX-License-Identifier: Apache-2.0
"""``softkvm debug``: what the vCPUs of a running machine are at; an NMI, or a SysRq."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from softkvm.cli import EXIT_OK, Command
from softkvm.cli.arguments import count
from softkvm.cli.live import connected
from softkvm.cli.output import say
from softkvm.control.dump import lines

EPILOG = """\
Registers, the bytes of the code around the instruction pointer and the stack of every vCPU; all stand for a moment.
Of a Linux kernel also the task and the call chain, out of its memory: without debug packages.
--nmi and --sysrq do that instead: a Linux guest shows by both what it is at (sysrq key l, or h for the others), if its
kernel.sysrq lets it.

exit status: 0; 1 if there is no such machine, or it refuses; 2 usage: bad arguments; 128 + n ended by signal n
"""

_PATIENCE_S = 10.0
_MOST = 4095


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machine", metavar="NAME|PID", nargs="?", help="which machine (default: the only one)")
    add("-d", "--dump", action="store_true", help="the registers, after --nmi or --sysrq too")
    add("-m", "--nmi", metavar="VCPU", help="send an NMI to a vCPU, or to all of them")
    add("-s", "--sysrq", metavar="KEY", help="send a break and a key on the serial console")
    add("--json", action="store_true", help="print JSON")


def _run(args: Namespace) -> int:
    vcpu = None if args.nmi in (None, "all") else count("--nmi", args.nmi, 0, _MOST)
    with connected(args.machine) as running:
        if args.sysrq is not None:
            running.ask("sysrq", key=args.sysrq)
        if args.nmi is not None:
            running.ask("nmi", vcpu=vcpu)
        if args.dump or (args.sysrq is None and args.nmi is None):
            answer = running.ask_long("dump", _PATIENCE_S)
            if args.json:
                say(json.dumps(answer))
            else:
                say("\n".join(line for cpu in answer["cpus"] for line in lines(cpu)))
    return EXIT_OK


command = Command(_add_arguments, _run, "What the vCPUs of a running machine are at.", EPILOG)
