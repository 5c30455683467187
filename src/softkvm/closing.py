# SPDX-License-Identifier: Apache-2.0
"""What a ``with`` statement closes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """An object with a ``close()`` that the end of a ``with`` statement calls."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the object holds; closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
