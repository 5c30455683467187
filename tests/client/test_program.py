# SPDX-License-Identifier: Apache-2.0
"""What ``softkvm exec`` makes of the file that it is given: how it is run, or the one line that says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.clients import EXEC, TIMEOUT_S, Completed, assert_ours, run_client

from softkvm.client import launch, program
from softkvm.client.settings import Settings


def run(*command: str | Path, under: tuple[str, ...] = ()) -> Completed:
    """Run a command under ``softkvm exec``."""
    return subprocess.run(
        [*under, *EXEC, "--", *command], check=False, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def assert_line(done: Completed, status: int, words: str) -> None:
    """Make sure that it has ended with one line of ours."""
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("softkvm: ") and done.stderr.count("\n") == 1 and words in done.stderr


def executable(path: Path, contents: bytes) -> Path:
    """Make a file that may be executed."""
    path.write_bytes(contents)
    path.chmod(0o755)
    return path


def changed(binary: Path, to: Path, offset: int, value: bytes) -> Path:
    """Make a copy of a program in which some bytes differ."""
    contents = binary.read_bytes()
    return executable(to, contents[:offset] + value + contents[offset + len(value) :])


#: By name: contents, exit status as a shell's, and what is said.
FILES = {
    "no program": (b"neither one nor the other", 126, "Exec format error"),
    "an empty file": (b"", 126, "Exec format error"),
    "the beginning of a program": (Path(sys.executable).read_bytes()[:300], 126, ""),
    "a script whose interpreter is not there": (b"#!/nonexistent/sh\n", 127, "its interpreter /nonexistent/sh"),
    "a script without an interpreter": (b"#!\n", 126, "Exec format error"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_executed(tmp_path: Path, name: str) -> None:
    contents, status, words = FILES[name]
    assert_line(run(executable(tmp_path / "client", contents)), status, words)


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    assert_line(run(tmp_path), 126, "Permission denied")
    os.mkfifo(tmp_path / "fifo", 0o755)
    assert_line(run(tmp_path / "fifo"), 126, "Permission denied")
    (tmp_path / "plain").touch(0o644)
    assert_line(run(tmp_path / "plain"), 126, "Permission denied")
    assert_line(run(tmp_path / "plain" / "within"), 127, "")
    assert_line(run("a-command-that-nobody-has"), 127, "No such file or directory")


@pytest.mark.parametrize("options", [(), ("-static",)])
def test_programs_of_other_machines(build: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    binary = build("environments", *options)
    assert_line(run(changed(binary, tmp_path / "arm", 18, b"\xb7")), 126, "")
    assert_line(run(changed(binary, tmp_path / "x32", 4, b"\x01")), 1, "32-bit")


def test_a_program_whose_dynamic_linker_is_not_there(build: Callable[..., Path], tmp_path: Path) -> None:
    binary = build("environments")
    linker = program.read(str(binary)).interpreter
    at = binary.read_bytes().index(linker.encode())
    other = "/nonexistent/ld.so"[: len(linker)].encode().ljust(len(linker), b"\0")
    assert_line(run(changed(binary, tmp_path / "client", at, other)), 127, "its interpreter /nonexistent")


def test_a_program_of_another_c_library_is_for_the_loader(build: Callable[..., Path], tmp_path: Path) -> None:
    binary = build("environments")
    found = program.read(str(binary))
    assert found.interpreter and not found.is_for_loader
    linker = found.interpreter.encode()
    at = binary.read_bytes().index(linker)
    musl = program.read(str(changed(binary, tmp_path / "musl", at, b"/lib/ld-musl-x.so.1".ljust(len(linker), b"\0"))))
    assert musl.interpreter and musl.is_for_loader
    assert program.read(str(build("environments", "-static"))).is_for_loader


@pytest.mark.parametrize("options", [(), ("-static",)])
def test_a_program_with_rights_of_its_own(build: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root can make one")
    client = tmp_path / "client"
    shutil.copy(build("environments", *options), client)
    os.chown(client, 65534, 65534)
    for mode, words in ((0o4755, "set-user-ID"), (0o2755, "set-group-ID")):
        client.chmod(mode)
        if os.statvfs(client).f_flag & os.ST_NOSUID:
            pytest.skip("it has none on this file system")
        assert_line(run(client, "works"), 1, words)
        done = run(client, "works", under=("setpriv", "--no-new-privs"))
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("options", [(), ("-static",)])
def test_scripts_are_run_by_their_interpreters(
    build: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    binary = build("environments", *options)
    (tmp_path / "client").symlink_to(binary)
    script = executable(tmp_path / "script", f"#! {tmp_path}/client works \n".encode())
    other = executable(tmp_path / "other", f"#!{script}\n".encode())
    for file in (script, other):
        done = run_client([file, "and", "arguments"], tmp_path / "stats", "KVM_RUN")
        assert (done.returncode, done.stderr) == (0, "")
    shell = executable(
        tmp_path / "shell", f'#!/bin/sh\n[ "$*" = "a b" ] && exec {build("environments")} works\n'.encode()
    )
    done = run_client([shell, "a", "b"], tmp_path / "stats", "KVM_RUN")
    assert (done.returncode, done.stderr) == (0, "")


def test_scripts_lead_to_their_interpreters_with_arguments(tmp_path: Path) -> None:
    one = executable(tmp_path / "one", b"#!/bin/sh -e -u \n")
    two = executable(tmp_path / "two", f"#!{one} x\n".encode())
    found = program.resolve(str(two), ["two", "a", "b"])
    assert found.path == "/bin/sh"
    assert found.arguments == ["/bin/sh", "-e -u", str(one), "x", str(two), "a", "b"]
    assert program.resolve(sys.executable, ["python"]).arguments == ["python"]


def test_kinds_of_programs(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    empty = tmp_path / "empty"
    empty.touch()
    go = tmp_path / "go"
    go.write_bytes(b"\x7fELF\x02" + bytes(60) + b"\x04\0\0\0Go\0\0/dev/kvm\0")
    found = [program.is_dynamic_go(str(path)) for path in (script, empty, go, Path(sys.executable))]
    assert found == [False, False, True, False]
    others = (script, empty, Path(sys.executable).resolve())
    assert [program.read(str(path)).is_for_loader for path in others] == [False] * 3


OTHER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
    return (void *)syscall(SYS_mmap, address, size, protection, flags, fd, offset);
}
int munmap(void *address, size_t size) { return syscall(SYS_munmap, address, size); }
int clock_gettime(clockid_t clock, struct timespec *now) {
    (void)clock;
    now->tv_sec = 1;
    now->tv_nsec = 0;
    return 0;
}
int open(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    int (*next)(const char *, int, int) = (int (*)(const char *, int, int))dlsym(RTLD_NEXT, "open");
    return next(path, flags, mode);
}
"""


