# SPDX-License-Identifier: Apache-2.0
"""What the decoder of the silicon says of operands."""

from __future__ import annotations

import pytest

from softkvm import _softcpu


@pytest.mark.parametrize(
    ("code", "sizes"),
    [
        ("e200", (2, 4, 8)),  # loop
        ("67e200", (4, 2, 4)),
        ("67e300", (4, 2, 4)),  # jcxz, jecxz
        ("67f3a4", (4, 2, 4)),  # rep movsb
        ("f3a4", (2, 4, 8)),
        ("f367a4", (4, 2, 4)),
        ("67ac", (4, 2, 4)),  # lodsb
        ("67d7", (4, 2, 4)),  # xlatb
        ("8a00", (2, 4, 8)),  # mov al, [bx + si], [eax], [rax]
        ("678a00", (4, 2, 4)),
        ("b067", (2, 4, 8)),  # mov al, 67h
        ("0f01c8", (2, 4, 8)),  # monitor
        ("670f01c8", (4, 2, 4)),
    ],
)
def test_address_size_follows_the_mode_and_the_prefix(code: str, sizes: tuple[int, int, int]) -> None:
    """APM vol. 3, 1.2.3: in 16-, 32- and 64-bit code."""
    assert tuple(_softcpu.decode(bytes.fromhex(code), bitness, 0).address_size for bitness in (16, 32, 64)) == sizes


def test_prefixes_of_64_bit_code_are_found_behind_rex() -> None:
    assert _softcpu.decode(bytes.fromhex("4867e200"), 64, 0).address_size == 4  # a REX that counts for nothing
    assert _softcpu.decode(bytes.fromhex("40b067"), 64, 0).address_size == 8
