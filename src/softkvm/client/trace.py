# SPDX-License-Identifier: Apache-2.0
"""What a client has asked its KVM, and got: every request as it is done, and how many there were.

In strace's manner, a line per request, or as JSON, an object per line, where the file's name ends in ``.json``::

    [4711]     0.001203 vcpu0 KVM_SET_REGS(kvm_regs(rip=0x1000, rflags=2)) = 0
    [4711]     0.001391 vcpu0 KVM_RUN() = 0 KVM_EXIT_IO(direction=1, size=1, port=0x3f8, count=1, data_offset=0x1000)
    [4711]     0.001402 vm0 0x4040aea0() = -1 ENOTTY (Inappropriate ioctl for device)
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from softkvm import _softcpu, abi
from softkvm.abi.arguments import Unread
from softkvm.client.settings import Settings

_SHOWN: Final = 12
#: Larger arrays are not read for the trace.
_SHOWN_BYTES: Final = 1 << 16
"""Elements of a list that a line has."""

#: The member of ``kvm_run`` that an exit reason tells to look at.
EXIT_MEMBERS: Final = {
    abi.KVM_EXIT_UNKNOWN: "hw",
    abi.KVM_EXIT_EXCEPTION: "ex",
    abi.KVM_EXIT_IO: "io",
    abi.KVM_EXIT_HYPERCALL: "hypercall",
    abi.KVM_EXIT_DEBUG: "debug",
    abi.KVM_EXIT_MMIO: "mmio",
    abi.KVM_EXIT_FAIL_ENTRY: "fail_entry",
    abi.KVM_EXIT_TPR_ACCESS: "tpr_access",
    abi.KVM_EXIT_INTERNAL_ERROR: "internal",
    abi.KVM_EXIT_SYSTEM_EVENT: "system_event",
    abi.KVM_EXIT_IOAPIC_EOI: "eoi",
    abi.KVM_EXIT_HYPERV: "hyperv",
    abi.KVM_EXIT_X86_RDMSR: "msr",
    abi.KVM_EXIT_X86_WRMSR: "msr",
    abi.KVM_EXIT_MEMORY_FAULT: "memory_fault",
}


def text_of(value: Any) -> str:
    """Return an argument or a result in one line."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(value) if -10 < value < 10 else hex(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(text_of, value[:_SHOWN]))
        return f"[{shown}{f', … {len(value)} in all' if len(value) > _SHOWN else ''}]"
    return repr(value)


def plain(value: Any) -> Any:
    """Return an argument or a result as JSON has it."""
    if isinstance(value, (ctypes.Structure, ctypes.Union)):
        return {name: plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, ctypes.Array):
        return bytes(value).hex() if value._type_ in (ctypes.c_uint8, ctypes.c_char) else [plain(v) for v in value]
    if isinstance(value, (list, tuple)):
        return [plain(element) for element in value]
    if isinstance(value, Unread):
        return _read(value)
    return value.hex() if isinstance(value, bytes) else value


def _read(given: Unread) -> str:
    """Return an array that the client has given in hexadecimal; how large it is if it is too large, or not there."""
    try:
        return bytes(given).hex() if len(given) <= _SHOWN_BYTES else repr(given)
    except OSError:
        return repr(given)


def _names(cls: type) -> list[str]:
    return [name for base in reversed(cls.__mro__) for name, *_ in vars(base).get("_fields_", ())]


def exit_of(run: Any) -> tuple[str, Any]:
    """Return the name of the exit that a ``kvm_run`` tells of, and the structure that describes it, or None."""
    member = EXIT_MEMBERS.get(run.exit_reason)
    name = abi.EXIT_REASON_NAMES.get(run.exit_reason, str(run.exit_reason))
    return name, None if member is None else getattr(run, member)


