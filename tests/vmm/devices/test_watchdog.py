# SPDX-License-Identifier: Apache-2.0
"""What happens to a machine whose guest does not reload its watchdog."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.machines import KVMS

from softkvm.cli.main import main
from softkvm.vmm.devices.watchdog import ACTIONS, WatchdogSpec, parse
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

POWER_OFF = bytes.fromhex("ba0406 b80034 ef")


def enable(slot: int = 1) -> bytes:
    """Real-mode code that starts the watchdog: megahertz, both counters at their ends (two seconds in all)."""

    def config(register: int, value: int) -> bytes:
        address = 0x80000000 | slot << 11 | register
        select = b"\x66\xba\xf8\x0c\0\0\x66\xb8" + struct.pack("<I", address) + b"\x66\xef"  # mov edx; mov eax; out
        return select + b"\x66\xba\xfc\x0c\0\0\xb0" + bytes([value]) + b"\xee"  # mov edx; mov al; out dx, al

    return config(0x60, 0x07) + config(0x68, 0x02)


HANG = b"\xfa\xf4\xeb\xfd"  # cli; hlt; again


@pytest.fixture(params=sorted(KVMS))
def accel(request: pytest.FixtureRequest) -> str:
    KVMS[request.param]().close()  # skips where it is not there
    return str(request.param)


@contextmanager
def hanging(accel: str, action: str, code: bytes = b"", **config: Any) -> Iterator[Machine]:
    """A machine whose guest enables a watchdog of some milliseconds, and hangs."""
    made = Config(32 * MIB, device_specs=(WatchdogSpec(action),), **config)
    with KVMS[accel]() as kvm, Machine(kvm, made) as machine:
        machine.devices[0]._preload = [10_000, 10_000]  # the guest's code has no way to memory that high
        machine.load(code or enable() + HANG, raw=True)
        machine.start()
        yield machine


@pytest.mark.parametrize(
    ("action", "end"), [("reset", End.RESET), ("poweroff", End.POWER_OFF), ("none", End.HALTED), ("debug", End.HALTED)]
)
def test_a_guest_that_hangs_ends_as_was_asked_for(
    accel: str, action: str, end: End, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has halted for good, but for the watchdog: the machine waits for that."""
    with hanging(accel, action) as machine:
        assert machine.wait(60).end is end
        assert machine.devices[0].read_register(0xC, 2) == 0x200
    said = capfd.readouterr().err.count("the watchdog has expired: the guest goes on")
    assert said == (1 if action == "debug" else 0)


def test_a_machine_that_begins_anew_finds_out_that_it_was_the_watchdog(accel: str) -> None:
    with hanging(accel, "reset", reboot=True) as machine:
        while machine.boots == 1 and not machine.ended.is_set():
            time.sleep(0.005)
        assert machine.devices[0].read_register(0xC, 2) == 0x200
        assert machine.devices[0].read_register(0, 4) == 0xFFFFF


def test_an_nmi_gets_through_to_a_guest_that_hangs(accel: str) -> None:
    start = enable()
    # xor ax, ax; mov ds, ax; the vector of the NMI: behind this code
    vector = b"\xc7\x06\x08\0" + struct.pack("<H", 14 + len(start) + len(HANG)) + b"\x8c\x0e\x0a\0"
    code = b"\x31\xc0\x8e\xd8" + vector + start + HANG
    with hanging(accel, "inject-nmi", code + POWER_OFF + HANG) as machine:
        assert machine.wait(60).end is End.POWER_OFF


def test_a_machine_is_paused_and_a_line_says_so(accel: str, capfd: pytest.CaptureFixture[str]) -> None:
    with hanging(accel, "pause") as machine:
        while not machine.paused and not machine.ended.is_set():
            time.sleep(0.005)
        assert machine.paused
        machine.resume()
        assert machine.wait(60).end is End.HALTED
    assert capfd.readouterr().err.count("the watchdog has expired: the machine is paused") == 1


def test_softkvm_run_has_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "hang.bin"
    image.write_bytes(enable() + HANG)
    assert main(["run", "--watchdog", "i6300esb", "--timeout", "60", f"flat:{image}"]) == 6
    assert capfd.readouterr().err == "softkvm: reset: watchdog\n"


def test_the_option_is_the_model_and_what_it_does() -> None:
    assert parse("i6300esb") == WatchdogSpec("reset")
    for action in ACTIONS:
        assert parse(f"i6300esb,action={action}") == WatchdogSpec(action)
    for text, wrong in (
        ("ib700", "expected i6300esb"),
        ("i6300esb,action=explode", "action=explode, expected reset"),
        ("i6300esb,loud", "unknown: loud"),
        ("", "expected i6300esb"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            parse(text)
