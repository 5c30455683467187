# SPDX-License-Identifier: Apache-2.0
"""What a watchdog does to a machine whose guest has not reloaded it in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from softkvm.vmm.devices.i6300esb import I6300Esb
from softkvm.vmm.devices.spec import Words
from softkvm.vmm.errors import complain
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

I6300ESB: Final = "i6300esb"
WATCHDOG: Final = "watchdog"


def _reset(machine: Machine) -> None:
    """The guest finds out who it was, if the machine begins anew."""
    machine.reset_by_guest(Outcome(End.RESET, WATCHDOG))


def _power_off(machine: Machine) -> None:
    machine.end(Outcome(End.POWER_OFF, WATCHDOG))


def _pause(machine: Machine) -> None:
    complain("the watchdog has expired: the machine is paused")
    machine.pausing.pause_soon()


def _none(machine: Machine) -> None:
    """The guest finds the watchdog's status."""


def _debug(machine: Machine) -> None:
    complain("the watchdog has expired: the guest goes on")


def _inject_nmi(machine: Machine) -> None:
    """An NMI to every processor, which takes it before it goes on in its guest."""
    for thread in machine.vcpus:
        thread.vcpu.call_soon(thread.vcpu.nmi)


ACTIONS: Final[dict[str, Callable[[Machine], None]]] = {
    "reset": _reset,
    "poweroff": _power_off,
    "pause": _pause,
    "none": _none,
    "debug": _debug,
    "inject-nmi": _inject_nmi,
}
"""By the names that QEMU has for them."""


@dataclass(frozen=True, slots=True)
class WatchdogSpec:
    """``--watchdog``."""

    action: str = "reset"

    def attach(self, machine: Machine) -> I6300Esb:
        """Make the device."""
        act = ACTIONS[self.action]
        device = machine.board.add_function(lambda address: I6300Esb(lambda: act(machine), address))
        machine.on_close(device.close)
        machine.pausing.parts.append(device)
        machine.resets.append(device.reset)
        machine.board.wakers.append(lambda: device.running)
        return device


def parse(text: str) -> WatchdogSpec:
    """Read ``--watchdog``'s text: ``i6300esb[,action=ACTION]``."""
    words = Words.of("--watchdog", text)
    if words.first != I6300ESB:
        raise words.error(f"expected {I6300ESB}, the one watchdog that there is")
    spec = WatchdogSpec(words.choice("action", tuple(ACTIONS), "reset"))
    words.end()
    return spec