class Recorder:
    """Writes requests to the trace, and counts them."""

    def __init__(self, settings: Settings) -> None:
        self._start = time.monotonic()
        self._stats = settings.stats
        self._lock = threading.Lock()
        self._closed = False
        self._is_child = False
        self._json = settings.trace.endswith(".json")
        self._file = open(settings.trace, "a", buffering=1) if settings.trace else None  # noqa: SIM115
        self.requests: Counter[tuple[str, str]] = Counter()
        """By kind of file and request."""
        self.errors: Counter[tuple[str, str, str]] = Counter()
        """By kind of file, request, and errno's name."""
        self.exits: Counter[str] = Counter()
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        """A child counts what it asks for itself, in a file of its own."""
        if self._stats:
            name, extension = os.path.splitext(self._stats)
            self._stats = f"{name}.{os.getpid()}{extension}"
        for counter in (self.requests, self.errors, self.exits):
            counter.clear()
        self._is_child = True

    def done(
        self, file: str, request: str, args: Sequence[Any], value: int, result: Any = None, run: Any = None
    ) -> None:
        """Note a request that has succeeded; ``run`` is the shared page behind KVM_RUN."""
        self.requests[_kind(file), request] += 1
        exit = None if run is None else exit_of(run)
        if exit is not None:
            self.exits[exit[0]] += 1
        if self._file is None:
            return
        if self._json:
            record = {"args": plain(args), "value": value}
            if exit is not None:
                record |= {"exit": exit[0], "detail": plain(exit[1])}
            elif result is not None:
                record["result"] = plain(result)
            self._write(file, request, record, "")
            return
        after = ""
        if exit is not None:
            _, _, fields = repr(exit[1]).partition("(")
            after = f" {exit[0]}" + (f"({fields}" if exit[1] is not None else "")
        elif result is not None and not isinstance(result, int):
            after = f" {text_of(result)}"
        self._write(file, request, {}, f"({', '.join(map(text_of, args))}) = {value}{after}")

    def failed(self, file: str, request: str, args: Sequence[Any], error: OSError) -> None:
        """Note a request that has failed."""
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        self.errors[_kind(file), request, name] += 1
        why = (error.strerror or "").partition(": ")[2] or os.strerror(error.errno or 0)
        given = ", ".join(map(text_of, args))
        self._write(file, request, {"errno": name, "why": why}, f"({given}) = -1 {name} ({why})")

    def _write(self, file: str, request: str, record: dict[str, Any], line: str) -> None:
        if self._file is None:
            return
        seconds = time.monotonic() - self._start
        thread = threading.get_native_id()
        if self._json:
            record = {"time_s": round(seconds, 6), "thread": thread, "file": file, "request": request, **record}
            line = json.dumps(record)
        else:
            line = f"[{thread}] {seconds:12.6f} {file} {request}{line}"
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(line + "\n")
            except OSError as error:  # the client's request is done, whatever becomes of the line
                print(f"softkvm: --trace {self._file.name}: {error.strerror}", file=sys.stderr)
                self._file = None

    def statistics(self) -> dict[str, Any]:
        """Return what was counted."""
        return {
            "cpuid_sites": _softcpu.client_cpuid_sites(),
            "requests": [
                {"file": file, "request": request, "count": count}
                for (file, request), count in self.requests.most_common()
            ],
            "errors": [
                {"file": file, "request": request, "errno": name, "count": count}
                for (file, request, name), count in self.errors.most_common()
            ],
            "exits": dict(self.exits.most_common()),
        }

    def close(self) -> None:
        """The client has ended: write what was counted."""
        if not self._stats or self._closed or (self._is_child and not self.requests):
            return
        self._closed = True
        try:
            self._write_statistics(self.statistics())
        except OSError as error:  # the client's end is its own, whatever becomes of the file
            print(f"softkvm: --stats {self._stats}: {error.strerror}", file=sys.stderr)

    def _write_statistics(self, statistics: dict[str, Any]) -> None:
        with open(self._stats, "w") as out:
            if self._stats.endswith(".json"):
                json.dump(statistics, out, indent=2)
                out.write("\n")
                return
            if statistics["cpuid_sites"]:
                print(f"{statistics['cpuid_sites']:12} places in the client's code where CPUID is answered", file=out)
            for row in statistics["requests"]:
                print(f"{row['count']:12} {row['file']:6} {row['request']}", file=out)
            for row in statistics["errors"]:
                print(f"{row['count']:12} {row['file']:6} {row['request']} {row['errno']}", file=out)
            for name, count in statistics["exits"].items():
                print(f"{count:12} exit   {name}", file=out)


def _kind(file: str) -> str:
    return file.rstrip("0123456789")
