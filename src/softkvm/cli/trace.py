# SPDX-License-Identifier: Apache-2.0
"""``softkvm trace``: record KVM's tracepoints, print them, sum them up, make files of them that viewers open."""

from __future__ import annotations

import json
from argparse import REMAINDER, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import count, file_name
from softkvm.cli.output import STDOUT, OutputFile, say, table
from softkvm.trace import chrome
from softkvm.trace.dat import Record, TraceFile, TraceFileError
from softkvm.trace.report import report
from softkvm.trace.save import JSON, VIEWER
from softkvm.trace.summary import Summary, summarize

if TYPE_CHECKING:
    from softkvm.trace.tracepoint import Tracepoint

DEFAULT_FILE = "trace.dat"
MAX_VCPU = 4095

EPILOG = """\
what to do:
  record    run a machine or a client, and record what its KVM does
  report    print a trace, a line for each event
  summary   exits by reason: how many, and how long they took
  convert   make a file for Perfetto (https://ui.perfetto.dev) or another viewer
  list      the tracepoints, and their fields

`softkvm trace WHAT --help` explains it; docs/tracing.md is the guide.
"""

RECORD_EPILOG = """\
Tracepoints have the kernel's names and fields; `softkvm trace list` shows them. A filter is a condition on the fields,
for all tracepoints that have them or for one.

FILE.json is for Perfetto and Chrome; every other name is a file of trace-cmd's, which `softkvm trace report` and
trace-cmd read. `softkvm run --trace` and `softkvm exec --trace-kvm` are the same. With --pid a machine that runs is
traced, until Ctrl-C; `softkvm stat --list` shows which there are.

exit status: that of `softkvm run` or `softkvm exec`; 2 for usage

examples:
  softkvm trace record -- run
  softkvm trace record -e 'kvm_e*' -e kvm_msr -f 'kvm_exit:exit_reason == 0x7c' -- run --vcpus 2
  softkvm trace record --pid qemu-system-x86 --duration 2
  softkvm trace record -o boot.json -- exec -- qemu-system-x86_64 -accel kvm -nographic -kernel vmlinuz
"""

TRACED = ("run", "exec")


def _add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="WHAT", required=True, help="record, report, summary, …")
    record = _action(
        actions, "record", _record, "Run a machine or a client, and record what its KVM does.", RECORD_EPILOG
    )
    add_options(record)
    record.add_argument(
        "-o", "--output", metavar="FILE", type=file_name, default=DEFAULT_FILE, help="the trace (default: trace.dat)"
    )
    record.add_argument("--pid", metavar="PID|NAME", help="a machine that runs already, until Ctrl-C")
    record.add_argument("--duration", metavar="SECONDS", help="with --pid: no longer than this")
    record.add_argument(
        "command", metavar="run|exec …", nargs=REMAINDER, help="the command to trace, and its arguments"
    )

    printed = _action(actions, "report", _report, "Print a trace, a line for each event, as trace-cmd does.")
    _add_input(printed)
    printed.add_argument("-e", "--event", metavar="GLOB", action="append", default=[], help="only these events")

    summed = _action(actions, "summary", _summary, "Print exits by reason, as `perf kvm stat report` does.")
    _add_input(summed)
    summed.add_argument("--vcpu", metavar="N", help="of one vCPU (default: of all)")
    summed.add_argument("--json", action="store_true", help="print JSON")

    converted = _action(actions, "convert", _convert, "Make Chrome's trace events in JSON, which Perfetto opens.")
    _add_input(converted)
    converted.add_argument("output", metavar="OUT.json", type=file_name, help="the file; - is standard output")

    listed = _action(actions, "list", _list, "Print the tracepoints and their fields.")
    listed.add_argument("events", metavar="GLOB", nargs="*", help="which (default: all)")
    listed.add_argument("--json", action="store_true", help="print JSON")


