# SPDX-License-Identifier: Apache-2.0
"""Prints docs/kvm-api.md: every ioctl and capability, whether it is implemented, and the test that covers it.

python scripts/kvm_api_table.py > docs/kvm-api.md

What is implemented is asked of the classes themselves; tests and known differences are read from the source of
tests/conformance (calls of the API's methods, of ``needs`` and of ``device_differs``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from softkvm import abi
from softkvm.kvm import Kvm, Vm
from softkvm.kvm.x86.capabilities import check_extension
from softkvm.kvm.x86.vcpu_ioctls import VcpuIoctls

COMMAND: Final = "python scripts/kvm_api_table.py > docs/kvm-api.md"
ROOT: Final = Path(__file__).resolve().parents[1]
CONFORMANCE: Final = ROOT / "tests" / "conformance"
SUPPORT: Final = ROOT / "tests" / "support" / "conformance.py"

#: Methods that exist only to refuse.
REFUSED: Final = {
    "KVM_SMI": "ENOTTY: there is no system management mode (KVM_CAP_X86_SMM is 0)",
    "KVM_CREATE_DEVICE": "ENODEV: x86 has VFIO's device only, which needs hardware",
}
OTHER_ARCHITECTURES: Final = ("_S390_", "_PPC_", "_ARM_", "_MIPS_", "_SPAPR_", "_XICS", "_MPIC")

_ARM64: Final = "arm64 has it"
_NESTING: Final = "to come, with nesting"
_ENCRYPTION: Final = "encrypted memory (SEV) needs hardware"
#: Capabilities whose value is not the same everywhere.
OF_THE_HOST: Final = {"KVM_CAP_NR_VCPUS": "the host's processors"}
#: Why what Linux 6.12's headers name is not there.
REASONS: Final = {
    "KVM_SET_MEMORY_REGION": "removed: KVM_SET_USER_MEMORY_REGION took its place",
    "KVM_SET_MEMORY_ALIAS": "removed in Linux 2.6.36",
    "KVM_GET_ONE_REG": "EINVAL on x86 until Linux 6.18",
    "KVM_SET_ONE_REG": "EINVAL on x86 until Linux 6.18",
    "KVM_GET_REG_LIST": "EINVAL on x86 until Linux 6.18",
    "KVM_CAP_PV_MMU": "obsolete: shadow page tables need no help of the guest's",
    "KVM_CAP_IOMMU": "removed in Linux 4.12, with device assignment; VFIO is its successor",
    "KVM_CAP_ASSIGN_DEV_IRQ": "removed in Linux 4.12, with device assignment",
    "KVM_CAP_PCI_2_3": "removed in Linux 4.12, with device assignment",
    "KVM_CAP_SW_TLB": "PowerPC has it",
    "KVM_CAP_ONE_REG": "other architectures have it, x86 from Linux 6.18 on",
    "KVM_CAP_VM_ATTRIBUTES": "s390 has it; x86's VMs have no attributes",
    "KVM_CAP_X86_SMM": "to come, with system management mode",
    "KVM_CAP_GUEST_DEBUG_HW_BPS": f"{_ARM64}; x86 has four, always",
    "KVM_CAP_GUEST_DEBUG_HW_WPS": f"{_ARM64}; x86 has four, always",
    "KVM_CAP_MSI_DEVID": _ARM64,
    "KVM_CAP_HYPERV_ENLIGHTENED_VMCS": _NESTING,
    "KVM_CAP_HYPERV_DIRECT_TLBFLUSH": _NESTING,
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT": "withdrawn: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is it, mended",
    "KVM_CAP_SMALLER_MAXPHYADDR": "0 on AMD's processors with nested paging: only Intel's tell such faults apart",
    "KVM_CAP_X86_NOTIFY_VMEXIT": "a VMX control (a window in cycles); AMD-V has nothing like it, and kvm_amd 0",
    "KVM_CAP_SGX_ATTRIBUTE": "enclaves (SGX) need hardware",
    "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM": _ENCRYPTION,
    "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM": _ENCRYPTION,
    "KVM_CAP_PTP_KVM": f"{_ARM64}; x86's guests find the hypercall in CPUID",
    "KVM_CAP_VM_GPA_BITS": "RISC-V has it",
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP": "arm64 needs it, whose chips write memory outside of any vCPU; no x86 has it",
    "KVM_CAP_COUNTER_OFFSET": _ARM64,
}

#: Differences that no test can show, or that are not differences of one test.
NOTES: Final = (
    "On the device (Linux 6.18), an interrupt message to the APIC id of a vCPU that was never given a KVM_SET_LAPIC "
    "may find nobody (KVM_SIGNAL_MSI: 0); on the software side a vCPU is found from its creation on.",
    "The device tried here is neither VMX nor SVM: the module kvm_pvm delivers interrupts itself and writes "
    "the local APIC's EOI at delivery, in every mode (the tracepoints kvm_apic and kvm_eoi show the write before the "
    "handler's first instruction). So a handler never sees its interrupt in service (ISR), the processor priority "
    "stays, a lower vector interrupts a higher one, and a level that is still up is requested again (IRR) at once. The "
    "software side has it in service until the guest's EOI (SDM vol. 3, 11.8.4 and 11.8.5).",
    "The software side's getters of lists (CPUID, MSR indexes) return Python lists of any length; E2BIG for a short "
    "buffer exists on the device only. E2BIG for tables that are too long exists on both sides.",
    "KVM_GET_FPU shows the guest's MXCSR on the software side; the kernel leaves the field alone. KVM_SET_FPU loads it "
    "on neither side.",
    "KVM_GET_FPU after a KVM_SET_XSAVE without the x87 or SSE component gives the initial state on the software side, "
    "and on the device what its buffer held before; KVM_GET_XSAVE gives the initial state on both.",
    "KVM_GET_XSAVE of a new vCPU marks x87 and SSE as present on the software side, as initial on the device.",
    "There are no MMU notifiers on the software side: `softkvm.kvm.Vm.host_unmapped` has to be told what the kernel "
    "finds out by itself. KVM_SET_USER_MEMORY_REGION takes the object that owns the memory "
    "and holds it, so an mmap object is not unmapped under a slot (its close() raises BufferError, on both sides). "
    "Memory that is not there when the guest touches it, because it was never mapped, or unmapped or protected past "
    "Python (munmap of libc, a file cut short), is EFAULT of KVM_RUN, as on a kernel. A place of a slot where nothing "
    "is mapped is kept free: memory comes there by MAP_FIXED only (a wish gets another place, MAP_FIXED_NOREPLACE is "
    "EEXIST). Memory that is unmapped under a slot without `host_unmapped`, and whose place is given to something else "
    "before any guest touches it, is not noticed: the guest reaches what is there then.",
    "A kernel finds out in get_user_pages() that a page is long in coming. The software side knows it of memory with a "
    "userfaultfd, for which it looks when a guest enables asynchronous page faults, and of what "
    "`softkvm.kvm.Vm.set_slow_memory` is told. Elsewhere a guest that touches such a page sleeps as any thread does: "
    "KVM_RUN's kick and signals end that at a userfaultfd's missing and minor faults, but neither where a page is "
    "write-protected by one, nor where a file is slow.",
    "The device tried here does not report KVM_CAP_INTR_SHADOW, although KVM_GET_VCPU_EVENTS has the shadow, nor "
    "KVM_CAP_MULTI_ADDRESS_SPACE, which a KVM with one address space leaves out; the software side says 1 to both.",
    "A signal whose handler a library of another language installed (Python's are known at once) may not end KVM_RUN"
    " on the software side until the next KVM_RUN that begins 20 ms later or more; one in HLT it ends always.",
    "An irqfd takes what KVM itself signals (ioeventfds, resample eventfds, connections of Hyper-V's) before anybody "
    "sees it, on both sides. What is written into the descriptor wakes the client's pollers, too, on the software "
    "side, and a thread takes it at once: a poller may find nothing, or be quicker and have the event in the irqfd's "
    "place. Don't poll an eventfd while it is an irqfd. A second irqfd on it is EBUSY in whichever VM, as from Linux "
    "6.17 on.",
    "Requests to a vCPU whose KVM_RUN is under way on another thread wait for its end on both sides, a second KVM_RUN "
    "among them: kick the vCPU first. On the software side a request of KVM_RUN's own thread (an exit handler, task "
    "work) is done at once, and only a KVM_RUN there is EBUSY.",
    "Closing a VM ends it on the software side: KVM_RUN of its vCPUs is EIO from then on. On the device it lives on "
    "until its vCPUs are closed, too.",
    "HWCR.TscFreqSel is set in a new vCPU on the software side (its TSC does count at one frequency, and Linux asks), "
    "and clear on the device.",
    "Whoever maps `Vcpu.shared_fd` finds the ring of coalesced MMIO there, one page for the VM, from "
    "`softkvm.kvm.Vcpu.shared_fd_mapped` on, which the kernel's mmap() needs not; otherwise from the next "
    "KVM_REGISTER_COALESCED_MMIO or the vCPU's first KVM_RUN on. Until every vCPU whose descriptor was asked for has "
    "run or is told of, writes to zones are exits. The ring takes 169 writes wherever it begins, as from Linux 6.12 "
    "on; when it fills up in the middle of REP OUTS the rest is an exit, where the kernel drops it.",
    "The file of KVM_GET_STATS_FD has its values as of its making on the software side, until `refresh_stats_fd` of "
    "the VM or vCPU brings them up to date; `softkvm exec` does before each of a client's reads. What this "
    "KVM doesn't do (shadow paging, preemption notifiers) has no statistics.",
    "With rings of dirty pages (KVM_CAP_DIRTY_LOG_RING) a page is mapped for writing by a guest's write only, so it is "
    "announced once until it is reset; the kernel maps what is read for writing, too, and announces it. What KVM "
    "writes while no vCPU runs goes into the first vCPU's ring, where the kernel forgets it.",
    "KVM_CAP_X86_BUS_LOCK_EXIT comes with the silicon's bus-lock threshold; kvm_amd has it from Linux 6.16 on, before "
    "that kvm_intel alone.",
    "KVM_GET_EMULATED_CPUID has WAITPKG (UMONITOR, UMWAIT, TPAUSE) on the software side: a vCPU has the instructions "
    "and IA32_UMWAIT_CONTROL if the CPUID that it was given has the bit, which KVM_GET_SUPPORTED_CPUID doesn't, as no "
    "AMD processor has them. IA32_UMWAIT_CONTROL is in KVM_GET_MSR_INDEX_LIST always.",
    "Xen's runstate is brought up to date when KVM_RUN begins and when a halt is over; the kernel does so at each "
    "preemption, too. An attribute that is refused changes nothing, where the kernel keeps a place without memory and "
    "tries it later. Memory that is named by a host's address and is in no slot is written as it is: its bits "
    "are atomic for KVM alone. As from Linux 6.15 on, KVM_SET_MSRS places no hypercall page.",
)


@dataclass
class Function:
    """A function of the test sources: what it calls and names."""

    where: str
    attributes: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)
    differs: set[str] = field(default_factory=set)


def read_function(where: str, node: ast.AST) -> Function:
    """Collect attributes, names and the reasons given to ``needs`` and ``device_differs``."""
    function = Function(where)
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            function.attributes.add(part.attr)
        elif isinstance(part, ast.Name):
            function.names.add(part.id)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.startswith("KVM_CAP_"):
            function.attributes.add(part.value)
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.args:
            argument = part.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                if part.func.id == "needs":
                    function.needs.add(argument.value)
                elif part.func.id == "device_differs":
                    function.differs.add(argument.value)
    return function


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Yield the module's functions and methods by name; module-level tables count for functions that name them."""
    tree = ast.parse(path.read_text())
    tables: dict[str, Function] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            tables[node.targets[0].id] = read_function("", node)
    for definition in ast.walk(tree):
        if isinstance(definition, ast.FunctionDef):
            function = read_function(f"{path.name}::{definition.name}", definition)
            for name in function.names & set(tables):
                function.attributes |= tables[name].attributes
            yield definition.name, function


