# SPDX-License-Identifier: Apache-2.0
"""The kernel's log, read out of its ring buffer: also of a kernel that cannot say anything any more.

Source: Linux, ``kernel/printk/printk_ringbuffer.c``: a ring of descriptors, each with the place of its text in a ring
of text; a descriptor's state is in the two upper bits of its ``state_var``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.linux.errors import KernelError

if TYPE_CHECKING:
    from softkvm.vmm.linux.kernel import Kernel

_STATE_SHIFT: Final = 62
_COMMITTED, _FINALIZED = 1, 2
_ID_MASK: Final = (1 << 62) - 1
_LONG: Final = 8
_RECORDS: Final = Size(
    "bits of the number of records in a guest's log",
    20,
    KernelError,
    giver="guest",
    effect="KernelError",
    where=__name__,
)
_TEXT: Final = Size(
    "bits of the size of a guest's log", 28, KernelError, giver="guest", effect="KernelError", where=__name__
)


def read_log(kernel: Kernel) -> str:
    """Return the log's lines with their times; KernelError if there is none that is understood."""
    btf = kernel.btf
    ring = kernel.variable("prb").dereference_()
    descriptors, texts = ring.desc_ring, ring.text_data_ring
    bits, text_bits = _RECORDS.check(int(descriptors.count_bits)), _TEXT.check(int(texts.size_bits))
    count, size = 1 << bits, 1 << text_bits
    desc, info = btf.named("struct prb_desc"), btf.named("struct printk_info")
    desc_size, info_size = btf.size(desc), btf.size(info)
    descs = kernel.read(int(descriptors.descs), desc_size * count)
    infos = kernel.read(int(descriptors.infos), info_size * count)
    text = kernel.read(int(texts.data), size)
    state_at, begin_at, next_at = (
        btf.offset(desc, path) for path in ("state_var", "text_blk_lpos.begin", "text_blk_lpos.next")
    )
    time_at, length_at = btf.offset(info, "ts_nsec"), btf.offset(info, "text_len")

    def word(data: bytes, at: int, length: int = 8) -> int:
        return int.from_bytes(data[at : at + length], "little")

    lines = []
    number, head = int(descriptors.tail_id.counter) & _ID_MASK, int(descriptors.head_id.counter) & _ID_MASK
    for _ in range(count):
        at = number % count
        state = word(descs, desc_size * at + state_at)
        if state >> _STATE_SHIFT in (_COMMITTED, _FINALIZED) and state & _ID_MASK == number:
            begin, after = word(descs, desc_size * at + begin_at), word(descs, desc_size * at + next_at)
            length = word(infos, info_size * at + length_at, 2)
            if not begin & 1:  # else there is no text
                start = begin % size
                if begin >> text_bits != after - 1 >> text_bits:  # it did not fit before the ring's end
                    start = 0
                line = text[start + _LONG : start + _LONG + length].decode("utf-8", "replace")
                seconds, ns = divmod(word(infos, info_size * at + time_at), 1_000_000_000)
                lines += [f"[{seconds:5}.{ns // 1000:06}] {part}" for part in line.split("\n")]
        if number == head:
            break
        number = number + 1 & _ID_MASK
    return "\n".join(lines) + "\n" if lines else ""
