# SPDX-License-Identifier: Apache-2.0
"""What a machine says to arguments of other types, and to calls at the wrong time; how things show themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.machines import open_soft

from softkvm import abi, api
from softkvm.vmm.boards.pc import Pc
from softkvm.vmm.errors import ConfigError, StateError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB

POWER_OFF = bytes.fromhex("ba0406 b80034 ef f4ebfd")


@pytest.fixture
def kvm() -> Iterator[api.Kvm]:
    with open_soft() as opened:
        yield opened


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vcpus": "2"}, "vcpus='2': expected a number"),
        ({"vcpus": True}, "vcpus=True: expected a number"),
        ({"memory_size": "256M"}, "memory_size='256M': expected a number"),
        ({"memory_size": 2.5e8}, "memory_size=250000000.0: expected a number"),
        ({"devices": 5}, "devices=5: expected a function"),
        ({"cpuid": []}, r"cpuid=\[\]: expected a function"),
    ],
)
def test_configuration_of_other_types_is_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        Config(**fields)


def test_machine_names_arguments_of_other_types(kvm: Any) -> None:
    nothing: Any = 5
    with pytest.raises(TypeError, match=r"^kvm=5: expected an open KVM"):
        Machine(nothing)
    with pytest.raises(TypeError, match=r"^config=5: expected a Config"):
        Machine(kvm, nothing)
    with pytest.raises(TypeError, match=r"^console=5: expected a function"):
        Machine(kvm, console=nothing)
    with Machine(kvm, Config(32 * MIB)) as machine:
        with pytest.raises(TypeError, match=r"^kernel is of type str: expected bytes or a pathlib\.Path"):
            machine.load("bzImage")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^command_line=5: expected a str"):
            machine.load(b"x", None, nothing)


def test_calls_at_the_wrong_time_are_one_line(kvm: api.Kvm) -> None:
    machine = Machine(kvm, Config(32 * MIB))
    with pytest.raises(StateError, match="has not been started"):
        machine.wait()
    assert machine.stats()["wall_ns"] == 0
    machine.load(POWER_OFF, raw=True)
    machine.run(60)
    for call in (machine.start, machine.run, lambda: machine.load(POWER_OFF, raw=True)):
        with pytest.raises(StateError, match="has been started"):
            call()
    machine.close()
    machine.close()
    for call in (machine.start, machine.run, lambda: machine.load(POWER_OFF, raw=True)):
        with pytest.raises(StateError, match="is closed"):
            call()
    assert machine.wait().end.value == "power-off"  # what is known stays known


def test_machine_is_loaded_as_its_board_is() -> None:
    assert inspect.signature(Machine.load) == inspect.signature(Pc.load)
    documentation = inspect.getdoc(Machine.load) or ""
    assert documentation.startswith(inspect.getdoc(Pc.load) or "nothing")
    assert documentation.endswith("StateError if the machine is closed or has been started.")


def test_things_say_what_they_are(kvm: api.Kvm) -> None:
    with Machine(kvm, Config(32 * MIB, 2)) as machine:
        assert repr(machine) == "<Machine: 2 vCPUs, 32 MiB, not started>"
        # 32 MiB, and the firmware once more below 4 GiB
        assert repr(machine.vm) == "<softkvm.kvm.Vm: 2 vCPUs, 32832 KiB of memory, in-kernel chips>"
        assert repr(machine.vcpus[1].vcpu) == "<softkvm.kvm.Vcpu 1: at RIP 0xfff0>"
        assert "0x3f8 com1" in repr(machine.pio)
        vm = machine.vm
    assert repr(machine) == "<Machine: 2 vCPUs, 32 MiB, closed>"
    assert repr(vm) == "<softkvm.kvm.Vm: closed>"


@pytest.mark.parametrize(
    ("structure", "text"),
    [
        (abi.kvm_regs(rax=1, rip=0xFFF0), "kvm_regs(rax=1, rip=0xfff0)"),
        (abi.kvm_regs(), "kvm_regs()"),
        (abi.kvm_sregs(gdt=abi.kvm_dtable(base=0x500, limit=9)), "kvm_sregs(gdt=kvm_dtable(base=0x500, limit=9))"),
        (abi.kvm_irq_level(irq=4, level=1), "kvm_irq_level(irq=4, level=1)"),  # a union of four bytes
        (abi.kvm_run(exit_reason=2), "kvm_run(exit_reason=2)"),  # one that only the exit reason explains
        (abi.kvm_enable_cap(cap=3), "kvm_enable_cap(cap=3)"),
    ],
)
def test_structures_show_their_fields(structure: Any, text: str) -> None:
    assert repr(structure) == text


def test_long_arrays_are_cut_short() -> None:
    xsave = abi.kvm_xsave()
    xsave.region[0] = 0x37F
    assert repr(xsave) == "kvm_xsave(region=[0x37f, 0, 0, 0, 0, 0, 0, 0, …])"
