# SPDX-License-Identifier: Apache-2.0
"""Thread 1: an intercepted instruction ends where it ends, whatever prefixes it has.

Each guest turns interrupts on with one waiting, so that it comes right behind the instruction under test: what the
interrupt pushes says where KVM has set RIP to, and that the interrupt shadow of the STI is over. Instructions, and
which prefixes mean nothing to them: APM vol. 3.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import pytest
from tests.support.tiny import CODE, DATA, IDT, PAGE_TABLES, Tiny

from softkvm import abi
from softkvm.kvm import Params
from softkvm.kvm.x86.svm import vmcb as V

MODES: Final = (16, 32, 64)
INTERRUPT: Final = 0x30
HANDLER: Final = 0x2000  # of the interrupt, and then of each exception
DONE: Final = 0x99  # port: the handler is there
PORT: Final = 0x10  # nobody's
PIC_MASK: Final = 0x21  # the PIC's, which is in the kernel
FEP: Final = bytes.fromhex("0f0b6b766d")  # ud2; "kvm"
STI: Final = b"\xfb"
PREFIXES: Final = tuple(bytes.fromhex("26 2e 36 3e")[:n] for n in range(5))  # segments that nothing is read from
PREFIXES_64: Final = (b"\x40", b"\x2e\x48", b"\x36\x3e\x42")  # and REX last: it extends no register of these


class Case(NamedTuple):
    """An instruction, the exit that it makes, and what it needs."""

    code: str
    exit: int
    registers: dict[str, int] = {}
    modes: tuple[int, ...] = MODES
    rex: bool = True
    """A REX prefix means nothing to it."""
    before: str = ""
    """What comes before the STI."""
    cr8: int = 0


class Machine(Tiny):
    """One vCPU in 16, 32 or 64-bit mode, with an interrupt that waits for RFLAGS.IF."""

    def __init__(self, mode: int, params: Params) -> None:
        super().__init__(irqchip=True, params=params)
        self.mode = mode
        self.code = ""
        {16: self.real_mode, 32: self.protected_mode, 64: self.long_mode}[mode]()
        for vector in (abi.DB_VECTOR, abi.UD_VECTOR, abi.GP_VECTOR, INTERRUPT):
            handler = HANDLER + 0x10 * vector
            self.memory.write(handler, bytes((0xE6, DONE)))  # out
            if mode == 64:
                self.gate64(vector, handler)
            elif mode == 32:
                self.memory.write(IDT + 8 * vector, struct.pack("<HHHH", handler, 8, 0x8E00, 0))
            else:
                self.memory.write(4 * vector, struct.pack("<HH", handler, 0))
        lapic = self.vcpu.get_lapic()
        lapic.regs[0xF0:0xF4] = list(struct.pack("<I", 0x1FF))  # SPIV: on
        self._lapic = lapic
        sregs = self.vcpu.get_sregs()
        sregs.cr0 |= 1 << 30  # CD: KVM keeps it from the processor, so CR0 is intercepted
        sregs.cr4 |= 1 << 18  # OSXSAVE
        self.sregs = sregs

    def start(self, code: bytes, before: bytes = b"", **registers: int) -> int:
        """From the beginning, have *code* behind an STI behind *before*; returns where it begins."""
        self.vcpu.set_lapic(self._lapic)
        self.vcpu.set_sregs(self.sregs)
        self.vcpu.exit_counts.clear()
        assert self.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=INTERRUPT)) == 1
        before += STI
        self.load(before + code + b"\x90" * 8 + bytes((0xE6, DONE)), **{"rdx": 0, **registers})
        return CODE + len(before)

    def start_case(self, case: Case, code: bytes) -> int:
        self.sregs.cr8 = case.cr8
        registers = {name: self.sregs.cr0 if value == KEEP_CR0 else value for name, value in case.registers.items()}
        return self.start(code, bytes.fromhex(case.before), **registers)

    def finish(self, answer: Callable[[Machine], None] = lambda machine: None) -> tuple[int, int]:
        """Run to a handler; *answer* is what userspace does at other exits. Returns the vector and the RIP pushed."""
        for _ in range(20):
            reason = self.run()
            if reason == abi.KVM_EXIT_IO and self.vcpu.kvm_run.io.port == DONE:
                break
            answer(self)
        regs = self.vcpu.get_regs()
        return (regs.rip - HANDLER) >> 4, self.pushed(regs.rsp)

    def pushed(self, rsp: int) -> int:
        """The instruction pointer in the frame; behind an error code, which is 0 here and no RIP is."""
        size = self.mode // 8
        words = [int.from_bytes(self.memory.read(rsp + size * n, size), "little") for n in range(2)]
        return words[0] or words[1]


def machine(mode: int, nrips: bool, **params: object) -> Machine:
    # With AVIC the processor leaves neither HLT nor CR8 to KVM: there is nothing to skip.
    return Machine(mode, Params(nrips=nrips, avic=False, **params))  # type: ignore[arg-type]


def _variants(case: Case, mode: int) -> Iterator[bytes]:
    """The instruction with 0 to 4 redundant prefixes."""
    code = bytes.fromhex(case.code)
    own = 1 if code[0] in (0x66, 0xF2, 0xF3) else 0  # its own prefix: REX goes behind
    for prefix in PREFIXES:
        yield prefix + code
    if mode == 64 and case.rex:
        for prefix in PREFIXES_64:
            yield prefix[:-1] + code[:own] + prefix[-1:] + code[own:]


def matrix(
    case: Case, nrips: bool, before: bytes = b"", prepare: Callable[[Machine], object] = lambda machine: None
) -> Iterator[tuple[Machine, int, int]]:
    """Start each variant of the instruction in each mode, behind *before*; gives its beginning and its end, too."""
    for mode in case.modes:
        guest = machine(mode, nrips, force_emulation_prefix=1, pause_filter_count=1, pause_filter_count_grow=0)
        prepare(guest)
        for code in _variants(case, mode):
            start = guest.start_case(case, before + code)
            guest.code = f"{mode}-bit {code.hex()}"
            yield guest, start + len(before), start + len(before + code)
        guest.close()


CR: Final = V.EXIT_READ_CR0
CR_WRITE: Final = V.EXIT_WRITE_CR0
KEEP_CR0: Final = -1  # RAX gets what the control register has
SKIPPED: Final = {
    "cpuid": Case("0fa2", V.EXIT_CPUID),
    "rdmsr": Case("0f32", V.EXIT_MSR, {"rcx": 0x1B}),
    "wrmsr": Case("0f30", V.EXIT_MSR, {"rcx": 0xC000_0103, "rax": 5}),
    "vmmcall": Case("0f01d9", V.EXIT_VMMCALL, {"rax": 1}),
    "hlt": Case("f4", V.EXIT_HLT),
    "invd": Case("0f08", V.EXIT_INVD),
    "wbinvd": Case("0f09", V.EXIT_WBINVD),
    "wbnoinvd": Case("f30f09", V.EXIT_WBINVD),
    "monitor": Case("0f01c8", V.EXIT_MONITOR, {"rax": DATA}, rex=False),
    "mwait": Case("0f01c9", V.EXIT_MWAIT, {"rax": 0}),
    "xsetbv": Case("0f01d1", V.EXIT_XSETBV, {"rax": 3, "rcx": 0}),
    "in-al-imm": Case("e410", V.EXIT_IOIO),
    "in-eax-imm": Case("e510", V.EXIT_IOIO),
    "in-al-dx": Case("ec", V.EXIT_IOIO, {"rdx": PORT}),
    "in-eax-dx": Case("ed", V.EXIT_IOIO, {"rdx": PORT}),
    "out-imm-al": Case("e610", V.EXIT_IOIO),
    "out-imm-eax": Case("e710", V.EXIT_IOIO),
    "out-dx-al": Case("ee", V.EXIT_IOIO, {"rdx": PORT}),
    "out-dx-eax": Case("ef", V.EXIT_IOIO, {"rdx": PORT}),
    "in-kernel": Case("e421", V.EXIT_IOIO),
    "out-kernel": Case("e621", V.EXIT_IOIO, {"rax": 0xFF}),
    "ins": Case("6c", V.EXIT_IOIO, {"rdx": PORT, "rdi": DATA}),
    "outs": Case("6e", V.EXIT_IOIO, {"rdx": PORT, "rsi": DATA}),
    "rep-outs": Case("f36e", V.EXIT_IOIO, {"rdx": PORT, "rsi": DATA, "rcx": 3}),
    "mov-from-cr0": Case("0f20c0", CR),
    "mov-to-cr0": Case("0f22c0", CR_WRITE, {"rax": KEEP_CR0}),
    "lmsw": Case("0f01f0", CR_WRITE, {"rax": KEEP_CR0}),
    "smsw": Case("0f01e0", CR),
    "clts": Case("0f06", CR_WRITE),
    "mov-from-cr4": Case("0f20e0", CR + 4),
    "mov-to-cr8": Case("440f22c0", CR_WRITE + 8, {"rax": 0}, modes=(64,), rex=False, cr8=15),
    "pause": Case("f390", V.EXIT_PAUSE, rex=False, before="f390"),
}
"""What KVM carries out or does nothing for, and skips."""

REFUSED: Final = {
    "rsm": Case("0faa", V.EXIT_RSM),
    "vmrun": Case("0f01d8", V.EXIT_VMRUN),
    "vmload": Case("0f01da", V.EXIT_VMLOAD),
    "vmsave": Case("0f01db", V.EXIT_VMSAVE),
    "stgi": Case("0f01dc", V.EXIT_STGI),
    "clgi": Case("0f01dd", V.EXIT_CLGI),
    "skinit": Case("0f01de", V.EXIT_SKINIT),
    "invlpga": Case("0f01df", V.EXIT_INVLPGA),
    "rdpru": Case("0f01fd", V.EXIT_RDPRU),
}
"""What a guest without nesting hasn't got: #UD, before the instruction."""


