# SPDX-License-Identifier: Apache-2.0
"""A whole machine is saved, put into another one, and goes on there as if nothing had been."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.guests import demo_image
from tests.support.hops import hop, timeless
from tests.support.machines import KVMS, open_soft

from softkvm import abi, api
from softkvm.vmm.console import Console
from softkvm.vmm.errors import SnapshotError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End
from softkvm.vmm.snapshot import encoding, state

POWER_OFF = bytes.fromhex("ba0406 b80034 ef")  # S5 by port 0x604


def compute(rounds: int) -> tuple[bytes, int]:
    """Code in real mode, and what it prints: four bytes, a linear congruential generator's after so many rounds."""
    loop = bytes.fromhex("6669c00d661900 66055ff36e3c 6649 75ef")
    code = (
        bytes.fromhex("66b801000000 66b9")
        + struct.pack("<I", rounds)
        + loop
        + bytes.fromhex("baf803") + bytes.fromhex("ee 66c1e808") * 4  # out dx, al; shr eax, 8
        + POWER_OFF
        + bytes.fromhex("fa f4")
    )  # fmt: skip
    value = 1
    for _ in range(rounds):
        value = (value * 1664525 + 1013904223) & 0xFFFF_FFFF
    return code, value


@pytest.fixture(params=sorted(KVMS))
def kvm(request: pytest.FixtureRequest) -> Iterator[api.Kvm]:
    with KVMS[request.param]() as opened:
        yield opened


@pytest.fixture(scope="module")
def soft() -> Iterator[api.Kvm]:
    with open_soft() as opened:
        yield opened


def test_a_guest_that_computes_has_the_same_result(kvm: api.Kvm) -> None:
    code, value = compute(3_000_000)
    console = Console()
    machine = Machine(kvm, Config(32 * MIB), console.output)
    machine.load(code, raw=True)
    machine.start()
    hops = 0
    while not machine.ended.wait(0.02) and hops < 6:
        machine = hop(machine, kvm, console)
        hops += 1
    assert machine.wait(60).end is End.POWER_OFF
    machine.close()
    assert bytes(console._data) == struct.pack("<I", value)


@pytest.mark.guest
@pytest.mark.parametrize("vcpus", [1, 3])
def test_demonstration_guest_goes_on_with_timers_and_interrupts(soft: api.Kvm, vcpus: int) -> None:
    console = Console()
    machine = Machine(soft, Config(64 * MIB, vcpus), console.output)
    console.attach(machine)
    machine.load(demo_image())
    machine.start()
    console.expect("> ", 60)
    ticks = []
    try:
        for _ in range(4):
            machine = hop(machine, soft, console)
            time.sleep(0.1)
            console.send("irq\r")
            timer, _ipi, serial = map(int, console.expect(r"^0 +(\d+) +(\d+) +(\d+)", 20).groups())
            ticks.append((timer, serial))
        console.send("poweroff\r")
        assert machine.wait(30).end is End.POWER_OFF
    finally:
        machine.close()
    assert ticks == sorted(ticks)
    assert ticks[0][0] < ticks[-1][0]  # the timer's interrupts go on
    assert ticks[0][1] < ticks[-1][1]


# -- the state


