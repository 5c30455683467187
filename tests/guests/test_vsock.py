# SPDX-License-Identifier: Apache-2.0
"""Linux's own driver: what becomes of its sockets when the machine is restored, or gets another context ID."""

from __future__ import annotations

import contextlib

import pytest
from tests.support.guests import linux_guest
from tests.support.hops import hop
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.devices.virtio_vsock import VsockSpec
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.outcome import End
from softkvm.vsocktest.guest import Settings, archive

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

PORT = 1111


def test_a_restored_guests_connections_are_reset_and_new_ones_work() -> None:
    """Who reads has ECONNRESET, or then ENOTCONN; the context ID is that given last, and the guest connects again."""
    guest = linux_guest()
    console = Console()
    commands = (
        f"vsock_test --mode client --describe --control-vsock {PORT}; vsock_test --local-cid; "
        f"vsock_test --tell again --control-vsock {PORT}"
    )
    with open_soft() as kvm:
        machine = Machine(kvm, Config(device_specs=(VsockSpec(),)), console.output)
        try:
            initrd = guest.initrd.read_bytes() + archive(Settings())
            machine.load(guest.kernel, initrd, f'{guest.command_line} quiet softkvm.run="{commands}"')
            machine.vsock.cid = 77
            with contextlib.closing(machine.vsock.listen(PORT)) as listener:
                listener.settimeout(300)
                machine.start()
                waiting, (cid, _) = listener.accept()
                waiting.settimeout(60)
                assert cid == 77 and waiting.recv(6) == b"CASES "
                machine = hop(machine, kvm, console)
                with pytest.raises(ConnectionResetError):  # the one of the machine that is no more
                    while waiting.recv(4096):
                        pass
            with contextlib.closing(machine.vsock.listen(PORT)) as listener:
                listener.settimeout(300)
                told, (cid, _) = listener.accept()
                told.settimeout(60)
                assert cid == 77
                with told.makefile("rb") as lines:
                    assert lines.readline() == b"EXIT again\n"
                told.sendall(b"DONE\n")
            assert machine.wait(120).end is End.POWER_OFF
        finally:
            machine.close()
    errors = ("Connection reset by peer", "Transport endpoint is not connected")
    assert any(f"control connection: {error}" in console.text for error in errors), console.text
    assert "\n77\r" in console.text
