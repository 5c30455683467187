# SPDX-License-Identifier: Apache-2.0
"""What a file is that is to be executed, as the kernel and the dynamic linker take it, and what keeps KVM out of it."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from softkvm.abi.sizes import Size

_ELF: Final = b"\x7fELF"
_CLASS_64: Final = 2
_PT_INTERP: Final = 3
#: The head of a note of Go's linker with the build's identification (its section is ``.note.go.buildid``).
_GO_NOTE: Final = struct.pack("<I", 4) + b"Go\0\0"

#: What the names of our C library's dynamic linkers begin with.
_LINKER: Final = "ld-linux"

#: So much of a script's first line the kernel looks at (``BINPRM_BUF_SIZE``), and so many scripts may lead to others.
_SCRIPT_LINE: Final = 256
_SCRIPTS: Final = 5

#: As the kernel takes them: 64 KiB of program headers, and PATH_MAX.
_HEADERS: Final = Size(
    "program headers of a client",
    (1 << 16) // 56,
    None,
    element=56,
    giver="file",
    effect="no program, as to execve()",
    where=__name__,
)
_LINKER_PATH: Final = Size(
    "bytes of a dynamic linker's path", 4096, None, giver="file", effect="the rest isn't read", where=__name__
)


class Program(NamedTuple):
    """What a file's head says."""

    interpreter: str = ""
    """A script's, or the dynamic linker of a program; none: "" ."""
    argument: str = ""
    """What a script has its interpreter given first."""
    is_script: bool = False
    is_elf: bool = False
    is_64_bit: bool = False

    @property
    def is_for_loader(self) -> bool:
        """A program into which our C library's dynamic linker loads nothing: static, or of another C library."""
        return self.is_64_bit and not Path(self.interpreter).name.startswith(_LINKER)


def read(path: str) -> Program:
    """Return what a file is; raises OSError if it cannot be read. What is no plain file has no kind."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return Program()
        head = file.read(_SCRIPT_LINE)
        if head[:2] == b"#!":
            interpreter, _, argument = head[2:].partition(b"\n")[0].strip(b" \t").partition(b" ")
            return Program(os.fsdecode(interpreter), os.fsdecode(argument.strip(b" \t")), is_script=True)
        if head[:4] != _ELF or len(head) < 64:
            return Program()
        if head[4] != _CLASS_64:
            return Program(is_elf=True)
        (offset,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        if size != _HEADERS.element or not _HEADERS.allows(count):
            return Program()  # the kernel executes it as little
        table = _read_at(file, offset, _HEADERS.bytes(count))
        for kind, _, start, _, _, length, _, _ in struct.iter_unpack("<IIQQQQQQ", table[: len(table) // size * size]):
            if kind == _PT_INTERP:
                linker = os.fsdecode(_read_at(file, start, _LINKER_PATH.cut(length)).rstrip(b"\0"))
                return Program(linker, is_elf=True, is_64_bit=True) if linker else Program()
        return Program(is_elf=True, is_64_bit=True)


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Return what lies at *offset*, nothing where no file reaches to."""
    return os.pread(file.fileno(), size, offset) if offset < 1 << 63 else b""


class Command(NamedTuple):
    """The program that runs in the end, and how it is called: a script's is its interpreter."""

    path: str
    arguments: list[str]
    """All of its arguments; the first is its name."""
    program: Program


def resolve(path: str, arguments: list[str]) -> Command:
    """Follow scripts to what interprets them, as execve() does (execve(2), "Interpreter scripts")."""
    program = read(path)
    for _ in range(_SCRIPTS):
        if not program.is_script or not os.access(program.interpreter, os.X_OK):
            break
        first = [program.interpreter, program.argument] if program.argument else [program.interpreter]
        path, arguments = program.interpreter, [*first, path, *arguments[1:]]
        program = read(path)
    return Command(path, arguments, program)


def is_dynamic_go(path: str) -> bool:
    """Tell whether a dynamically linked program is a KVM client in Go, which makes its system calls itself."""
    if not os.path.getsize(path):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        return contents[:4] == _ELF and contents.find(_GO_NOTE) >= 0 and contents.find(b"/dev/kvm") >= 0


def _has_no_new_privs() -> bool:
    with suppress(OSError), open("/proc/self/status") as status:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in status)
    return False


def _gains(path: str) -> str:
    """Return what a file that is executed gives its process that this one has not: "" for nothing."""
    file = os.stat(path)
    if _has_no_new_privs() or os.statvfs(path).f_flag & os.ST_NOSUID:
        return ""
    if file.st_mode & stat.S_ISUID and file.st_uid != os.getuid():
        return "set-user-ID"
    if file.st_mode & stat.S_ISGID and file.st_mode & stat.S_IXGRP and file.st_gid != os.getgid():
        return "set-group-ID"
    if os.getuid() != 0:
        with suppress(OSError):
            os.getxattr(path, "security.capability")
            return "a file with capabilities"
    return ""


def obstacle(command: Command) -> str:
    """Return why KVM cannot get into a program, "" if it can."""
    program = command.program
    if program.is_elf and not program.is_64_bit:
        return "a 32-bit program; only 64-bit ones can be served"
    gains = _gains(command.path) if program.is_64_bit else ""
    if gains:
        # With such rights the dynamic linker loads nothing that others wish (ld.so(8), "Secure-execution mode"); the
        # loader's process has none.
        return f"{gains}: no KVM gets into it with its rights; `setpriv --no-new-privs softkvm …` runs it without them"
    return ""


def needs_loader(command: Command) -> bool:
    """Tell whether it is the loader that brings KVM into a program: Go's make their system calls themselves."""
    return command.program.is_for_loader or (command.program.is_64_bit and is_dynamic_go(command.path))
