# SPDX-License-Identifier: Apache-2.0
"""Starts a client whose ``/dev/kvm`` is KVM in Python."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from softkvm.client.settings import Settings

PRELOAD = Path(__file__).parent / "libsoftkvm_preload.so"
LOADER = Path(__file__).parent / "softkvm-load"

_PT_INTERP = 3
#: The head of a note of Go's linker with the build's identification (its section is ``.note.go.buildid``).
_GO_NOTE = struct.pack("<I", 4) + b"Go\0\0"


class LaunchError(Exception):
    """Why a client cannot be started, in one line."""


def python_library() -> Path:
    """Return this interpreter as a shared library."""
    names = {name for key in ("INSTSONAME", "LDLIBRARY") if (name := sysconfig.get_config_var(key)) and ".so" in name}
    names |= {f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"}
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    places = [sysconfig.get_config_var("LIBDIR") or "", f"{sys.base_prefix}/lib", f"/usr/lib/{multiarch}", "/usr/lib64"]
    for place in places:
        for name in names:
            path = Path(place, name)
            if path.exists():
                return path
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    raise LaunchError(f"this Python has no {name}.so to load into a client: apt-get install {name}")


def world_script(path: Sequence[str], settings: Settings) -> str:
    """Return what the interpreter in the client runs; its variable ``core`` is what the client's side needs."""
    package = str(Path(__file__).parents[2])
    return f"""import sys
if sys.flags.no_site and sys.flags.ignore_environment:
    sys.path[:] = {list(path)!r}
else:  # the client's own interpreter
    sys.path.append({package!r})
try:
    from softkvm.client.world import start
    core = start({settings.as_dict()!r})
except BaseException as error:
    import os
    if os.environ.get("PYTHONDEVMODE"):
        raise
    kind = type(error).__name__
    why = str(error.strerror if isinstance(error, OSError) else f"{{kind}}: {{error}}" if str(error) else kind)
"""


def environment(before: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Return the environment of a client that is to be started with ``before``."""
    if not PRELOAD.exists():
        raise LaunchError(f"{PRELOAD.name} is not built")
    preloaded = [str(PRELOAD), *before.get("LD_PRELOAD", "").split()]
    path = [str(Path(entry).absolute()) for entry in sys.path]
    return {
        **before,
        "LD_PRELOAD": " ".join(preloaded),
        "SOFTKVM_LIBPYTHON": str(python_library()),
        "SOFTKVM_PYTHON": sys.executable,
        "SOFTKVM_WORLD": world_script(path, settings),
    }


def is_static(path: str) -> bool:
    """Tell whether a file is a program that no dynamic linker loads: one without PT_INTERP."""
    with open(path, "rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False
        (offset,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        file.seek(offset)
        table = file.read(size * count)
    return all(struct.unpack_from("<I", table, n)[0] != _PT_INTERP for n in range(0, len(table) - 3, size))


def is_dynamic_go(path: str) -> bool:
    """Tell whether a dynamically linked program is a KVM client in Go, which makes its system calls itself."""
    if not os.path.getsize(path):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        return contents[:4] == b"\x7fELF" and contents.find(_GO_NOTE) >= 0 and contents.find(b"/dev/kvm") >= 0


class Client(NamedTuple):
    """A client that is to be started: as ``execve()`` takes it."""

    executable: str
    arguments: list[str]
    environment: dict[str, str]


def prepare(command: Sequence[str], settings: Settings) -> Client:
    """Return how a client is started; LaunchError, or FileNotFoundError, if it cannot be."""
    variables = environment(os.environ, settings)
    program = shutil.which(command[0])
    if program is None:
        # What is there but may not be executed, execve() has the right word for.
        if os.sep not in command[0] or not os.path.exists(command[0]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
        return Client(command[0], list(command), variables)
    if not is_static(program):
        if is_dynamic_go(program):
            why = "a dynamically linked Go program makes its system calls itself"
            raise LaunchError(f"{command[0]}: {why}; build it with CGO_ENABLED=0")
        return Client(program, list(command), variables)
    if not LOADER.exists():
        raise LaunchError(f"{LOADER.name} is not built")
    preload = variables.pop("LD_PRELOAD")
    arguments = [LOADER.name, program, *command[1:]]
    return Client(str(LOADER), arguments, {**variables, "SOFTKVM_PRELOAD": preload})


def execute(command: Sequence[str], settings: Settings) -> NoReturn:
    """Become the client; raises OSError, or LaunchError, if that cannot be."""
    client = prepare(command, settings)
    os.execve(client.executable, client.arguments, client.environment)
