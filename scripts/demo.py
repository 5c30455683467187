# SPDX-License-Identifier: Apache-2.0
"""``make demo``: boot the default guest with 2 vCPUs on the software CPU, run commands in its shell, show the cost."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import softkvm
from softkvm.progress import StatusLine, TerminalProgress
from softkvm.vmm.console import Console, ConsoleError
from softkvm.vmm.guest import Guest, GuestUnavailable, demo_kernel, prepare
from softkvm.vmm.guest.initramfs import INIT_REACHED, PROMPT
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.stats import ConsoleWatcher, Milestone

COMMANDS = ("uname -a", "nproc", "cat /proc/cpuinfo | head", "free -m")
VCPUS = 2
MEMORY_SIZE = 256 * MIB
BOOT_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 60.0

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class LastLine(StatusLine):
    """Shows the last whole line of the guest's console."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self._line = b""

    def __call__(self, data: bytes) -> None:
        """Take output of the guest."""
        *whole, self._line = (self._line + data).split(b"\n")
        if whole:
            self.show(_CONTROL.sub("", whole[-1].decode("utf-8", "replace")))

    def stop(self) -> None:
        """Leave an empty line, for good."""
        self.clear()
        self.shown = False


def run_linux(guest: Guest) -> None:
    """Boot Linux, talk to its shell, power it off."""
    watcher = ConsoleWatcher()
    watcher.milestones.append(Milestone("shell", re.compile(re.escape(INIT_REACHED.encode()))))
    last_line = LastLine()

    def output(data: bytes) -> None:
        watcher(data)
        last_line(data)

    print(f"booting {guest.kernel_package.split('_')[0]} on the software CPU: {VCPUS} vCPUs, 256 MiB", flush=True)
    console = Console(output)
    with softkvm.open() as kvm, Machine(kvm, Config(MEMORY_SIZE, VCPUS), console.output) as machine:
        console.attach(machine)
        machine.load(guest.kernel.read_bytes(), guest.initrd.read_bytes(), guest.command_line)
        watcher.started_ns = time.monotonic_ns()
        machine.start()
        try:
            console.expect(re.escape(PROMPT) + r"\S*# ", BOOT_TIMEOUT_S)
            last_line.stop()
            for command in COMMANDS:
                console.send(command + "\n")
                echo = re.escape(command) + r"\r\n"
                answer = console.expect(rf"(?s){echo}(.*?){re.escape(PROMPT)}\S*# ", COMMAND_TIMEOUT_S)[1]
                print(f"$ {command}\n{_CONTROL.sub('', answer).rstrip()}", flush=True)
            console.send("exit\n")
            print("$ exit", flush=True)
        except ConsoleError as error:
            machine.end(Outcome(End.STOPPED, "the demonstration failed"))
            machine.wait()
            last_line.stop()
            sys.exit(f"demo: {error}\ndemo: {machine.outcome}")
        outcome = machine.wait(COMMAND_TIMEOUT_S)
        stats = machine.stats()
    if outcome.end is not End.POWER_OFF:
        sys.exit(f"demo: the guest did not power off: {outcome}")
    print_table(stats, watcher)


def print_table(stats: dict[str, Any], watcher: ConsoleWatcher) -> None:
    """Print times, instructions and exits."""
    rows = []
    for name, label in (("kernel", "to the kernel's first line"), ("shell", "to init")):
        milestone = watcher.reached(name)
        if milestone is not None and milestone.at_ns is not None:
            rows.append((label, f"{milestone.at_ns / 1e9:.2f} s"))
    rows.append(("to power-off", f"{stats['wall_ns'] / 1e9:.2f} s"))
    counts = [vcpu.get("kvm", {}).get("instructions") for vcpu in stats["vcpus"]]
    if None not in counts:
        rows.append(("instructions", f"{sum(counts) / 1e6:,.0f} M"))
    exits: Counter[str] = Counter()
    for vcpu in stats["vcpus"]:
        exits.update({reason: entry["count"] for reason, entry in vcpu["exits"].items()})
    rows += [(reason, f"{count:,}") for reason, count in exits.most_common()]
    width = max(len(label) for label, _ in rows)
    figures = max(len(figure) for _, figure in rows)
    print()
    for label, figure in rows:
        print(f"{label.ljust(width)}  {figure.rjust(figures)}")


def run_builtin(kernel: Path, reason: str) -> None:
    """Without Linux: the demonstration guest, by commands on its command line."""
    print(f"{reason}\nbooting the built-in demonstration guest instead", flush=True)
    console = Console(lambda data: (sys.stdout.buffer.write(data), sys.stdout.buffer.flush()))
    watcher = ConsoleWatcher()
    with softkvm.open() as kvm, Machine(kvm, Config(MEMORY_SIZE, VCPUS), console.output) as machine:
        machine.load(kernel.read_bytes(), None, 'run="irq; bench; poweroff"')
        outcome = machine.run(COMMAND_TIMEOUT_S)
        stats = machine.stats()
    if outcome.end is not End.POWER_OFF:
        sys.exit(f"demo: the guest did not power off: {outcome}")
    print_table(stats, watcher)


def main() -> None:
    """Run the demonstration with whichever guest there is."""
    try:
        guest = prepare(TerminalProgress())
    except GuestUnavailable as error:
        run_builtin(demo_kernel(), f"no Linux guest: {error}")
    else:
        run_linux(guest)
    if sys.stdin.isatty() and sys.stdout.isatty():
        print("\nan interactive shell:  .venv/bin/softkvm run --vcpus 2     (Ctrl-A x ends it, `exit` powers off)")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # nobody reads it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
