# SPDX-License-Identifier: Apache-2.0
"""The silicon: an AMD-V x86-64 machine in software (typed statement of the seam to the Rust crate).

Physical addresses are host virtual addresses (*hva*). Guest state lives in the VMCB (AMD APM vol. 2,
appendix B) and in the register block (:attr:`Cpu.registers`).
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from typing_extensions import Buffer

_R = TypeVar("_R")

class Page(Buffer):
    """Zeroed pages of the machine's own, in a row; supports the buffer protocol."""

    address: int
    size: int
    def free(self) -> None:
        """Give the memory back, which no table names any more; ``BufferError`` while views of it exist."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Machine:
    """The physical machine: memory regions and the processors that may reach them.

    Accesses raise ``ValueError`` outside of regions, and ``OSError`` (EFAULT) where registered memory is not there.
    """

    def __init__(self) -> None: ...
    def add_region(self, hva: int, size: int) -> None:
        """Register RAM that nested leaves may name.

        ``ValueError`` if unaligned or overlapping (any machine's own pages, too), ``MemoryError`` if the host has no
        memory for 8 bytes a page.
        """
    def remove_region(self, hva: int) -> None:
        """Forget a region; returns once no processor can reach it any more."""
    def has_region(self, hva: int, size: int) -> bool:
        """Tell whether a region holds a byte of the range; False in a child."""
    has_region_function: tuple[int, int]
    """:meth:`has_region` for C: the address of an ``int f(void *, size_t hva, size_t size)``, and its first argument;
    async-signal-safe, takes no lock. To be called while the object is there."""
    def fill_holes(self, hva: int) -> None:
        """Have nothing be mapped in holes of the region that holds ``hva`` but what names the place (``MAP_FIXED``)."""
    def alloc_page(self, count: int = 1) -> Page:
        """Zeroed pages of the machine's own, apart from all regions; ``MemoryError`` if the host has none."""
    def notify_write(self, hva: int, size: int) -> None:
        """The host wrote memory: code cached from there is dropped at once."""
    def pte_load(self, address: int) -> int: ...
    def pte_store(self, address: int, value: int) -> None: ...
    def pte_or(self, address: int, mask: int) -> int: ...
    def pte_exchange(self, address: int, value: int) -> int: ...
    def pte_compare_exchange(self, address: int, expected: int, value: int) -> int: ...
    def pte_fill(self, address: int, count: int, first: int, step: int) -> int:
        """Store ``first``, ``first + step``, ... in those of ``count`` entries that have P clear; return how many."""

    def pte_clear_bits(self, address: int, count: int, mask: int, having: int = 0) -> int:
        """Clear bits in those of ``count`` entries that have all bits of ``having``; return how many had any."""
    def pte_test_and_clear(self, address: int, count: int, mask: int) -> bytes: ...
    def read(self, hva: int, size: int) -> bytes: ...
    def populate(self, hva: int) -> None:
        """Read a byte, so that its page comes; waits for that without the interpreter's lock. EFAULT if it can't."""
    def write(self, hva: int, data: bytes) -> None: ...
    def discard(self, hva: int, size: int, shared: bool) -> None:
        """Give pages back to the host: they read as zeroes then (MADV_DONTNEED, for shared memory MADV_REMOVE)."""

class Cpu:
    """One logical processor."""

    registers: memoryview
    instructions: int
    next_rip: bool
    waitpkg: bool
    """Guests have UMONITOR, UMWAIT and TPAUSE (SDM vol. 2), which no AMD processor has; off at first."""
    tsc_ratio: int
    """The TSC ratio MSR, C000_0104h: guests' ticks for one of the processor's, 8.32 bits (APM vol. 2, 15.30.5)."""
    def __init__(self, machine: Machine, index: int) -> None: ...
    def vmrun(self, vmcb: int) -> int:
        """VMLOAD, VMRUN, VMSAVE; returns EXITCODE (APM vol. 2, appendix C).

        Guest memory that is not there when it is accessed is a machine check: VMEXIT_EXCP18 with its address in
        EXITINFO2, before the instruction that found out.

        With what a hypervisor's entry code puts around them: RAX and RSP are in the register block like the others,
        before and after, and go to the VMCB and back; TLB_CONTROL is 0 afterwards.
        """
    def watch(self, words: Buffer) -> None:
        """Have each :class:`Run` look at 64-bit words, and keep them; ``ValueError`` if it does so already."""
    def request(self, function: Callable[..., _R], *args: object, **named: object) -> _R:
        """Call ``function`` as :func:`uninterrupted` does while no other thread runs the processor or is in a request.

        Waits for those; Python handlers run meanwhile. In a run or request of the thread's own it is just a call.
        """
    held: bool
    """Whether the calling thread is in a :class:`Run` or :meth:`request`."""
    def interrupt(self) -> None:
        """End the run, or the next one, by a kick that stays until it is taken."""
    interrupted: bool
    """Whether the run is to end: by :meth:`interrupt` or because a signal came."""
    def take_interrupt(self) -> bool:
        """Return :attr:`interrupted`, and take back :meth:`interrupt`."""
    interrupt_function: tuple[int, int]
    """:meth:`interrupt` for C: the address of a ``void f(void *)``, and its argument; async-signal-safe, takes no lock.
    To be called while the object is there."""
    def kick(self) -> None:
        """Physical interrupt: stays pending until VMEXIT_INTR or :meth:`clear_kick` takes it."""
    def ring(self) -> None:
        """Ring the doorbell of AVIC (APM vol. 2, 15.29): a running guest looks at its virtual APIC's IRR, without an
        exit; a wait ends. Stays pending until one of them, or :meth:`clear_kick`."""
    def kick_at_entry(self, other: Cpu) -> None:
        """Kick ``other`` when this processor's thread has left the interpreter: at its next vmrun, wait or poll.

        Then the other's thread finds the interpreter's lock free, instead of sleeping once more for that.
        """
    def wait(self, timeout_ns: int = -1) -> bool:
        """Sleep until a kick is pending, which the timer's is too, or a :meth:`ring`.

        False after ``timeout_ns`` (-1: no limit).
        """
    def poll(self, timeout_ns: int) -> bool:
        """Spin until a kick is pending or the timer is due, which this returns, at most for ``timeout_ns``."""
    def clear_kick(self) -> bool: ...
    def set_timer(self, deadline_ns: int) -> None:
        """Kick the processor when :func:`clock_ns` reaches ``deadline_ns``; 0: not. One deadline at a time."""
    def account(self) -> None:
        """Account the processor time of the thread that is in a :class:`Run`, and of those after it, from now on.

        ``RuntimeError`` on another thread. It can't be ended.
        """
    def cpu_times(self) -> tuple[int, int]:
        """Return the processor time that is accounted in ns, and the guest's share; neither ever falls.

        The first is exact: the threads' clocks, from the first run's :meth:`account` on. What a thread does between
        two runs counts when it is in the second. The share is measured around VMRUN and scaled
        (:func:`cputime_adjust`). Outside of runs both are what they were when the last one ended.
        """
    def cpu_thread(self) -> tuple[int, int]:
        """Return the native identifier of the thread that is accounted and in a :class:`Run`, 0 for none, and by how
        much the time accounted is ahead of that thread's clock (negative: behind it)."""
    def flush_tlb(self) -> None: ...
    def stats(self) -> dict[str, int]: ...

class Run:
    """KVM_RUN's frame around ``function``, which takes ``owner``: :meth:`run` calls it as the one that runs ``cpu``."""

    def __init__(self, cpu: Cpu, function: Callable[[_R, int], object], owner: _R) -> None: ...
    mask: int | None
    """The signals blocked during a run (bit n - 1 for signal n); None: those that the thread has blocked."""
    def run(self) -> None:
        """Call ``function(owner, told)`` on this thread.

        It is told :data:`RUN_INTERRUPTED` if :attr:`Cpu.interrupted`, :data:`RUN_WATCHED` if a word of
        :meth:`Cpu.watch` isn't 0, and :data:`RUN_MOVED` if the time is accounted and was on another thread before.

        Signals that come to the thread meanwhile interrupt the run, and their handlers, C's and Python's, run behind
        it, before what the function raises is raised. Python handlers whose signals came before run now; what one
        raises is raised, and no run has begun. Signals that :attr:`mask` does not block and the thread had blocked
        interrupt it and pend again behind it. Waits for another thread's run or :meth:`Cpu.request`, in which Python
        handlers run, too; EBUSY if the thread itself is in one. In the end what :meth:`Cpu.kick_at_entry` has collected
        is sent, and the next run is anybody's, however this one has ended.
        """

class EventPoller:
    """The eventfds that one thread waits for. It takes their counters without the interpreter's lock: soon.

    Each descriptor has to stay open until it is removed. The first, ``wake``, is not taken from: it ends a wait.
    """

    wake: int
    def __init__(self, wake: int) -> None: ...
    def add(self, fd: int) -> None: ...
    def remove(self, fd: int) -> int:
        """Take nothing from an eventfd from now on; return what was taken before, and not asked for."""
    def take(self, fd: int) -> int:
        """Return what was taken from an eventfd since it was asked last; 0 if it is none of ours."""
    def wait(self) -> list[int]:
        """Wait until there is something; return the eventfds that something was found in. It may have been taken."""
    def close(self) -> None:
        """Close the descriptor that it waits with; in a child, too. No thread may wait."""

class ThreadTimer:
    """A timer of the host's on the processor time of a thread of this process.

    It sends ``signal`` to the thread ``receiver``, which should have it blocked and wait for it. ``tid`` and
    ``receiver`` are native identifiers. ``OSError``: EINVAL if there is no such thread, EAGAIN for too many timers.
    """

    def __init__(self, tid: int, signal: int, receiver: int) -> None: ...
    def arm(self, deadline_ns: int) -> None:
        """Have the signal sent once the thread's clock reads ``deadline_ns``, at the host's next tick; 0: not."""

class Instruction:
    """A decoded instruction: lengths and operands."""

    length: int
    mnemonic: str
    op_count: int
    memory_base: str | None
    memory_index: str | None
    memory_scale: int
    memory_displacement: int
    memory_segment: str | None
    memory_size: int
    has_rep: bool
    has_repne: bool
    has_lock: bool
    is_string: bool
    address_size: int
    code: str
    near_branch_target: int
    far_branch_selector: int | None
    far_branch_offset: int
    accesses_memory: bool
    cpuid_features: list[str]
    def op_kind(self, index: int) -> str: ...
    def op_register(self, index: int) -> str | None: ...
    def op_size(self, index: int) -> int: ...
    def op_access(self, index: int) -> str: ...
    def immediate(self, index: int) -> int: ...

RUN_INTERRUPTED: Final[int]
RUN_WATCHED: Final[int]
RUN_MOVED: Final[int]

REGISTER_OFFSETS: Final[dict[str, int]]
"""Where the fields of the register block (:attr:`Cpu.registers`) begin, in bytes; their names are the crate's."""

def clock_ns() -> int: ...
def rdtsc() -> int: ...
def tsc_khz() -> int: ...
def clocks() -> tuple[int, int]: ...
def use_host_tsc() -> int: ...
def cputime_adjust(run: int, guest: int, host: int, told: tuple[int, int]) -> tuple[int, int]:
    """Split ``run`` as ``guest`` and ``host`` are to each other, which were measured; neither is less than ``told``."""

def sched_yield() -> int:
    """Let another thread have the host's processor, and the interpreter's lock with it; returns for how many ns."""

FLUSH_MAX_RANGES: Final[int]
"""Ranges that one :func:`flush_physical` or :func:`flush_linear` takes."""

def flush_physical(cpus: Sequence[Cpu], ranges: Sequence[tuple[int, int]] | None, /) -> int:
    """Have processors forget what is known of guest-physical pages: (first page, count) each; None: everything.

    When this returns none of them executes an instruction by a translation made before. A processor within a guest
    does it between two instructions and doesn't leave for that; any other before its next instruction. Returns how many
    were within one. Translations of other pages stay. ``ValueError`` for too many ranges.
    """

def flush_linear(cpus: Sequence[Cpu], asid: int, ranges: Sequence[tuple[int, int]] | None, /) -> int:
    """Have processors forget linear pages in every address space of a guest, as :func:`flush_physical`.

    As INVLPGB with an ASID and addresses, or without addresses for None (APM vol. 3). A large page goes as a whole.
    """

def watch_signal(signal: int, main_thread: int) -> None:
    """Tell that Python has a handler for ``signal``: from now on it is known to every :class:`Run`.

    ``main_thread`` is the identifier of the thread that runs it. A signal that another thread has caught waits for the
    end of that one's run or request, too. Handlers that nobody tells of are found within 20 ms, when a run begins.
    """

def unseen(function: Callable[..., _R], *args: object) -> _R:
    """Call a function of a thread that is none of the client's: sanitizers that the client has leave it out."""

def sanitized() -> bool:
    """Tell whether the client has a sanitizer that looks at all of its process's threads (LSan, ASan, MSan)."""

def uninterrupted(function: Callable[..., _R], *args: object, **named: object) -> _R:
    """Call ``function`` while signals to the thread wait as in a run: handlers run before and behind it.

    What a Python handler raises then is raised in the place of the result.
    """

def decode(code: bytes, bitness: int, ip: int) -> Instruction: ...
def exit_name(code: int) -> str: ...
def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]: ...
def read_memory(address: int, size: int) -> bytes:
    """Return a copy of the process's memory; EFAULT if it is not there."""

