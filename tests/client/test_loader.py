# SPDX-License-Identifier: Apache-2.0
"""What holds for a client that the preload is in, holds for one that the loader runs, whatever it is linked with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.client.test_examples import MUSL
from tests.support.clients import EXEC, TIMEOUT_S, Completed

#: By program. Not among them: what counts the process's threads, of which the loader has its own; reading what is no
#: file of statistics, which is empty there; and a main thread that ends as the process does, which a static C library
#: cannot unwind any more by then.
CASES = {
    "faults": [
        "handler_before_open",
        "handler_after_open",
        "handler_by_other_functions",
        "on_alternate_stack",
        "handlers_call_the_one_before",
        "without_a_handler",
        "handler_for_once",
        "ram_is_unmapped",
        "ram_is_truncated",
        "ram_is_protected",
        "ram_is_read_only",
        "ram_is_covered",
        "ram_is_moved",
        "ram_file_is_unmapped",
        "ram_is_replaced",
        "ram_is_replaced_in_the_last_of_many",
        "client_faults_while_a_guest_runs",
    ],
    "forks": [
        "child",
        "grandchild",
        "while_another_thread_runs",
        "spawned",
        "executed",
        "executed_from_a_thread_that_runs_a_guest",
        "daemon_opens_it",
        "from_many_threads",
        "separate_children_have_none",
    ],
    "descriptors": [
        "copies",
        "close_on_exec_as_the_kernels",
        "numbers_are_the_lowest_free",
        "vm_is_closed_first",
        "raw_close",
        "ranges",
        "over_a_socket",
        "mapping_outlives_its_descriptor",
        "numbers_are_used_again",
        "vms_leave_nothing",
        "vcpus_leave_nothing",
    ],
    "signals": [
        "handler_before_open",
        "handler_after_first_run",
        "handler_by_other_functions",
        "restart_flag",
        "timer",
        "halted",
        "ignored",
        "siginfo",
        "mask_open_in_run",
        "mask_blocked_in_run",
        "immediate_exit_race",
        "longjmp_out",
        "longjmp_out_of_anything",
        "thread_ends_in_handler",
        "cancel_deferred",
        "cancel_asynchronous",
        "exit_under_a_guest",
    ],
    "requests": [
        "wild_pointers",
        "structures_that_end_too_early",
        "read_only_memory",
        "lists_that_are_too_short",
        "arrays_are_read_last",
        "requests_of_other_files",
        "arguments_that_must_be_none",
        "one_vcpu_in_many_threads",
        "fuzzer",
    ],
}


@pytest.mark.parametrize(("program", "case"), [(program, case) for program in CASES for case in CASES[program]])
def test_a_static_client(program: str, case: str, holds_static: Callable[..., None]) -> None:
    holds_static(program, case)


#: For clients that are linked dynamically, a little of everything.
SOME = [
    ("cpuid", "is_the_one_of_kvm"),
    ("faults", "handlers_call_the_one_before"),
    ("faults", "ram_is_replaced"),
    ("forks", "child"),
    ("forks", "spawned"),
    ("forks", "executed"),
    ("requests", "one_vcpu_in_many_threads"),
]


@pytest.mark.parametrize(
    ("program", "case"), [*SOME, ("signals", "siginfo"), ("descriptors", "numbers_are_used_again")]
)
def test_a_dynamic_client_in_the_loader(program: str, case: str, client: Callable[..., Completed]) -> None:
    done = client(program, case, options=("--loader",))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize("linked", ["", "-static"])
@pytest.mark.parametrize(("program", "case"), SOME)
def test_a_client_of_musl(program: str, case: str, linked: str, tmp_path: Path) -> None:
    if not shutil.which(MUSL[0]):
        pytest.skip(f"no {MUSL[0]}")
    source = Path(__file__).parent / "programs" / f"{program}.c"
    client = tmp_path / program
    options = [linked] if linked else []
    subprocess.run([*MUSL, "-O1", "-pthread", *options, "-o", client, source], check=True, timeout=TIMEOUT_S)
    command: list[str | Path] = [*EXEC, "--", client, case]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_the_program_is_called_as_without_the_loader(tmp_path: Path) -> None:
    source = tmp_path / "names.c"
    source.write_text(NAMES)
    client = tmp_path / "names"
    subprocess.run(["cc", "-static", "-o", client, source], check=True, timeout=TIMEOUT_S)
    link = tmp_path / "link"
    link.symlink_to(client)
    command: list[str | Path] = [
        "sh",
        "-c",
        'cd "$1" && shift && exec "$@"',
        "sh",
        tmp_path,
        *EXEC,
        "--",
        "./link",
        "a",
        "b",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["./link", "a", "b", str(client), str(client)]


NAMES = """
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char name[4096], path[64];
    for (int n = 0; n < argc; n++) puts(argv[n]);
    const char *links[] = {"/proc/self/exe", path};
    snprintf(path, sizeof path, "/proc/%d/exe", getpid());
    for (int n = 0; n < 2; n++) {
        ssize_t length = readlink(links[n], name, sizeof name);
        printf("%.*s\\n", (int)length, name);
    }
    return 0;
}
"""


#: Without a C library: forks, and both end by exit(), which ends a thread.
BARE = """
    .globl _start
_start:
    mov $57, %eax
    syscall
    test %eax, %eax
    jz child
    xor %edi, %edi
    dec %rdi
    lea status(%rip), %rsi
    xor %edx, %edx
    xor %r10d, %r10d
    mov $61, %eax
    syscall
    movzbl status+1(%rip), %edi
    inc %edi
    mov $60, %eax
    syscall
child:
    mov $41, %edi
    mov $60, %eax
    syscall
    .bss
status: .long 0
"""


def test_a_process_ends_with_the_main_thread_of_a_program_without_a_c_library(tmp_path: Path) -> None:
    source = tmp_path / "bare.s"
    source.write_text(BARE)
    program = tmp_path / "bare"
    subprocess.run(["cc", "-nostdlib", "-static", "-o", program, source], check=True, timeout=TIMEOUT_S)
    done = subprocess.run([*EXEC, "--", program], check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr, done.stdout) == (42, "", "")
