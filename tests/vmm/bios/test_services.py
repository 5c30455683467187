# SPDX-License-Identifier: Apache-2.0
"""BIOS services on a vCPU that only has registers; values from the IBM PC AT Technical Reference and ACPI 6.4, 15.1."""

import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.machines import RecordingVcpu

from softkvm import abi
from softkvm.vmm.bios.services import SERVICE_PORT, SERVICES, Bios
from softkvm.vmm.boot import firmware, layout
from softkvm.vmm.bus import Bus
from softkvm.vmm.devices import cmos, serial
from softkvm.vmm.memory import MIB, GuestMemory

CARRY, ZERO, INTERRUPTS = 1 << 0, 1 << 6, 1 << 9
STACK_SEGMENT, STACK = 0x3000, 0x100
BUFFER_SEGMENT, BUFFER = 0x4000, 0x40
SMAP = int.from_bytes(b"PAMS", "little")


class Vcpu(RecordingVcpu):
    def get_regs(self) -> abi.kvm_regs:
        return abi.kvm_regs.from_buffer_copy(self.regs)


class Pc:
    """A BIOS with the chips that it asks, and its caller."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.vcpu = Vcpu()
        self.sent = bytearray()
        self.resets = 0
        self.ended = threading.Event()
        self.ports = Bus("I/O port", 16)
        self.uart = serial.Serial(self.sent.extend)
        self.ports.add(serial.COM1_PORT, serial.REGISTERS, self.uart, "com1")
        self.ports.add(cmos.CMOS_PORT, 2, cmos.Cmos(clock_ns=lambda: 1_795_957_888 * 10**9), "cmos")
        self.bios = Bios(
            lambda: self.vcpu,  # type: ignore[arg-type,return-value]
            memory,
            lambda: layout.memory_map(memory),
            self.ports,
            self._reset,
            self.ended,
        )
        memory.write(layout.BIOS_DATA, firmware.data_area())
        memory.write(layout.TEXT_SCREEN, b" \x07" * 2000)

    def _reset(self) -> None:
        self.resets += 1

    def call(self, vector: int, flags: int = 2, **registers: int) -> Any:
        """Call the service as the firmware's handler does; return the registers and the caller's flags."""
        self.vcpu.sregs.cs.selector, self.vcpu.sregs.cs.base = 0xF000, 0xF0000
        self.vcpu.sregs.ss.base = STACK_SEGMENT << 4
        self.vcpu.sregs.es.base = BUFFER_SEGMENT << 4
        self.vcpu.regs = abi.kvm_regs(rflags=2, rsp=STACK, **registers)
        self.memory.write((STACK_SEGMENT << 4) + STACK, struct.pack("<4H", vector, 0x1234, 0x5678, flags))
        self.bios.write(0, 1, 0)
        regs = self.vcpu.regs
        self.flags = struct.unpack("<4H", self.memory.read((STACK_SEGMENT << 4) + STACK, 8))
        assert self.flags[:3] == (vector, 0x1234, 0x5678), "the way back is the caller's"
        return regs

    @property
    def failed(self) -> bool:
        return bool(self.flags[3] & CARRY)

    @property
    def retries(self) -> bool:
        return bool(self.vcpu.regs.rflags & CARRY)

    def console(self) -> bytes:
        self.uart.flush()
        return bytes(self.sent)


@pytest.fixture
def pc() -> Iterator[Pc]:
    memory = GuestMemory(64 * MIB)
    pc = Pc(memory)
    yield pc
    pc.uart.close()
    memory.close()


def test_registers_above_the_service_keep_their_upper_halves(pc: Pc) -> None:
    assert pc.call(0x12, rax=0xAAAA_BBBB_CCCC_DDDD).rax == 0xAAAA_BBBB_CCCC_0000 | 639


def test_equipment_and_memory_size_are_those_of_the_data_area(pc: Pc) -> None:
    assert pc.call(0x11).rax == 0x0222, "a serial port, 80 columns, an x87"
    pc.memory.write(0x413, struct.pack("<H", 600))
    assert pc.call(0x12).rax == 600


def test_e820_gives_the_memory_map_row_by_row(pc: Pc) -> None:
    rows, more = [], 0
    while True:
        regs = pc.call(0x15, rax=0xE820, rbx=more, rcx=24, rdx=SMAP, rdi=BUFFER)
        assert not pc.failed
        assert (regs.rax, regs.rcx) == (SMAP, 20)
        rows.append(struct.unpack("<QQI", pc.memory.read((BUFFER_SEGMENT << 4) + BUFFER, 20)))
        more = regs.rbx
        if not more:
            break
    assert rows == layout.memory_map(pc.memory)


@pytest.mark.parametrize("registers", [{"rdx": 0}, {"rcx": 19}, {"rbx": 100}])
def test_e820_refuses_what_is_no_call_of_it(pc: Pc, registers: dict[str, int]) -> None:
    pc.call(0x15, **({"rax": 0xE820, "rbx": 0, "rcx": 20, "rdx": SMAP, "rdi": BUFFER} | registers))
    assert pc.failed
    assert pc.vcpu.regs.rax >> 8 & 0xFF == 0x86


def test_older_memory_sizes_agree_with_the_map(pc: Pc) -> None:
    regs = pc.call(0x15, rax=0xE801)
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (15 * 1024, 48 * 16, 15 * 1024, 48 * 16)
    assert pc.call(0x15, rax=0x8800).rax == 0xFC00, "63 MiB above the first"
    assert not pc.failed


def test_block_move_copies_between_physical_addresses(pc: Pc) -> None:
    source, target = 0x200000, 0x3000000
    pc.memory.write(source, b"move me!")
    table = bytearray(0x30)
    for at, base in ((0x10, source), (0x18, target)):
        struct.pack_into("<HHBBBB", table, at, 0xFFFF, base & 0xFFFF, base >> 16 & 0xFF, 0x93, 0, base >> 24)
    pc.memory.write(BUFFER_SEGMENT << 4, bytes(table))
    regs = pc.call(0x15, rax=0x8700, rcx=4, rsi=0)
    assert not pc.failed
    assert regs.rax == 0
    assert pc.memory.read(target, 8) == b"move me!"


def test_block_move_from_nowhere_fails(pc: Pc) -> None:
    pc.memory.write(BUFFER_SEGMENT << 4, b"\xff" * 0x30)
    pc.call(0x15, rax=0x8700, rcx=4, rsi=0)
    assert pc.failed


def test_wait_ends_after_its_time_and_lets_interrupts_in(pc: Pc) -> None:
    pc.call(0x15, rax=0x8600, rcx=0, rdx=1000)
    rounds = 0
    while pc.retries:
        pc.call(0x15, rax=0x8600, rcx=0, rdx=1000)
        rounds += 1
        assert rounds < 1000
    assert rounds
    assert not pc.failed


def test_unknown_system_services_fail_with_86h(pc: Pc) -> None:
    for function in (0x53, 0xC0, 0xC2, 0xE9):
        assert pc.call(0x15, rax=function << 8).rax >> 8 == 0x86
        assert pc.failed


@pytest.mark.parametrize("function", [0x02, 0x08, 0x41])
@pytest.mark.parametrize("drive", [0x00, 0x80])
def test_there_is_no_disk(pc: Pc, function: int, drive: int) -> None:
    pc.call(0x13, rax=function << 8 | 1, rbx=0x55AA, rdx=drive)
    assert pc.failed


def test_teletype_writes_to_the_screen_and_to_the_line(pc: Pc) -> None:
    for character in b"Hello\r\nworld":
        pc.call(0x10, rax=0x0E00 | character, rbx=7)
    assert pc.bios.screen.text().splitlines()[:2] == ["Hello", "world"]
    assert pc.memory.read(0xB8000, 10) == b"H\x07e\x07l\x07l\x07o\x07"
    assert pc.console() == b"Hello\r\nworld"
    assert pc.call(0x10, rax=0x0300).rdx == 0x0105, "row, column"


def test_lines_move_up_at_the_end_of_the_screen(pc: Pc) -> None:
    for row in range(26):
        for character in b"%d\r\n" % row:
            pc.call(0x10, rax=0x0E00 | character)
    lines = pc.bios.screen.text().split("\n")
    assert (lines[0], lines[23], lines[24]) == ("2", "25", "")
    assert pc.console() == b"".join(b"%d\r\n" % row for row in range(26)), "a plain text stays one"


def test_text_wraps_at_the_last_column(pc: Pc) -> None:
    for _ in range(81):
        pc.call(0x10, rax=0x0E00 | ord("x"))
    assert pc.bios.screen.text().split("\n")[:2] == ["x" * 80, "x"]


def test_characters_at_a_place_are_shown_at_that_place(pc: Pc) -> None:
    pc.call(0x10, rax=0x0200, rdx=0x050A)
    pc.call(0x10, rax=0x0900 | ord("#"), rbx=0x1F, rcx=3)
    assert pc.memory.read(0xB8000 + 2 * (5 * 80 + 10), 6) == b"#\x1f" * 3
    assert pc.console() == b"\x1b[6;11H\x1b[0;1;37;44m###"
    assert pc.call(0x10, rax=0x0800).rax == 0x1F00 | ord("#")
    assert pc.call(0x10, rax=0x0300).rdx == 0x050A, "the cursor stays"


def test_window_scrolls(pc: Pc) -> None:
    for row in range(3):
        pc.call(0x10, rax=0x0200, rdx=row << 8)
        pc.call(0x10, rax=0x0A00 | ord("a") + row, rcx=80)
    pc.call(0x10, rax=0x0601, rbx=0x0700, rcx=0x0002, rdx=0x0205)  # one line up, rows 0 to 2, columns 2 to 5
    assert [line[:8] for line in pc.bios.screen.text().split("\n")[:3]] == ["aabbbbaa", "bbccccbb", "cc    cc"]
    pc.call(0x10, rax=0x0702, rbx=0x0700, rcx=0x0000, rdx=0x024F)  # two lines down
    assert [line[:8] for line in pc.bios.screen.text().split("\n")[:3]] == ["", "", "aabbbbaa"]
    pc.call(0x10, rax=0x0600, rbx=0x0700, rcx=0x0000, rdx=0x184F)
    assert not pc.bios.screen.text().strip()


@pytest.mark.parametrize("rdx", [0xFFFF, 0x1850])
def test_cursor_stays_on_the_screen(pc: Pc, rdx: int) -> None:
    pc.call(0x10, rax=0x0200, rdx=rdx)
    pc.call(0x10, rax=0x0E41)
    assert pc.memory.read(0xB8000 + 2 * 80 * 25, 2) == b"\0\0"


def test_string_is_written(pc: Pc) -> None:
    pc.memory.write((BUFFER_SEGMENT << 4) + 8, b"text")
    pc.call(0x10, rax=0x1301, rbx=0x07, rcx=4, rdx=0x0203, rbp=8)
    assert pc.bios.screen.text().split("\n")[2] == "   text"
    assert pc.call(0x10, rax=0x0300).rdx == 0x0207


def test_keys_come_from_the_line(pc: Pc) -> None:
    pc.call(0x16, rax=0x0100)
    assert pc.flags[3] & ZERO, "no key"
    pc.uart.feed(b"aA\r\x02\x1b[A\x7f")
    assert pc.call(0x16, rax=0x0100).rax == 0x1E61
    assert not pc.flags[3] & ZERO
    keys = [pc.call(0x16, rax=function).rax for function in (0x0000, 0x1000, 0, 0, 0, 0)]
    assert keys == [0x1E61, 0x1E41, 0x1C0D, 0x3002, 0x4800, 0x0E08]


def test_escape_key_alone_is_itself(pc: Pc) -> None:
    pc.uart.feed(b"\x1b")
    assert pc.call(0x16, rax=0).rax == 0x011B


def test_reading_a_key_waits_for_one(pc: Pc) -> None:
    pc.call(0x16, rax=0x0000)
    assert pc.retries
    pc.uart.feed(b"x")
    assert pc.call(0x16, rax=0x0000).rax == 0x2D78
    assert not pc.retries


def test_waiting_ends_with_the_machine(pc: Pc) -> None:
    pc.ended.set()
    pc.call(0x16, rax=0x0000)
    assert pc.retries, "and does not take the service's 10 ms"


def test_serial_service_sends_and_receives(pc: Pc) -> None:
    assert pc.call(0x14, rax=0x0141, rdx=0).rax >> 8 & 0x60 == 0x60
    assert pc.console() == b"A"
    assert pc.call(0x14, rax=0x0200, rdx=0).rax & 0x8000, "nothing there"
    pc.uart.feed(b"z")
    assert pc.call(0x14, rax=0x0200, rdx=0).rax == ord("z")
    assert pc.call(0x14, rax=0x0141, rdx=1).rax & 0x8000, "no second port"


def test_clock_counts_ticks_and_tells_the_time(pc: Pc) -> None:
    pc.memory.write(0x46C, struct.pack("<I", 0x00012345))
    pc.memory.write(0x470, b"\1")
    regs = pc.call(0x1A, rax=0)
    assert (regs.rcx, regs.rdx, regs.rax) == (1, 0x2345, 1)
    assert pc.call(0x1A, rax=0).rax == 0, "midnight is told once"
    pc.call(0x1A, rax=0x0100, rcx=2, rdx=3)
    assert pc.memory.read(0x46C, 4) == struct.pack("<I", 0x00020003)
    regs = pc.call(0x1A, rax=0x0400)
    assert (regs.rcx, regs.rdx) == (0x2026, 0x1129), "BCD"
    regs = pc.call(0x1A, rax=0x0200)
    assert (regs.rcx, regs.rdx >> 8) == (0x1311, 0x28)
    pc.call(0x1A, rax=0xB101)
    assert pc.failed, "no PCI BIOS"


def test_bootstrap_resets_the_machine(pc: Pc) -> None:
    pc.call(0x19)
    assert pc.resets == 1


def test_only_the_firmware_in_real_mode_is_served(pc: Pc) -> None:
    pc.call(0x19)
    pc.vcpu.sregs.cs.selector = 0x1000
    pc.bios.write(0, 1, 0)
    pc.vcpu.sregs.cs.selector = 0xF000
    pc.vcpu.sregs.cr0 |= 1
    pc.bios.write(0, 1, 0)
    assert pc.resets == 1
    pc.vcpu.regs.rflags |= 1 << 17  # a monitor runs it in virtual-8086 mode
    pc.bios.write(0, 1, 0)
    assert pc.resets == 2


def test_stack_or_buffer_outside_of_memory_is_harmless(pc: Pc) -> None:
    pc.call(0x19)
    pc.vcpu.sregs.ss.base = 64 * MIB
    pc.bios.write(0, 1, 0)
    assert pc.resets == 1
    pc.vcpu.sregs.es.base = 64 * MIB
    pc.call(0x15, rax=0xE820, rcx=20, rdx=SMAP, rdi=0)


def test_every_service_survives_every_function(pc: Pc) -> None:
    pc.ended.set()
    for vector in SERVICES:
        for function in range(256):
            pc.call(vector, rax=function << 8 | 0xFF, rbx=0xFFFF, rcx=0x10, rdx=0xFFFF, rdi=0xFFF0, rsi=0xFFF0)
    assert SERVICE_PORT == 0xB2


def test_state_outside_of_memory_is_saved(pc: Pc) -> None:
    pc.uart.feed(b"ab")
    pc.call(0x16, rax=0)
    for character in b"xyz":
        pc.call(0x10, rax=0x0E00 | character)
    state = pc.bios.save()
    other = Pc(pc.memory)
    other.bios.restore(state)
    assert other.call(0x16, rax=0).rax == 0x3062
    other.memory.write(0x450, bytes([3, 0]))
    other.call(0x10, rax=0x0E00 | ord("!"))
    assert other.console() == b"!", "the terminal's cursor is where it was"
    other.uart.close()
