# SPDX-License-Identifier: Apache-2.0
"""The kernel that runs in a guest: its symbols, types, variables and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final

from softkvm.vmm.debug.virtual import MemoryFault
from softkvm.vmm.linux import vmcoreinfo
from softkvm.vmm.linux.btf import Btf, Kind, Type
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.linux.kallsyms import Symbol, Symbols, read_kallsyms, read_system_map
from softkvm.vmm.linux.value import Value
from softkvm.vmm.linux.variables import VARIABLES
from softkvm.vmm.linux.vmlinux import read_vmlinux
from softkvm.vmm.memory import GuestMemory

_BTF_MOST: Final = 1 << 28


class Kernel:
    """The Linux kernel in *memory*; KernelError if there is none that tells of itself, or not yet.

    Everything is read when it is first asked for, out of guest memory: symbols from kallsyms (or from *system_map*, or
    the symbols of *vmlinux*, which KASLR's offset is added to), types from BTF. The guest may run meanwhile; what it
    changes while it is read is read as it comes.
    """

    def __init__(self, memory: GuestMemory, *, system_map: Path | None = None, vmlinux: Path | None = None) -> None:
        self.memory = memory
        self.vmcoreinfo, self.page_tables = vmcoreinfo.find(memory)
        self._system_map = system_map
        self._vmlinux = vmlinux

    def __repr__(self) -> str:
        return f"<Kernel: Linux {self.release}>"

    @property
    def release(self) -> str:
        """The release, as ``uname -r`` says it."""
        return self.vmcoreinfo.release

    # -- memory

    def read(self, address: int, size: int) -> bytes:
        """Return memory at a virtual address of the kernel's; MemoryFault if it isn't there."""
        try:
            return self.page_tables.read(address, size)
        except MemoryFault:
            self.page_tables.forget()  # what was kept may be old
            return self.page_tables.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Store at a virtual address of the kernel's; MemoryFault, and nothing written, if it isn't there."""
        self.page_tables.forget()
        self.page_tables.write(address, data)

    # -- symbols

    @cached_property
    def symbols(self) -> Symbols:
        """The kernel's symbols, without those of its modules (:meth:`module_symbols`)."""
        offset = self.vmcoreinfo.offset
        if self._system_map is not None:
            found = read_system_map(self._system_map.read_bytes())
        elif self._vmlinux is not None:
            found = read_vmlinux(self._vmlinux).symbols
        else:
            return Symbols(read_kallsyms(self.vmcoreinfo, self.read))
        percpu = 1 << 32  # per-CPU addresses are none of the image's
        return Symbols(
            (address + offset if address >= percpu else address, kind, name, module)
            for address, kind, name, module in found
        )

    def module_symbols(self) -> Symbols:
        """Return the symbols of the kernel and of the modules that are loaded now."""
        found = [(symbol.address, symbol.type, symbol.name, "") for symbol in self.symbols]
        for module in self.modules():
            found += _of_module(module)
        return Symbols(found)

    def symbol(self, name: str) -> int:
        """Return the address of a symbol; KernelError if there is none."""
        try:
            return self.symbols[name]
        except KeyError:
            raise KernelError(f"Linux {self.release} has no symbol {name!r}") from None

    def symbolize(self, address: int) -> str:
        """Return an address as ``symbol+0x12``; as a number if it is in none."""
        found = self.symbols.at(address)
        return f"{address:#x}" if found is None else spell(found)

    # -- types and variables

    @cached_property
    def btf(self) -> Btf:
        """The kernel's types; KernelError if it has none (CONFIG_DEBUG_INFO_BTF)."""
        try:
            start, end = self.symbols["__start_BTF"], self.symbols["__stop_BTF"]
        except KeyError:
            raise KernelError(f"Linux {self.release} has no BTF: CONFIG_DEBUG_INFO_BTF is not set") from None
        if not 0 < end - start <= _BTF_MOST:
            raise KernelError(f"Linux {self.release} has BTF of {end - start} bytes")
        return Btf(self.read(start, end - start))

    def type(self, text: str) -> Type:
        """Return the type that C would write so: ``struct task_struct``, ``char [16]``."""
        return self.btf.named(text)

    def object(self, type: str | Type, address: int) -> Value:
        """Return the object of a type at an address."""
        return Value(self, self.type(type) if isinstance(type, str) else type, address)

    def variable_type(self, name: str) -> Type:
        """Return a variable's type: of a per-CPU one from BTF, of another from a table; KernelError if not there."""
        found = self.btf.find(name, Kind.VAR)
        if found is not None:
            return self.btf.target(found)
        text = VARIABLES.get(name)
        if text is None:
            raise KernelError(f"the type of {name!r} is not known (BTF has those of per-CPU variables): name it")
        type = self.type(text)
        symbol = self.symbols.find(name)
        if type.kind is Kind.ARRAY and not type.count and symbol is not None:  # as long as its initializer
            type = self._sized(type, symbol)
        return type

    def _sized(self, array: Type, symbol: Symbol) -> Type:
        """Return the type of an array that reaches up to the next symbol, without what only fills that gap."""
        element = self.btf.target(array)
        size = max(self.btf.size(element), 1)
        count = symbol.size // size
        if self.btf.resolve(element).kind is Kind.PTR:
            data = self.read(symbol.address, count * size)
            count = -(-len(data.rstrip(b"\0")) // size)
        return Type(Kind.ARRAY, target=element, count=count)

    def __getitem__(self, name: str) -> Value:
        """Return a variable by name; of a per-CPU one the template, see :meth:`per_cpu`."""
        return self.variable(name)

    def variable(self, name: str, type: str | None = None) -> Value:
        """Return a variable; *type* is needed where the kernel does not tell it (:meth:`variable_type`)."""
        return Value(self, self.type(type) if type is not None else self.variable_type(name), self.symbol(name))

    def per_cpu(self, name: str, cpu: int, type: str | None = None) -> Value:
        """Return a processor's own copy of a per-CPU variable."""
        value = self.variable(name, type)
        offset = int(self.variable("__per_cpu_offset")[cpu])
        return Value(self, value.type_, value.address_ + offset & (1 << 64) - 1)

    # -- what it runs

    def tasks(self) -> Iterator[Value]:
        """Yield the ``struct task_struct`` of every process, the idle one (``init_task``) first."""
        first = self.variable("init_task")
        yield first
        yield from first.tasks.list_("struct task_struct", "tasks")

    def current(self, cpu: int) -> Value:
        """Return the ``struct task_struct`` that a processor runs."""
        for name, path in (("current_task", ""), ("pcpu_hot", "current_task"), ("const_current_task", "")):
            if name in self.symbols:
                value = self.per_cpu(name, cpu)
                return (value.member_(path) if path else value).dereference_()
        raise KernelError(f"Linux {self.release} does not say what a processor runs")

    def modules(self) -> Iterator[Value]:
        """Yield the ``struct module`` of every module that is loaded."""
        return self.variable("modules").list_("struct module", "list")

    def log(self) -> str:
        """Return the kernel's log, as ``dmesg`` shows it."""
        from softkvm.vmm.linux.log import read_log

        return read_log(self)


def spell(found: tuple[Symbol, int]) -> str:
    """Return a symbol and an offset as text."""
    symbol, offset = found
    module = f" [{symbol.module}]" if symbol.module else ""
    return f"{symbol.name}+{offset:#x}{module}"


_ELF64_SYM: Final = 24
_MODULE_SYMBOLS_MOST: Final = 1 << 18


def _of_module(module: Value) -> list[tuple[int, str, str, str]]:
    """Return a module's symbols (``struct mod_kallsyms``): address, type, name, module."""
    name = module.member_("name").string_()
    table = module.member_("kallsyms")
    count = int(table.num_symtab)
    if not int(table) or not 0 < count <= _MODULE_SYMBOLS_MOST:
        return []
    kinds = table.typetab.string_(count) if "typetab" in table.members_() else ""
    data = table.symtab[0].address_
    source = module._source_
    entries = source.read(data, _ELF64_SYM * count)
    strings = int(table.strtab)
    found = []
    for n in range(1, count):
        entry = entries[_ELF64_SYM * n : _ELF64_SYM * (n + 1)]
        at, value = int.from_bytes(entry[:4], "little"), int.from_bytes(entry[8:16], "little")
        try:
            text = Value(source, source.btf.named("char [0]"), strings + at).string_(512)
        except MemoryFault:
            continue
        if text and value:
            found.append((value, kinds[n : n + 1] or "t", text, name))
    return found
