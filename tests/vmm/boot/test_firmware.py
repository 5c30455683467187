# SPDX-License-Identifier: Apache-2.0
"""The firmware's segment and data areas; offsets from the IBM PC AT Technical Reference, "System BIOS"."""

import itertools
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.machines import KVMS

from softkvm import abi, api
from softkvm.vmm.boot import firmware
from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

Boot = Callable[[str], tuple[Machine, Console]]


@pytest.fixture(params=sorted(KVMS))
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Return a function that makes a machine with a few bytes of real-mode code."""
    kvm: api.Kvm = KVMS[request.param]()
    machines = []

    def make(code: str) -> tuple[Machine, Console]:
        console = Console()
        machine = Machine(kvm, Config(32 * MIB), console.output)
        machines.append(machine)
        console.attach(machine)
        machine.load(bytes.fromhex(code), raw=True)
        return machine, console

    yield make
    for machine in machines:
        machine.close()
    kvm.close()


def test_data_area_has_what_a_kernel_looks_for() -> None:
    data = firmware.data_area()

    def word(offset: int) -> int:
        return int(struct.unpack_from("<H", data, offset)[0])

    assert word(0x00) == 0x3F8, "COM1"
    assert word(0x0E) == 0x9FC0, "extended data area"
    assert word(0x13) == 639, "KiB of conventional memory: up to the extended data area"
    assert data[0x75] == 0, "hard disks"
    assert (data[0x49], word(0x4A), data[0x84]) == (3, 80, 24)
    now = time.time() % 86400 * 0x1800B0 / 86400
    assert abs(struct.unpack_from("<I", data, 0x6C)[0] - now) < 1000 or now < 1000


def test_every_vector_leads_to_code_of_the_firmware() -> None:
    rom = firmware.rom()
    table = firmware.vectors()
    for vector in range(256):
        offset, segment = struct.unpack_from("<HH", table, 4 * vector)
        assert segment == 0xF000
        assert offset in rom
    assert max(offset + len(code) for offset, code in rom.items()) <= 0x10000
    spans = sorted((offset, offset + len(code)) for offset, code in rom.items())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert rom[0xFFFE] == b"\xfc", "model: PC AT"


def test_interrupt_10h_prints(boot: Boot) -> None:
    machine, console = boot("b8410e cd10 b8420e cd10 ba0406 b80034 ef")  # teletype A, B; power off
    assert machine.run(20).end is End.POWER_OFF
    assert console.text == "AB"
    assert machine.board.bios.screen.text().startswith("AB")


def test_registers_and_flags_come_back_from_a_service(boot: Boot) -> None:
    # stc; mov ax, 0x8800; int 0x15; jc spin; mov dx, 0x3f8; out dx, al (0x7c00 KiB: AL 0, AH 0x7c); mov al, ah; out
    machine, console = boot("f9 b80088 cd15 72fe baf803 8ac4 ee ba0406 b80034 ef")
    assert machine.run(20).end is End.POWER_OFF
    assert console.text == "\x7c"


def test_interrupt_16h_waits_for_a_key_while_the_timer_ticks(boot: Boot) -> None:
    # sti; mov ah, 0; int 0x16; then the low byte of the tick count's change since the start, and the key
    machine, console = boot(
        "fb 31c0 8ed8 8b1e6c04"  # sti; ds = 0; mov bx, [0x46c]
        "b8200e cd10 b400 cd16"  # print a space; read a key
        "8b0e6c04 29d9 83f902 72fe"  # cx = ticks that passed; fewer than two: spin
        "b40e cd10 ba0406 b80034 ef"  # print the key; power off
    )
    machine.start()
    console.expect(" ", 20)
    time.sleep(0.3)
    console.send("k")
    assert machine.wait(20).end is End.POWER_OFF
    assert console.text == " k"


def test_waiting_for_a_key_does_not_hold_up_the_end(boot: Boot) -> None:
    machine, _ = boot("b400 cd16")
    assert machine.run(0.2).end is End.TIMEOUT


@pytest.mark.parametrize("code", ["cd19", "cd18", "eaf0ff00f0"])
def test_bootstrap_and_a_jump_to_the_reset_vector_reset_the_machine(boot: Boot, code: str) -> None:
    machine, _ = boot(code)
    assert machine.run(20).end is End.RESET


def test_user_interrupt_1ch_is_called_by_the_timer(boot: Boot) -> None:
    machine, _ = boot(
        "fa 31c0 8ed8 c70670001a00 c7067200 0010"  # vector 0x1c = 1000:001a
        "fb f4 ebfd 90909090 9090"  # sti; 1: hlt; jmp 1b
        "ba0406 b80034 ef"  # 1a: power off
    )
    assert machine.run(20).end is End.POWER_OFF


def test_shutdown_status_leads_on_to_the_warm_reset_vector(boot: Boot) -> None:
    """What a kernel sets up before it sends INIT to the boot processor."""
    # ds = 0; [0x467] = 1000:0020; CMOS 0x0f = 0x0a; jmp f000:fff0;  0x20: print the status that is left, power off
    machine, console = boot(
        "31c0 8ed8 c70667042000 c70669040010 b00f e670 b00a e671 eaf0ff00f0"
        + "90" * (0x20 - 29)
        + "b00f e670 e471 0430 baf803 ee ba0406 b80034 ef"
    )
    assert machine.run(20).end is End.POWER_OFF
    assert console.text == "0"


def test_processor_finds_the_firmware_after_init(boot: Boot) -> None:
    machine, _ = boot("ebfe")
    vcpu = machine.vcpus[0].vcpu
    sregs = vcpu.get_sregs()
    sregs.cs.selector, sregs.cs.base = 0xF000, 0xFFFF0000  # APM volume 2, 14.1.3
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.kvm_regs(rip=0xFFF0, rflags=2))
    outcome = machine.run(20)
    assert (outcome.end, outcome.detail) == (End.RESET, "BIOS")
