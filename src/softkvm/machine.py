# SPDX-License-Identifier: Apache-2.0
"""Machines for scripts: boot a guest, run commands in it, stop it and look inside (docs/scripting.md).

::

    with softkvm.Machine() as machine:
        machine.boot()
        print(machine.run("uname -r").output)
        machine.pause()
        print(hex(machine.vcpus[0].registers["rip"]), machine.kernel.symbolize(machine.vcpus[0].registers["rip"]))

It is :class:`softkvm.vmm.machine.Machine` with what a script needs around it; that one is its attribute ``vmm``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from softkvm import abi, api
from softkvm.closing import Closing
from softkvm.script.by_agent import AgentRunner
from softkvm.script.shell import CommandFailed, CommandTimeout, Completed, Shell
from softkvm.vmm.console import Console
from softkvm.vmm.debug.breakpoints import BreakpointError, Kind
from softkvm.vmm.debug.controller import Breakpoint, Callback, Controller
from softkvm.vmm.debug.debugger import Cause, Stop
from softkvm.vmm.debug.registers import BY_NAME, Registers
from softkvm.vmm.debug.report import machine_text
from softkvm.vmm.debug.virtual import MemoryFault, read_virtual, write_virtual
from softkvm.vmm.devices.spec import DeviceSpec
from softkvm.vmm.devices.virtio_vsock import VsockSpec
from softkvm.vmm.errors import ConfigError, MachineError, StateError
from softkvm.vmm.guest import prepare
from softkvm.vmm.guest.agent import Agent, AgentError
from softkvm.vmm.guest.initramfs import PROMPT
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.linux.kernel import Kernel
from softkvm.vmm.linux.orc import Frame, Unwinder
from softkvm.vmm.machine import Config
from softkvm.vmm.machine import Machine as VmmMachine
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.stats import REASONS

if TYPE_CHECKING:
    from softkvm.vmm.vcpu_thread import VcpuThread

__all__ = [
    "Breakpoint",
    "BreakpointError",
    "AgentError",
    "Cause",
    "CommandFailed",
    "CommandTimeout",
    "Completed",
    "ConfigError",
    "End",
    "Kernel",
    "KernelError",
    "Machine",
    "MachineError",
    "MemoryFault",
    "Outcome",
    "StateError",
    "Stop",
    "Vcpu",
]

MIB: Final = 1 << 20
BOOT_S: Final = 120.0
_SAVED: Final = "softkvm.Machine"
_AGENT_S: Final = 20.0
_ACCESS: Final = {"w": Kind.WRITE, "r": Kind.READ, "rw": Kind.ACCESS}

ExitHook = Callable[["Vcpu", abi.kvm_run], object]


class RegistersView(Mapping[str, int]):
    """The registers of a vCPU by gdb's names; it has to stand while they are read or set (StateError)."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def _fresh(self) -> Registers:
        self._vcpu.expect_standing()
        return Registers(self._vcpu.kvm)

    def __getitem__(self, name: str) -> int:
        """Return a register; KeyError if there is none of that name."""
        return self._fresh()[name]

    def __setitem__(self, name: str, value: int) -> None:
        """Set a register; OSError for a value that KVM refuses."""
        registers = self._fresh()
        registers[name] = value
        self._vcpu.changed()

    def __iter__(self) -> Iterator[str]:
        return iter(BY_NAME)

    def __len__(self) -> int:
        return len(BY_NAME)

    def read_all(self) -> dict[str, int]:
        """Return all of them, read at once."""
        registers = self._fresh()
        return {name: registers[name] for name in BY_NAME}