def read_tests() -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """Return the tests by the API names they use, by what they need, and by the difference they know of."""
    helpers = dict(functions(SUPPORT))
    used: dict[str, list[tuple[int, str]]] = {}
    needs: dict[str, list[str]] = {}
    differs: dict[str, list[str]] = {}
    for path in sorted(CONFORMANCE.glob("test_*.py")):
        local = dict(functions(path))
        for name, function in local.items():
            if not name.startswith("test_"):
                continue
            for table, found in ((needs, function.needs), (differs, function.differs)):
                for reason in sorted(found):
                    table.setdefault(reason, []).append(function.where)
            depths = dict.fromkeys(function.attributes, 0)
            pending = [(function, 0)]
            seen: set[str] = set()
            while pending:
                current, depth = pending.pop(0)
                for attribute in current.attributes:
                    depths.setdefault(attribute, depth)
                for callee in (current.names | current.attributes) - seen:
                    seen.add(callee)
                    helper = local.get(callee) or helpers.get(callee)
                    if helper is not None and not callee.startswith("test_"):
                        pending.append((helper, depth + 1))
            for attribute, depth in depths.items():
                used.setdefault(attribute, []).append((depth, function.where))
    # The tests that call it themselves come first, then those that call it through a helper.
    covering = {name: [where for _, where in sorted(tests, key=lambda test: test[0])] for name, tests in used.items()}
    return covering, needs, differs


