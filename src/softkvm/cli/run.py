# SPDX-License-Identifier: Apache-2.0
"""``softkvm run``: boot a virtual machine."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import resource
import signal
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import softkvm
from softkvm import api
from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.accel import AUTO, KVM, SOFT, open_kvm
from softkvm.cli.arguments import add_param, count, file_name, param_values, percent, seconds, size
from softkvm.cli.configuration import add_config
from softkvm.cli.devices import add_device_options, device_specs
from softkvm.cli.dry_run import add_dry_run, tell_machine
from softkvm.cli.ends import EXIT_STATUS, signals_end
from softkvm.cli.output import STDOUT, OutputFile, say_printed, warn
from softkvm.cli.panic_watch import PanicWatch
from softkvm.cli.restored import extra_of
from softkvm.cli.run_cached import BootCache, Keeping
from softkvm.cli.run_command import GuestCommand, add_command_arguments, check_no_command, command_status
from softkvm.cli.run_console import RunConsole
from softkvm.cli.run_control import add_control_arguments, control, detached
from softkvm.cli.run_gdb import add_gdb, gdb_spec, let_debug
from softkvm.cli.run_image import COMMAND_LINE, GuestImage, choose_image, name_file, open_images
from softkvm.cli.terminal import NONE, STDIO, console_choice
from softkvm.cli.tracepoints import add_selection, selecting
from softkvm.control.console import ConsoleHub
from softkvm.vmm.boot.bzimage import Entry
from softkvm.vmm.boot.image import Deadline
from softkvm.vmm.errors import LoadTimeout, MachineError, show_traceback
from softkvm.vmm.machine import MAX_VCPUS, Config, Machine
from softkvm.vmm.memory import KIB
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.stats import STATS_VERSION, ConsoleWatcher

if TYPE_CHECKING:
    from softkvm.plugin import Policy
    from softkvm.trace.record import Recorder

#: Whose paravirtual interfaces a guest is offered.
CPU_KVM, CPU_HYPERV = "kvm", "hv"

NO_ASSIGNMENT = (
    "there is no device assignment (VFIO): a guest's memory is the process's own, which no IOMMU maps for a device"
)


EPILOG = """\
exit status:
  0  the guest powered off
  1  internal error: the host, the KVM or softkvm failed, or a full disk took no more output
  2  usage: bad arguments, a kernel or an initrd that cannot be loaded
  3  the guest's kernel panicked (pvpanic device; or, a heuristic, a panic message on the console)
  4  triple fault
  5  timeout
  6  the guest reset itself (not with --reboot)
  7  ended from the console with Ctrl-A x, or by `softkvm stop`
  8  the guest wrote the debug-exit port
  9  the guest halted for good, with interrupts disabled
  10 --cpu-time-limit
  128 + n  ended by signal n; 141: nobody reads the console

on the console:
  Ctrl-A x ends the machine, Ctrl-A h helps, Ctrl-A Ctrl-A sends Ctrl-A
