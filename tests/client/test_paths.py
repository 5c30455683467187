# SPDX-License-Identifier: Apache-2.0
"""``/dev/kvm`` by its path, and what a client is told of its descriptors: what the kernel's KVM says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.clients import EXEC, TIMEOUT_S

BY_PATH = [
    "it_is_a_character_device",
    "it_may_be_read_and_written",
    "open_has_its_flags",
    "other_functions_open_it",
    "other_words_for_its_path",
]


@pytest.mark.parametrize("case", BY_PATH)
def test_the_path_is_a_character_device_that_can_be_opened(holds: Callable[..., None], case: str) -> None:
    holds("paths", case)


def test_wild_pointers_are_efault(holds: Callable[..., None]) -> None:
    holds("paths", "wild_pointers")


@pytest.mark.parametrize(
    "case",
    [
        "descriptors_are_a_device_and_anonymous_files",
        "nothing_can_be_read_or_written",
        "only_a_vcpu_can_be_mapped",
    ],
)
def test_descriptors_are_what_the_kernels_are(holds: Callable[..., None], case: str) -> None:
    holds("paths", case)


@pytest.mark.parametrize("case", ["other_functions_open_it", "nothing_can_be_read_or_written"])
def test_a_client_that_is_built_with_checks_of_its_calls(build: Callable[..., Path], case: str) -> None:
    program = build("paths", "-O2", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2")
    done = subprocess.run([*EXEC, "--", program, case], check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize(
    "case",
    [
        "it_is_a_character_device",
        "it_may_be_read_and_written",
        "open_has_its_flags",
        "other_words_for_its_path",
        "wild_pointers",
    ],
)
def test_a_static_client_finds_the_same_by_the_path(holds_static: Callable[..., None], case: str) -> None:
    holds_static("paths", case)


#: What the host may have in the place of /dev: made in a namespace of its own.
HOSTS = {
    "none": "mount -t tmpfs none /dev",
    "a regular file": "mount -t tmpfs none /dev && touch /dev/kvm",
    "one that nobody may open": "mount -t tmpfs none /dev && touch /dev/kvm && chmod 0 /dev/kvm",
    "a directory": "mount -t tmpfs none /dev && mkdir /dev/kvm",
}


@pytest.mark.parametrize("case", [*BY_PATH, "wild_pointers", "descriptors_are_a_device_and_anonymous_files"])
@pytest.mark.parametrize("host", HOSTS)
def test_whatever_the_host_has_there(
    build: Callable[..., Path], in_namespace: Callable[..., list[str]], host: str, case: str
) -> None:
    command = in_namespace(HOSTS[host], *EXEC, "--", str(build("paths")), case)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
