# SPDX-License-Identifier: Apache-2.0
"""All of a machine but its memory: taken while it stands, put into a new one that has never run.

Restoring checks before it changes anything that a running machine would notice: what is refused raises SnapshotError,
and the new machine is to be closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from softkvm.vmm.errors import SnapshotError, unexpected
from softkvm.vmm.snapshot.structures import field

if TYPE_CHECKING:
    from softkvm.vmm.boards import Saving
    from softkvm.vmm.machine import Machine

VERSION = 1
"""Of what :func:`save` returns; states of other versions are refused."""


def save(machine: Machine) -> dict[str, Any]:
    """Return the state of *machine*, which stands (:meth:`softkvm.vmm.pausing.Pausing.still`), as plain data.

    SnapshotError if it is asleep or about to be reset, or its guest runs guests.
    """
    if machine.changes:
        raise SnapshotError("the machine is asleep (S3) or being reset: expected one that runs")
    return {
        "version": VERSION,
        "devices": [device.save() for device in _added(machine)],
        "board": machine.board.save(),
        "hyperv": machine.hyperv.save(),
    }


def _added(machine: Machine) -> list[Saving]:
    """Return the devices that were added to the board's own, and that it does not know: those of virtio it does."""
    known = {id(transport.device) for transport in machine.board.virtio.transports.values()}
    return [device for device in machine.devices if id(device) not in known and hasattr(device, "save")]


def restore(machine: Machine, state: dict[str, Any], *, step_time: bool = True) -> None:
    """Put *state* into *machine*, which has the same configuration, and memory with its contents, and never ran.

    With *step_time* the guest's clocks have gone on meanwhile, else they go on where they were. SnapshotError for
    another processor, and for anything that this KVM, or a device, does not take.
    """
    with _refusing():
        if field(state, "version", int) != VERSION:
            raise SnapshotError(f"state of version {state['version']}, expected {VERSION}")
        hyperv = field(state, "hyperv", dict)
        added, states = _added(machine), field(state, "devices", list)
        if len(added) != len(states):
            raise SnapshotError(f"state of {len(states)} devices besides the board's, expected {len(added)}")
        machine.board.restore(field(state, "board", dict), step_time=step_time)
        for device, its in zip(added, states, strict=True):
            device.restore(its)
        machine.hyperv.restore(hyperv)
        machine.board.was_stopped()


@contextmanager
def _refusing() -> Iterator[None]:
    """Make SnapshotError of what a device raises for a state that is none of its."""
    try:
        yield
    except SnapshotError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        raise SnapshotError(f"not a state of this machine: {unexpected(error)}") from error