def covered(tests: list[str]) -> str:
    """Return a table cell that names a test and says how many more there are."""
    if not tests:
        return "–"
    more = f" (+{len(tests) - 1})" if len(tests) > 1 else ""
    return f"`{tests[0]}`{more}"


def ioctls() -> list[str]:
    """Return the names of the requests in the order of the ABI's table."""
    return list(abi.REQUESTS | abi.X86_REQUESTS)


def owner(request: str) -> str:
    """Return the class that implements a request on the software side, or nothing."""
    found = [cls for cls in (Kvm, Vm, VcpuIoctls) if callable(getattr(cls, abi.method_name(request), None))]
    return ", ".join(cls.__name__.removesuffix("Ioctls") for cls in found)


def absent(name: str) -> str:
    """Return what the table says of what is not there: why."""
    return f"no: {REASONS[name]}" if name in REASONS else "no"


def ioctl_rows(tests: dict[str, list[str]]) -> Iterator[str]:
    """Yield the table of ioctls."""
    yield "| ioctl | software side | test (tests/conformance) |"
    yield "|---|---|---|"
    for name in ioctls():
        where = owner(name)
        state = REFUSED.get(name) or (f"yes: `{where}.{abi.method_name(name)}`" if where else absent(name))
        yield f"| {name} | {state} | {covered(tests.get(abi.method_name(name), []) if where else [])} |"


