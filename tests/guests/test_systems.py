# SPDX-License-Identifier: Apache-2.0
"""Systems other than the default guest boot, from the command line or by its means: each by another way in."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.guests import linux_guest
from tests.support.machines import open_soft
from tests.support.systems import archive, compile_program, package_file

from softkvm.vmm.boot.bzimage import Entry
from softkvm.vmm.boot.image import Image
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.console import Console
from softkvm.vmm.guest.initramfs import INIT_REACHED, RUN_ENDED
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.outcome import End

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(900)]

BOOT_S = 400
RUN = (sys.executable, "-m", "softkvm.cli.main", "run", "--timeout", str(BOOT_S))

# write(1, text, length), then reboot(…, LINUX_REBOOT_CMD_POWER_OFF), by int 0x80
INIT_I386 = r"""
static int call(int n, int a, int b, int c, int d) {
    int result;
    asm volatile("int $0x80" : "=a"(result) : "a"(n), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
    return result;
}
void _start(void) {
    static const char text[] = "init of 32 bits\n";
    call(4, 1, (int)text, sizeof text - 1, 0);
    call(88, 0xfee1dead, 672274793, 0x4321fedc, 0);
    for (;;) { }
}
"""

# kexec_file_load(argv[1], argv[2], argv[3], KEXEC_FILE_ON_CRASH)
LOAD_CRASH_KERNEL = r"""
static long call(long n, long a, long b, long c, long d, long e) {
    long result;
    register long r10 asm("r10") = d;
    register long r8 asm("r8") = e;
    asm volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
    return result;
}
__attribute__((used)) static void start(char **argv) {
    long kernel = call(2, (long)argv[1], 0, 0, 0, 0), initrd = call(2, (long)argv[2], 0, 0, 0, 0), length = 0;
    while (argv[3][length++]) { }
    long result = call(320, kernel, initrd, length, (long)argv[3], 2);
    call(60, -result, 0, 0, 0, 0);
}
asm(".globl _start\n_start: lea 8(%rsp), %rdi\nand $-16, %rsp\ncall start");
"""

SPIN = 'void _start(void) { for (;;) asm volatile("pause"); }'


@contextmanager
def booted(
    kernel: Path, line: str = "", *, memory_mib: int = 64, entry: Entry | None = None
) -> Iterator[tuple[Machine, Console]]:
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(memory_mib << 20), console.output) as machine:
        console.attach(machine)
        machine.load(kernel, None, line, entry=entry)
        machine.start()
        yield machine, console


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def test_xen_with_a_linux_dom0() -> None:
    """Multiboot, several modules with arguments, the BIOS data area; the power-off comes through Xen."""
    xen = package_file("xen-hypervisor-4.17-amd64", r"boot/xen-4[^/]*\.gz")
    kernel = package_file("linux-image-amd64", r"boot/vmlinuz[^/]*", kernel=True)
    dom0 = f'{kernel} console=hvc0 quiet softkvm.run="cat /sys/hypervisor/type; uname -r"'
    initrd = linux_guest().initrd
    done = run(
        "--kernel", xen, "--append", "console=com1 com1=115200", "--initrd", f"{dom0},{initrd}", "--mem", "512M"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "Xen version 4.17" in done.stdout
    assert INIT_REACHED in done.stdout
    assert f"{RUN_ENDED} 0" in done.stdout


@pytest.mark.parametrize("architecture", ["amd64", "i386"])
def test_gnu_mach_starts_a_task(tmp_path: Path, architecture: str) -> None:
    """Multiboot, loaded from gzip; of i386 the entry point is a virtual address."""
    kernel = package_file("gnumach-image-1.8-486", r"boot/gnumach[^/]*\.gz", architecture=architecture)
    task = compile_program(SPIN, tmp_path / "task", "-m32")
    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(128 << 20), console.output) as machine:
        console.attach(machine)
        script = b"task argument ${host-port} $(mine=task-create) $(task-resume)"
        machine.load(kernel, None, "gnumach console=com0", modules=[Module(Image("module", task.read_bytes()), script)])
        machine.start()
        console.expect(r"GNU Mach 1\.8", BOOT_S)
        console.expect("1 multiboot modules", BOOT_S)
        console.expect("task loaded: task argument", BOOT_S)
        console.expect("start task", BOOT_S)


@pytest.mark.parametrize(("width", "entry"), [("x64", Entry.LONG), ("ia32", Entry.PROTECTED)])
def test_memtest_finds_no_error(width: str, entry: Entry) -> None:
    """The 64-bit and the 32-bit entry of a kernel that is not Linux; what it shows is on the screen, in memory."""
    image = package_file("memtest86+", rf"boot/memtest86\+{width}\.bin")
    with booted(image, "console=ttyS0,115200", entry=entry) as (machine, console):
        console.expect(r"Memtest86\+ v\d", BOOT_S)
        end = time.monotonic() + BOOT_S
        while not re.search(r"Test #[1-9]", machine.board.bios.screen.text()):
            assert time.monotonic() < end, machine.board.bios.screen.text()
            time.sleep(0.1)
        text = machine.board.bios.screen.text()
    assert "Errors: 0" in text
    assert "64MB" in text


def test_ipxe_is_at_its_prompt() -> None:
    """The real-mode entry, BIOS services, keys, and the way back into the BIOS."""
    with booted(package_file("ipxe", r"boot/ipxe\.lkrn")) as (machine, console):
        console.expect("Press Ctrl-B", BOOT_S)
        console.send("\x02")
        console.expect("iPXE> ", BOOT_S)
        console.send("echo sum ${builtin/version}\r")
        console.expect(r"sum 1\.\S+\r\niPXE> ", BOOT_S)
        console.send("exit\r")
        assert machine.wait(BOOT_S).end is End.RESET


@pytest.mark.parametrize("entry", [Entry.PROTECTED, Entry.REAL])
def test_linux_by_its_older_entries(entry: Entry) -> None:
    guest = linux_guest()
    done = run(
        *("--kernel", guest.kernel, "--initrd", guest.initrd, "--entry", entry.value),
        *("--append", f'{guest.command_line} softkvm.run="dmesg"'),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert f"{RUN_ENDED} 0" in done.stdout
    assert "BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable" in done.stdout


def test_32_bit_linux(tmp_path: Path) -> None:
    kernel = package_file("linux-image-686", r"boot/vmlinuz[^/]*", architecture="i386", kernel=True)
    init = compile_program(INIT_I386, tmp_path / "init", "-m32")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(archive({"dev/keep": b"", "init": init.read_bytes()}))
    # without the self-tests of what is not used: they take most of the time
    slow = "crypto_algapi_init,load_system_certificate_list,isapnp_init,init_kprobe_trace"
    done = run("--kernel", kernel, "--initrd", initrd, "--append", f"console=ttyS0 initcall_blacklist={slow}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "init of 32 bits" in done.stdout


@pytest.mark.parametrize("processor", [0, 1])
def test_crash_kernel_runs_after_a_panic_and_sees_the_memory_of_the_other(tmp_path: Path, processor: int) -> None:
    """On the boot processor, and on the other: then the boot processor gets INIT and comes through the firmware."""
    guest = linux_guest()
    loader = compile_program(LOAD_CRASH_KERNEL, tmp_path / "load", "-m64")
    files = {"crash/load": loader, "crash/vmlinuz": guest.kernel, "crash/initrd": guest.initrd}
    extra = tmp_path / "extra"
    extra.write_bytes(archive({path: file.read_bytes() for path, file in files.items()}))
    crash_line = "console=ttyS0 quiet softkvm.run=ls${IFS}-l${IFS}/proc/vmcore"
    crash = f"taskset {1 << processor} sh -c 'echo c > /proc/sysrq-trigger'"
    commands = f"/crash/load /crash/vmlinuz /crash/initrd '{crash_line}' && {crash}"
    done = run(
        *("--kernel", guest.kernel, "--initrd", guest.initrd, "--initrd", extra, "--mem", "512M", "--vcpus", "2"),
        *("--append", f'{guest.command_line} quiet crashkernel=192M softkvm.run="{commands}"'),
    )
    assert "Kernel panic - not syncing: sysrq triggered crash" in done.stdout, done.stdout[-3000:] + done.stderr
    crashed = done.stdout.partition("Kernel panic")[2]
    assert INIT_REACHED in crashed
    assert "/proc/vmcore" in crashed
    assert f"{RUN_ENDED} 0" in crashed
    assert done.returncode == 3, "a panic, be it one with an aftermath"