def write_memory(address: int, data: Buffer) -> None:
    """Put bytes into the process's memory; EFAULT if it is not there, or must not be written."""

def client_file(object: object, fd: int, flags: int, proc: int) -> int:
    """Return a new descriptor of the memfd ``fd`` that is a client's, on which requests are methods of ``object``.

    ``flags`` are open()'s; ``proc`` is a descriptor of /proc. ``object.nature`` is a ``KIND_*`` of the crate
    ``softkvm_client``.

    ``ioctl(request, argument)``; ``release()`` when nobody has it open or mapped any more; and, if it has them,
    ``run()`` for KVM_RUN, ``refresh()`` before it is read, ``mapped(address, size, offset, protection)`` behind mmap().
    """

def client_guest(function: tuple[int, int], add: bool) -> None:
    """Have a machine, by its ``has_region_function``, asked before memory of the client's goes."""

def own_descriptor(fd: int) -> int:
    """Move a descriptor out of the way of a client's, which does not close it, either; returns the new one."""

def close_own_descriptor(fd: int) -> None:
    """Close a descriptor of :func:`own_descriptor`."""

def client_cpuid_sites() -> int:
    """Return in how many places of the client's code CPUID was replaced, to be answered as the silicon does."""

def client_core(
    open_system: Callable[[int], int],
    unmapping: Callable[[int, int], None],
    at_exit: Callable[[], None] | None,
) -> int:
    """Return the address of the functions that a client's side calls (``softkvm_client::Core``).

    ``at_exit`` is called when the process ends by a call of its own, if there is something to be done then.
    """