@pytest.fixture(params=[True, False], ids=["nrips", "decoded"])
def nrips(request: pytest.FixtureRequest) -> bool:
    """Whether KVM uses NEXT_RIP (APM vol. 2, 15.7.1), or decodes."""
    value: bool = request.param
    return value


@pytest.mark.parametrize("name", SKIPPED)
def test_an_interrupt_comes_right_behind_what_was_skipped(name: str, nrips: bool) -> None:
    case = SKIPPED[name]
    for guest, _, end in matrix(case, nrips):
        assert guest.finish() == (INTERRUPT, end), guest.code
        assert guest.vcpu.exit_counts.get(case.exit, 0) >= 1, guest.code


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_guest_has_not_got_is_not_skipped(name: str, nrips: bool) -> None:
    case = REFUSED[name]
    for guest, start, _ in matrix(case, nrips):
        assert guest.finish() == (abi.UD_VECTOR, start), guest.code
        exits = guest.vcpu.exit_counts  # in real mode the processor itself has no such instruction
        assert case.exit in exits or V.EXIT_EXCP_BASE + abi.UD_VECTOR in exits, guest.code


def test_wrmsr_that_is_refused_stays_where_it_is(nrips: bool) -> None:
    """#GP is a fault: the frame has the WRMSR's first prefix."""
    for guest, start, _ in matrix(Case("0f30", V.EXIT_MSR, {"rcx": 0x1234_5678}), nrips):
        assert guest.finish() == (abi.GP_VECTOR, start), guest.code


