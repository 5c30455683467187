# SPDX-License-Identifier: Apache-2.0
"""Expected bytes from the ACPI specification, chapter 20 and section 19.3.4."""

import pytest

from softkvm.vmm.boot import aml


@pytest.mark.parametrize(
    ("length", "encoded"),
    [(0, "01"), (62, "3f"), (63, "4104"), (4093, "4fff"), (4094, "810001"), (65536, "830010")],
)
def test_package_length_counts_itself(length: int, encoded: str) -> None:
    assert aml.package_length(length).hex() == encoded


def test_package_length_has_a_limit() -> None:
    with pytest.raises(ValueError, match="at most"):
        aml.package_length(1 << 28)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (1, "01"), (2, "0a02"), (0x100, "0b0001"), (0x10000, "0c00000100"), (1 << 32, "0e0000000001000000")],
)
def test_integers_take_the_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


def test_integer_out_of_range() -> None:
    with pytest.raises(ValueError, match="expected 0"):
        aml.integer(-1)


def test_eisa_ids() -> None:
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert aml.eisa_id("PNP0B00").hex() == "0c41d00b00"


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("_S5", b"_S5_"),
        ("\\_SB", b"\\_SB_"),
        ("\\_SB.COM1", b"\\\x2e_SB_COM1"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
        ("\\", b"\\\x00"),
    ],
)
def test_name_strings(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


def test_long_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 4"):
        aml.name_string("TOOLONG")


def test_resources() -> None:
    assert aml.io(0x3F8, 8).hex() == "4701f803f8030108"
    assert aml.irq(4).hex() == "221000"
    assert aml.resource_template(aml.irq(4)).hex() == "11080a052210007900"


def test_a_method_that_notifies() -> None:
    """As iasl compiles ``Method (_E05, 0, NotSerialized) { Notify (\\_SB.VGEN, 0x80) }``."""
    method = aml.method("_E05", 0, aml.notify("\\_SB.VGEN", 0x80))
    assert method.hex() == "1413" + b"_E05".hex() + "00" + "865c2e" + b"_SB_VGEN".hex() + "0a80"
