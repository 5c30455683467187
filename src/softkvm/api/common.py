# SPDX-License-Identifier: Apache-2.0
"""What the KVM API is on every architecture.

Structures that differ between architectures are in their own modules, :mod:`softkvm.api.x86` for example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from softkvm import abi

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from softkvm.cputime import CpuClock


class Closeable(Protocol):
    """Something that a ``with`` statement closes."""

    def close(self) -> None:
        """Give back what the object holds; closing twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Kvm(Closeable, Protocol):
    """What ``/dev/kvm`` is: the system."""

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if *cap* is not there, else what the capability defines."""

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM."""

    def get_device_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR on the system: a number of 64 bits. ENXIO for an unknown attribute."""

    def has_device_attr(self, group: int, attr: int) -> None:
        """KVM_HAS_DEVICE_ATTR on the system: ENXIO for an unknown attribute."""

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of :attr:`Vcpu.shared`."""


class Vm(Closeable, Protocol):
    """A virtual machine."""

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on a VM."""

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: Buffer | None = None) -> None:
        """KVM_SET_USER_MEMORY_REGION.

        *memory* is the object that owns the memory, an :class:`mmap.mmap` for example. The slot holds a view of it
        until it is deleted or the VM is closed, so that it is not unmapped while the guest uses it: its ``close()``
        and ``resize()`` raise BufferError, and it stays when its last name is gone. Without it the caller answers
        for that: the process may end with SIGSEGV otherwise.
        """

    def set_user_memory_region2(self, region: abi.kvm_userspace_memory_region2, memory: Buffer | None = None) -> None:
        """KVM_SET_USER_MEMORY_REGION2: as above, and with KVM_MEM_GUEST_MEMFD a part of a guest_memfd beside.

        The guest has that where its frames are private, and the process's memory where they are shared.
        """

    def create_guest_memfd(self, wanted: abi.kvm_create_guest_memfd) -> int:
        """KVM_CREATE_GUEST_MEMFD: a descriptor of memory for this VM's guest, to be closed by the caller.

        Its slots keep the file. ``fallocate()`` with FALLOC_FL_PUNCH_HOLE gives memory back.
        """

    def create_device(self, type: int, flags: int) -> int:
        """KVM_CREATE_DEVICE: a descriptor of a device in the kernel. ENODEV for a type that this KVM has not got.

        With KVM_CREATE_DEVICE_TEST in *flags* only whether it has.
        """

    def set_memory_attributes(self, attributes: abi.kvm_memory_attributes) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: make guest frames private (KVM_MEMORY_ATTRIBUTE_PRIVATE), or shared.

        EINVAL for attributes that the VM, by its type, cannot have.
        """

    def create_vcpu(self, id: int) -> Vcpu:
        """KVM_CREATE_VCPU: *id* is the architecture's number of the processor."""

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: the interrupt chips of the architecture, in KVM."""

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE: set the level of GSI *irq*."""

    def set_gsi_routing(self, entries: Sequence[abi.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table."""

    def signal_msi(self, msi: abi.kvm_msi) -> int:
        """KVM_SIGNAL_MSI: > 0 if delivered, 0 if the guest blocked it."""

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG: a bit per page of *slot*, LSB first, in whole 64-bit words."""

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG: clear the dirty bits that *bitmap* names; its bit 0 is *first_page*.

        EINVAL unless *first_page* is a multiple of 64 and *num_pages* is one too or reaches the slot's end; ENOENT
        if the slot has no log; EFAULT if *bitmap* is shorter than *num_pages* in whole 64-bit words.
        """

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: watch those pages again that userspace has collected from the vCPUs' rings; how many.

        A ring (KVM_CAP_DIRTY_LOG_RING) is mapped from :attr:`Vcpu.shared_fd`, at page KVM_DIRTY_LOG_PAGE_OFFSET; its
        entries are :class:`softkvm.abi.kvm_dirty_gfn`. EINVAL without rings.
        """

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on a VM."""

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD: a write to eventfd *fd* raises *gsi*."""

    def ioeventfd(self, fd: int, addr: int, len: int, datamatch: int | None = None, flags: int = 0) -> None:
        """KVM_IOEVENTFD: a guest's write to *addr* signals *fd* instead of leaving KVM_RUN.

        KVM_IOEVENTFD_FLAG_DATAMATCH is added to *flags* when *datamatch* is given.
        """

    def register_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_REGISTER_COALESCED_MMIO: collect the guest's writes to a range of MMIO, or of ports, in a ring.

        The ring, :class:`softkvm.abi.kvm_coalesced_mmio_ring` and its entries, is the page
        KVM_COALESCED_MMIO_PAGE_OFFSET of every vCPU's :attr:`Vcpu.shared`, the same in all. A write that it has no
        room for is an exit.
        """

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: forget the zones that hold all of the range, if there are any."""

    def host_unmapped_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell that the process's memory at each (address, size) is another now: given back, mapped anew, or unmapped.

        Not an ioctl: a kernel finds it out by its MMU notifiers, and there this does nothing. KVM in Python forgets its
        mappings of all ranges with one flush.
        """

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a descriptor of the VM's statistics, to be read with os.pread() and closed by the caller.

        The file begins with a :class:`softkvm.abi.kvm_stats_header`.
        """


class Vcpu(Closeable, Protocol):
    """A virtual processor. The thread that calls :meth:`run` is its thread.

    Requests of other threads wait until :meth:`run` has ended (``vcpu->mutex``): :meth:`kick` first.
    """

    def pre_fault_memory(self, range: abi.kvm_pre_fault_memory) -> None:
        """KVM_PRE_FAULT_MEMORY: map *range* before the guest uses it; *range* is what is left of it afterwards.

        Part of it may have been mapped, without an error. ENOENT where there is no slot, EFAULT where there is no
        memory, EINTR after a kick.
        """

    @property
    def kvm_run(self) -> abi.kvm_run_page:
        """The shared page as a structure over :attr:`shared`; an architecture's has more fields."""

    @property
    def shared(self) -> memoryview:
        """``get_vcpu_mmap_size()`` bytes; PIO data lie at ``kvm_run.io.data_offset`` in here."""

    @property
    def shared_fd(self) -> int:
        """The descriptor that :attr:`shared` is a mapping of, for mmap() by others; -1 once the vCPU is closed."""

    def run(self) -> None:
        """KVM_RUN: until an exit that :attr:`kvm_run` describes.

        Raises InterruptedError (EINTR) after :meth:`kick`, when this thread has got a signal that is not blocked, and
        at once when ``kvm_run.immediate_exit`` is set. The signal's handler has run then; what it raised is raised
        instead.
        """

    def kick(self) -> None:
        """Make :meth:`run` raise InterruptedError, now or at its next call; from any thread.

        Not an ioctl: it is what a signal does to the thread of a real vCPU. One or more kicks end one run. A signal's
        handler may kick.
        """

    def call_soon(self, work: Callable[[], None]) -> None:
        """Have :meth:`run` call ``work`` on its thread, before it enters the guest again (task work); from any thread.

        A guest that runs is interrupted for it, and goes on; one that halts is woken, and halts again. What ``work``
        raises, ``run`` raises, and the rest is done in the next one. Not an ioctl: it is what the kernel does for
        itself.
        """

    @property
    def cpu_clock(self) -> CpuClock:
        """The CPU time of the vCPU, and timers on it, from the first question for it on."""

    def get_mp_state(self) -> abi.kvm_mp_state:
        """KVM_GET_MP_STATE."""

    def set_mp_state(self, state: abi.kvm_mp_state) -> None:
        """KVM_SET_MP_STATE."""

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue an external interrupt; only without in-kernel chips."""

    def set_device_attr(self, group: int, attr: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR on a vCPU: *value* is a number of 64 bits. ENXIO for an unknown attribute."""

    def get_device_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR on a vCPU: a number of 64 bits. ENXIO for an unknown attribute."""

    def has_device_attr(self, group: int, attr: int) -> None:
        """KVM_HAS_DEVICE_ATTR on a vCPU: ENXIO for an unknown attribute."""

    def translate(self, linear_address: int) -> abi.kvm_translation:
        """KVM_TRANSLATE."""

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on a vCPU."""

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a descriptor of the vCPU's statistics, as :meth:`Vm.get_stats_fd` is of the VM's."""

    def set_signal_mask(self, sigset: bytes | None) -> None:
        """KVM_SET_SIGNAL_MASK: the signals blocked during :meth:`run`; None: those that the thread has blocked.

        *sigset* is 8 bytes, little-endian, bit n - 1 for signal n. A signal that only this unblocks ends a run and
        stays pending.
        """
