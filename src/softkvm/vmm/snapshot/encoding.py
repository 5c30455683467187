# SPDX-License-Identifier: Apache-2.0
"""Plain data as bytes: JSON, in which bytes and dictionaries with other keys than texts have forms of their own.

========================  =================================
``b"..."``                ``{"$bytes": "<base64>"}``
``{1: "one"}``            ``{"$items": [[1, "one"]]}``
========================  =================================

A tuple becomes a list. Reading what anybody may have written raises SnapshotError for whatever isn't this, and makes
nothing but plain data of it.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.errors import SnapshotError

_BYTES: Final = "$bytes"
_ITEMS: Final = "$items"

ENCODED: Final = Size(
    "bytes of a machine's state", 256 << 20, SnapshotError, giver="file", effect="SnapshotError", where=__name__
)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _plain(element) for key, element in value.items()}
        return {_ITEMS: [[_plain(key), _plain(element)] for key, element in value.items()]}
    raise TypeError(f"{value!r}: expected plain data: int, str, bytes, list, dict")


def _restored(value: dict[str, Any]) -> Any:
    """Return what a JSON object stands for; it is called for inner objects first."""
    if len(value) == 1:
        if _BYTES in value:
            return base64.b64decode(value[_BYTES], validate=True)
        if _ITEMS in value:
            return dict(value[_ITEMS])
    return value


def encode(value: Any) -> bytes:
    """Return *value* as bytes, the same for the same value; TypeError if it isn't plain data."""
    return json.dumps(_plain(value), separators=(",", ":")).encode("ascii")


def decode(data: bytes) -> Any:
    """Return the value that *data* says; SnapshotError if it says none."""
    ENCODED.check(len(data))
    try:
        return json.loads(data, object_hook=_restored)
    except (ValueError, TypeError, binascii.Error, RecursionError) as error:
        raise SnapshotError(f"not a machine's state: {error}") from None
