# SPDX-License-Identifier: Apache-2.0
"""A process finds its own entries of /proc after its descriptors are gone, in children, and from threads."""

from __future__ import annotations

import os
import threading

from softkvm.kvm import procfs


def test_it_is_found_again_when_its_descriptor_was_closed_or_is_another_files() -> None:
    pid = f"Pid:\t{os.getpid()}\n".encode()
    assert pid in procfs.read_own("status")
    directory = procfs.directory()
    os.close(directory)
    assert pid in procfs.read_own("status")
    again = procfs.directory()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, again)
    try:
        assert pid in procfs.read_own("status")
        assert procfs.directory() != again
    finally:
        os.close(null)
        os.close(again)


def test_a_child_has_its_own() -> None:
    procfs.directory()
    child = os.fork()
    if not child:
        os._exit(f"Pid:\t{os.getpid()}\n".encode() not in procfs.read_own("status"))
    assert os.waitpid(child, 0)[1] == 0


def test_a_thread_finds_itself() -> None:
    found: list[bytes] = []

    def ask() -> None:
        found.append(procfs.read_own(f"task/{threading.get_native_id()}/comm"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found[0]


def test_links_and_descriptors() -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    assert procfs.link_of_own(f"fd/{null}") == "/dev/null"
    again = procfs.open_own(f"fd/{null}", os.O_WRONLY)
    assert os.write(again, b"x") == 1 and not os.get_inheritable(again)
    os.close(null)
    os.close(again)
