# SPDX-License-Identifier: Apache-2.0
"""drgn on the kernel of a running guest: memory from the machine, types from the kernel's BTF, symbols from kallsyms.

drgn (0.3) reads DWARF and not BTF. It takes types and objects from functions, though, and makes types of parts: so each
type of BTF becomes one of drgn's when it is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final, Protocol

from softkvm.vmm.linux.btf import Btf, Kind, Type
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.linux.kallsyms import Symbol
from softkvm.vmm.linux.kernel import Kernel
from softkvm.vmm.memory import GuestMemory

_FINDER: Final = "softkvm"


class Machine(Protocol):
    """A :class:`softkvm.Machine`, as far as drgn needs it."""

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs."""

    @property
    def memory(self) -> GuestMemory:
        """The machine's memory."""

    def read_physical(self, address: int, size: int) -> bytes:
        """Return memory; IndexError if it is no RAM."""


def drgn(machine: Machine) -> Any:
    """Return a ``drgn.Program`` on the kernel of *machine*, which may run meanwhile.

    ImportError if drgn is not installed (the extra ``softkvm[drgn]``), KernelError if no Linux kernel has booted, or it
    has no BTF.
    """
    try:
        module = importlib.import_module("drgn")
    except ImportError:
        raise ImportError("softkvm.drgn needs drgn: pip install 'softkvm[drgn]'") from None
    kernel = machine.kernel
    kernel.btf  # noqa: B018 - without it there would be nothing to see, and a finder's error comes late
    flags = module.PlatformFlags.IS_64_BIT | module.PlatformFlags.IS_LITTLE_ENDIAN
    program = module.Program(module.Platform(module.Architecture.X86_64, flags))

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        try:
            return machine.read_physical(address, count)
        except IndexError:
            raise module.FaultError("guest memory is not there", address) from None

    for ram in machine.memory.ranges:
        program.add_memory_segment(ram.start, ram.end - ram.start, read, True)
    finder = _Finder(module, program, kernel)
    program.register_type_finder(_FINDER, finder.find_type, enable_index=0)
    program.register_object_finder(_FINDER, finder.find_object, enable_index=0)
    program.register_symbol_finder(_FINDER, finder.find_symbols, enable_index=0)
    program.set_linux_kernel_custom(kernel.vmcoreinfo.text, True)
    return program


