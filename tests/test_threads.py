# SPDX-License-Identifier: Apache-2.0
"""Threads that a library starts, and those of its clients' that are in it, when the interpreter ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

#: As many processes end, each with the threads in whatever they do then.
EXITS = 8

#: Threads of ours, and every kind of thing that one does when the interpreter takes its lock from all others.
_QUIET = """
import threading, time
from softkvm.threads import start_quiet

def compute():
    while True:
        sum(range(100))

def release():
    while True:
        time.sleep(0)

def wait():
    event = threading.Event()
    while True:
        event.wait(1e-5)

for number, target in enumerate((compute, release, wait)):
    start_quiet(target, f"quiet {number}")
"""

#: A machine whose vCPUs run, exit, halt and are refused; with timers, eventfds, a trace, CPU timers, dirty logging.
_MACHINE = """
import itertools, os, threading, time
from softkvm import abi
from softkvm.kvm import TRACEPOINTS
from softkvm.trace.record import Recorder
from tests.support.tiny import CODE, Tiny

recorder = Recorder(TRACEPOINTS.match("kvm_*"))
tiny = Tiny(irqchip=True, vcpus=4).long_mode()
tiny.load(bytes.fromhex("e680 ebfc"))  # out 0x80, al; jmp
for vcpu in tiny.vcpus[1:]:
    vcpu.set_sregs(tiny.vcpu.get_sregs())
    vcpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
tiny.memory.write(CODE + 0x100, bytes.fromhex("48ff0425 00000100 ebf6"))  # inc qword [0x10000]; jmp
tiny.memory.write(CODE + 0x200, bytes.fromhex("f4 ebfd"))  # hlt; jmp
for vcpu, offset in zip(tiny.vcpus[1:], (0x100, 0x200, 0x100)):
    regs = vcpu.get_regs()
    regs.rip, regs.rflags = CODE + offset, 2
    vcpu.set_regs(regs)
eventfd = os.eventfd(0)
tiny.vm.irqfd(eventfd, 5)
timers = [vcpu.cpu_clock.create_timer(lambda timer: None) for vcpu in tiny.vcpus]
for timer in timers:
    timer.settime(100_000, 100_000)
tiny.vm.create_pit2()

def run(vcpu):
    while True:
        vcpu.run()

def ask():
    while True:
        tiny.vcpu.get_regs()
        os.eventfd_write(eventfd, 1)

def log():
    for number in itertools.count():
        tiny.slot(0, 0, tiny.memory.size, tiny.memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES if number & 1 else 0)

for target, *args in (*((run, vcpu) for vcpu in tiny.vcpus), (ask,), (log,)):
    threading.Thread(target=target, args=args, daemon=True).start()
"""

_ENDS = {
    "sys.exit": ("import sys; sys.exit(3)", 3),
    "the end of the program": ("", 0),
    "an exception": ("raise SystemExit(4)", 4),
    "os._exit": ("import os; os._exit(5)", 5),
}


@pytest.mark.parametrize("end", _ENDS)
@pytest.mark.parametrize("program", [_QUIET, _MACHINE], ids=["threads of ours", "a machine"])
def test_a_process_ends_as_it_wants_to_whatever_daemon_threads_do(program: str, end: str) -> None:
    last, status = _ENDS[end]
    for number in range(EXITS):
        source = f"{program}\ntime.sleep({number % 4 * 0.01})\n{last}\n"
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != -signal.SIGABRT, done.stderr
        assert (done.returncode, done.stderr) == (status, "")
