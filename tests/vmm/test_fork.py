# SPDX-License-Identifier: Apache-2.0
"""A forked child closes the machine that it inherited, and its parent's runs on."""

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.support.forks import in_child
from tests.support.machines import KVMS

from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End, Outcome


@pytest.fixture(params=sorted(KVMS))
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine that sends a byte to COM1 and spins."""
    with KVMS[request.param]() as kvm, Machine(kvm, Config(32 * MIB, 2), console=lambda _: None) as machine:
        machine.load(bytes.fromhex("baf803 b041 ee ebfe"), raw=True)
        yield machine


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="forked") as caught:
        call()
    assert caught.value.errno == errno.EIO


def test_a_child_closes_a_machine_that_runs_and_the_parents_runs_on(machine: Machine) -> None:
    machine.start()
    in_child(machine.close, machine.close)
    in_child(lambda: refused(machine.start), lambda: refused(machine.wait), machine.close)
    in_child(lambda: machine.end(Outcome(End.STOPPED)), machine.close)
    assert not machine.ended.is_set()
    assert [thread.vcpu.kvm_run.immediate_exit for thread in machine.vcpus] == [0, 0]
    machine.end(Outcome(End.STOPPED))
    assert machine.wait(20).end is End.STOPPED


def test_locks_that_the_parents_threads_hold_keep_no_child(machine: Machine) -> None:
    machine.start()
    board = machine.board
    with ExitStack() as stack:
        # Held at the fork by the only thread that is left: as good as by one that is not.
        for lock in (machine._end_lock, board.serial._lock, board.cmos._lock, board.acpi_pm._lock):
            stack.enter_context(lock)
        in_child(machine.close)
    assert not machine.ended.is_set()
