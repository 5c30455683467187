# SPDX-License-Identifier: Apache-2.0
"""Powering off as Pintos does (devices/shutdown.c): 0x2000 to 0xB004, then "Shutdown" to 0x8900."""

from softkvm.vmm.devices.shutdown_ports import OldPm1Control, ShutdownPort


def test_old_register_powers_off_by_sleep_type_0_alone() -> None:
    calls: list[str] = []
    register = OldPm1Control(lambda: calls.append("off"))
    for value in (0, 0x2400, 0x3400, 0x0FFF):
        register.write(0, 2, value)
    register.write(0, 1, 0x20)  # the low byte
    assert calls == []
    register.write(0, 2, 0x2000)
    register.write(1, 1, 0x20)
    assert calls == ["off", "off"]
    assert register.read(0, 2) == 0xFFFF


def test_shutdown_is_spelled_without_a_mistake() -> None:
    calls: list[str] = []
    port = ShutdownPort(lambda: calls.append("off"))

    def write(text: bytes) -> None:
        for byte in text:
            port.write(0, 1, byte)

    write(b"shutdown Shut down Shutdow")
    assert calls == []
    write(b"SShut")
    other = ShutdownPort(lambda: calls.append("other"))
    other.restore(port.save())
    port = other
    write(b"down")
    assert calls == ["other"]
    assert port.read(0, 1) == 0xFF
