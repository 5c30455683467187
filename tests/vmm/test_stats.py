# SPDX-License-Identifier: Apache-2.0
from softkvm import abi
from softkvm.vmm.stats import ConsoleWatcher, ExitStats

BOOT = (
    b"[    0.000000] Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)\r\n"
    b"[    2.564093] Run /init as init process\r\n"
    b"INIT\r\n"
)


def test_milestones_are_found_in_any_slicing_of_the_output() -> None:
    for step in (1, 7, len(BOOT)):
        watcher = ConsoleWatcher()
        for at in range(0, len(BOOT), step):
            watcher(BOOT[at : at + step])
        assert list(watcher.as_dict()) == ["console", "kernel", "init"]
        init = watcher.reached("init")
        assert init is not None
        assert "Run /init as init process" in init.line
        assert watcher.reached("panic") is None


def test_panic_lines_are_told_apart() -> None:
    watcher = ConsoleWatcher()
    watcher(b"[ 1.0] Kernel panic - not syncing: Attempted to kill init!\r\n")
    assert watcher.reached("panic")
    assert not watcher.reached("panic_end")
    watcher(b"[ 1.1] ---[ end Kernel panic - not syncing: Attempted to kill init! ]---\r\n")
    assert watcher.reached("panic_end")


def test_a_line_without_end_does_not_grow_for_ever() -> None:
    watcher = ConsoleWatcher()
    for _ in range(100):
        watcher(b"x" * 1000)
    assert len(watcher._line) <= 5000


def test_exit_table_names_the_reasons_that_occurred() -> None:
    stats = ExitStats()
    stats.counts[abi.KVM_EXIT_IO] = 2
    stats.handler_ns[abi.KVM_EXIT_IO] = 50
    assert stats.as_dict()["exits"] == {"KVM_EXIT_IO": {"count": 2, "handler_ns": 50}}
