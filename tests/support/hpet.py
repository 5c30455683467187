# SPDX-License-Identifier: Apache-2.0
"""A high precision event timer that is simulated tick by tick, as section 2.3 of its specification tells it."""

MASK_64 = (1 << 64) - 1
LEVEL, INT_ENABLE, PERIODIC, SET_VALUE, MODE_32 = 1 << 1, 1 << 2, 1 << 3, 1 << 6, 1 << 8
CAPABLE = 1 << 4 | 1 << 5
ROUTES = 0x00FF0004


class Comparator:
    def __init__(self) -> None:
        self.config = CAPABLE
        self.value = MASK_64
        self.written = 0

    @property
    def mask(self) -> int:
        return (1 << 32) - 1 if self.config & MODE_32 else MASK_64


class Model:
    """The block, accessed by whole registers; ``irqs`` notes each edge and each change of a level's line."""

    def __init__(self) -> None:
        self.config = self.status = self.count = 0
        self.comparators = [Comparator() for _ in range(3)]
        self.irqs: list[tuple[int, int]] = []
        self.held: set[int] = set()

    def line(self, index: int) -> int | None:
        if self.config & 3 == 3 and index < 2:
            return (0, 8)[index]
        pin = self.comparators[index].config >> 9 & 31
        return (0 if pin == 2 else pin) if ROUTES >> pin & 1 else None

    def levels(self) -> None:
        held = set()
        for index, c in enumerate(self.comparators):
            line = self.line(index)
            active = self.config & 1 and c.config & LEVEL and c.config & INT_ENABLE and self.status >> index & 1
            if active and line is not None:
                held.add(line)
        self.irqs += [(line, 0) for line in sorted(self.held - held)]
        self.irqs += [(line, 1) for line in sorted(held - self.held)]
        self.held = held

    def compare(self, *indices: int) -> None:
        """What those comparators do with the counter's value."""
        for index in indices:
            c = self.comparators[index]
            if (self.count ^ c.value) & c.mask:
                continue
            if c.config & PERIODIC:
                c.value = c.value + c.written & c.mask
            if c.config & LEVEL:
                self.status |= 1 << index
            elif c.config & INT_ENABLE:
                line = self.line(index)
                if line is not None and line not in self.held:
                    self.irqs += [(line, 1), (line, 0)]
        self.levels()

    def tick(self) -> None:
        if self.config & 1:
            self.count = self.count + 1 & MASK_64
            self.compare(0, 1, 2)

    def write(self, register: int, value: int) -> None:
        if register == 0x10:
            started = value & ~self.config & 1
            self.config = value & 3
            self.levels()
            if started:
                self.compare(0, 1, 2)
        elif register == 0x20:
            self.status &= ~value
            self.levels()
        elif register == 0xF0:
            self.count = value
            if self.config & 1:
                self.compare(0, 1, 2)
        else:
            index, part = divmod(register - 0x100, 0x20)
            c = self.comparators[index]
            before = c.value, c.mask
            if part == 0:
                route = value & 31 << 9
                if not ROUTES >> (route >> 9) & 1:
                    route = c.config & 31 << 9
                c.config = CAPABLE | route | value & (LEVEL | INT_ENABLE | PERIODIC | SET_VALUE | MODE_32)
                c.value &= c.mask
                c.written &= c.mask
            else:
                if not c.config & PERIODIC or c.config & SET_VALUE:
                    c.value = value & c.mask
                c.written = value & c.mask
                if c.config & PERIODIC:
                    c.config &= ~SET_VALUE
            self.levels()
            if self.config & 1 and before != (c.value, c.mask):
                self.compare(index)
