# SPDX-License-Identifier: Apache-2.0
"""The keyboard controller as Linux's i8042 driver probes it."""

from softkvm.vmm.devices.i8042 import I8042, SystemControlPortA

DATA, COMMAND = 0, 4
OBF, AUX, TIMEOUT = 0x01, 0x20, 0x40


def test_pulsing_the_reset_line_resets() -> None:
    resets: list[int] = []
    controller = I8042(lambda: resets.append(1))
    controller.write(COMMAND, 1, 0xFF)  # pulses nothing
    assert resets == []
    controller.write(COMMAND, 1, 0xFE)
    assert resets == [1]


def test_output_port_bit_0_resets_and_a20_does_not() -> None:
    resets: list[int] = []
    controller = I8042(lambda: resets.append(1))
    controller.write(COMMAND, 1, 0xD1)
    controller.write(DATA, 1, 0xDF)
    assert resets == []
    controller.write(COMMAND, 1, 0xD1)
    controller.write(DATA, 1, 0xDE)
    assert resets == [1]


def test_status_is_idle_at_reset() -> None:
    controller = I8042()
    assert controller.read(COMMAND) & 0x03 == 0  # neither buffer full


def test_self_test_and_interface_test_pass() -> None:
    controller = I8042()
    for command, answer in ((0xAA, 0x55), (0xAB, 0x00)):
        controller.write(COMMAND, 1, command)
        assert controller.read(COMMAND) & OBF
        assert controller.read(DATA) == answer
        assert not controller.read(COMMAND) & OBF


def test_command_byte_reads_back() -> None:
    controller = I8042()
    controller.write(COMMAND, 1, 0x60)
    controller.write(DATA, 1, 0x45)
    controller.write(COMMAND, 1, 0x20)
    assert controller.read(DATA) == 0x45


def test_keyboard_disable_and_enable_show_in_the_command_byte() -> None:
    controller = I8042()
    for command, bit in ((0xAD, 0x10), (0xAE, 0x00)):
        controller.write(COMMAND, 1, command)
        controller.write(COMMAND, 1, 0x20)
        assert controller.read(DATA) & 0x10 == bit


def test_linux_finds_no_auxiliary_port() -> None:
    # i8042_check_aux(): the looped byte comes back as the keyboard's, and the port test fails with 1..0xF9.
    controller = I8042()
    controller.write(COMMAND, 1, 0xD3)
    controller.write(DATA, 1, 0x5A)
    assert controller.read(COMMAND) & (OBF | AUX) == OBF
    assert controller.read(DATA) == 0x5A
    controller.write(COMMAND, 1, 0xA9)
    assert controller.read(DATA) not in (0x00, 0xFA, 0xFF)


def test_a_byte_to_the_absent_keyboard_times_out_at_once_with_an_interrupt() -> None:
    levels: list[int] = []
    controller = I8042(set_irq=levels.append)
    controller.write(COMMAND, 1, 0x60)
    controller.write(DATA, 1, 0x01)  # keyboard interrupt on
    controller.write(DATA, 1, 0xF2)  # identify
    assert levels == [1]
    assert controller.read(COMMAND) & (OBF | TIMEOUT) == OBF | TIMEOUT
    assert controller.read(DATA) == 0xFE
    assert levels == [1, 0]


def test_answers_are_bounded_however_much_a_guest_asks() -> None:
    controller = I8042()
    for _ in range(10_000):
        controller.write(COMMAND, 1, 0xAA)
    count = 0
    while controller.read(COMMAND) & OBF:
        controller.read(DATA)
        count += 1
    assert count <= 16


def test_save_and_restore() -> None:
    controller = I8042()
    controller.write(COMMAND, 1, 0x60)
    state = controller.save()
    other = I8042()
    other.restore(state)
    other.write(DATA, 1, 0x33)
    other.write(COMMAND, 1, 0x20)
    assert other.read(DATA) == 0x33


def test_port_92_resets_when_bit_0_rises_and_a20_is_storage() -> None:
    """As Linux opens A20 (arch/x86/boot/a20.c, enable_a20_fast): bit 1 set, bit 0 never."""
    calls: list[str] = []
    port = SystemControlPortA(lambda: calls.append("reset"))
    assert port.read(0) == 0x02
    port.write(0, 1, port.read(0) | 0x02 & ~0x01)
    port.write(0, 1, 0)
    assert (calls, port.read(0)) == ([], 0)
    port.write(0, 1, 1)
    port.write(0, 1, 1)
    assert calls == ["reset"]
    other = SystemControlPortA()
    other.restore(port.save())
    assert other.read(0) == 1