@pytest.mark.parametrize("name", ["cpuid", "rdmsr", "wrmsr", "xsetbv", "hlt", "in-al-imm", "out-dx-eax", "clts"])
def test_the_emulator_ends_the_shadow_too(name: str, nrips: bool) -> None:
    """By the forced-emulation prefix, which is what runs XSETBV through the emulator."""
    for guest, _, end in matrix(SKIPPED[name], nrips, FEP):
        emulated = guest.vcpu.stat_insn_emulation
        assert guest.finish() == (INTERRUPT, end), guest.code
        assert guest.vcpu.stat_insn_emulation == emulated + 1


@pytest.mark.parametrize("prefix", [b"", FEP], ids=["silicon", "emulator"])
@pytest.mark.parametrize(
    ("registers", "fault"),
    [
        ({"rax": 3, "rcx": 0}, False),
        ({"rax": 6, "rcx": 0}, True),  # XCR0 without x87
        ({"rax": 3, "rcx": 1}, True),  # no such register
        ({"rax": 3, "rcx": 0, "rdx": 1 << 31}, True),  # reserved
    ],
)
def test_xsetbv_does_what_the_processor_would(prefix: bytes, registers: dict[str, int], fault: bool) -> None:
    guest = machine(64, nrips=True, force_emulation_prefix=1)
    before = guest.vcpu.get_xcrs().xcrs[0].value
    code = prefix + bytes.fromhex("2e0f01d1")
    start = guest.start(code, b"", **registers)
    assert guest.finish() == ((abi.GP_VECTOR, start + len(prefix)) if fault else (INTERRUPT, start + len(code)))
    assert guest.vcpu.get_xcrs().xcrs[0].value == (before if fault else registers["rax"])
    guest.close()


