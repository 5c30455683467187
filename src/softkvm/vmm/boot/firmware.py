# SPDX-License-Identifier: Apache-2.0
"""What a PC's firmware leaves behind for programs that go back to real mode: interrupt vectors, i8259s, i8254.

The interrupt chips come up programmed as the IBM PC AT's BIOS did: IRQ 0 to 7 at vectors 8 to 0xF, IRQ 8 to 15 at
0x70 to 0x77, the timer ticking 18.2 times a second, its interrupt unmasked. Every vector has a handler: those of
interrupts acknowledge, IRQ 0 counts ticks at 0040:006C, all others return at once. There are no BIOS services.

Source: IBM PC AT Technical Reference, "System BIOS" (vectors, timer tick count); Intel 8259A and 8254 data sheets.
"""

from __future__ import annotations

from softkvm import abi, api
from softkvm.vmm.boot import layout
from softkvm.vmm.memory import GuestMemory

FIRST_IRQ_VECTOR = 0x08
SECOND_IRQ_VECTOR = 0x70
UNMASKED_FIRST = ~(1 << 0 | 1 << 2) & 0xFF  # the timer and the cascade
UNMASKED_SECOND = 0xFF
PIT_SQUARE_WAVE = 3
PIT_LOW_HIGH = 3
PIT_PERIOD = 0x10000

SEGMENT = layout.FIRMWARE >> 4
RETURN = 0x00
FIRST_IRQ = 0x10
SECOND_IRQ = 0x20
TIMER = 0x30

HANDLERS: dict[int, bytes] = {
    RETURN: bytes.fromhex("cf"),  # iret
    # push ax; mov al, 0x20; out 0x20, al; pop ax; iret
    FIRST_IRQ: bytes.fromhex("50 b0 20 e6 20 58 cf"),
    # push ax; mov al, 0x20; out 0xa0, al; out 0x20, al; pop ax; iret
    SECOND_IRQ: bytes.fromhex("50 b0 20 e6 a0 e6 20 58 cf"),
    # push ax; push ds; mov ax, 0x40; mov ds, ax; inc dword [0x6c]; mov al, 0x20; out 0x20, al; pop ds; pop ax; iret
    TIMER: bytes.fromhex("50 1e b8 40 00 8e d8 66 ff 06 6c 00 b0 20 e6 20 1f 58 cf"),
}


def install(vm: api.Vm, memory: GuestMemory, *, pit: bool = True) -> None:
    """Write vectors and handlers, program the interrupt chips and, with *pit*, the timer."""
    for offset, code in HANDLERS.items():
        memory.write(layout.FIRMWARE + offset, code)
    vectors = [RETURN] * 256
    vectors[FIRST_IRQ_VECTOR : FIRST_IRQ_VECTOR + 8] = [FIRST_IRQ] * 8
    vectors[SECOND_IRQ_VECTOR : SECOND_IRQ_VECTOR + 8] = [SECOND_IRQ] * 8
    vectors[FIRST_IRQ_VECTOR] = TIMER
    table = b"".join((SEGMENT << 16 | offset).to_bytes(4, "little") for offset in vectors)
    memory.write(0, table)
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
