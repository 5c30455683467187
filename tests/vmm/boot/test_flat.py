# SPDX-License-Identifier: Apache-2.0
import pytest
from tests.support.machines import RecordingVcpu

from softkvm.vmm.boot import flat
from softkvm.vmm.boot.image import Image
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, GuestMemory


def test_image_is_entered_in_real_mode_at_its_first_byte() -> None:
    memory = GuestMemory(MIB)
    vcpu = RecordingVcpu()
    flat.load(vcpu, memory, Image("kernel", b"\xf4"))  # type: ignore[arg-type]
    assert (vcpu.sregs.cs.selector, vcpu.sregs.cs.base, vcpu.regs.rip) == (0x1000, 0x10000, 0)
    assert (vcpu.sregs.ss.selector, vcpu.regs.rsp) == (0x1000, 0x8000)
    assert memory.read(0x10000, 1) == b"\xf4"
    memory.close()


@pytest.mark.parametrize("size", [0, 0x9FC00 - 0x10000 + 1])
def test_image_must_fit_into_conventional_memory(size: int) -> None:
    memory = GuestMemory(MIB)
    with pytest.raises(ImageError, match=f"flat image has {size} bytes: expected 1 to 588800"):
        flat.load(RecordingVcpu(), memory, Image("kernel", bytes(size)))  # type: ignore[arg-type]
    memory.close()