@pytest.mark.parametrize("prefix", [b"", FEP], ids=["silicon", "emulator"])
def test_xsetbv_is_undefined_without_osxsave(prefix: bytes) -> None:
    guest = machine(64, nrips=True, force_emulation_prefix=1)
    guest.sregs.cr4 &= ~(1 << 18)
    start = guest.start(prefix + bytes.fromhex("0f01d1"), rax=3, rcx=0)
    assert guest.finish() == (abi.UD_VECTOR, start + len(prefix))
    guest.close()


def _answer_msr(guest: Machine) -> None:
    assert guest.vcpu.kvm_run.exit_reason in (abi.KVM_EXIT_X86_RDMSR, abi.KVM_EXIT_X86_WRMSR)
    guest.vcpu.kvm_run.msr.data = 0x1_0000_0002


def _answer_hypercall(guest: Machine) -> None:
    assert guest.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_HYPERCALL
    guest.vcpu.kvm_run.hypercall.ret = 0


ANSWERED: Final = {
    "rdmsr": (Case("0f32", V.EXIT_MSR, {"rcx": 0x1234_5678}), _answer_msr),
    "wrmsr": (Case("0f30", V.EXIT_MSR, {"rcx": 0x1234_5678}), _answer_msr),
    "vmmcall": (
        Case("0f01d9", V.EXIT_VMMCALL, {"rax": abi.KVM_HC_MAP_GPA_RANGE, "rbx": DATA, "rcx": 1, "rdx": 0}),
        _answer_hypercall,
    ),
}