def _action(
    actions: Any, name: str, run: Callable[[Namespace], int], description: str, epilog: str | None = None
) -> ArgumentParser:
    parser: ArgumentParser = actions.add_parser(
        name,
        help=description,
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(act=run)
    return parser


def _add_input(parser: ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=file_name, nargs="?", default=DEFAULT_FILE, help="the trace (default: trace.dat)"
    )


def add_options(parser: ArgumentParser) -> None:
    """Add the options that say what is recorded."""
    parser.add_argument(
        "-e", "--event", metavar="GLOB", action="append", default=[], help="tracepoints to record (default: all of KVM)"
    )
    parser.add_argument(
        "-f",
        "--filter",
        metavar="[EVENT:]CONDITION",
        action="append",
        default=[],
        help="record those alone, such as 'vcpu_id == 1' or 'kvm_msr:ecx >= 0x800'",
    )


# --- record ------------------------------------------------------------------------------------------------


def _record(args: Namespace) -> int:
    from softkvm.cli.main import run_command

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.pid is not None:
        if command:
            raise CommandError("--pid is for a machine that runs: expected no command")
        from softkvm.cli import trace_running

        return trace_running.record(args)
    if args.duration is not None:
        raise CommandError("--duration needs --pid; `softkvm run` has --timeout")
    if not command or command[0] not in TRACED:
        raise CommandError(f"expected `-- {'` or `-- '.join(TRACED)}` and its arguments, the command to trace")
    name, *rest = command
    options = ["--trace" if name == "run" else "--trace-kvm", args.output]
    for option, values in (("--trace-event", args.event), ("--trace-filter", args.filter)):
        options += [f"{option}={value}" for value in values]
    try:
        return run_command(name, [*options, *rest])
    except CommandError as error:
        raise CommandError(_as_typed(str(error)), error.status) from error.__cause__


#: Options of `softkvm run` and `softkvm exec`, and what they are here.
_TYPED = {"--trace-event": "--event", "--trace-filter": "--filter", "--trace-kvm": "--output", "--trace": "--output"}


def _as_typed(text: str) -> str:
    """Have what a traced command says of our options name those that the user knows."""
    option, space, rest = text.partition(" ")
    bare = option.removesuffix(":")
    return f"{_TYPED.get(bare, bare)}{option[len(bare) :]}{space}{rest}"


# --- reading -----------------------------------------------------------------------------------------------


def _open(name: str) -> TraceFile:
    try:
        return TraceFile.open(name)
    except OSError as error:
        raise CommandError(f"{name}: {error.strerror}") from None
    except TraceFileError as error:
        if name.endswith(JSON):
            raise CommandError(
                f"{name}: JSON is for viewers ({VIEWER}), which `softkvm trace convert` makes it for; "
                "report and summary read the file that it was made of: record to FILE.dat"
            ) from None
        raise CommandError(f"{name}: {error}") from None


def _chosen(trace: TraceFile, patterns: list[str]) -> Iterable[Record]:
    if not patterns:
        return trace.records()
    from fnmatch import fnmatchcase

    wanted = {
        event.id
        for event in trace.events.values()
        if any(fnmatchcase(event.name, glob) or fnmatchcase(f"{event.system}:{event.name}", glob) for glob in patterns)
    }
    if not wanted:
        raise CommandError(f"--event {patterns[0]}: the trace has no such event")
    return (record for record in trace.records() if record.event is None or record.event.id in wanted)


def _report(args: Namespace) -> int:
    trace = _open(args.file)
    for lines in _batched(report(trace, _chosen(trace, args.event))):
        say("\n".join(lines))
    return EXIT_OK


def _batched(lines: Iterable[str], size: int = 512) -> Iterable[list[str]]:
    batch = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _summary(args: Namespace) -> int:
    vcpu = None if args.vcpu is None else count("--vcpu", args.vcpu, 0, MAX_VCPU)
    trace = _open(args.file)
    summary = summarize(trace.records(), vcpu)
    if args.json:
        rows = [row.as_dict() for row in summary.rows]
        say(json.dumps({"guest_ns": summary.guest_ns, "vcpus": summary.vcpus, "exits": rows}, indent=2))
        return EXIT_OK
    if not summary.rows:
        whose = "" if vcpu is None else f" of vCPU {vcpu}"
        raise CommandError(f"{args.file}: there are no exits{whose} (kvm_entry and kvm_exit)", EXIT_ERROR)
    say("\n".join(render(summary)))
    return EXIT_OK


def render(summary: Summary) -> list[str]:
    """Return the table for people."""
    header = ["VM-EXIT", "Samples", "Samples%", "Time%", "Total us", "Min us", "Avg us", "Max us", "+-%"]
    rows = [
        [
            row.reason,
            f"{row.count:,}",
            f"{100 * row.count / summary.count:.2f}",
            f"{100 * row.total_ns / max(summary.total_ns, 1):.2f}",
            f"{row.total_ns / 1000:,.1f}",
            f"{row.min_ns / 1000:,.2f}",
            f"{row.mean_ns / 1000:,.2f}",
            f"{row.max_ns / 1000:,.2f}",
            f"{row.error_percent:.1f}",
        ]
        for row in summary.rows
    ]
    vcpus = "1 vCPU" if summary.vcpus == 1 else f"{summary.vcpus} vCPUs"
    return [
        *table(header, rows, left=1),
        "",
        f"{summary.count:,} exits of {vcpus}; {summary.total_ns / 1e9:.3f} s to handle them, halts and "
        f"userspace included; {summary.guest_ns / 1e9:.3f} s in the guest",
    ]


def _convert(args: Namespace) -> int:
    file = OutputFile("OUT.json", args.output)
    trace = _open(args.file)
    pieces = chrome.convert(trace, trace.records())
    if file.name == STDOUT:
        for batch in _batched(pieces):
            say("".join(batch), end="")
        return EXIT_OK
    file.write("".join(pieces))
    return EXIT_OK


# --- list --------------------------------------------------------------------------------------------------


def _list(args: Namespace) -> int:
    from softkvm.kvm import TRACEPOINTS
    from softkvm.kvm.trace import TraceError, select

    try:
        chosen = select(TRACEPOINTS, args.events)
    except TraceError as error:
        raise CommandError(str(error)) from None
    if args.json:
        say(json.dumps([_described(tracepoint) for tracepoint in chosen], indent=2))
        return EXIT_OK
    lines = []
    for tracepoint in sorted(chosen, key=lambda tracepoint: tracepoint.event.name):
        event = tracepoint.event
        lines.append(f"{event.system}:{event.name}")
        lines += [f"    {field.declaration}" for field in event.fields]
    say("\n".join(lines))
    return EXIT_OK


def _described(tracepoint: Tracepoint) -> dict[str, Any]:
    event = tracepoint.event
    fields = [{"name": field.name, "type": field.ctype, "size": field.size} for field in event.fields]
    return {"system": event.system, "name": event.name, "fields": fields, "print_fmt": event.print_fmt}


def _run(args: Namespace) -> int:
    act: Callable[[Namespace], int] = args.act
    return act(args)


command = Command(_add_arguments, _run, "KVM's tracepoints.", EPILOG)