def registers(values: random.Random, machine: Machine) -> None:
    """Give every register that is saved some value that it may have."""
    for thread in machine.vcpus:
        vcpu = thread.vcpu
        regs = vcpu.get_regs()
        for name, _ in regs._fields_:  # type: ignore[misc]
            setattr(regs, name, values.getrandbits(64))
        regs.rflags = regs.rflags & 0x3F7FD5 & ~(1 << 17) | 2
        regs.rip &= 0xFFFF
        vcpu.set_regs(regs)
        xsave = vcpu.get_xsave()
        area = memoryview(xsave.region).cast("B")
        area[32:416] = values.randbytes(384)
        for register in range(8):  # an 80-bit register in 16 bytes
            area[32 + 16 * register + 10 : 32 + 16 * register + 16] = bytes(6)
        area[512] |= 3
        vcpu.set_xsave(xsave)
        debugregs = vcpu.get_debugregs()
        for index in range(4):
            debugregs.db[index] = values.getrandbits(47)
        vcpu.set_debugregs(debugregs)
        sregs = vcpu.get_sregs()
        for name in ("ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.selector = values.getrandbits(16)
            segment.base = segment.selector << 4
        sregs.idt.base, sregs.idt.limit = values.getrandbits(47), values.getrandbits(16)
        sregs.cr2 = values.getrandbits(64)
        vcpu.set_sregs(sregs)
        linear = (0xC000_0082, 0xC000_0083, 0xC000_0102, 0x175, 0x176)
        msrs = {index: values.getrandbits(47) for index in linear} | {
            0xC000_0081: values.getrandbits(64),
            0xC000_0084: values.getrandbits(32),
            0xC000_0103: values.getrandbits(32),
            0x174: values.getrandbits(16),
            0x200: values.getrandbits(12) << 12 | 6,
            0x201: values.getrandbits(12) << 12 | 1 << 11,
        }
        assert vcpu.set_msrs(msrs) == len(msrs)
        events = vcpu.get_vcpu_events()
        events.nmi.pending = values.getrandbits(1)
        events.nmi.masked = values.getrandbits(1)
        events.interrupt.shadow = 1 if values.getrandbits(1) else 0
        vcpu.set_vcpu_events(events)
        lapic = vcpu.get_lapic()
        area = memoryview(lapic.regs).cast("B")
        for vector in values.sample(range(32, 256), 5):
            area[0x200 + vector // 32 * 16 + vector % 32 // 8] |= 1 << vector % 8
        area[0x320:0x324] = (1 << 16 | values.getrandbits(8)).to_bytes(4, "little")
        vcpu.set_lapic(lapic)


@given(seed=st.integers(0, 1 << 32), vcpus=st.integers(1, 3), hyperv=st.booleans())
@settings(max_examples=10)
def test_what_was_restored_is_saved_again_as_it_was(seed: int, vcpus: int, hyperv: bool) -> None:
    values = random.Random(seed)
    with open_soft() as soft:
        config = Config(32 * MIB, vcpus, hyperv=hyperv)
        with Machine(soft, config) as machine, Machine(soft, config) as other:
            registers(values, machine)
            machine.vm.irq_line(values.choice((3, 5, 6, 7)), 1)  # a line of no device's
            saved = state.save(machine)
            data = encoding.encode(saved)
            state.restore(other, encoding.decode(data), step_time=False)
            assert timeless(state.save(other)) == timeless(encoding.decode(data))


@pytest.mark.parametrize("step", [True, False])
def test_the_guests_clocks_go_on_together_or_stand(soft: api.Kvm, step: bool) -> None:
    """KVM_CLOCK_REALTIME: what has passed meanwhile has passed for kvmclock and for the counter alike."""
    passed_ns = 3_600_000_000_000
    with Machine(soft, Config(32 * MIB, 2)) as machine, Machine(soft, Config(32 * MIB, 2)) as other:
        saved = state.save(machine)
        clock = abi.kvm_clock_data.from_buffer_copy(saved["board"]["clock"])
        clock.realtime -= passed_ns
        saved["board"]["clock"] = bytes(clock)
        state.restore(other, saved, step_time=step)
        now = other.vm.get_clock()
        tsc = [thread.vcpu.get_msrs([0x10])[0] for thread in other.vcpus]
        khz = other.vcpus[0].vcpu.get_tsc_khz()
    moved_ns = now.clock - clock.clock
    assert moved_ns - (passed_ns if step else 0) < 60_000_000_000
    before = dict(map(tuple, saved["board"]["vcpus"][0]["msrs"]))[0x10]
    for value in tsc:
        assert abs((value - before) * 1_000_000 // khz - moved_ns) < 60_000_000_000


def test_the_guest_is_told_that_it_was_stopped(soft: api.Kvm) -> None:
    """KVM_KVMCLOCK_CTRL: the flag is in its clock's structure with the next entry."""
    spin = bytes.fromhex("ebfe")
    with Machine(soft, Config(32 * MIB)) as machine:
        machine.load(spin, raw=True)
        machine.vcpus[0].vcpu.set_msrs({0x4B564D01: 0x10_0001})
        saved, memory = state.save(machine), bytes(machine.memory.view)
    with Machine(soft, Config(32 * MIB)) as machine:
        machine.memory.view[:] = memory
        state.restore(machine, saved)
        machine.start()
        deadline = time.monotonic() + 20
        while not machine.memory.read(0x10_0000 + 29, 1)[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert machine.memory.read(0x10_0000 + 29, 1)[0] & 2  # PVCLOCK_GUEST_STOPPED


# -- what is refused


def changed(saved: dict[str, Any], *path: str | int, to: object) -> dict[str, Any]:
    """A copy of a state with one value changed."""
    copy: dict[str, Any] = encoding.decode(encoding.encode(saved))
    place: Any = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return copy


@pytest.mark.parametrize(
    ("path", "to", "why"),
    [
        (("version",), 99, "state of version 99"),
        (("board", "cpuid"), [], "state of 0 vCPUs"),
        (("board", "cpuid", 0), [], "another processor"),
        (("board", "vcpus"), [], "state of 0 vCPUs"),
        (("board", "vcpus", 0), {}, "tsc_khz"),
        (("board", "vcpus", 0, "regs"), b"short", "kvm_regs: 5 bytes, expected 144 bytes"),
        (("board", "vcpus", 0, "msrs"), [[0xC0000080, 1 << 70]], "there is no such register"),
        (("board", "vcpus", 0, "msrs"), [[0x123456, 7]], "MSR 0x123456: this KVM does not take 0x7"),
        (("board", "vcpus", 0, "tsc_khz"), -5, "-5 kHz"),
        (("board", "vcpus", 0, "mp_state"), b"\x63\0\0\0", "mp_state"),
        (("board", "chips", "ioapic"), bytes(520), "chip 0, expected 2"),
        (("board", "clock"), b"", "kvm_clock_data"),
        (("board", "devices"), {"toaster": {}}, "toaster"),
        (("board", "devices", "com1"), {}, "not a state of this machine"),
        (("board", "devices", "hpet", "comparators"), 7, "not a state of this machine"),
        (("hyperv",), None, "hyperv"),
    ],
)
def test_a_state_of_something_else_is_refused_with_the_reason(
    soft: api.Kvm, path: tuple[str | int, ...], to: object, why: str
) -> None:
    with Machine(soft, Config(32 * MIB)) as machine, Machine(soft, Config(32 * MIB)) as other:
        saved = state.save(machine)
        with pytest.raises(SnapshotError, match=why):
            state.restore(other, changed(saved, *path, to=to))


def test_another_processor_is_refused_with_the_leaf(soft: api.Kvm) -> None:
    def without_aes(entries: list[abi.kvm_cpuid_entry2]) -> list[abi.kvm_cpuid_entry2]:
        for entry in entries:
            if entry.function == 1:
                entry.ecx &= ~(1 << 25)
        return entries

    config = Config(32 * MIB, cpuid=without_aes)
    refused = pytest.raises(SnapshotError, match=r"another processor: CPUID leaf 0x1\.0 was .* \(vCPU 0\)")
    with Machine(soft, Config(32 * MIB)) as machine, Machine(soft, config) as other, refused:
        state.restore(other, state.save(machine))


def test_a_machine_that_is_asleep_is_not_saved(soft: api.Kvm) -> None:
    """S3: its threads wait for a wake-up, which is no state of KVM's."""
    enter_s3 = bytes.fromhex("ba0406 b80024 ef ebfe")  # SLP_EN, sleep type 1
    with Machine(soft, Config(32 * MIB)) as machine:
        machine.load(enter_s3, raw=True)
        machine.start()
        deadline = time.monotonic() + 20
        while not machine.changes and time.monotonic() < deadline:
            time.sleep(0.01)
        with machine.pausing.still(), pytest.raises(SnapshotError, match="asleep"):
            state.save(machine)