def capability_rows(tests: dict[str, list[str]]) -> Iterator[str]:
    """Yield the table of capabilities."""
    yield "| capability | number | software side | test (tests/conformance) |"
    yield "|---|---|---|---|"
    for name, number in vars(abi).items():
        if not name.startswith("KVM_CAP_") or any(mark in name for mark in OTHER_ARCHITECTURES):
            continue
        value = check_extension(number)
        state = absent(name) if not value else "yes" if value == 1 else f"yes: {OF_THE_HOST.get(name, value)}"
        yield f"| {name} | {number} | {state} | {covered(tests.get(name, []))} |"


def difference_rows(needs: dict[str, list[str]], differs: dict[str, list[str]]) -> Iterator[str]:
    """Yield what differs between the sides, and what tests skip for."""
    yield "| the device … | test |"
    yield "|---|---|"
    for reason, where in sorted(differs.items()):
        yield f"| {reason} | {covered(where)} |"
    yield ""
    yield from (f"- {note}" for note in NOTES)
    yield ""
    yield "Hosts differ too. These abilities are probed on the device, and tests that need one are skipped where it is"
    yield "missing; the software side has to have them all:"
    yield ""
    yield from (f"- {ability}: {covered(where)}" for ability, where in sorted(needs.items()))


def main() -> None:
    """Print the document."""
    tests, needs, differs = read_tests()
    print("# The KVM API: what is there, and what tests it")
    print()
    print(f"Generated by `{COMMAND}`: what Linux 6.12's headers name")
    print("for x86, but for encrypted memory and what needs other hardware. Tests are those of")
    print(
        "`tests/conformance`, which run on the software side and, where it opens, on `/dev/kvm`; `(+n)` is the number"
    )
    print("of further tests. What is not there has its reason.")
    print()
    print("\n".join(["## Differences between the sides", "", *difference_rows(needs, differs), ""]))
    print("\n".join(["## Ioctls", "", *ioctl_rows(tests), ""]))
    print("\n".join(["## Capabilities", "", "Those of other architectures are left out.", "", *capability_rows(tests)]))


if __name__ == "__main__":
    main()
