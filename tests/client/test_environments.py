# SPDX-License-Identifier: Apache-2.0
"""``softkvm exec`` works wherever a client is run, or says in one line why it cannot."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.support.clients import EXEC, TIMEOUT_S, Completed, run_client

LINKED = pytest.mark.parametrize("options", [(), ("-static",)], ids=["dynamic", "static"])


def run(command: Sequence[str | Path], cwd: str | Path | None = None) -> Completed:
    """Run a command to its end."""
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd)


def assert_well(done: Completed) -> None:
    """Make sure that a program's checks held, and nobody has said anything."""
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


#: By what is strange: the environment's variables, all of them where the first is None.
VARIABLES: dict[str, dict[str, str | None]] = {
    "none": {"": None},
    "no HOME": {"HOME": None},
    "HOME is not there": {"HOME": "/nonexistent"},
    "TMPDIR is not there": {"TMPDIR": "/nonexistent"},
    "no PATH": {"PATH": None},
    "a locale that is not there": {"LC_ALL": "xx_YY.UTF-8"},
    "no UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("variables", VARIABLES)
def test_variables_of_the_environment(build: Callable[..., Path], tmp_path: Path, variables: str) -> None:
    changes = VARIABLES[variables]
    environment = {} if "" in changes else {name: text for name, text in os.environ.items() if name not in changes}
    environment |= {name: text for name, text in changes.items() if text is not None}
    done = run_client([build("environments"), "works"], tmp_path / "stats", "KVM_RUN", env=environment)
    assert_well(done)


#: Variables for Python that a client may have: the interpreter in it has nothing to do with them.
@pytest.mark.parametrize("name", ["PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONMALLOC"])
def test_a_clients_own_variables_for_python(build: Callable[..., Path], tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for module in ("enum", "typing", "ctypes", "softkvm"):
        (theirs / f"{module}.py").write_text("raise SystemExit('not this one')")
    command: list[str | Path] = ["env", f"{name}={theirs}", build("environments"), "works"]
    assert_well(run_client(command, tmp_path / "stats", "KVM_RUN"))


def test_a_file_mode_mask_that_leaves_nothing(build: Callable[..., Path], tmp_path: Path) -> None:
    shell = ["sh", "-c", 'umask 0777; exec "$@"', "sh"]
    assert_well(run([*shell, *EXEC, "--", build("environments"), "works"], cwd=tmp_path))


def test_a_directory_that_is_gone(build: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    shell = ["sh", "-c", 'rmdir ../gone; exec "$@"', "sh"]
    command: list[str | Path] = [*shell, sys.executable, "-P", *EXEC[1:], "--", build("environments"), "works"]
    assert_well(run(command, cwd=tmp_path / "gone"))


@pytest.mark.parametrize("limit", ["-l 0", "-c 0", "-s unlimited", "-t 1000"])
def test_limits(build: Callable[..., Path], limit: str) -> None:
    shell = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh"]
    assert_well(run([*shell, *EXEC, "--", build("environments"), "works"]))


@pytest.mark.parametrize("case", ["no_more_descriptors", "no_locked_memory"])
def test_what_a_client_has_no_more(holds: Callable[..., None], case: str) -> None:
    holds("environments", case)


def test_a_static_client_that_has_no_more_descriptors(holds_static: Callable[..., None]) -> None:
    holds_static("environments", "no_more_descriptors")


def test_no_descriptor_for_the_first_open(client: Callable[..., Completed]) -> None:
    done = client("environments", "no_descriptors_at_the_first_open")
    why = f"{os.strerror(errno.EMFILE)}"
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.startswith("softkvm: ") and done.stderr.count("\n") == 1 and why in done.stderr


def test_no_file_system_can_be_written(build: Callable[..., Path], in_namespace: Callable[..., list[str]]) -> None:
    program = str(build("environments"))
    read_only = "mount -o remount,bind,ro / 2>/dev/null || mount -r --bind / /mnt"
    assert_well(run(in_namespace(read_only, *EXEC, "--", program, "works")))


@pytest.mark.parametrize("missing", ["/sys", "/dev", "/tmp"])
def test_directories_that_are_not_there(
    build: Callable[..., Path], in_namespace: Callable[..., list[str]], missing: str
) -> None:
    program = build("environments")
    if program.is_relative_to(missing):
        # Somewhere else, for the time being.
        command = f"exec 9<{program}; mount -t tmpfs none {missing}; cp /dev/fd/9 /tmp/program; chmod +x /tmp/program"
        program = Path("/tmp/program")
    else:
        command = f"mount -t tmpfs none {missing}"
    if any(Path(path).is_relative_to(missing) for path in (sys.executable, *sys.path) if path):
        pytest.skip(f"Python is in {missing}")
    assert_well(run(in_namespace(command, *EXEC, "--", str(program), "works")))


@LINKED
def test_without_proc_it_takes_a_right_to_mount_one(
    build: Callable[..., Path], in_namespace: Callable[..., list[str]], options: tuple[str, ...]
) -> None:
    if os.geteuid():
        pytest.skip("only root may mount one")
    program = str(build("environments", *options))
    unshare = ["unshare", "--mount", "--propagation", "private"]
    without = ["sh", "-ec", 'mount -t tmpfs none /proc; exec "$@"', "sh"]
    assert_well(run([*unshare, *without, *EXEC, "--", program, "works_without_proc"]))
    # In a namespace of users that has no /proc, there can be none.
    done = run(in_namespace("mount -t tmpfs none /proc", *EXEC, "--", program, "does_not_open"))
    why = f"/proc is not mounted, and cannot be: {os.strerror(errno.EPERM)}"
    assert (done.returncode, done.stderr) == (0, f"softkvm: KVM could not be loaded: {why}\n")


@LINKED
def test_a_client_that_changes_its_root(
    build: Callable[..., Path], in_namespace: Callable[..., list[str]], options: tuple[str, ...]
) -> None:
    assert_well(run(in_namespace(":", *EXEC, "--", str(build("environments", *options)), "root_changes")))


def test_another_user(build: Callable[..., Path]) -> None:
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if not shutil.which("setpriv") or run([*other, *EXEC, "--", "true"]).returncode:
        pytest.skip("nobody cannot run this Python, or we cannot become nobody")
    program = build("environments")
    for directory in (program.parent, *program.parent.parents[:2]):
        directory.chmod(0o755)
    assert_well(run([*other, *EXEC, "--", program, "works"], cwd="/"))


def test_a_user_in_a_namespace(build: Callable[..., Path]) -> None:
    unshare = ["unshare", "--map-root-user"]
    if not shutil.which("unshare") or run([*unshare, "true"]).returncode:
        pytest.skip("no namespaces here")
    assert_well(run([*unshare, *EXEC, "--", build("environments"), "works"]))


def test_no_files_in_memory(build: Callable[..., Path]) -> None:
    done = run([*EXEC, "--", build("refusing"), "memfd_create", build("environments"), "does_not_open"])
    why = f"memfd_create: {os.strerror(errno.EPERM)}"
    assert (done.returncode, done.stderr) == (0, f"softkvm: KVM could not be loaded: {why}\n")


def test_a_signal_that_ends_a_client_is_its_status(build: Callable[..., Path]) -> None:
    for name in (signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT):
        done = run([*EXEC, "--", "sh", "-c", f"kill -{int(name)} $$"])
        assert (done.returncode, done.stderr) == (-name, "")
