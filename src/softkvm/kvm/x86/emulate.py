# SPDX-License-Identifier: Apache-2.0
"""The instruction emulator (emulate.py, emulate_ops.py, emulate_string.py, emulate_sse.py): written by the lead now.

Core helper: leave these files to the lead; call `emulate_instruction(vcpu, gpa=None) -> int` (1 = go on, 0 = exit to
userspace with kvm_run filled and `vcpu.complete_userspace_io` set to a callable `() -> int` called at the next run()).
The emulator uses: vcpu.q/d/w/b, vcpu.gpr (memoryview 'Q' of the register block; RAX/RSP written to the VMCB too),
vcpu.ymm (memoryview of the register block at 0x200), vcpu.shared, vcpu.get_rflags(), vcpu.cpl, vcpu.vm.mmio_bus,
vcpu.vm.pio_bus, queue_exception via exceptions.py, mmu.paging.walk.
"""
