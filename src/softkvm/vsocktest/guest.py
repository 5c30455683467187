# SPDX-License-Identifier: Apache-2.0
"""The guest that does its half: the default guest with our program, and the kernel's where one is given."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Final

from softkvm import api
from softkvm.reports.result import Result, Status
from softkvm.vmm.devices.virtio_vsock import VsockSpec
from softkvm.vmm.errors import MachineError
from softkvm.vmm.guest.cpio import CpioWriter
from softkvm.vmm.guest.default import Guest
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.vsock.sockets import VsockListener
from softkvm.vsocktest.control import ControlLost
from softkvm.vsocktest.half import DEFAULT_PORT
from softkvm.vsocktest.session import MODES, Finished, GuestLost, Suite, take_report

CONTROL_PORT: Final = 1111
OWN: Final = "guest"
KERNELS: Final = "vsock_test"
VIRTIO, VMCI, LOOPBACK = "virtio", "vmci", "loopback"
TRANSPORTS: Final = (VIRTIO, VMCI, LOOPBACK)
BOOT_S: Final = 300.0
LOG_BYTES: Final = 64 << 10
_CASE: Final = re.compile(r"\d+ - (?P<name>.+)\.\.\.(?P<end>ok|skipped)")

SCRIPT: Final = """\
#!/bin/sh
# The suite in the guest: a program and a mode after the other, each as often as the host wants it.
modprobe vsock_loopback
tell() { vsock_test --tell "$1" --log /tmp/log --control-vsock $control; }

own() { # mode
    while
        vsock_test --mode $1 --describe --control-vsock $control $options >/tmp/log 2>&1
        tell $?
    do :; done
}

# The kernel's speaks to its other half by TCP, which the relay carries to the host.
kernels_client() {
    vsock_test --relay listen --control-port 2222 --describe --like /tmp/list --control-vsock $control &
    vsock_test_kernel --mode client --control-host 127.0.0.1 --control-port 2222 --peer-cid 2 >/tmp/log 2>&1
}
kernels_server() {
    vsock_test --relay connect --control-port 2222 --describe --like /tmp/list --control-vsock $control &
    vsock_test_kernel --mode server --control-port 2222 --peer-cid 2 >/tmp/log 2>&1
}
kernels() { # mode
    vsock_test_kernel --list >/tmp/list
    while
        kernels_$1
        status=$?
        wait
        tell $status
    do :; done
}

# Both halves in the guest, on the loopback: ours against the kernel's, or against itself.
loopback() { # our mode, the other's
    like=
    if [ -x /bin/vsock_test_kernel ]; then
        vsock_test_kernel --list >/tmp/list
        like='--like /tmp/list'
        other=vsock_test_kernel
    else
        other=vsock_test
    fi
    ours="vsock_test --mode $1 $like --control-port 2222 --peer-cid 1 $options"
    theirs="$other --mode $2 --control-port 2222 --peer-cid 1"
    if [ $1 = server ]; then
        $ours >/tmp/log 2>&1 &
        sleep 1
        timeout 300 $theirs --control-host 127.0.0.1 >/tmp/other 2>&1 || kill $!
        wait $!
        status=$?
    else
        $theirs >/tmp/other 2>&1 &
        sleep 1
        timeout 300 $ours --control-host 127.0.0.1 >/tmp/log 2>&1
        status=$?
        [ $status = 0 ] || kill $!
    fi
    wait
    sed 's/^/other: /' /tmp/other >>/tmp/log
    tell $status
}
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is done, and how."""

    modes: Sequence[str] = MODES
    """What the guest's half is, one after the other."""
    picked: Callable[[str], bool] = lambda name: True
    transport: str = VIRTIO
    """What is between the halves: ``loopback`` has both in the guest, ``vmci`` reads nothing behind a close."""
    kernels: Path | None = None
    """A build of the kernel's own vsock_test, static: the guest's half is that one then."""
    port: int = DEFAULT_PORT
    memory_size: int = 256 * MIB
    vcpus: int = 1


@dataclass(slots=True)
class Run:
    """What came of it."""

    results: list[Result] = field(default_factory=list)
    trouble: str = ""
    """Why it ended before its end."""
    log: str = ""
    """The end of the guest's console."""
    live_sockets: int = 0
    """Connections of the host's that were left behind the last case."""


