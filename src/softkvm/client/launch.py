# SPDX-License-Identifier: Apache-2.0
"""Starts a client whose ``/dev/kvm`` is KVM in Python."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from softkvm import _softcpu
from softkvm.client import program
from softkvm.client.settings import Settings

PRELOAD = Path(__file__).parent / "libsoftkvm_preload.so"
LOADER = Path(__file__).parent / "softkvm-load"


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
    # The module's first import has SIGINT raise KeyboardInterrupt in this interpreter, where it would end the client.
    import _signal
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
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


_SEPARATORS = frozenset(" \t\n\v\f\r:$")
"""What a dynamic linker does not take for a character of a file's name in LD_PRELOAD (ld.so(8))."""


def preloadable(library: Path) -> Path:
    """Return a path of the library that LD_PRELOAD can have: its own, or a link's in a directory for temporary files.

    The link's name is the same every time, as others may still start programs by it. Raises LaunchError.
    """
    if _SEPARATORS.isdisjoint(str(library)):
        return library
    import tempfile  # where it is needed: every start of a client would wait for them
    import zlib

    name = f"softkvm-{os.getuid()}-{zlib.crc32(os.fsencode(library)):08x}"
    for place in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]):
        directory = Path(place, name)
        link = directory / library.name
        if not _SEPARATORS.isdisjoint(str(directory)):
            continue
        try:
            directory.mkdir(0o755, exist_ok=True)
            status = directory.lstat()
            # What others can write is not for a process to load.
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                continue
            with contextlib.suppress(FileExistsError):
                link.symlink_to(library)
            if link.samefile(library):
                return link
        except OSError:
            continue
    raise LaunchError(f"{library}: LD_PRELOAD takes no path with a space, `:` or `$`, and no directory can have a link")


def cpuid_table() -> str:
    """Return what the silicon answers to CPUID: a row per leaf and subleaf, ``*`` where all subleaves are alike."""
    rows = []
    for first in (0, 0x8000_0000):
        for leaf in range(first, _softcpu.cpuid(first, 0)[0] + 1):
            answers = [_softcpu.cpuid(leaf, subleaf) for subleaf in range(64)]
            alike = len(set(answers)) == 1
            for subleaf, values in enumerate(answers[:1] if alike else answers):
                if any(values):
                    rows.append(f"{leaf:x}.{'*' if alike else f'{subleaf:x}'}:{','.join(f'{v:x}' for v in values)}")
    return " ".join(rows)


def environment(before: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Return the environment of a client that is to be started with ``before``."""
    if not PRELOAD.exists():
        raise LaunchError(f"{PRELOAD.name} is not built")
    preloaded = [str(preloadable(PRELOAD)), *before.get("LD_PRELOAD", "").split()]
    path = [str(Path(entry).absolute()) for entry in sys.path]
    return {
        **before,
        "LD_PRELOAD": " ".join(preloaded),
        "SOFTKVM_LIBPYTHON": str(python_library()),
        "SOFTKVM_LOADER": str(LOADER),
        "SOFTKVM_PYTHON": sys.executable,
        "SOFTKVM_WORLD": world_script(path, settings),
        "SOFTKVM_CPUID": cpuid_table(),
    }


class Client(NamedTuple):
    """A client that is to be started: as ``execve()`` takes it."""

    executable: str
    arguments: list[str]
    environment: dict[str, str]


def prepare(command: Sequence[str], settings: Settings, *, loader: bool = False) -> Client:
    """Return how a client is started, by the loader if need be or asked for.

    Raises LaunchError, or FileNotFoundError, if it cannot be.
    """
    variables = environment(os.environ, settings)
    path = shutil.which(command[0])
    if path is None:
        # What is there but may not be executed, execve() has the right word for.
        if os.sep not in command[0] or not os.path.exists(command[0]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
        return Client(command[0], list(command), variables)
    found = program.resolve(path, list(command))
    why = program.obstacle(found)
    if why:
        raise LaunchError(f"{command[0]}: {why}")
    if found.program.interpreter and not os.path.exists(found.program.interpreter):
        interpreter = f"{os.strerror(errno.ENOENT)}: its interpreter {found.program.interpreter}"
        raise FileNotFoundError(errno.ENOENT, interpreter, command[0])
    if not (program.needs_loader(found) or (loader and found.program.is_64_bit)):
        return Client(path, list(command), variables)
    if not LOADER.exists():
        raise LaunchError(f"{LOADER.name} is not built")
    preload = variables.pop("LD_PRELOAD")
    arguments = [LOADER.name, found.path, *found.arguments]
    return Client(str(LOADER), arguments, {**variables, "SOFTKVM_PRELOAD": preload})


def execute(command: Sequence[str], settings: Settings, *, loader: bool = False) -> NoReturn:
    """Become the client; raises OSError, or LaunchError, if that cannot be."""
    client = prepare(command, settings, loader=loader)
    os.execve(client.executable, client.arguments, client.environment)
