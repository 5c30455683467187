# SPDX-License-Identifier: Apache-2.0
"""A machine's life, whatever board it is: vCPU threads on the KVM API, buses, start, sleep and end."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.threads import inherited_error, start_quiet, tell_after_fork
from softkvm.vmm.boards.pc import Pc
from softkvm.vmm.bus import Bus
from softkvm.vmm.cpu_limits import PERIOD_NS, Bandwidth, CpuTimeLimit, cpu_times
from softkvm.vmm.devices.spec import DeviceSpec
from softkvm.vmm.errors import ConfigError, MachineError, StateError, show_traceback, unexpected
from softkvm.vmm.events import Event, Events
from softkvm.vmm.halt_watch import HaltWatch
from softkvm.vmm.hyperv import Hyperv
from softkvm.vmm.memory import MIB, FilePart, GuestMemory
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.pausing import PAUSE_S, Pausing
from softkvm.vmm.standstill import Standstill
from softkvm.vmm.vcpu_thread import VcpuThread
from softkvm.vmm.virtio.worker import Workers

if TYPE_CHECKING:
    from softkvm.vmm.vsock.api import Vsock

_P = ParamSpec("_P")

MAX_VCPUS = 16
_VCPUS = Size("vCPUs of a machine", MAX_VCPUS, ConfigError, least=1, effect="ConfigError", where=__name__)
MAX_SECONDS = 1e9
MIN_MEMORY = 32 * MIB
MAX_MEMORY = 1 << 40


@dataclass(frozen=True, slots=True)
class Config:
    """The size of a machine; ConfigError if it is one that we do not build."""

    memory_size: int = 256 * MIB
    vcpus: int = 1
    cpuid: Callable[[list[abi.kvm_cpuid_entry2]], list[abi.kvm_cpuid_entry2]] | None = None
    """Last word on every vCPU's CPUID table: gets what it would be, returns what it is."""
    pit: bool = True
    """Whether there is an i8254."""
    hpet: bool = True
    """Whether there is a high precision event timer."""
    end_when_halted: bool = True
    """Whether the machine ends (HALTED) when nothing that it has can wake any vCPU any more."""
    devices: Callable[[Machine], None] | None = None
    """Called after the standard devices are on the buses, to add more."""
    pin_memory: bool = False
    """Whether all memory is there from the start, locked, and never given back (ConfigError if the host refuses)."""
    device_specs: tuple[DeviceSpec, ...] = ()
    """Devices besides the board's own, in the order in which the guest finds them."""
    reboot: bool = False
    """Whether a guest's reset, and a triple fault, begin the machine anew; else they end it."""
    hyperv: bool = False
    """Whether its processors have Hyper-V's interfaces, in place of KVM's own."""
    cpu_time_limit_s: float | None = None
    """CPU time of the host's for all vCPUs together, with which the machine ends (CPU_TIME); None: no limit."""
    cpu_quota: float | None = None
    """CPU time of the host's for each vCPU in every 100 ms of the wall clock, in percent of that; None: all."""
    firmware: bytes | None = None
    """Contents of the ROM that boots the machine from its disks, SeaBIOS or OVMF; None: :meth:`Machine.load` does."""
    memory_files: tuple[FilePart, ...] = ()
    """What memory begins with, mapped copy-on-write: a snapshot's."""
    memory: GuestMemory | None = None
    """Memory that is there already, of ``memory_size`` bytes, and becomes the machine's."""

    def __post_init__(self) -> None:
        for name in ("memory_size", "vcpus"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name}={value!r}: expected a number")
        for name, limit in (("cpu_time_limit_s", MAX_SECONDS), ("cpu_quota", 100)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                raise ConfigError(f"{name}={value!r}: expected a number")
            if value is not None and not 0 < value <= limit:
                raise ConfigError(f"{name}={value!r}: expected a number above 0, up to {limit:g}")
        for name in ("cpuid", "devices"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name}={value!r}: expected a function")
        for spec in self.device_specs:
            if not callable(getattr(spec, "attach", None)):
                raise ConfigError(f"device_specs: {spec!r}: expected what has attach()")
        if not _VCPUS.allows(self.vcpus):
            raise ConfigError(f"{self.vcpus} vCPUs: expected 1 to {MAX_VCPUS}")
        if not MIN_MEMORY <= self.memory_size <= MAX_MEMORY:
            raise ConfigError(
                f"memory of {self.memory_size // MIB} MiB: expected {MIN_MEMORY // MIB} MiB to {MAX_MEMORY >> 40} TiB"
            )


def _as_board(
    method: Callable[Concatenate[Pc, _P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Machine, _P], None]]:
    """Give a machine's method the signature and the documentation of the board's *method* that it calls."""

    def decorate(own: Callable[..., None]) -> Callable[Concatenate[Machine, _P], None]:
        own.__doc__ = f"{inspect.getdoc(method)}\n\n{own.__doc__}"
        own.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        return own

    return decorate


class Machine(Closing):
    """A machine on *kvm*: ``load`` an image, ``start`` it, ``wait`` for its end, ``close`` it.

    *console* gets what the guest writes to COM1, in pieces, on a thread of the machine's.
    """

    def __init__(
        self, kvm: api.Kvm, config: Config | None = None, console: Callable[[bytes], None] | None = None
    ) -> None:
        if not hasattr(kvm, "create_vm"):
            raise TypeError(f"kvm={kvm!r}: expected an open KVM, such as softkvm.open() returns")
        if config is not None and not isinstance(config, Config):
            raise TypeError(f"config={config!r}: expected a Config")
        if console is not None and not callable(console):
            raise TypeError(f"console={console!r}: expected a function that takes bytes")
        self.config = config or Config()
        self.ended = threading.Event()
        self.outcome: Outcome | None = None
        self.failure: BaseException | None = None
        """The exception behind an outcome of kind ``ERROR``, if there was one."""
        self.started_ns = 0
        self.ended_ns = 0
        self.events = Events()
        """What happens to the machine as a whole."""
        self.resets: list[Callable[[], object]] = []
        """Called when the machine is reset, with everything standing: what has been added to the board's own."""
        self.standstill = Standstill(self.ended)
        self.pausing = Pausing(self)
        self.changes = 0
        """Changes of the whole machine that are under way: a sleep, a reset."""
        self._halt_watch: HaltWatch | None = None
        self._vsock: Vsock | None = None
        self._end_lock = threading.RLock()  # a signal's handler ends a machine, too: in the middle of its end or close
        self._closed = False
        self._inherited = False
        self._resetting = False
        self.boots = 1
        """How often the machine has begun, with every reset once more."""
        tell_after_fork(self)
        self.pio = Bus("I/O port", 16)
        self.mmio = Bus("memory", 52)

        self.vcpus: list[VcpuThread] = []
        with contextlib.ExitStack() as resources:
            self._resources = resources
            self._build(kvm, console, resources)
            self._resources = resources.pop_all()

    def _build(self, kvm: api.Kvm, console: Callable[[bytes], None] | None, resources: contextlib.ExitStack) -> None:
        """Make the parts; *resources* gets what closes them."""
        self.vm = kvm.create_vm()
        resources.callback(self.vm.close)
        self.workers = Workers()
        resources.callback(self.workers.close)
        self.board = Pc(self, console, resources)
        self.pausing.parts += [*self.board.parts, self.workers]
        self.memory: GuestMemory = self.board.memory
        self.hyperv = Hyperv(self.memory)
        for index, vcpu in enumerate(self.board.create_vcpus(kvm)):
            thread = VcpuThread(self, index, vcpu)
            resources.callback(thread.close)
            self.vcpus.append(thread)
        if self.config.end_when_halted:
            self._halt_watch = HaltWatch(
                self.vcpus, self.standstill, self.board.halted_for_good, self.ended, self._halted
            )
            resources.callback(self._halt_watch.close)
        self._limit_cpu()
        self.devices: list[Any] = [spec.attach(self) for spec in self.config.device_specs]
        if self.config.devices is not None:
            self.config.devices(self)
        self.board.built()

    def _limit_cpu(self) -> None:
        limit_s, quota = self.config.cpu_time_limit_s, self.config.cpu_quota
        if limit_s is not None:
            outcome = Outcome(End.CPU_TIME, f"{limit_s:g} s")
            vcpus = [thread.vcpu for thread in self.vcpus]
            self._cpu_time_limit = CpuTimeLimit(vcpus, int(limit_s * 1e9), lambda: self.end(outcome))
        if quota is not None:
            for thread in self.vcpus:
                thread.bandwidth = Bandwidth(thread.vcpu, max(int(PERIOD_NS * quota / 100), 1))

    @property
    def vsock(self) -> Vsock:
        """Connections between host and guest; StateError if the machine has no vsock device."""
        if self._vsock is None:
            raise StateError("the machine has no vsock device: expected one with VsockSpec, or --vsock")
        return self._vsock

    def set_vsock(self, vsock: Vsock) -> None:
        """A device's, when it is made; ConfigError if there is one: a guest has one context ID."""
        if self._vsock is not None:
            raise ConfigError("two vsock devices: expected one at most")
        self._vsock = vsock

    def on_close(self, close: Callable[[], object]) -> None:
        """Call *close* when the machine is closed, before what was there before."""
        self._resources.callback(close)

    def current_vcpu(self) -> api.Vcpu:
        """Return the vCPU on whose thread we are: for a device that looks at the registers of its caller."""
        current = threading.current_thread()
        return next(thread.vcpu for thread in self.vcpus if thread.thread is current)

    def on_vcpu_thread(self) -> bool:
        """Whether we are on the thread of one of the vCPUs: in a device, or a hook."""
        current = threading.current_thread()
        return any(thread.thread is current for thread in self.vcpus)

    def leave_guest(self) -> None:
        """Have the vCPU on whose thread we are, if we are on one, come out of KVM_RUN before it goes on.

        KVM completes the exit that we handle, and not an instruction more is executed.
        """
        if self.on_vcpu_thread():
            vcpu = self.current_vcpu()
            vcpu.call_soon(vcpu.kick)

    # -- standing still

    @property
    def paused(self) -> bool:
        """Whether :meth:`pause` has stopped the machine."""
        return self.pausing.paused

    def pause(self, timeout_s: float = PAUSE_S) -> None:
        """Let the machine stand until :meth:`resume`, from any thread but a vCPU's; returns when it stands.

        Its vCPUs are out of KVM_RUN, their last exits completed, and its devices do nothing by themselves. A machine
        that has not been started will start paused; for one that is paused nothing happens. What limits a run's time
        goes on. StateError if the machine is closed, ends, or does not come to stand within *timeout_s*: it runs then.
        """
        self.pausing.pause(timeout_s)

    def press_power_button(self) -> None:
        """Ask the guest's operating system to shut down; one that does not listen goes on, one that sleeps wakes up."""
        self.events.tell(Event.POWER_BUTTON)
        self.board.press_power_button()

    def resume(self) -> None:
        """Let a paused machine go on, from any thread; nothing happens if it isn't paused."""
        self.pausing.resume()

    def sleep(self, wait_for_wake_up: Callable[[], bool], wake_up: Callable[[], object]) -> None:
        """Let all vCPUs stand, the one on whose thread we are first, until *wait_for_wake_up* says True.

        It is asked again and again, and may take a moment. Then *wake_up* is called with the vCPUs still standing, and
        nobody else looking at them: a machine that is paused asleep wakes up when it goes on.
        """
        boots = self.boots

        def ready() -> bool:
            return self._resetting or self.boots != boots or wait_for_wake_up()

        def change() -> None:
            if self.boots == boots and not self._resetting:
                wake_up()

        self._change_standing("wake-up", ready, change)

    def reset(self, by: str) -> None:
        """Begin anew from the image, as with the reset button, from any thread; does not wait for it.

        A machine that is paused begins anew when it goes on. Memory keeps what the image does not fill. StateError if
        the machine is closed, has ended or has not been started.
        """
        self._expect(started=True)
        self.expect_going()
        with self._end_lock:
            under_way, self._resetting = self._resetting, True
        if under_way:
            self.leave_guest()
        else:
            self._change_standing("reset", lambda: True, lambda: self._begin_anew(by))

    def reset_by_guest(self, outcome: Outcome) -> None:
        """The guest, or a triple fault, resets the machine: begin anew, or end with *outcome* (``Config.reboot``)."""
        if self.config.reboot:
            self.reset(str(outcome))
        else:
            self.end(outcome)

    def _begin_anew(self, by: str) -> None:
        self.board.flush()  # who listens has heard all that the guest said
        self.events.tell(Event.RESET, by=by)
        if self.ended.is_set():
            return
        with contextlib.ExitStack() as rest:
            for part in self.pausing.parts:
                rest.callback(part.resume)
                part.pause()
            for reset in self.resets:
                reset()
            self.hyperv.reset()
            self.board.reset()
            self.boots += 1
        self._resetting = False

    def _change_standing(self, what: str, ready: Callable[[], bool], change: Callable[[], object]) -> None:
        """Stop the vCPU on whose thread we are; once all stand, and it is *ready*, call *change* on another thread."""
        self.standstill.acquire()
        self.changes += 1
        self.leave_guest()
        start_quiet(self._changing, what, what, ready, change)

    def _changing(self, what: str, ready: Callable[[], bool], change: Callable[[], object]) -> None:
        try:
            while not (self.standstill.wait(self.running_vcpus(), 0.1) and ready()):
                if self.ended.is_set():
                    return
            with self.standstill.alone() as alone:
                if alone:
                    change()
        except MachineError as error:
            self.end(Outcome(End.ERROR, f"{what}: {error}"))
        except Exception as error:  # a thread's exception must end the machine, not vanish
            self.failure = error
            show_traceback(error)
            self.end(Outcome(End.ERROR, f"{what}: {unexpected(error)}"))
        finally:
            self.changes -= 1
            self.standstill.release()

    def running_vcpus(self) -> list[VcpuThread]:
        """Return the vCPUs whose threads are there."""
        return [vcpu for vcpu in self.vcpus if vcpu.thread.is_alive()]

    # -- life

    @_as_board(Pc.load)
    def load(self, *args: Any, **kwargs: Any) -> None:
        """StateError if the machine is closed or has been started."""
        self._expect(started=False)
        self.board.load(*args, **kwargs)

    def after_fork(self) -> None:
        """In a child the machine is its parent's: it can be closed."""
        self._inherited = True

    def _expect(self, *, started: bool) -> None:
        """Raise StateError unless the machine is open and has, or has not, been started."""
        if self._closed:
            raise StateError("the machine is closed: expected an open one")
        if bool(self.started_ns) != started:
            was, expected = ("not been started", "start() first") if started else ("been started", "that once")
            raise StateError(f"the machine has {was}: expected {expected}")

    def expect_going(self) -> None:
        """Raise StateError if the machine is closed or has ended."""
        if self._closed:
            raise StateError("the machine is closed: expected an open one")
        if self.ended.is_set():
            raise StateError(f"the machine has ended ({self.outcome}): expected one that runs")

    def start(self) -> None:
        """Let all vCPUs run; StateError if the machine is closed or has been started before.

        OSError in a child of the process that made the machine.
        """
        if self._inherited:
            raise inherited_error()
        self._expect(started=False)
        self.started_ns = time.monotonic_ns()
        for vcpu in self.vcpus:
            if vcpu.bandwidth is not None:
                vcpu.bandwidth.start()
            vcpu.thread.start()
        if self._halt_watch is not None:
            self._halt_watch.start()

    def _halted(self) -> None:
        self.end(Outcome(End.HALTED, "interrupts are disabled on every vCPU"))

    def end(self, outcome: Outcome) -> None:
        """End the machine; the first outcome counts. From any thread; does not wait."""
        if self._inherited:
            return
        with self._end_lock:
            if self._closed:
                return
            first = self.outcome is None
            if first:
                self.outcome = outcome
                self.ended_ns = time.monotonic_ns()
            self.ended.set()
            if first:
                self.events.tell(Event.ENDED, end=outcome.end.value, detail=outcome.detail)
            for vcpu in self.vcpus:
                vcpu.vcpu.kick()

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the end, which comes with outcome TIMEOUT after *timeout_s*; return it when all vCPUs stand.

        StateError if the machine has never been started, OSError in a child of the process that made it.
        """
        if self._inherited:
            raise inherited_error()
        if self.outcome is None:
            self._expect(started=True)
        if not self.ended.wait(timeout_s):
            self.end(Outcome(End.TIMEOUT, f"{timeout_s:g} s"))
        self._join()
        self.board.flush()
        assert self.outcome is not None
        return self.outcome

    def _join(self) -> None:
        """Wait for the vCPU threads. Each was kicked; kick again in case one was between two runs."""
        for vcpu in self.vcpus:
            while vcpu.thread.is_alive():
                vcpu.thread.join(0.5)
                if vcpu.thread.is_alive():
                    vcpu.vcpu.kick()
        self.pausing.end()

    def run(self, timeout_s: float | None = None) -> Outcome:
        """Start, wait, return the outcome."""
        self.start()
        return self.wait(timeout_s)

    def close(self) -> None:
        """End the machine if it runs, and give back everything it holds."""
        if self._closed:
            return
        if self._inherited:
            self._close_inherited()
            return
        if self.started_ns:
            self.end(Outcome(End.STOPPED))
            self._join()
        with self._end_lock:
            self._closed = True
        self._resources.close()

    def _close_inherited(self) -> None:
        """Give back what a child has of the machine. Its devices' locks may be held, by threads that are not there."""
        self._closed = True
        self.vm.close()
        for thread in self.vcpus:
            thread.close()
        self.memory.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else str(self.outcome or self._going())
        return f"<Machine: {len(self.vcpus)} vCPUs, {self.config.memory_size // MIB} MiB, {state}>"

    def _going(self) -> str:
        if self.paused:
            return "paused"
        return "running" if self.started_ns else "not started"

    def stats(self) -> dict[str, Any]:
        """Return wall and processor time, and what every vCPU did; the KVM's own counters where it has some."""
        vcpus = []
        for vcpu in self.vcpus:
            entry = {"cpu_ns": vcpu.cpu_time_ns, **vcpu.stats.as_dict()}
            if self.config.cpu_quota is not None or self.config.cpu_time_limit_s is not None:
                entry["cpu_time"] = cpu_times(vcpu.vcpu)
            if vcpu.bandwidth is not None:
                entry["cpu_quota"] = vcpu.bandwidth.as_dict()
            kvm_stats = getattr(vcpu.vcpu, "stats", None)
            if kvm_stats is not None:
                try:
                    entry["kvm"] = kvm_stats()
                except OSError as error:
                    entry["kvm_error"] = str(error)
            vcpus.append(entry)
        return {
            "wall_ns": (self.ended_ns or time.monotonic_ns()) - self.started_ns if self.started_ns else 0,
            "vcpus": vcpus,
        }