"""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="KERNEL", nargs="?", type=file_name, help="the same as --kernel")
    add(
        "-k",
        "--kernel",
        metavar="FILE",
        type=file_name,
        help="bzImage, ELF kernel with a PVH note or Multiboot image; flat:FILE is raw real-mode code "
        "(default: the default guest)",
    )
    add(
        "-i",
        "--initrd",
        metavar="FILE",
        type=file_name,
        action="append",
        default=[],
        help="initial RAM disk; several become one. For a Multiboot kernel its modules: 'FILE ARGUMENTS,FILE …'",
    )
    add(
        "-p",
        "--append",
        metavar="TEXT",
        help=f"kernel command line (default: {COMMAND_LINE}; none for a Multiboot kernel)",
    )
    add(
        "--firmware",
        metavar="FILE",
        type=file_name,
        help="boot from disks by this ROM in place of a kernel: seabios, ovmf (as the system's packages have them), or "
        "a file",
    )
    add(
        "--entry",
        choices=[entry.value for entry in Entry],
        help="entry of a Linux kernel: 64, 32 or 16 bits, the last with BIOS calls, or pvh, that of the ELF kernel "
        "inside (default: the first of 64, 32 and 16 that it has)",
    )
    add("-m", "--mem", metavar="SIZE", default="256M", help="guest memory, MiB without a unit (default: 256M)")
    add("--pin-memory", action="store_true", help="populate and lock all of the guest's memory; none is given back")
    add("--assign", metavar="DEVICE", help="refused: devices of the host cannot be assigned to a guest")
    add("-c", "--vcpus", metavar="N", default="1", help="virtual processors, 1 to 16 (default: 1)")
    add(
        "--cpu",
        choices=(CPU_KVM, CPU_HYPERV),
        default=CPU_KVM,
        help="paravirtual interfaces: kvm, KVM's clock and hypercalls (default); hv, Hyper-V's in their place",
    )
    add(
        "--accel",
        choices=(SOFT, KVM, AUTO),
        default=SOFT,
        help="soft: KVM in Python on the software CPU (default); kvm: /dev/kvm; auto: kvm if a guest runs there, else "
        "soft, and one line says which",
    )
    add(
        "--console",
        metavar="WHERE",
        type=console_choice,
        default=STDIO,
        help="stdio (default), pty, file:PATH or none: COM1's other end; virtio or virtio,WHERE: the console device's, "
        "/dev/hvc0, which knows the terminal's size",
    )
    add(
        "--reboot",
        action=BooleanOptionalAction,
        default=False,
        help="a guest's reset, or a triple fault, begins the machine anew instead of ending it; a panic still ends it",
    )
    add(
        "--incoming",
        metavar="WHERE",
        help="run the machine that `softkvm migrate` sends: unix:PATH, or tcp:127.0.0.1:PORT",
    )
    add(
        "--no-cache",
        action="store_true",
        help="boot the default guest, in place of going on from where a run like this one had booted it to",
    )
    add_gdb(parser)
    add("--timeout", metavar="SECONDS", help="end the machine after this long")
    add("--cpu-time-limit", metavar="SECONDS", help="end the machine when its vCPUs have used so much CPU time in all")
    add(
        "--cpu-quota",
        metavar="PERCENT",
        help="CPU time of each vCPU, 1 to 100 percent of every 100 ms; it stands for the rest",
    )
    # as kvmtool and QEMU have them
    add("--cpus", "--smp", dest="vcpus", default=SUPPRESS, help=SUPPRESS)
    add("--memory", dest="mem", default=SUPPRESS, help=SUPPRESS)
    add("-d", dest="disk", action="append", default=SUPPRESS, help=SUPPRESS)
    add_device_options(parser)
    add_config(parser)
    add_dry_run(parser)
    add_control_arguments(parser)
    add_command_arguments(parser)
    add_param(parser)
    add(
        "--plugin",
        metavar="FILE.py",
        type=file_name,
        action="append",
        default=[],
        help="let a Python file change KVM's policy (may be repeated); docs/hacking.md",
    )
    add(
        "--trace",
        metavar="FILE",
        type=file_name,
        help="record KVM's tracepoints: a file of trace-cmd's, or FILE.json for Perfetto (`softkvm trace --help`)",
    )
    add_selection(parser)
    add(
        "--stats",
        metavar="FILE",
        type=file_name,
        help="write statistics as JSON when the machine has ended; - is standard output",
    )


def _start_trace(kvm: api.Kvm, args: Namespace, stack: contextlib.ExitStack) -> Recorder | None:
    """Begin to record what --trace asks for; *stack* ends that. None if nothing is asked for."""
    if args.trace is None:
        if args.trace_event or args.trace_filter:
            raise CommandError("--trace-event and --trace-filter need --trace FILE")
        return None
    from softkvm.kvm import TRACEPOINTS, trace
    from softkvm.kvm import Kvm as SoftKvm

    if not isinstance(kvm, SoftKvm):
        raise CommandError("--trace records KVM in Python: it needs --accel soft; trace-cmd records the kernel's")
    with selecting():
        recorder = trace.start(TRACEPOINTS, args.trace_event, args.trace_filter)
    return stack.enter_context(contextlib.closing(recorder))


def _trace_file(name: str | None) -> OutputFile | None:
    if name == STDOUT:
        raise CommandError("--trace -: expected a file: the console has standard output")
    return None if name is None else OutputFile("--trace", name)


def _write_trace(recorder: Recorder, file: OutputFile) -> None:
    """Write the trace; say what it has and lacks."""
    from softkvm.trace.save import save, told

    contents = io.BytesIO()
    save(recorder, contents, file.name)
    replaced = os.path.isfile(file.name)
    file.write(contents.getvalue())
    if recorder.problem:
        warn(f"{file.name}: it is not complete: {recorder.problem}")
    warn(told(file.name, recorder.count, recorder.lost, replaced=replaced))


def _set_params(kvm: api.Kvm, texts: Sequence[str]) -> None:
    """Set the module parameters that ``--param`` names."""
    if texts:
        from softkvm.cli.parameters import assign_params

        assign_params(kvm, param_values(texts))


def _load_plugins(kvm: api.Kvm, files: Sequence[str]) -> Policy | None:
    """Let the plugins change the policy of *kvm*; None if there are none."""
    if not files:
        return None
    from softkvm import plugin
    from softkvm.kvm import Kvm as SoftKvm

    if not isinstance(kvm, SoftKvm):
        raise CommandError("--plugin changes KVM in Python: it needs --accel soft")
    policy = plugin.Policy(kvm)
    for file in files:
        try:
            plugin.load(file, policy)
        except plugin.PluginError as error:
            if error.__cause__ is not None:
                show_traceback(error.__cause__)
            raise CommandError(f"--plugin {error}") from None
    return policy


def _instructions(stats: dict[str, Any]) -> int | None:
    """Sum the instructions that the vCPUs retired, if their KVM counts them."""
    counts = [vcpu.get("kvm", {}).get("instructions") for vcpu in stats["vcpus"]]
    return sum(counts) if counts and None not in counts else None


def _collect(
    machine: Machine,
    image: GuestImage,
    command_line: str,
    accel: str,
    outcome: Outcome,
    status: int,
    watcher: ConsoleWatcher,
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
        "kernel": None if image.firmware else str(image.kernel),
        "firmware": str(image.kernel) if image.firmware else None,
        "initrd": ",".join(image.initrd) or None,
        "command_line": None if image.raw else command_line,
        "memory_bytes": machine.config.memory_size,
        "vcpu_count": machine.config.vcpus,
        "end": outcome.end.value,
        "detail": outcome.detail,
        "exit_status": status,
        "debug_exit_status": outcome.status if outcome.end is End.DEBUG_EXIT else None,
        "milestones": watcher.as_dict(),
        "wall_ns": stats["wall_ns"],
        "cpu_ns": int((usage.ru_utime + usage.ru_stime) * 1e9),
        "max_rss_bytes": usage.ru_maxrss * KIB,
        "instructions": _instructions(stats),
        "exits": exits,
        "vcpus": stats["vcpus"],
    }


def _run(args: Namespace) -> int:
    if args.incoming is not None:
        from softkvm.cli.run_incoming import run_incoming

        return run_incoming(args)
    timeout_s = None if args.timeout is None else seconds("--timeout", args.timeout)
    with contextlib.ExitStack() as files:
        if args.detach and not detached(args):
            return EXIT_OK
        return _run_with(args, timeout_s, files)


def _run_with(args: Namespace, timeout_s: float | None, files: contextlib.ExitStack) -> int:
    """Boot what *args* say; *files* closes the images, from which a machine that is reset begins anew."""
    if args.assign is not None:
        raise CommandError(f"--assign {args.assign}: {NO_ASSIGNMENT}")
    guest_command = None
    if args.command is None:
        check_no_command(args)
    else:
        guest_command = GuestCommand(args)
        args.vsock = args.vsock or [""]
    try:
        vcpus = count("--vcpus", args.vcpus, 1, MAX_VCPUS)
        limit, quota = args.cpu_time_limit, args.cpu_quota
        config = Config(
            size("--mem", args.mem),
            vcpus,
            pin_memory=args.pin_memory,
            hyperv=args.cpu == CPU_HYPERV,
            cpu_time_limit_s=None if limit is None else seconds("--cpu-time-limit", limit),
            reboot=args.reboot,
            cpu_quota=None if quota is None else percent("--cpu-quota", quota),
            device_specs=device_specs(args),
        )
        gdb = gdb_spec(args)
        stats_file = OutputFile("--stats", args.stats) if args.stats else None
        trace_file = _trace_file(args.trace)
        image = choose_image(args)
        if image.firmware:
            from softkvm.vmm.boards.pc_firmware import read

            config = replace(config, firmware=read(image.kernel))
        deadline = Deadline(timeout_s)
        loaded = open_images(image, config.memory_size, deadline, files)
    except LoadTimeout as error:
        return _timed_out(error)
    except MachineError as error:
        raise CommandError(str(error)) from None
    console = RunConsole(_console(args), config.device_specs)
    caught: list[int] = []
    failed: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        kvm, accel = open_kvm(args.accel)
        stack.enter_context(kvm)
        _set_params(kvm, args.param)
        policy = _load_plugins(kvm, args.plugin)
        recorder = _start_trace(kvm, args, stack)
        watcher, hub = ConsoleWatcher(), ConsoleHub()
        panic = PanicWatch(watcher, crash_kernel=bool(re.search(r"\bcrashkernel=", loaded.command_line)))

        def output(data: bytes) -> None:
            watcher(data)
            hub.output(data)
            try:
                console.output(data)
            except BrokenPipeError:
                caught.append(signal.SIGPIPE)
                machine.end(Outcome(End.STOPPED, "nobody reads the console"))
                raise
            except OSError as error:
                failed.append(Outcome(End.ERROR, f"{console.name}: {error.strerror}"))
                machine.end(failed[0])
                raise
            finally:
                panic.output(data)
                if keeping is not None:
                    keeping.output(data)

        keeping: Keeping | None = None
        try:
            config = replace(config, device_specs=config.device_specs + console.specs(output))
            cache = BootCache.of(args, image, config, kvm, accel)
            booted = None if cache is None else cache.restore(kvm, output, config)
            machine = stack.enter_context(booted or Machine(kvm, config, output))
            if booted is not None and loaded.kernel is not None:
                booted.board.remember(loaded.kernel, None, loaded.command_line, modules=loaded.modules)
            elif loaded.kernel is not None:
                machine.load(
                    loaded.kernel,
                    None,
                    loaded.command_line,
                    modules=loaded.modules,
                    raw=image.raw,
                    entry=image.entry,
                    deadline=deadline,
                )
                if cache is not None and guest_command is not None:
                    guest_command.booted = cache.keep_now
                elif cache is not None:
                    keeping = stack.enter_context(cache.keep(machine))
                    console.through = keeping.hold
        except LoadTimeout as error:
            return _timed_out(error)
        except MachineError as error:
            raise CommandError(name_file(error, image)) from None
        except (OSError, MemoryError) as error:
            show_traceback(error)
            raise CommandError(f"the machine cannot be built: {error}", EXIT_ERROR) from None
        if args.dry_run:
            return tell_machine(args, machine, image, loaded, accel)
        control(machine, args, hub, stack, extra_of(args, accel, image))
        hub.line = console.line(machine)
        panic.attach(machine)
        if gdb is not None:
            let_debug(machine, gdb, stack)
        with (
            signals_end(machine, caught),
            console.attach(machine, lambda: machine.end(Outcome(End.STOPPED, "from the console"))),
        ):
            watcher.started_ns = time.monotonic_ns()
            start = machine.run if guest_command is None else functools.partial(guest_command.run, machine)
            outcome = panic.judge(start(deadline.remaining_s))
            console.flush()
        if outcome.end is End.TIMEOUT:
            outcome = Outcome(End.TIMEOUT, f"{timeout_s:g} s")
        if outcome.end is End.POWER_OFF and failed:  # its last words were lost
            outcome = failed[0]
        status = 128 + caught[0] if caught else EXIT_STATUS[outcome.end]
        status = command_status(guest_command, outcome, status)
        if outcome.end is not End.POWER_OFF:
            warn(outcome.detail if outcome in failed else str(outcome))
        if recorder is not None and trace_file is not None:
            _write_trace(recorder, trace_file)
        for report in policy.at_end if policy is not None else ():
            say_printed(report)
        if stats_file is not None:
            stats = _collect(machine, image, loaded.command_line, accel, outcome, status, watcher)
            stats_file.write(json.dumps(stats, indent=2) + "\n")
        return status


def _console(args: Namespace) -> str:
    """Return where the console is."""
    if args.detach and args.console == STDIO:
        return NONE
    return args.console if args.command is None else GuestCommand.console(args)


def _timed_out(error: LoadTimeout) -> int:
    """Say that --timeout passed before the machine ran; return the exit status."""
    outcome = Outcome(End.TIMEOUT, str(error))
    warn(str(outcome))
    return EXIT_STATUS[outcome.end]


command = Command(_add_arguments, _run, "Boot a virtual machine.", EPILOG, intermixed=True, takes_command=True)