class _Finder:
    """Finds types, objects and symbols for *program*."""

    def __init__(self, drgn: Any, program: Any, kernel: Kernel) -> None:
        self._drgn = drgn
        self._program = program
        self._kernel = kernel
        self._made: dict[int, Any] = {}
        kind = drgn.TypeKind
        self._kinds = {
            kind.INT: (Kind.INT,),
            kind.BOOL: (Kind.INT,),
            kind.FLOAT: (Kind.FLOAT,),
            kind.STRUCT: (Kind.STRUCT, Kind.FWD),
            kind.UNION: (Kind.UNION, Kind.FWD),
            kind.ENUM: (Kind.ENUM, Kind.ENUM64),
            kind.TYPEDEF: (Kind.TYPEDEF,),
        }

    @property
    def _btf(self) -> Btf:
        return self._kernel.btf

    # -- what drgn calls

    def find_type(self, program: Any, kinds: Any, name: str, filename: str | None) -> Any:
        """Find a type by name."""
        if filename:  # BTF knows no files
            return None
        for kind, wanted in self._kinds.items():
            if kind in kinds:
                found = self._btf.find(name, *wanted)
                if found is not None and (
                    found.kind is not Kind.FWD or found.union == (kind == self._drgn.TypeKind.UNION)
                ):
                    made = self._type(found)
                    if made.kind == kind:
                        return made
        return None

    def find_object(self, program: Any, name: str, flags: Any, filename: str | None) -> Any:
        """Find a variable, a function or an enumerator by name."""
        if filename:
            return None
        want = self._drgn.FindObjectFlags
        symbol = self._kernel.symbols.find(name)
        if symbol is not None and flags & want.VARIABLE:
            try:
                type = self._kernel.variable_type(name)
            except KernelError:
                pass
            else:
                return self._drgn.Object(self._program, self._type(type), address=symbol.address)
        if symbol is not None and flags & want.FUNCTION:
            function = self._btf.find(name, Kind.FUNC)
            if function is not None:
                type = self._btf.target(function)
                return self._drgn.Object(self._program, self._type(type), address=symbol.address)
        if flags & want.CONSTANT:
            found = self._enumerators.get(name)
            if found is not None:
                return self._drgn.Object(self._program, self._type(found[0]), value=found[1])
        return None

    def find_symbols(self, program: Any, name: str | None, address: int | None, one: bool) -> list[Any]:
        """Find symbols by name, by address, or all."""
        symbols = self._kernel.symbols
        if name is not None:
            found = symbols.named(name)
            if address is not None:
                found = [symbol for symbol in found if symbol.address <= address < symbol.address + symbol.size]
        elif address is not None:
            at = symbols.at(address)
            found = [] if at is None else [at[0]]
        else:
            found = list(symbols)
        return [self._symbol(symbol) for symbol in (found[:1] if one else found)]

    def _symbol(self, symbol: Symbol) -> Any:
        binding, kind = self._drgn.SymbolBinding, self._drgn.SymbolKind
        bound = binding.WEAK if symbol.type in "wWvV" else binding.GLOBAL if symbol.type.isupper() else binding.LOCAL
        return self._drgn.Symbol(
            symbol.name, symbol.address, symbol.size, bound, kind.FUNC if symbol.type in "tTwW" else kind.OBJECT
        )

    @cached_property
    def _enumerators(self) -> dict[str, tuple[Type, int]]:
        found: dict[str, tuple[Type, int]] = {}
        for type in self._btf.all(Kind.ENUM, Kind.ENUM64):
            for name, value in type.enumerators:
                found.setdefault(name, (type, value))
        return found

    # -- types

    def _type(self, type: Type) -> Any:
        """Return drgn's type for one of BTF's."""
        if not type.number:  # a constructed one, or void
            return self._make(type)
        made = self._made.get(type.number)
        if made is None:
            made = self._made[type.number] = self._make(type)
        return made

    def _target(self, type: Type) -> Any:
        return self._type(self._btf.target(type))

    def _later(self, number: int) -> Callable[[], Any]:
        return lambda: self._type(self._btf.type(number))

    def _make(self, type: Type) -> Any:
        program, name = self._program, type.name or None
        match type.kind:
            case Kind.VOID:
                return program.void_type()
            case Kind.INT:
                if type.is_bool:
                    return program.bool_type(type.name, type.size)
                return program.int_type(type.name, type.size, type.signed)
            case Kind.FLOAT:
                return program.float_type(type.name, type.size)
            case Kind.PTR:
                return program.pointer_type(self._target(type))
            case Kind.ARRAY:
                return program.array_type(self._target(type), type.count or None)
            case Kind.STRUCT | Kind.UNION:
                make = program.struct_type if type.kind is Kind.STRUCT else program.union_type
                return make(name, type.size, tuple(self._members(type)))
            case Kind.FWD:
                whole = self._btf.find(type.name, Kind.UNION if type.union else Kind.STRUCT)
                if whole is not None:
                    return self._type(whole)
                return (program.union_type if type.union else program.struct_type)(name)
            case Kind.ENUM | Kind.ENUM64:
                if not type.enumerators:
                    return program.enum_type(name)
                values = [self._drgn.TypeEnumerator(*enumerator) for enumerator in type.enumerators]
                signed = type.signed or any(value < 0 for _, value in type.enumerators)
                return program.enum_type(name, self._integer(type.size, signed=signed), values)
            case Kind.TYPEDEF:
                return program.typedef_type(type.name, self._target(type))
            case Kind.CONST | Kind.VOLATILE | Kind.RESTRICT:
                target = self._target(type)
                return target.qualified(target.qualifiers | getattr(self._drgn.Qualifiers, type.kind.name))
            case Kind.FUNC_PROTO:
                variadic = bool(type.parameters) and type.parameters[-1] == ("", 0)
                parameters = [
                    self._drgn.TypeParameter(self._later(number), name or None)
                    for name, number in type.parameters[: -1 if variadic else None]
                ]
                return program.function_type(self._target(type), parameters, variadic)
            case _:
                return self._target(type)

    def _integer(self, size: int, *, signed: bool) -> Any:
        """Return an integer type of a size, for an enumeration."""
        names = {1: "char", 2: "short", 4: "int", 8: "long"}
        name = names.get(size, "int")
        return self._program.int_type(name if signed else f"unsigned {name}", size, signed)

    def _members(self, type: Type) -> list[Any]:
        members = []
        for member in type.members:
            made: Callable[[], Any] = self._later(member.type)
            if member.bit_size:
                made = self._bit_field(member.type, member.bit_size)
            members.append(self._drgn.TypeMember(made, member.name or None, member.bit_offset))
        return members

    def _bit_field(self, number: int, size: int) -> Callable[[], Any]:
        return lambda: self._drgn.Object(self._program, self._type(self._btf.type(number)), bit_field_size=size)
