# SPDX-License-Identifier: Apache-2.0
"""What a PC's firmware leaves behind: interrupt vectors and handlers, the BIOS data areas, i8259s and i8254 programmed.

The interrupt chips come up programmed as the IBM PC AT's BIOS did: IRQ 0 to 7 at vectors 8 to 0xF, IRQ 8 to 15 at
0x70 to 0x77, the timer ticking 18.2 times a second, its interrupt unmasked. Every vector has a handler: those of
interrupts acknowledge, IRQ 0 counts ticks at 0040:006C and calls INT 1Ch, those of BIOS services hand over to
the package ``softkvm.vmm.bios``, all others return at once. ::

    F000:0000  handlers of interrupts        F000:0100  entries of the services, 8 bytes each, by vector
    F000:0900  the way to the services       F000:E05B  what the reset vector leads to
    F000:FFF0  the reset vector

A processor comes to the reset vector by INIT (the boot processor's, when a kernel that crashed on another starts its
successor there) or by a jump. The shutdown status in CMOS byte 0x0F tells what to do: 5 and 0xA lead on to the address
at 0040:0067, the former with an end of interrupt; all others ask INT 19h, which resets the machine.

Source: IBM PC AT Technical Reference, "System BIOS" (vectors, timer tick count, data area, equipment word, shutdown
status); Intel 8259A and 8254 data sheets; for the 16-bit code the Intel SDM, vol. 2.
"""

from __future__ import annotations

import struct
import time

from softkvm import abi, api
from softkvm.vmm.bios.services import SERVICE_PORT, SERVICES
from softkvm.vmm.boot import layout
from softkvm.vmm.devices import serial
from softkvm.vmm.memory import KIB, GuestMemory

FIRST_IRQ_VECTOR = 0x08
SECOND_IRQ_VECTOR = 0x70
UNMASKED_FIRST = ~(1 << 0 | 1 << 2) & 0xFF  # the timer and the cascade
UNMASKED_SECOND = 0xFF
PIT_SQUARE_WAVE = 3
PIT_LOW_HIGH = 3
PIT_PERIOD = 0x10000
TICKS_PER_DAY = 0x1800B0

SEGMENT = layout.FIRMWARE >> 4
RETURN = 0x00
FIRST_IRQ = 0x10
SECOND_IRQ = 0x20
TIMER = 0x30
ENTRIES = 0x100
ENTRY_SIZE = 8
SERVICE = ENTRIES + 256 * ENTRY_SIZE
POST = 0xE05B
RESET = 0xFFF0
DATE = 0xFFF5
MODEL = 0xFFFE
PC_AT = 0xFC

HANDLERS: dict[int, bytes] = {
    RETURN: bytes.fromhex("cf"),  # iret
    # push ax; mov al, 0x20; out 0x20, al; pop ax; iret
    FIRST_IRQ: bytes.fromhex("50 b0 20 e6 20 58 cf"),
    # push ax; mov al, 0x20; out 0xa0, al; out 0x20, al; pop ax; iret
    SECOND_IRQ: bytes.fromhex("50 b0 20 e6 a0 e6 20 58 cf"),
    TIMER: bytes.fromhex(
        "50 1e b84000 8ed8"  # push ax; push ds; mov ax, 0x40; mov ds, ax
        "66 ff066c00"  # inc dword [0x6c]
        "66 813e6c00b0001800 72 0e"  # cmp dword [0x6c], 0x1800b0; jb 1f
        "66 c7066c0000000000 c606700001"  # mov dword [0x6c], 0; mov byte [0x70], 1
        "cd1c b020 e620 1f 58 cf"  # 1: int 0x1c; mov al, 0x20; out 0x20, al; pop ds; pop ax; iret
    ),
    # The vector lies on the stack. The service runs with the OUT; carry says that it wants to be asked again.
    SERVICE: bytes([0xE6, SERVICE_PORT])  # 2: out SERVICE_PORT, al
    + bytes.fromhex("72 04 83c402 cf")  # jc 3f; add sp, 2; iret
    # The write to port 0x80, which nobody has, is an exit with interrupts on: whatever the KVM, they are taken there.
    + bytes.fromhex("fb 90 e680 fa ebf1"),  # 3: sti; nop; out 0x80, al; cli; jmp 2b
    RESET: bytes.fromhex("ea 5be000f0"),  # jmp 0xf000:0xe05b
    POST: bytes.fromhex(
        "fa b08f e670 e471 8ae0"  # cli; mov al, 0x8f; out 0x70, al; in al, 0x71; mov ah, al
        "b08f e670 b000 e671"  # mov al, 0x8f; out 0x70, al; mov al, 0; out 0x71, al
        "80fc05 740b 80fc0a 740a"  # cmp ah, 5; je 1f; cmp ah, 0xa; je 2f
        "cd19 f4 ebfd 90"  # int 0x19; 3: hlt; jmp 3b; nop
        "b020 e620"  # 1: mov al, 0x20; out 0x20, al
        "31c0 8ed8 ff2e6704"  # 2: xor ax, ax; mov ds, ax; jmp far [0x467]
    ),
}


