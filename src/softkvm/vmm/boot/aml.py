# SPDX-License-Identifier: Apache-2.0
"""A writer of AML, the byte code of ACPI's definition blocks: as much as a small DSDT needs.

Every function returns the encoded bytes of one term; terms nest by concatenation::

    device("COM1", name("_HID", eisa_id("PNP0501")), name("_UID", integer(1)))

Source: ACPI specification 6.4, chapter 20 (AML grammar) and section 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct

ZERO_OP = b"\x00"
ONE_OP = b"\x01"
NAME_OP = b"\x08"
BYTE_PREFIX = b"\x0a"
WORD_PREFIX = b"\x0b"
DWORD_PREFIX = b"\x0c"
STRING_PREFIX = b"\x0d"
QWORD_PREFIX = b"\x0e"
SCOPE_OP = b"\x10"
BUFFER_OP = b"\x11"
PACKAGE_OP = b"\x12"
METHOD_OP = b"\x14"
NOTIFY_OP = b"\x86"
DEVICE_OP = b"\x5b\x82"

IRQ_DESCRIPTOR = 0x22
IO_DESCRIPTOR = 0x47
END_TAG = b"\x79\x00"
DECODE_16 = 1
MEMORY32_FIXED_DESCRIPTOR = 0x86
EXTENDED_INTERRUPT_DESCRIPTOR = 0x89
DWORD_ADDRESS_DESCRIPTOR = 0x87
WORD_ADDRESS_DESCRIPTOR = 0x88

# address space descriptors (6.4.3.5): resource types, general flags, type specific flags
ADDRESS_MEMORY, ADDRESS_IO, ADDRESS_BUS = 0, 1, 2
MIN_FIXED, MAX_FIXED = 1 << 2, 1 << 3
MEMORY_WRITABLE = 1
IO_ENTIRE_RANGE = 3

# extended interrupt descriptor (6.4.3.6)
CONSUMER, EDGE, SHARED = 1 << 0, 1 << 1, 1 << 3


def package_length(content_length: int) -> bytes:
    """Encode the length of a term's content plus that of this encoding (20.2.4)."""
    if content_length + 1 < 1 << 6:
        return bytes([content_length + 1])
    for extra in (1, 2, 3):
        total = content_length + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML term of {content_length} bytes: at most {(1 << 28) - 5}")


def name_string(path: str) -> bytes:
    """Encode a name path such as ``_SB_``, ``\\_SB_.COM1`` (20.2.2)."""
    root = b""
    if path.startswith("\\"):
        root, path = b"\\", path[1:]
    segments = [segment.ljust(4, "_").encode("ascii") for segment in path.split(".")] if path else []
    for segment in segments:
        if len(segment) != 4:
            raise ValueError(f"AML name segment {segment!r}: at most 4 characters")
    prefix = {0: b"\x00", 1: b"", 2: b"\x2e"}.get(len(segments), b"\x2f" + bytes([len(segments)]))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """Encode a constant in its shortest form (20.2.3)."""
    if value in (0, 1):
        return ONE_OP if value else ZERO_OP
    for prefix, size in ((BYTE_PREFIX, 1), (WORD_PREFIX, 2), (DWORD_PREFIX, 4), (QWORD_PREFIX, 8)):
        if 0 <= value < 1 << (8 * size):
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"AML integer {value}: expected 0 to 2**64 - 1")


def string(text: str) -> bytes:
    """Encode a string constant."""
    return STRING_PREFIX + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode a seven-character EISA id such as ``PNP0501`` as the integer that _HID holds (19.3.4)."""
    vendor = 0
    for letter in text[:3]:
        vendor = vendor << 5 | ord(letter) - 0x40
    number = vendor << 16 | int(text[3:], 16)
    return DWORD_PREFIX + number.to_bytes(4, "big")


def name(path: str, value: bytes) -> bytes:
    """Name(path, value)."""
    return NAME_OP + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope(path) {terms}."""
    content = name_string(path) + b"".join(terms)
    return SCOPE_OP + package_length(len(content)) + content


def device(path: str, *terms: bytes) -> bytes:
    """Device(path) {terms}."""
    content = name_string(path) + b"".join(terms)
    return DEVICE_OP + package_length(len(content)) + content


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Method(path, arguments, NotSerialized) {terms}."""
    content = name_string(path) + bytes([arguments]) + b"".join(terms)
    return METHOD_OP + package_length(len(content)) + content


def notify(path: str, value: int) -> bytes:
    """Notify(path, value)."""
    return NOTIFY_OP + name_string(path) + integer(value)


def package(*elements: bytes) -> bytes:
    """Package() {elements}."""
    content = bytes([len(elements)]) + b"".join(elements)
    return PACKAGE_OP + package_length(len(content)) + content


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate() {descriptors}: a buffer that ends with an end tag."""
    data = b"".join(descriptors) + END_TAG
    content = integer(len(data)) + data
    return BUFFER_OP + package_length(len(content)) + content


def io(port: int, length: int) -> bytes:
    """IO(Decode16, port, port, 1, length) (6.4.2.5)."""
    return (
        bytes([IO_DESCRIPTOR, DECODE_16]) + port.to_bytes(2, "little") + port.to_bytes(2, "little") + bytes([1, length])
    )


def irq(line: int) -> bytes:
    """IRQNoFlags() {line}: edge triggered, active high (6.4.2.1)."""
    return bytes([IRQ_DESCRIPTOR]) + (1 << line).to_bytes(2, "little")


def interrupt(gsi: int) -> bytes:
    """Interrupt(ResourceConsumer, Edge, ActiveHigh, Shared) {gsi} (6.4.3.6)."""
    return struct.pack("<BHBBI", EXTENDED_INTERRUPT_DESCRIPTOR, 6, CONSUMER | EDGE | SHARED, 1, gsi)


def memory32_fixed(address: int, length: int) -> bytes:
    """Memory32Fixed(ReadWrite, address, length) (6.4.3.4)."""
    return struct.pack("<BHBII", MEMORY32_FIXED_DESCRIPTOR, 9, MEMORY_WRITABLE, address, length)


def _address_space(format: str, descriptor: int, kind: int, flags: int, first: int, last: int) -> bytes:
    """A window that a bridge passes on, fixed at both ends (6.4.3.5): granularity, minimum, maximum, offset, length."""
    window = struct.pack(f"<5{format}", 0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB", descriptor, 3 + len(window), kind, MIN_FIXED | MAX_FIXED, flags) + window


def word_bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber(ResourceProducer): the buses below a bridge."""
    return _address_space("H", WORD_ADDRESS_DESCRIPTOR, ADDRESS_BUS, 0, first, last)


def word_io(first: int, last: int) -> bytes:
    """WordIO(ResourceProducer): ports that a bridge passes on."""
    return _address_space("H", WORD_ADDRESS_DESCRIPTOR, ADDRESS_IO, IO_ENTIRE_RANGE, first, last)


def dword_memory(first: int, last: int) -> bytes:
    """DWordMemory(ResourceProducer, ReadWrite, NonCacheable): memory that a bridge passes on."""
    return _address_space("I", DWORD_ADDRESS_DESCRIPTOR, ADDRESS_MEMORY, MEMORY_WRITABLE, first, last)