class Vcpu:
    """A virtual processor of a machine."""

    def __init__(self, machine: Machine, thread: VcpuThread) -> None:
        self._machine = machine
        self._thread = thread
        self.index = thread.index
        self.registers = RegistersView(self)

    def __repr__(self) -> str:
        return f"<Vcpu {self.index} of {self._machine!r}>"

    @property
    def kvm(self) -> api.Vcpu:
        """The KVM API's object."""
        return self._thread.vcpu

    def expect_standing(self) -> None:
        """Raise StateError unless the vCPU is out of KVM_RUN, or we are on its thread."""
        if self._machine.standing or self._machine.vmm.on_vcpu_thread():
            return
        raise StateError("the machine runs: registers are there while it is paused, in a callback or an exit hook")

    def changed(self) -> None:
        """Registers have been set behind the debugger's back."""
        self._machine._registers_changed()

    def step(self, count: int = 1) -> Stop:
        """Execute *count* instructions on this vCPU while the others stand; the machine stands afterwards."""
        return self._machine._control().step(self.index, count)

    def read(self, address: int, size: int) -> bytes:
        """Return memory at a virtual address, as this vCPU sees it now; MemoryFault if it isn't there."""
        self.expect_standing()
        controller = self._machine._controller
        if controller is not None and controller.debugger.halted:
            return controller.debugger.read(self.index, address, size)
        return read_virtual(self.kvm, self._machine.vmm.memory, address, size)

    def string(self, address: int, size_max: int = 4096) -> str:
        """Return the text at a virtual address, up to its NUL or *size_max* bytes; MemoryFault if it isn't there."""
        data = b""
        while len(data) < size_max and b"\0" not in data:
            at = address + len(data)
            data += self.read(at, min(256 - at % 256, size_max - len(data)))  # never over a page's end
        return data.partition(b"\0")[0].decode("utf-8", "replace")

    def write(self, address: int, data: bytes) -> None:
        """Store *data* at a virtual address; MemoryFault, and nothing written, if it isn't there."""
        self.expect_standing()
        controller = self._machine._controller
        if controller is not None and controller.debugger.halted:
            controller.debugger.write(self.index, address, data)
        else:
            write_virtual(self.kvm, self._machine.vmm.memory, address, data)

    def backtrace(self) -> list[Frame]:
        """Return the call chain in the Linux kernel; KernelError if there is none, or it has no unwind tables."""
        self.expect_standing()
        registers = Registers(self.kvm)
        names = ("rip", "rsp", "rbp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
        return list(self._machine.unwinder.chain({name: registers[name] for name in names}))


@dataclass(frozen=True, slots=True)
class _Image:
    kernel: Path | bytes
    initrd: Path | bytes | None
    command_line: str
    is_default: bool


class Machine(Closing):
    """A machine: the default guest, or the *kernel*, *initrd* and *command_line* that are given.

    *memory* is in MiB. *devices* are options of ``softkvm run`` without the dashes (``"net user"``, ``"rng"``,
    ``"balloon 64M,reporting"``), or specifications of :mod:`softkvm.vmm.devices`. *kvm* is an open KVM, or what
    :func:`softkvm.open` takes. *append* is added to the default guest's command line. *output* gets what the guest
    writes to its console. *options* are further fields of :class:`softkvm.vmm.machine.Config`.

    It begins to run with :meth:`start` or :meth:`boot`, and ends at the end of the ``with`` statement. ConfigError for
    what no machine can be, GuestUnavailable if there is no default guest, OSError for files that cannot be read.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str] | bytes | None = None,
        initrd: str | os.PathLike[str] | bytes | None = None,
        command_line: str | None = None,
        *,
        memory: int = 256,
        vcpus: int = 1,
        devices: Iterable[str | DeviceSpec] = (),
        kvm: str | os.PathLike[str] | api.Kvm | None = None,
        append: str = "",
        output: Callable[[bytes], object] | None = None,
        **options: Any,
    ) -> None:
        self._devices = list(devices)
        if kernel is None and not any(isinstance(_spec(device), VsockSpec) for device in self._devices):
            self._devices.append("vsock")  # the guest's agent is behind it
        config = Config(memory * MIB, vcpus, device_specs=tuple(map(_spec, self._devices)), **options)
        self._prepare(kvm, output)
        image = _image(kernel, initrd, command_line, append)
        self._is_default = image.is_default
        self._build(lambda host, console: VmmMachine(host, config, console))
        try:
            self.vmm.load(image.kernel, image.initrd, image.command_line)
        except BaseException:
            self.close()
            raise

    @classmethod
    def restored(
        cls,
        directory: str | os.PathLike[str],
        *,
        devices: Iterable[str | DeviceSpec] | None = None,
        kvm: str | os.PathLike[str] | api.Kvm | None = None,
        output: Callable[[bytes], object] | None = None,
    ) -> Self:
        """Return a machine in the state that :meth:`save` has saved, to be started; SnapshotError if it cannot be.

        *devices* are those that it had, if they were not all named by texts, or :meth:`save` is not who saved it.
        """
        from softkvm.vmm.snapshot.directory import Snapshot  # which names the package's version

        machine = cls.__new__(cls)
        machine._prepare(kvm, output)
        with Snapshot(directory) as snapshot:
            saved = snapshot.manifest.extra.get(_SAVED, {})
            machine._is_default = bool(saved.get("is_default"))
            machine._devices = list(saved.get("devices", ()) if devices is None else devices)
            machine._build(machine._restoring(snapshot.restore))
        return machine

    def _restoring(
        self, restore: Callable[..., VmmMachine]
    ) -> Callable[[api.Kvm, Callable[[bytes], None]], VmmMachine]:
        specs = tuple(map(_spec, self._devices))
        return lambda kvm, console: restore(kvm, console, device_specs=specs)

    def _prepare(self, kvm: str | os.PathLike[str] | api.Kvm | None, output: Callable[[bytes], object] | None) -> None:
        self._open = _opener(kvm)
        self._output = output
        self._resources = contextlib.ExitStack()

    def _build(self, make: Callable[[api.Kvm, Callable[[bytes], None]], VmmMachine]) -> None:
        """Have a machine of the monitor's, by *make*; nothing has changed if it raises."""
        console = Console(self._output)
        with contextlib.ExitStack() as resources:
            host, owned = self._open()
            if owned:
                resources.enter_context(host)
            vmm = resources.enter_context(make(host, console.output))
            resources.callback(self.detach)
            self._resources = resources.pop_all()
        console.attach(vmm)
        console.look = self._expect_no_stop
        self.vmm, self.console = vmm, console
        self.vcpus = [Vcpu(self, thread) for thread in vmm.vcpus]
        self._controller: Controller | None = None
        self._kernel: tuple[int, Kernel] | None = None
        self._unwinder: tuple[Kernel, Unwinder] | None = None
        self._runner: AgentRunner | Shell | None = None

    def close(self) -> None:
        """End the machine if it runs, and give back everything it holds."""
        self._resources.close()

    def __repr__(self) -> str:
        return repr(self.vmm)

    # -- life

    def start(self) -> None:
        """Let it run; StateError if it has been started before."""
        self.vmm.start()

    def boot(self, pattern: str | None = None, timeout_s: float = BOOT_S) -> None:
        """Start it, and wait until the default guest's shell, or *pattern*, is on the console.

        ConsoleTimeout or ConsoleEnded with the end of the console's text if that does not come.
        """
        if pattern is None and not self._is_default:
            raise StateError("only the default guest is known to have booted by its prompt: expected a pattern")
        self.start()
        self.console.expect(pattern if pattern is not None else PROMPT, timeout_s)

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the machine's end; return how it was, TIMEOUT after *timeout_s*, with which it ends."""
        return self.vmm.wait(timeout_s)

    @property
    def outcome(self) -> Outcome | None:
        """How the machine has ended; None if it hasn't."""
        return self.vmm.outcome

    def reset(self, timeout_s: float = 10.0) -> None:
        """Press the reset button: the machine begins anew from its image."""
        self.vmm.reset("the script")

    # -- the guest

    @property
    def agent(self) -> Agent:
        """The default guest's agent: programs with their streams, files in and out (:mod:`softkvm.vmm.guest.agent`)."""
        return Agent(self.vmm.vsock.connect)

    def run(self, command: str, timeout_s: float = 60.0, *, check: bool = False, input: bytes = b"") -> Completed:
        """Run a shell command in the default guest; return its output (both streams) and exit status.

        With *check* a status other than 0 is CommandFailed. CommandTimeout if it takes longer than *timeout_s*. The
        guest's agent runs it; where there is none, it is typed at the shell on the console.
        """
        if "\0" in command:
            raise ValueError("a command with a NUL character")
        self._expect_no_stop()
        if self.vmm.paused:
            raise StateError("the machine is paused: no command would end")
        if self._runner is None:
            self._runner = self._find_runner()
        completed = self._runner.run(command, timeout_s, input)
        if check and completed.status:
            raise CommandFailed(completed)
        return completed

    def _find_runner(self) -> AgentRunner | Shell:
        if self._is_default:
            with contextlib.suppress(AgentError):
                self.agent.wait(_AGENT_S)
                return AgentRunner(self.vmm.vsock.connect, self._expect_no_stop)
        return Shell(self.console)

    def expect(self, pattern: str, timeout_s: float = 30.0) -> str:
        """Wait for a pattern on the console, after what was found last; return the text that matches it."""
        return self.console.expect(pattern, timeout_s)[0]

    def send(self, text: str) -> None:
        """Type *text* at the console."""
        self.console.send(text)

    def _expect_no_stop(self) -> None:
        """Who waits for the guest waits in vain if it has been stopped: raise what a callback raised, or StateError."""
        if self._controller is not None:
            self._controller.expect_going()

    # -- standing still

    @property
    def paused(self) -> bool:
        """Whether the machine stands: it was paused, or a breakpoint or a step has stopped it."""
        return self.vmm.paused or (self._controller is not None and self._controller.stopped is not None)

    @property
    def standing(self) -> bool:
        """Whether nothing runs at the moment, in a callback for example."""
        return self.vmm.pausing.standing or not self.vmm.started_ns or self.vmm.ended.is_set()

    def pause(self) -> None:
        """Let the machine stand until :meth:`resume`."""
        if self._controller is not None:
            self._controller.pause()
        else:
            self.vmm.pause()

    def resume(self) -> None:
        """Let it go on, wherever it stands."""
        if self._controller is not None:
            self._controller.go_on()
        self.vmm.resume()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[Machine]:
        """Have the machine stand for the ``with`` statement, whether it is paused or not."""
        with self.vmm.pausing.still():
            yield self

    # -- memory

    def read(self, address: int, size: int, vcpu: int = 0) -> bytes:
        """Return memory at a virtual address; MemoryFault if it isn't there.

        While the machine stands it is as *vcpu* sees it; while it runs, as the Linux kernel does (KernelError if there
        is none).
        """
        return self.vcpus[vcpu].read(address, size) if self.standing else self.kernel.read(address, size)

    def write(self, address: int, data: bytes, vcpu: int = 0) -> None:
        """Store *data* at a virtual address, as :meth:`read` reads it."""
        if self.standing:
            self.vcpus[vcpu].write(address, data)
        else:
            self.kernel.write(address, data)

    @property
    def memory(self) -> GuestMemory:
        """The machine's memory: guest-physical addresses, slices of it."""
        return self.vmm.memory

    def read_physical(self, address: int, size: int) -> bytes:
        """Return memory at a guest-physical address, running or not; IndexError if it is no RAM."""
        data = self.vmm.memory.read(address, size)
        return data if self._controller is None else self._controller.debugger.breakpoints.hide(address, data)

    def write_physical(self, address: int, data: bytes) -> None:
        """Store *data* at a guest-physical address; IndexError if it is no RAM."""
        if self._controller is not None:
            data = self._controller.debugger.breakpoints.keep(address, data)
        self.vmm.memory.write(address, data)

    # -- the kernel

    @property
    def kernel(self) -> Kernel:
        """The Linux kernel that runs: symbols, types, variables, tasks. KernelError if there is none (so far)."""
        boots = self.vmm.boots
        if self._kernel is None or self._kernel[0] != boots:
            self._kernel = (boots, Kernel(self.vmm.memory))
        return self._kernel[1]

    def use_kernel(self, *, system_map: Path | None = None, vmlinux: Path | None = None) -> Kernel:
        """Take the kernel's symbols from a System.map or an ELF file: for one that does not tell them itself."""
        self._kernel = (self.vmm.boots, Kernel(self.vmm.memory, system_map=system_map, vmlinux=vmlinux))
        return self._kernel[1]

    @property
    def unwinder(self) -> Unwinder:
        """The call chains of the kernel that runs."""
        kernel = self.kernel
        if self._unwinder is None or self._unwinder[0] is not kernel:
            self._unwinder = (kernel, Unwinder(kernel))
        return self._unwinder[1]

    def describe(self) -> str:
        """Return what every vCPU is at, as text: registers, code, stack, call chain."""
        return machine_text(self.vmm)

    # -- breakpoints

    def _control(self) -> Controller:
        if self._controller is None:
            controller = self._controller = Controller(self.vmm)
            if self.vmm.paused:  # it is the controller's from now on
                controller.pause()
                self.vmm.resume()
        return self._controller

    def detach(self) -> None:
        """Take all breakpoints away, let the machine go on, and have it free for gdb."""
        controller, self._controller = self._controller, None
        if controller is not None:
            controller.close()

    def _registers_changed(self) -> None:
        if self._controller is not None:
            for registers in self._controller.debugger.registers:
                registers.forget()

    def _address(self, place: int | str) -> int:
        return self.kernel.symbol(place) if isinstance(place, str) else place

    def breakpoint(
        self, place: int | str, callback: Callback | None = None, *, hardware: bool | None = None
    ) -> Breakpoint:
        """Set a breakpoint at a linear address, or at a symbol of the kernel's.

        *callback* is called with the :class:`Stop` on a thread of the machine's, while all of it stands; the machine
        goes on when it returns, unless it returns something true. Without one the machine stops (:meth:`go`). By
        default memory gets an INT3; with *hardware*, or where there is no memory yet, a debug register is used.
        """
        kind = None if hardware is None else Kind.EXECUTE if hardware else Kind.SOFTWARE
        return self._control().add(kind, self._address(place), 1, callback)

    def watchpoint(
        self, place: int | str, size: int = 8, access: str = "w", callback: Callback | None = None
    ) -> Breakpoint:
        """Stop behind each access to *size* bytes at a linear address or a symbol: ``w``, ``r`` or ``rw``.

        As :meth:`breakpoint`. BreakpointError if the debug registers don't suffice. A read of what somebody writes at
        the same moment is taken for a write.
        """
        if access not in _ACCESS:
            raise ConfigError(f"access={access!r}: expected 'w', 'r' or 'rw'")
        return self._control().add(_ACCESS[access], self._address(place), size, callback)

    def go(self, timeout_s: float | None = None) -> Stop | None:
        """Let the machine go on, and wait until it stops again; None if it doesn't within *timeout_s*: it runs then.

        If it has stopped already and nobody has been told, that stop is returned. The end of the machine is a stop,
        too. What a callback has raised is raised here.
        """
        if self._controller is None and self.vmm.ended.is_set():
            return Stop(Cause.END, 0)
        controller = self._control()
        controller.go_on(unless_unseen=True)
        self.vmm.resume()
        return controller.wait(timeout_s)

    def wait_for_stop(self, timeout_s: float | None = None) -> Stop | None:
        """Wait until a breakpoint stops the machine, which runs."""
        return self._control().wait(timeout_s)

    # -- exits

    def on_exit(self, reason: int | str, hook: ExitHook) -> Callable[[], None]:
        """Have *hook* called at each exit of a reason, before it is handled; returns a function that ends that.

        *reason* is a number or a name (``"KVM_EXIT_IO"``). The hook gets the vCPU and its ``kvm_run``, on the vCPU's
        thread, while other vCPUs run; it makes exits slower. If it returns something true, the exit is not handled by
        the machine: what the hook has put into ``kvm_run`` is the answer.
        """
        number = _reason(reason)
        undo = [self._hook(thread, number, hook) for thread in self.vmm.vcpus]

        def end() -> None:
            for each in undo:
                each()

        return end

    def _hook(self, thread: VcpuThread, reason: int, hook: ExitHook) -> Callable[[], None]:
        vcpu, run = self.vcpus[thread.index], thread.vcpu.kvm_run
        active = True
        before = thread.handlers[reason]

        def handler() -> None:
            if not (active and hook(vcpu, run)):
                before()

        def end() -> None:
            nonlocal active
            active = False
            if thread.handlers[reason] is handler:
                thread.handlers[reason] = before

        thread.handlers[reason] = handler
        return end

    # -- snapshots

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Save the whole machine to a new directory; it stands meanwhile. SnapshotError if it cannot be."""
        from softkvm.vmm.snapshot.directory import save

        named = [device for device in self._devices if isinstance(device, str)]
        about: dict[str, Any] = {"is_default": self._is_default}
        if len(named) == len(self._devices):
            about["devices"] = named
        save(self.vmm, directory, durable=False, extra={_SAVED: about})

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Put the machine into a saved state, from which it runs on; breakpoints and hooks are gone.

        SnapshotError if the snapshot is not whole, or another machine's; this one stays as it is then.
        """
        from softkvm.vmm.snapshot.directory import Snapshot

        with Snapshot(directory) as snapshot:
            controller, previous, before = self._controller, self._resources, self.console
            self._build(self._restoring(snapshot.restore))
        if controller is not None:
            controller.close()
        previous.close()
        self.console.carry_on(before)
        self.start()

    # -- figures

    def statistics(self) -> dict[str, Any]:
        """Return wall and processor time and every vCPU's exits, as ``softkvm run --stats`` has them."""
        return self.vmm.stats()

    @property
    def instructions(self) -> int | None:
        """The instructions that all vCPUs have executed; None where the KVM does not count them."""
        counts = [vcpu.get("kvm", {}).get("instructions") for vcpu in self.vmm.stats()["vcpus"]]
        return sum(counts) if None not in counts else None


def _opener(kvm: str | os.PathLike[str] | api.Kvm | None) -> Callable[[], tuple[api.Kvm, bool]]:
    """Return what gives an open KVM, and whether it is to be closed with the machine."""
    import softkvm

    if kvm is None or isinstance(kvm, (str, os.PathLike)):
        return lambda: (softkvm.open(kvm), True)
    if not hasattr(kvm, "create_vm"):
        raise TypeError(f"kvm={kvm!r}: expected an open KVM, or a path such as /dev/kvm")
    return lambda: (kvm, False)


def _image(
    kernel: str | os.PathLike[str] | bytes | None,
    initrd: str | os.PathLike[str] | bytes | None,
    command_line: str | None,
    append: str,
) -> _Image:
    def source(given: str | os.PathLike[str] | bytes) -> Path | bytes:
        return given if isinstance(given, bytes) else Path(given)

    if kernel is not None:
        arguments = "console=ttyS0" if command_line is None else command_line
        return _Image(
            source(kernel), None if initrd is None else source(initrd), f"{arguments} {append}".strip(), False
        )
    if initrd is not None or command_line is not None:
        raise ConfigError("initrd and command_line go with a kernel: expected one, or append for the default guest")
    guest = prepare()
    return _Image(guest.kernel, guest.initrd, f"{guest.command_line} {append}".strip(), True)


def _spec(device: str | DeviceSpec) -> DeviceSpec:
    """Return the specification that *device* is, or that its text names as on the command line."""
    if not isinstance(device, str):
        return device
    from softkvm.cli.devices import DEVICE_OPTIONS

    name, _, text = device.strip().removeprefix("--").partition(" ")
    for option in DEVICE_OPTIONS:
        if option.name == name.replace("-", "_"):
            return option.parse(text.strip())
    names = ", ".join(option.name for option in DEVICE_OPTIONS)
    raise ConfigError(f"device {device!r}: expected one of {names}, and its options behind a blank")


def _reason(reason: int | str) -> int:
    number = getattr(abi, reason, None) if isinstance(reason, str) and reason.startswith("KVM_EXIT_") else reason
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < REASONS:
        raise ConfigError(f"reason={reason!r}: expected an exit reason such as 'KVM_EXIT_IO'")
    return number