def _service_entry(vector: int) -> bytes:
    """Return the handler of a service: push the vector, go to the common part."""
    at = ENTRIES + ENTRY_SIZE * vector
    # push imm16; jmp rel16
    return b"\x68" + struct.pack("<H", vector) + b"\xe9" + struct.pack("<h", SERVICE - (at + 6))


def rom() -> dict[int, bytes]:
    """Return the contents of the firmware's segment, by offset."""
    contents = dict(HANDLERS)
    for vector in SERVICES:
        contents[ENTRIES + ENTRY_SIZE * vector] = _service_entry(vector)
    contents[DATE] = b"01/01/26"
    contents[MODEL] = bytes([PC_AT])
    return contents


def vectors() -> bytes:
    """Return the interrupt vector table."""
    offsets = [RETURN] * 256
    offsets[FIRST_IRQ_VECTOR : FIRST_IRQ_VECTOR + 8] = [FIRST_IRQ] * 8
    offsets[SECOND_IRQ_VECTOR : SECOND_IRQ_VECTOR + 8] = [SECOND_IRQ] * 8
    offsets[FIRST_IRQ_VECTOR] = TIMER
    for vector in SERVICES:
        offsets[vector] = ENTRIES + ENTRY_SIZE * vector
    return b"".join((SEGMENT << 16 | offset).to_bytes(4, "little") for offset in offsets)


def ticks_since_midnight() -> int:
    """Return what the count at 0040:006C is now, UTC: 1573040 ticks are a day."""
    return int(time.time() % 86400 * TICKS_PER_DAY / 86400)


def data_area() -> bytes:
    """Return the BIOS data area, 0040:0000 to 0040:00FF."""
    data = bytearray(0x100)
    for offset, format, value in (
        (0x00, "<H", serial.COM1_PORT),
        (0x0E, "<H", layout.EBDA >> 4),
        (0x10, "<H", 1 << 9 | 2 << 4 | 1 << 1),  # equipment: one serial port, 80 columns in colour, x87
        (0x13, "<H", layout.EBDA // KIB),
        (0x1A, "<H", 0x1E),  # keyboard buffer: head, tail
        (0x1C, "<H", 0x1E),
        (0x49, "<B", 3),  # video mode, columns, page size
        (0x4A, "<H", layout.TEXT_COLUMNS),
        (0x4C, "<H", 0x1000),
        (0x60, "<H", 0x0607),  # cursor's shape
        (0x63, "<H", 0x3D4),
        (0x6C, "<I", ticks_since_midnight()),
        (0x80, "<H", 0x1E),  # keyboard buffer: start, end
        (0x82, "<H", 0x3E),
        (0x84, "<B", layout.TEXT_ROWS - 1),
        (0x85, "<H", 16),  # scan lines a character
        (0x96, "<B", 1 << 4),  # 101 keys
    ):
        struct.pack_into(format, data, offset, value)
    return bytes(data)


def install(vm: api.Vm, memory: GuestMemory, *, pit: bool = True) -> None:
    """Write vectors, handlers and data areas, program the interrupt chips and, with *pit*, the timer."""
    for offset, code in rom().items():
        memory.write(layout.FIRMWARE + offset, code)
    memory.write(0, vectors())
    memory.write(layout.BIOS_DATA, data_area())
    memory.write(layout.EBDA, bytes([(layout.VIDEO_MEMORY - layout.EBDA) // KIB]))
    memory.write(layout.TEXT_SCREEN, b" \x07" * (layout.TEXT_COLUMNS * layout.TEXT_ROWS))
    for chip_id, base, mask in (
        (abi.KVM_IRQCHIP_PIC_MASTER, FIRST_IRQ_VECTOR, UNMASKED_FIRST),
        (abi.KVM_IRQCHIP_PIC_SLAVE, SECOND_IRQ_VECTOR, UNMASKED_SECOND),
    ):
        chip = vm.get_irqchip(chip_id)
        chip.chip.pic.irq_base = base
        chip.chip.pic.imr = mask
        chip.chip.pic.init4 = 1
        vm.set_irqchip(chip)
    if pit:
        state = vm.get_pit2()
        channel = state.channels[0]
        channel.mode = PIT_SQUARE_WAVE
        channel.rw_mode = channel.read_state = channel.write_state = PIT_LOW_HIGH
        channel.count = PIT_PERIOD
        channel.gate = 1
        vm.set_pit2(state)