@pytest.mark.parametrize("order", ["before", "behind"])
def test_another_preloaded_library_stands_where_it_likes(
    build: Callable[..., Path], tmp_path: Path, order: str
) -> None:
    library = tmp_path / "other.so"
    compiler: list[str | Path] = ["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"]
    subprocess.run(compiler, check=True, input=OTHER, text=True, timeout=TIMEOUT_S)
    client: list[str | Path] = [build("environments"), "works"]
    if order == "behind":
        done = run_client(client, tmp_path / "stats", "KVM_RUN", env={**os.environ, "LD_PRELOAD": str(library)})
    else:
        shell: list[str | Path] = ["sh", "-c", f'LD_PRELOAD="{library} $LD_PRELOAD" exec "$@"', "sh", *client]
        done = run_client(shell, tmp_path / "stats", "KVM_RUN")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_python_without_its_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(launch.LaunchError, match=r"this Python has no libpython3\.\d+\.so to load into a client"):
        launch.python_library()


def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """The preloaded library in a directory of this name."""
    directory = tmp_path / name
    directory.mkdir()
    library = directory / launch.PRELOAD.name
    shutil.copy(launch.PRELOAD, library)
    monkeypatch.setattr(launch, "PRELOAD", library)
    return library


# What ld.so(8) takes for the end of a name in LD_PRELOAD, or for the begin of a token.
@pytest.mark.parametrize("name", ["two words", "a:b", "a$LIB", "tab\tbed"])
def test_a_softkvm_whose_path_cannot_be_preloaded(
    build: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    library = installed(tmp_path, monkeypatch, name)
    stats = tmp_path / "stats"
    settings = Settings({}, [], "", str(stats))
    for _ in range(2):  # the second finds the first's link
        client = launch.prepare([str(build("environments")), "works"], settings)
        assert Path(client.environment["LD_PRELOAD"].split()[0]).samefile(library)
        done = subprocess.run(
            [client.executable, *client.arguments[1:]],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=client.environment,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert_ours(stats, "KVM_RUN")
    link = Path(client.environment["LD_PRELOAD"].split()[0])
    link.unlink()
    link.parent.rmdir()


def test_a_path_of_other_characters_is_preloaded_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = installed(tmp_path, monkeypatch, "äöü,;%")
    assert launch.preloadable(library) == library


def test_no_link_is_made_where_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = installed(tmp_path, monkeypatch, "two words")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    link = launch.preloadable(library)
    assert link.parent.parent == tmp_path
    link.parent.chmod(0o777)
    elsewhere = launch.preloadable(library)
    assert elsewhere.parent.parent != tmp_path
    elsewhere.unlink()
    elsewhere.parent.rmdir()


def test_a_path_that_cannot_be_preloaded_and_no_place_for_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: os.rmdir("/nonexistent"))
    with pytest.raises(launch.LaunchError, match="/a b/c: LD_PRELOAD takes no path with a space"):
        launch.preloadable(Path("/a b/c"))
