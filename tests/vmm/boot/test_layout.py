# SPDX-License-Identifier: Apache-2.0
from softkvm.vmm.boot.layout import memory_map
from softkvm.vmm.memory import GIB, MIB, GuestMemory


def test_map_of_a_small_machine() -> None:
    memory = GuestMemory(32 * MIB)
    assert memory_map(memory) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (0x100000, 31 * MIB, 1),
    ]
    memory.close()


def test_map_of_a_machine_with_memory_above_the_hole() -> None:
    memory = GuestMemory(5 * GIB)
    assert memory_map(memory)[3:] == [(MIB, 3 * GIB - MIB, 1), (4 * GIB, 2 * GIB, 1)]
    memory.close()
