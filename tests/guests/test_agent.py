# SPDX-License-Identifier: Apache-2.0
"""The agent of the default guest, over vsock."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm.vmm.console import Console
from softkvm.vmm.devices import virtio_vsock
from softkvm.vmm.guest.agent import Agent, AgentError, GuestOSError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

BOOT_S = 240
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"


def test_programs_and_files_in_the_guest(capsys: pytest.CaptureFixture[str]) -> None:
    guest = linux_guest()
    console = Console()
    config = Config(256 * MIB, 2, device_specs=(virtio_vsock.parse(""),))
    with open_soft() as kvm, Machine(kvm, config, console.output) as machine:
        console.attach(machine)
        machine.load(guest.kernel, guest.initrd, guest.command_line)
        machine.start()
        agent = Agent(machine.vsock.connect)
        assert agent.wait(BOOT_S) == 1
        assert agent.run(["cat", "/etc/hostname"]).stdout == b"softkvm\n"
        data = os.urandom(1 << 20)
        agent.put("/tmp/data", data, 0o600)
        assert agent.get("/tmp/data") == data
        assert agent.run(["cat"], data, timeout_s=BOOT_S).stdout == data
        with pytest.raises(GuestOSError, match="No such file"):
            agent.run(["/no/such/program"])
        found: dict[int, bytes] = {}

        def work(number: int) -> None:
            found[number] = agent.run(["echo", str(number)], timeout_s=BOOT_S).stdout

        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOOT_S)
        assert found == {number: f"{number}\n".encode() for number in range(5)}
        with agent.start(["sleep", "1000"]) as session:
            assert agent.run(["kill", "-9", str(session.process)]).status == 0
            assert session.serve(lambda data: None, lambda data: None, BOOT_S).status == 137
        assert agent.run(["sh", "-c", "ps | grep -c 'sleep 1[0]00'"]).stdout == b"0\n"
        (example,) = re.findall(r"```python\n(from softkvm.vmm.guest.agent.*?)```", GUIDE.read_text(), re.DOTALL)
        exec(compile(example, "docs/guide.md", "exec"), {"machine": machine})
        assert capsys.readouterr().out == "3 b'hello'\n"
        assert machine.wait(BOOT_S).end is End.POWER_OFF
        with pytest.raises(AgentError):
            agent.run(["true"])
