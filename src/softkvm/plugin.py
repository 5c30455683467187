# SPDX-License-Identifier: Apache-2.0
"""Changes of KVM's policy from outside: ``softkvm run --plugin FILE.py``, and ``exec``; docs/hacking.md has examples.

A plugin is a Python file with a function ``softkvm_plugin(policy)``. It is called once, before there is a virtual
machine, and changes what :class:`Policy` holds: the tables that KVM itself looks into.
"""

from __future__ import annotations

import inspect
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

from softkvm import abi
from softkvm.kvm import TRACEPOINTS, Kvm, Params, Vm
from softkvm.kvm.x86.msr_rows import Msr
from softkvm.kvm.x86.msrs import MSRS
from softkvm.kvm.x86.paravirt.hypercalls import HYPERCALLS, Hypercall
from softkvm.kvm.x86.svm.exits import EXIT_HANDLERS, Handler
from softkvm.trace.tracepoint import Tracepoints
from softkvm.vmm.errors import unexpected

ENTRY_POINT = "softkvm_plugin"

CpuidChange = Callable[[list[abi.kvm_cpuid_entry2]], list[abi.kvm_cpuid_entry2]]


class PluginError(Exception):
    """A plugin cannot be used; the message names the file and says why in one line."""


class Policy:
    """What a plugin may change: the tables of one process's KVM, and what is done for each virtual machine.

    The tables belong to the process, as a kernel module's do to the kernel; the rest belongs to the open KVM.
    """

    exit_handlers: dict[int, Handler] = EXIT_HANDLERS
    """By exit code of the processor (``softkvm.kvm.x86.svm.vmcb.EXIT_*``, APM vol. 2, appendix C): a function of the
    vCPU that returns 1 if the guest goes on and 0 if userspace has to see the exit."""
    msrs: dict[int, Msr] = MSRS
    """By index: ``Msr(read(vcpu, index, host), write(vcpu, index, data, host))``; None and False stand for #GP."""
    hypercalls: dict[int, tuple[Hypercall, int | None]] = HYPERCALLS
    """By number: a function of the vCPU and four arguments that returns the result, and the feature bit that
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID demands, or None."""
    tracepoints: Tracepoints = TRACEPOINTS
    """By name: ``tracepoints["kvm_msr"].register(function)`` has a function called with the values of the fields."""

    def __init__(self, kvm: Kvm) -> None:
        self.params: Params = kvm.params
        """Module parameters (:mod:`softkvm.kvm.params`)."""
        self.cpuid: list[CpuidChange] = kvm.cpuid_changes
        """Functions from what KVM_GET_SUPPORTED_CPUID would be to what it is."""
        self.vm_created: list[Callable[[Vm], object]] = kvm.vm_created
        """Functions that see each new VM, before it has memory: to set ``vm.mmu.mapping_level``, for example."""
        self.at_end: list[Callable[[], object]] = []
        """Functions that are called when ``softkvm run``, or a client, has ended: to print what was counted."""

    def end(self) -> None:
        """Call what was left for the end, each whatever the others do; what it raises is one line on stderr."""
        for function in self.at_end:
            try:
                function()
            except Exception as error:
                print(f"softkvm: at_end: {unexpected(error)}", file=sys.stderr)
        sys.stdout.flush()


def load(path: str | os.PathLike[str], policy: Policy) -> None:
    """Run the plugin at *path* and let it change *policy*; PluginError if it has no entry point or fails."""
    name = os.fspath(path)
    try:
        entry = runpy.run_path(name).get(ENTRY_POINT)
    except Exception as error:
        if isinstance(error, OSError) and error.filename == os.path.abspath(name):
            raise PluginError(f"{name}: {error.strerror or error}") from None
        raise PluginError(f"{name}: {unexpected(error)}") from error
    if not callable(entry) or not _takes_one(entry):
        raise PluginError(f"{name}: has no function {ENTRY_POINT}(policy)")
    try:
        entry(policy)
    except Exception as error:
        raise PluginError(f"{name}: {ENTRY_POINT}: {unexpected(error)}") from error


def _takes_one(function: Any) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    return True