def _ask_userspace(guest: Machine) -> None:
    guest.vm.enable_cap(abi.KVM_CAP_X86_USER_SPACE_MSR, abi.KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.vm.enable_cap(abi.KVM_CAP_EXIT_HYPERCALL, 1 << abi.KVM_HC_MAP_GPA_RANGE)


@pytest.mark.parametrize("prefix", [b"", FEP], ids=["silicon", "emulator"])
@pytest.mark.parametrize("name", ANSWERED)
def test_what_userspace_completes_is_skipped_too(name: str, prefix: bytes, nrips: bool) -> None:
    case, answer = ANSWERED[name]
    for guest, _, end in matrix(case, nrips, prefix, _ask_userspace):
        assert guest.finish(answer) == (INTERRUPT, end), guest.code


def _debug(guest: Machine) -> None:
    debug = abi.kvm_guest_debug(control=abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP)
    debug.arch.debugreg[7] = 0x400
    guest.vcpu.set_guest_debug(debug)


@pytest.mark.parametrize(
    "case",
    [Case("0f21f8", V.EXIT_READ_DR0 + 7), Case("0f23f8", V.EXIT_WRITE_DR0 + 7, {"rax": 0x400})],
    ids=["read", "write"],
)
def test_moves_of_debug_registers_under_a_debugger(case: Case, nrips: bool) -> None:
    """They are intercepted as long as the debugger has the registers."""
    for guest, _, end in matrix(case, nrips, prepare=_debug):
        assert guest.finish() == (INTERRUPT, end), guest.code
        assert case.exit in guest.vcpu.exit_counts


def test_icebp_is_a_trap_behind_all_its_prefixes(nrips: bool) -> None:
    for guest, _, end in matrix(Case("f1", V.EXIT_EXCP_BASE + abi.DB_VECTOR), nrips):
        assert guest.finish() == (abi.DB_VECTOR, end), guest.code


@pytest.mark.parametrize("code", ["0fa2", "e421", "e410"], ids=["cpuid", "in the kernel", "in userspace"])
def test_skipping_ends_the_resume_flag(code: str, nrips: bool) -> None:
    """APM vol. 2, 13.1.3.2: RF holds breakpoints off one instruction; the next one's is met."""
    guest = machine(64, nrips)
    registers = abi.kvm_debugregs(dr7=0x402)
    registers.db[0] = CODE + len(bytes.fromhex(code))
    guest.vcpu.set_debugregs(registers)
    guest.load(bytes.fromhex(code) + b"\x90" * 8 + bytes((0xE6, DONE)), rflags=abi.X86_EFLAGS_RF | 2)
    assert guest.finish() == (abi.DB_VECTOR, registers.db[0])
    guest.close()


ALIAS: Final = 0x20_0000
_PDE: Final = PAGE_TABLES + 0x2000 + 8
FORGET_ALIAS: Final = bytes.fromhex("48c70425") + struct.pack("<II", _PDE, 0)  # mov qword [_PDE], 0


def _stale(nrips: bool) -> Tiny:
    """A guest that runs from a page which is only in the TLB any more: KVM cannot read the instruction."""
    guest = Tiny(params=Params(nrips=nrips)).long_mode()
    guest.memory.write(_PDE, struct.pack("<Q", 0x87))  # 2 MiB at ALIAS: those at 0
    guest.load(FORGET_ALIAS + bytes.fromhex("2e0fa2f4"), rax=0)
    guest.registers(rip=ALIAS + CODE)
    return guest


def test_next_rip_needs_no_instruction_bytes() -> None:
    guest = _stale(nrips=True)
    assert guest.run_to_halt().rip == ALIAS + CODE + len(FORGET_ALIAS) + 4
    guest.close()


def test_a_skip_that_fails_is_told_and_logged_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    """KVM_EXIT_INTERNAL_ERROR each time, the instruction still to be executed; the log has no flood."""
    guest = _stale(nrips=False)
    with caplog.at_level(logging.DEBUG, "softkvm"):
        for _ in range(100):
            assert guest.run() == abi.KVM_EXIT_INTERNAL_ERROR
            assert guest.vcpu.kvm_run.internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
            assert guest.vcpu.get_regs().rip == ALIAS + CODE + len(FORGET_ALIAS)
    lines = [record for record in caplog.records if "cannot skip" in record.getMessage()]
    assert 1 <= len(lines) <= 20  # ten in five seconds
    assert f"rip {ALIAS + CODE + len(FORGET_ALIAS):#x}" in lines[0].getMessage()
    guest.close()