def program() -> bytes:
    """Return our program for the guest; FileNotFoundError in a source tree where ``make guests`` has not built it."""
    file = resources.files(__package__).joinpath("data", "vsock_test")
    try:
        return file.read_bytes()
    except OSError:
        raise FileNotFoundError("the guest's half is not built: run `make guests` in the source tree") from None


def archive(settings: Settings) -> bytes:
    """Return the files that the default guest gets besides its own."""
    out = io.BytesIO()
    writer = CpioWriter(out)
    writer.file("bin/vsock_test", program(), 0o755)
    if settings.kernels is not None:
        writer.file("bin/vsock_test_kernel", settings.kernels.read_bytes(), 0o755)
    writer.file("etc/vsock-suite", (SCRIPT + _calls(settings)).encode(), 0o755)
    writer.close()
    return out.getvalue()


def _calls(settings: Settings) -> str:
    options = f"--peer-port {settings.port}" if settings.kernels is None else ""
    if settings.transport == VMCI:
        options += " --transport vmci"
    lines = [f"control={CONTROL_PORT}", f"options='{options}'"]
    for mode in settings.modes:
        if settings.transport == LOOPBACK:
            lines.append(f"loopback {mode} {MODES[1 - MODES.index(mode)]}")
        else:
            lines.append(f"{'own' if settings.kernels is None else 'kernels'} {mode}")
    return "\n".join(lines) + "\n"


def run(kvm: api.Kvm, guest: Guest, settings: Settings, finished: Finished) -> Run:
    """Boot *guest* on *kvm* and do all that *settings* say; *finished* is told of each result."""
    outcome = Run()
    console = bytearray()

    def output(data: bytes) -> None:
        console.extend(data)
        del console[:-LOG_BYTES]

    specs = (VsockSpec(),)
    config = Config(settings.memory_size, settings.vcpus, device_specs=specs)
    initrd = guest.initrd.read_bytes() + archive(settings)
    with Machine(kvm, config, output) as machine:
        command_line = f'{guest.command_line} quiet softkvm.run="sh /etc/vsock-suite"'
        machine.load(guest.kernel, initrd=initrd, command_line=command_line)
        listener = machine.vsock.listen(CONTROL_PORT)
        listener.settimeout(BOOT_S)
        machine.start()
        try:
            for mode in settings.modes:
                _one(machine, listener, mode, settings, finished, outcome)
        except (GuestLost, ControlLost, MachineError) as error:
            outcome.trouble = str(error)
        outcome.live_sockets = machine.vsock.live_sockets
        machine.end(Outcome(End.STOPPED, "the suite is done"))
        machine.wait()
    outcome.log = console.decode("utf-8", "replace")
    return outcome


def _one(
    machine: Machine, listener: VsockListener, mode: str, settings: Settings, finished: Finished, outcome: Run
) -> None:
    """One mode of the guest's half."""
    name = OWN if settings.kernels is None else KERNELS
    if settings.transport == LOOPBACK:
        _loopback(listener, mode, name, settings, finished, outcome)
        return
    suite = Suite(
        machine.vsock,
        listener,
        mode,
        name,
        finished,
        settings.picked,
        port=settings.port,
        read_after_close=settings.transport != VMCI,
        results=outcome.results,
    )
    suite.run()


def _loopback(
    listener: VsockListener, mode: str, name: str, settings: Settings, finished: Finished, outcome: Run
) -> None:
    """Both halves are in the guest: take its word for each case."""
    status, lines = take_report(listener)
    other = f"{name} as {MODES[1 - MODES.index(mode)]}"
    cases = [match for line in lines if (match := _CASE.fullmatch(line))]
    for match in cases:
        if settings.picked(match["name"]):
            passed = Status.PASS if match["end"] == "ok" else Status.SKIP
            result = Result(f"{OWN} as {mode} with {other}: {match['name']}", passed)
            outcome.results.append(result)
            finished(result)
    if status != "0" or not cases:
        why = next((line for line in lines if not _CASE.fullmatch(line) and not line.startswith("other: ")), "")
        result = Result(
            f"{OWN} as {mode} with {other}", Status.FAIL, why or f"exit status {status}", log="\n".join(lines)
        )
        outcome.results.append(result)
        finished(result)
