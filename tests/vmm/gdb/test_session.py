# SPDX-License-Identifier: Apache-2.0
"""The stub, packet by packet (gdb's manual, E.2 to E.4), on 16-bit programs."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.machines import KVMS, open_soft
from tests.support.stub import CODE, Client, connect, stub, tiny_machine

from softkvm import abi
from softkvm.vmm.debug.debugger import Debugger
from softkvm.vmm.debug.registers import AVX, CORE, SSE, Registers
from softkvm.vmm.errors import StateError
from softkvm.vmm.gdb import description
from softkvm.vmm.gdb.packets import PACKET_BYTES
from softkvm.vmm.gdb.server import GdbServer
from softkvm.vmm.gdb.session import Session
from softkvm.vmm.machine import Machine
from softkvm.vmm.outcome import End

KINDS = [
    *("m", "M", "X", "Z0,", "Z2,", "z1,", "P", "p", "G", "H", "T", "vCont;", "qRcmd,", "Qqemu.sstep="),
    *("qXfer:features:read:target.xml:", "qXfer:threads:read::", "qThreadExtraInfo,"),
]
NUMBERS = {register.name: number for number, register in enumerate(CORE + SSE)}


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[tuple[Machine, GdbServer, Client]]:
    """A machine with the program that the test names (``90 eb fd``: NOP, back to it), and a client of its stub."""
    code, vcpus = getattr(request, "param", ("90ebfd", 1))
    with tiny_machine(open_soft(), code, vcpus=vcpus) as machine, stub(machine) as server, Client(server) as client:
        if vcpus > 1:
            second = machine.vcpus[1].vcpu
            second.set_sregs(machine.vcpus[0].vcpu.get_sregs())
            second.set_regs(machine.vcpus[0].vcpu.get_regs())
            second.set_mp_state(abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))
        machine.start()
        yield machine, server, client


def program(code: str, vcpus: int = 1) -> pytest.MarkDecorator:
    """Names the program of :func:`target`."""
    return pytest.mark.parametrize("target", [(code.replace(" ", ""), vcpus)], indirect=True, ids=[code])


Target = tuple[Machine, GdbServer, Client]


def register(client: Client, name: str) -> int:
    """A register by ``p``."""
    return int.from_bytes(bytes.fromhex(client.ask(f"p{NUMBERS[name]:x}")), "little")


def test_a_register_is_read_alone_and_with_all_and_written_either_way(target: Target) -> None:
    client = target[2]
    whole = client.ask("g")
    assert len(whole) == 2 * sum(part.size for part in CORE + SSE)
    assert register(client, "rip") == CODE
    assert client.ask(f"P{NUMBERS['rbx']:x}=efbeadde00000000") == "OK"
    assert register(client, "rbx") == 0xDEADBEEF
    assert client.ask(f"P{NUMBERS['xmm3']:x}={bytes(range(16)).hex()}") == "OK"
    assert register(client, "xmm3") == int.from_bytes(bytes(range(16)), "little")
    assert client.ask(f"P{NUMBERS['st2']:x}={bytes(range(10)).hex()}") == "OK"
    assert register(client, "st2") == int.from_bytes(bytes(range(10)), "little")
    assert client.ask("G" + whole) == "OK"
    assert client.ask("g") == whole


@pytest.mark.parametrize("name", ["eflags", "fs_base", "k_gs_base", "cr2", "cr8", "mxcsr", "ds", "fctrl"])
def test_system_registers_are_written(target: Target, name: str) -> None:
    value = {"eflags": 0x246, "mxcsr": 0x1FA0, "fctrl": 0x27F, "cr8": 5}.get(name, 0x1230)
    size = (CORE + SSE)[NUMBERS[name]].size
    assert target[2].ask(f"P{NUMBERS[name]:x}={value.to_bytes(size, 'little').hex()}") == "OK"
    assert register(target[2], name) == value
    assert Registers(target[0].vcpus[0].vcpu)[name] == value, "KVM has it, too"


def test_what_kvm_refuses_is_an_error_and_changes_nothing(target: Target) -> None:
    before = target[2].ask("g")
    assert target[2].ask(f"P{NUMBERS['cr4']:x}=ffffffffffffffff") == "E16"
    assert target[2].ask("g") == before


def test_a_selector_in_real_mode_brings_its_base_along(target: Target) -> None:
    assert target[2].ask(f"P{NUMBERS['es']:x}=34120000") == "OK"
    assert target[0].vcpus[0].vcpu.get_sregs().es.base == 0x12340


def test_memory_is_read_and_written_and_what_is_none_is_an_error(target: Target) -> None:
    machine, _, client = target
    assert client.ask("m1000,3") == "90ebfd"
    assert client.ask("M1ffe,4:01020304") == "OK"
    assert client.ask("m1ffe,4") == "01020304"
    assert client.ask(b"X2ffe,4:" + b"}\x03}\x04}\x0a#"[:6] + b"}\x5d") == "OK"
    assert machine.memory.read(0x2FFE, 4) == b"#$*}"
    assert client.ask("mfec00000,4") == "E0e"
    assert client.ask("Mfec00000,1:00") == "E0e"
    assert client.ask("m1fffffe,8") == "0000", "as much as there is, up to the end of its page"
    assert client.ask("mffffffffffffffff,2") == "E0e"


def test_sizes_that_are_none_of_memorys_are_cut_or_refused(target: Target) -> None:
    client = target[2]
    assert len(client.ask("m0,ffffffffffffffff")) == PACKET_BYTES
    assert client.ask("M0,4:00") == "E16"
    assert client.ask("m0") == "E16"
    assert client.ask("mx,1") == "E16"
    assert client.ask("m11111111111111111,1") == "E16"


def test_a_software_breakpoint_is_an_int3_while_the_guest_runs(target: Target) -> None:
    machine, _, client = target
    assert client.ask("M1100,2:9041") == "OK"
    assert client.ask("Z0,1100,1") == client.ask("Z0,1100,1") == "OK"
    assert client.ask("m10ff,4") == "00904100"
    assert client.ask("M1100,1:40") == "OK"
    client.send(b"c")
    time.sleep(0.1)
    assert machine.memory.read(0x1100, 2) == b"\xcc\x41"
    with machine.pausing.still():
        assert machine.memory.read(0x1100, 2) == b"\x40\x41", "who copies a machine that stands copies none"
    assert machine.memory.read(0x1100, 2) == b"\xcc\x41"
    client.socket.sendall(b"\x03")
    assert client.receive() == b"T02thread:1;"
    assert machine.memory.read(0x1100, 2) == b"\x40\x41"
    assert client.ask("z0,1100,1") == "OK"
    assert client.ask("z0,1100,1") == "OK", "taking away what isn't there"
    assert client.ask("Z0,fec00000,1") == "E0e"


@program("40 40 40 eb fb")  # inc ax (thrice); back to the first
def test_a_breakpoint_is_hit_again_and_again_and_a_step_is_one_instruction(target: Target) -> None:
    client = target[2]
    assert client.ask("Z0,1001,1") == "OK"
    for rounds in (1, 2, 3):
        assert client.ask("c") == "T05thread:1;"
        assert (register(client, "rip"), register(client, "rax")) == (CODE + 1, 3 * rounds - 2)
        assert client.ask("z0,1001,1") == "OK"
        assert client.ask("s") == "T05thread:1;"
        assert (register(client, "rip"), register(client, "rax")) == (CODE + 2, 3 * rounds - 1)
        assert client.ask("Z0,1001,1") == "OK"


@program("40 40 40 eb fb")
def test_who_knows_of_kinds_of_breakpoints_is_told_which_it_was(target: Target) -> None:
    client = target[2]
    assert "swbreak+" in client.ask("qSupported:swbreak+;hwbreak+")
    assert client.ask("Z0,1001,1") == client.ask("Z1,1002,1") == "OK"
    assert client.ask("c") == "T05thread:1;swbreak:;"
    assert client.ask("z0,1001,1") == "OK"
    assert client.ask("vCont;c") == "T05thread:1;hwbreak:;"
    assert register(client, "rip") == CODE + 2


@program("40 40 40 40 40 40 eb fe")
def test_a_range_is_stepped_through_without_stopping(target: Target) -> None:
    assert target[2].ask("vCont;r1000,1004:1;c") == "T05thread:1;"
    assert (register(target[2], "rip"), register(target[2], "rax")) == (CODE + 4, 4)


@program("a1 00 20 a3 00 30 a3 04 20 eb fe")  # mov ax,[2000]; mov [3000],ax; mov [2004],ax
@pytest.mark.parametrize(
    ("point", "rip", "told"),
    [
        ("Z2,3000,2", CODE + 6, "watch:3000"),
        ("Z2,2000,8", CODE + 9, "watch:2000"),
        ("Z3,2000,2", CODE + 3, "rwatch:2000"),
        ("Z4,3001,1", CODE + 6, "awatch:3001"),
        ("Z4,2003,2", CODE + 9, "awatch:2003"),
    ],
)
def test_a_watchpoint_stops_behind_the_access(target: Target, point: str, rip: int, told: str) -> None:
    assert target[2].ask(point) == "OK"
    assert target[2].ask("c") == f"T05thread:1;{told};"
    assert register(target[2], "rip") == rip


def test_there_are_four_debug_registers(target: Target) -> None:
    client = target[2]
    assert client.ask("Z2,2001,7") == "OK"  # 1 + 2 + 4 bytes
    assert client.ask("Z4,3001,2") == "E1c"
    assert client.ask("Z1,3001,1") == "OK"
    assert client.ask("Z1,4001,1") == "E1c"
    assert client.ask("z2,2001,7") == "OK"
    assert client.ask("Z4,3001,2") == "OK"
    assert client.ask("Z2,2000,1000") == "E1c"
    assert client.ask("Z2,2000,0") == "E1c"
    assert client.ask("Z5,2000,1") == ""


# mov word [000c],100a; int3; eb fe; at 100a: mov bx,55aa; iret
@program("c7 06 0c 00 0a 10 cc eb fe 90 bb aa 55 cf")
def test_the_guests_own_int3_is_the_guests(target: Target) -> None:
    machine, _, client = target
    assert client.ask("M0c,4:0a100000") == client.ask("Z0,3000,1") == client.ask("Z1,1007,1") == "OK"
    assert client.ask("c") == "T05thread:1;"
    assert (register(client, "rip"), register(client, "rbx")) == (CODE + 7, 0x55AA)
    assert machine.memory.read(CODE + 6, 1) == b"\xcc"


# pushf; pop ax; or ax,100; push ax; popf; nop; jmp .; at 1010: mov bx,55aa; pop cx; pop dx; pop ax; jmp .
@program("9c 58 0d 00 01 50 9d 90 eb fe 00 00 00 00 00 00 bb aa 55 eb fe")
def test_a_single_step_of_the_guests_own_is_the_guests(target: Target) -> None:
    client = target[2]
    assert client.ask("M4,4:10100000") == client.ask("Z1,1013,1") == "OK"
    assert client.ask("c") == "T05thread:1;"
    assert (register(client, "rip"), register(client, "rbx")) == (CODE + 0x13, 0x55AA)
    assert target[0].vcpus[0].vcpu.get_debugregs().dr6 & 1 << 14, "DR6 says BS"


def test_a_running_guest_is_interrupted(target: Target) -> None:
    client = target[2]
    for _ in range(3):
        client.send(b"c")
        time.sleep(0.05)
        client.socket.sendall(b"\x03")
        assert client.receive() == b"T02thread:1;"
        assert register(client, "rip") in (CODE, CODE + 1)


@program("40 eb fd", 2)
def test_threads_are_vcpus_and_go_on_by_themselves(target: Target) -> None:
    client = target[2]
    assert client.ask("qfThreadInfo") == "m1,2"
    assert client.ask("qsThreadInfo") == "l"
    assert [client.ask(f"T{thread}") for thread in (1, 2, 3)] == ["OK", "OK", "E16"]
    assert client.ask("Hg2") == "OK"
    assert client.ask("qC") == "QC2"
    assert client.ask("vCont;s:2") == "T05thread:2;"
    assert client.ask("vCont;s:2") == "T05thread:2;"
    assert (register(client, "rip"), register(client, "rax")) == (CODE, 1)
    assert client.ask("Hg1") == "OK"
    assert (register(client, "rip"), register(client, "rax")) == (CODE, 0), "that one stood"
    assert client.ask("Hc2") == client.ask("Hg2") == "OK"
    assert client.ask("s") == "T05thread:2;"
    assert register(client, "rax") == 2
    assert client.ask("Hg0") == client.ask("Hc0") == client.ask("Hc-1") == "OK"
    assert client.ask("Hg3") == client.ask("Hg-1") == client.ask("Hx1") == "E16"
    threads = ET.fromstring(client.ask("qXfer:threads:read::0,1000")[1:])
    assert [thread.get("id") for thread in threads] == ["1", "2"]
    assert bytes.fromhex(client.ask("qThreadExtraInfo,2")).startswith(b"vCPU 1: running, RIP 0x1001")


@program("40 eb fd", 2)
def test_a_vcpu_that_stands_stays_where_it_is_while_others_run(target: Target) -> None:
    client = target[2]
    client.send(b"vCont;c:2")
    time.sleep(0.1)
    client.socket.sendall(b"\x03")
    assert client.receive().startswith(b"T02")
    assert client.ask("Hg1") == "OK"
    assert (register(client, "rip"), register(client, "rax")) == (CODE, 0)
    assert client.ask("Hg2") == "OK"
    assert register(client, "rip") in (CODE, CODE + 1)
    client.send(b"vCont;c")
    time.sleep(0.1)
    client.socket.sendall(b"\x03")
    assert client.receive().startswith(b"T02")
    assert client.ask("Hg1") == "OK"
    assert register(client, "rax") != 0


def test_a_client_that_detaches_or_vanishes_leaves_the_guest_running_without_breakpoints(target: Target) -> None:
    machine, server, client = target
    assert client.ask("Z0,1000,1") == client.ask("Z2,3000,4") == "OK"
    client.socket.close()
    with Client(server) as second:
        assert second.ask("?").startswith("T")
        assert machine.memory.read(CODE, 1) == b"\x90"
        assert second.ask("Z0,1000,1") == "OK"
        assert second.ask("D") == "OK"
        assert second.receive() == b""
    assert machine.memory.read(CODE, 1) == b"\x90"
    assert not machine.pausing.standing
    assert not machine.ended.is_set()


def test_there_is_one_debugger_at_a_time(target: Target) -> None:
    machine, server, client = target
    with connect(server) as second:
        second.settimeout(10)
        assert second.recv(1) == b""
    with pytest.raises(StateError, match="has a debugger already"):
        Debugger(machine)
    assert client.ask("qC") == "QC1"


@program("f4")
@pytest.mark.parametrize("packet", ["k", "vKill;1"])
def test_killing_ends_the_machine(target: Target, packet: str) -> None:
    target[2].send(packet.encode())
    assert target[2].receive() in (b"", b"OK")
    assert target[0].wait(10).end is End.STOPPED


@program("b0 2a e6 f4 eb fe")  # out f4,2a: the port of tests that end
def test_the_machines_end_is_told(target: Target) -> None:
    assert target[2].ask("c") == "W01"
    assert target[0].wait(10).end is End.DEBUG_EXIT


def test_the_monitors_commands(target: Target) -> None:
    client = target[2]
    assert {"help", "info registers", "phys", "reset", "quit"} <= {
        line.partition("  ")[0] for line in client.monitor("help").splitlines()
    }
    assert "rip    0000000000001000" in client.monitor("info registers")
    assert client.monitor("info  vcpus").startswith("* vCPU 0: running, RIP 0x1000")
    assert "guest-physical" in client.monitor("phys on")
    assert client.ask("qqemu.PhyMemMode") == "1"
    assert client.ask("m1000,1") == "90"
    assert client.ask("m2000000,1") == "E0e"
    assert client.ask("Qqemu.PhyMemMode:0") == "OK"
    assert client.monitor("phys") == "addresses are virtual\n"
    assert "expected on or off" in client.monitor("phys maybe")
    assert "no command" in client.monitor("phyz on")
    assert client.ask("qRcmd,zz") == "E16"


def test_the_monitor_ends_the_machine(target: Target) -> None:
    target[2].monitor("quit")
    assert target[0].wait(10).end is End.STOPPED
    assert target[2].ask("c") == "W01"


def test_steps_are_as_qemus_are_chosen(target: Target) -> None:
    client = target[2]
    assert client.ask("qqemu.sstepbits") == "ENABLE=1,NOIRQ=2,NOTIMER=4"
    assert client.ask("qqemu.sstep") == "0x7"
    assert client.ask("Qqemu.sstep=1") == "OK"
    assert client.ask("qqemu.sstep") == "0x1"
    assert client.ask("Qqemu.sstep=ff") == "E16"


@program("fb 40 40 40 40 eb fe")  # sti; inc ax …: an interrupt waits, vector 20h, whose handler is inc bx; iret
@pytest.mark.parametrize(("sstep", "taken"), [("7", 0), ("1", 1)])
def test_a_step_takes_no_interrupt_unless_it_is_told_to(target: Target, sstep: str, taken: int) -> None:
    machine, _, client = target
    machine.memory.write(0x20 * 4, bytes.fromhex("00300000"))
    machine.memory.write(0x3000, bytes.fromhex("43cf"))
    lapic = machine.vcpus[0].vcpu.get_lapic()
    lapic.regs[0xF1] = 1  # enabled by software
    lapic.regs[0x210] = 1  # IRR: vector 20h
    machine.vcpus[0].vcpu.set_lapic(lapic)
    assert client.ask(f"Qqemu.sstep={sstep}") == "OK"
    for _ in range(4):
        assert client.ask("s") == "T05thread:1;"
    assert register(client, "rbx") == taken
    assert CODE + 3 <= register(client, "rip") <= CODE + 5


def test_the_description_is_one_that_has_the_features_of_gdb_in_any_pieces(target: Target) -> None:
    client = target[2]
    text, more = "", True
    while more:
        answer = client.ask(f"qXfer:features:read:target.xml:{len(text):x},1f3")
        text, more = text + answer[1:], answer[0] == "m"
    root = ET.fromstring(text)
    assert [feature.get("name") for feature in root.iter("feature")] == [
        "org.gnu.gdb.i386.core",
        "org.gnu.gdb.i386.sse",
    ]
    described = [(reg.get("name"), int(reg.get("bitsize") or 0) // 8) for reg in root.iter("reg")]
    assert described == [(part.name, part.size) for part in CORE + SSE]
    assert client.ask(f"qXfer:features:read:target.xml:{len(text):x},10") == "l"
    assert client.ask(f"qXfer:features:read:target.xml:{len(text) + 1:x},10") == "E16"
    assert client.ask("qXfer:features:read:other.xml:0,10") == ""


def test_the_description_has_avx_where_the_processor_has() -> None:
    root = ET.fromstring(description.target_xml(CORE + SSE + AVX))
    features = {feature.get("name"): feature for feature in root.iter("feature")}
    assert [reg.get("name") for reg in features["org.gnu.gdb.i386.avx"].iter("reg")] == [f"ymm{n}h" for n in range(16)]


def test_what_is_not_known_is_answered_with_nothing(target: Target) -> None:
    client = target[2]
    for packet in (
        "vMustReplyEmpty",
        "vRun;x",
        "vAttach;1",
        "!",
        "R00",
        "qOffsets",
        "qCRC:0,1",
        "x0,1",
        "",
        "qXfer:auxv",
    ):
        assert client.ask(packet) == "", packet


@pytest.mark.parametrize(
    "data",
    [b"$" + b"g" * (PACKET_BYTES + 100), b"$g#67" * 200 + b"$c#63" + b"$g#67" * 200, b"\x03" * 1000, b"$" * 40000],
)
def test_a_client_that_knows_no_bounds_loses_its_connection_at_most(target: Target, data: bytes) -> None:
    machine, server, client = target
    client.socket.settimeout(0.3)
    try:
        client.socket.sendall(data)
        while client.socket.recv(1 << 16):
            pass
    except OSError:
        pass
    client.socket.close()
    with Client(server) as second:
        assert second.ask("p10") == "0010000000000000" or second.ask("p10") == "0110000000000000"
    assert not machine.ended.is_set()


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.tuples(
                st.sampled_from(KINDS).map(str.encode),
                st.text("0123456789abcdef,:;=-cs", max_size=30).map(str.encode),
            ).map(b"".join),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_no_packet_hurts(packets: list[bytes]) -> None:
    sent: list[bytes] = []
    with tiny_machine(open_soft(), "90ebfd") as machine, Debugger(machine) as debugger:
        debugger.halt()
        session = Session(machine, debugger, sent.append)
        for packet in packets:
            answer = session.handle(packet)
            assert answer is None or len(answer) <= 2 * PACKET_BYTES + 1
            debugger.halt()
            if session.over:
                break


@pytest.mark.parametrize("kind", list(KVMS))
def test_registers_are_there_whatever_kvm_it_is(kind: str, tmp_path: Path) -> None:
    with tiny_machine(KVMS[kind](), "90ebfd") as machine:
        registers = Registers(machine.vcpus[0].vcpu)
        there = description.registers(machine.vcpus[0].vcpu)
        values = {part.name: registers.get(part) for part in there}
        assert values["rip"] == CODE
        assert values["fctrl"] in (0x37F, 0x40)  # as FNINIT leaves it, or a reset (APM vol. 2, 14.1.3)
        for name in ("rax", "xmm1", "st3", *(("ymm2h",) if "ymm2h" in values else ())):
            registers[name] = 0x1122334455667788
            assert Registers(machine.vcpus[0].vcpu)[name] == 0x1122334455667788, name
