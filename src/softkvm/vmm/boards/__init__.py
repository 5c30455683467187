# SPDX-License-Identifier: Apache-2.0
"""Boards: what a machine is made of. One module each; :class:`Board` is what the machine's life asks of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from softkvm import api
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.pausing import Pausable


class Saving(Protocol):
    """A device whose state can be taken and put back."""

    def save(self) -> dict[str, Any]:
        """Return the state, plain data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""


class Board(Protocol):
    """Memory map, interrupt chips, devices, boot protocols and description tables of one kind of machine.

    Its ``load`` puts an image into memory and the first processor to its entry; what that takes is the board's own.
    """

    memory: GuestMemory
    parts: list[Pausable]
    """Devices that do something by themselves."""

    def create_vcpus(self, kvm: api.Kvm) -> Iterable[api.Vcpu]:
        """Make the processors, in the state that the board's reset leaves them in."""

    def built(self) -> None:
        """All parts, those of ``Config.devices`` too, are there."""

    def where(self, vcpu: api.Vcpu) -> str:
        """Say where a vCPU is, for a message that it stands in; empty if that isn't known."""

    def halted_for_good(self) -> bool:
        """Whether no interrupt that there can be wakes any processor; none of them is in KVM_RUN meanwhile."""

    def was_stopped(self) -> None:
        """The machine has stood still and goes on: tell it, where it has a way to know; its processors stand yet."""

    def reset(self) -> None:
        """Begin anew: every part as it is built, the image loaded again; the processors stand."""

    def press_power_button(self) -> None:
        """Ask the guest to shut down."""

    def save(self) -> dict[str, Any]:
        """The state of all but memory, as plain data; the machine stands."""

    def restore(self, state: dict[str, Any], *, step_time: bool) -> None:
        """Take over a state; SnapshotError for that of another machine. *step_time*: clocks have gone on meanwhile."""

    def files(self) -> Iterable[str]:
        """The files that its devices have open, whose contents belong to the machine's state."""

    def let_go_of_files(self) -> None:
        """The machine stands, and may go on in another process, which is to have them now."""

    def take_files_back(self) -> None:
        """It goes on here, after all."""

    def new_identity(self, number: int) -> None:
        """The machine, which was restored, may not be the only one with its past: it is clone *number*, or 0."""

    def flush(self) -> None:
        """The machine stands: write out what devices hold back."""
