# SPDX-License-Identifier: Apache-2.0
"""The ACPI hardware: PM1a event and control blocks, PM timer, general-purpose events, the reset register.

Source: ACPI specification 6.4, section 4.8 (fixed hardware registers), 4.8.2.1 (PM timer), 4.8.3.6 (reset register),
4.8.4 (general-purpose event register blocks).
The machine is always in ACPI mode (FADT.SMI_CMD = 0), so PM1_CNT.SCI_EN reads as one.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.devices.timer import Timer

# The block's layout from its base port; FADT names each part.
PM1_STS: Final = 0x0
PM1_EN: Final = 0x2
PM1_CNT: Final = 0x4
PM_TMR: Final = 0x8
GPE0_STS: Final = 0xC
GPE0_EN: Final = 0xE
GPE0_SIZE: Final = 4
PM_BLOCK_SIZE: Final = 0x10
PM_BASE_PORT: Final = 0x600
SCI_IRQ: Final = 9

PM_TIMER_HZ: Final = 3_579_545

STS_TMR: Final = 1 << 0
STS_PWRBTN: Final = 1 << 8
STS_SLPBTN: Final = 1 << 9
STS_RTC: Final = 1 << 10
STS_WAK: Final = 1 << 15
STS_GBL: Final = 1 << 5
_WAKE_MASK: Final = STS_PWRBTN | STS_SLPBTN | STS_RTC
_EN_MASK: Final = STS_TMR | STS_GBL | STS_PWRBTN | STS_SLPBTN | STS_RTC

CNT_SCI_EN: Final = 1 << 0
CNT_SLP_TYP_SHIFT: Final = 10
CNT_SLP_TYP_MASK: Final = 7 << CNT_SLP_TYP_SHIFT
CNT_SLP_EN: Final = 1 << 13

S3_SLP_TYP: Final = 1  # as QEMU's PIIX4, whose test programs write it without asking the DSDT
S5_SLP_TYP: Final = 5  # what the DSDT's \_S5 package must hold
PIIX4_S5_SLP_TYP: Final = 0  # S5 of QEMU's PIIX4: programs without an ACPI interpreter write it

RESET_PORT: Final = 0xCF9
RESET_VALUE: Final = 0x06  # FADT.RESET_VALUE
_RST_CPU: Final = 0x04
_SYS_RST: Final = 0x02

_NS: Final = 1_000_000_000


class AcpiPm:
    """The power-management block of ``PM_BLOCK_SIZE`` ports. ``power_off()`` is called when the guest enters S5.

    ``sleep()`` is called when it enters S3, on the vCPU's thread; the machine sleeps until :meth:`wait_for_wake_up`
    returns.

    ``clock_ns`` drives the PM timer (32 bits wide; FADT.TMR_VAL_EXT) and does not go backwards.
    """

    def __init__(
        self,
        power_off: Callable[[], object] | None = None,
        set_irq: Callable[[int], object] | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[], object] | None = None,
    ) -> None:
        self._power_off = power_off
        self._sleep = sleep
        self._set_irq = set_irq
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._epoch_ns = clock_ns()  # when the timer was zero
        self._seen_ticks = 0
        self._sts = 0
        self._en = 0
        self._cnt = CNT_SCI_EN
        self._gpe_sts = 0
        self._gpe_en = 0
        self._irq_level = 0
        self._paused = False
        self._timer = Timer("acpi pm timer", clock_ns, self._timer_expired)
        self._changed = threading.Condition(self._lock)

    def read(self, offset: int, size: int) -> int:
        """Read ``size`` bytes of the block from ``offset``; bytes between the registers are zero."""
        if offset == PM_TMR and size == 4:  # the one that guests read often
            return self._ticks() & 0xFFFFFFFF
        with self._lock:
            self._advance()
            block = bytearray(PM_BLOCK_SIZE)
            block[PM1_STS:PM1_EN] = self._sts.to_bytes(2, "little")
            block[PM1_EN:PM1_CNT] = self._en.to_bytes(2, "little")
            block[PM1_CNT : PM1_CNT + 2] = self._cnt.to_bytes(2, "little")
            block[PM_TMR:GPE0_STS] = (self._ticks() & 0xFFFFFFFF).to_bytes(4, "little")
            block[GPE0_STS:GPE0_EN] = self._gpe_sts.to_bytes(2, "little")
            block[GPE0_EN:PM_BLOCK_SIZE] = self._gpe_en.to_bytes(2, "little")
            return int.from_bytes(block[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes of the block from ``offset``; the timer is read-only."""
        entered = None
        with self._lock:
            self._advance()
            for i in range(size):
                state = self._write_byte(offset + i, value >> 8 * i & 0xFF)
                entered = state if state is not None else entered
            self._update_irq()
            self._arm()
        states = {S3_SLP_TYP: self._sleep, S5_SLP_TYP: self._power_off, PIIX4_S5_SLP_TYP: self._power_off}
        enter = states.get(-1 if entered is None else entered)
        if enter is not None:
            enter()

    def _write_byte(self, offset: int, value: int) -> int | None:
        """Write one byte of a register; return the sleep type if it puts the machine to sleep."""
        register, shift = offset & ~1, 8 * (offset & 1)
        value <<= shift
        kept = 0xFF00 >> shift
        if register == PM1_STS:
            self._sts &= ~value  # write one to clear
        elif register == PM1_EN:
            self._en = (self._en & kept | value) & _EN_MASK
        elif register == GPE0_STS:
            self._gpe_sts &= ~value  # write one to clear
        elif register == GPE0_EN:
            self._gpe_en = self._gpe_en & kept | value
        elif register == PM1_CNT:
            self._cnt = (self._cnt & kept | value) & ~CNT_SLP_EN | CNT_SCI_EN
            if value & CNT_SLP_EN:
                return (self._cnt & CNT_SLP_TYP_MASK) >> CNT_SLP_TYP_SHIFT
        return None

    def press_power_button(self) -> None:
        """Ask the guest to shut down: PWRBTN_STS and an SCI (section 4.8.2.2.1)."""
        self._event(STS_PWRBTN)

    def raise_event(self, event: int) -> None:
        """General-purpose event *event*, 0 to 15, has come: its status and, if it is enabled, an SCI (4.8.4.1)."""
        with self._lock:
            self._gpe_sts |= 1 << event
            self._update_irq()

    def rtc_alarm(self) -> None:
        """The real-time clock raised its interrupt: RTC_STS, which can wake the machine (section 4.8.3.1.1)."""
        self._event(STS_RTC)

    def _event(self, status: int) -> None:
        with self._changed:
            self._sts |= status
            self._update_irq()
            self._changed.notify_all()

    def wait_for_wake_up(self, timeout_s: float) -> bool:
        """Wait for an enabled wake-up event, then set WAK_STS and return True; False after *timeout_s*."""
        with self._changed:
            awake = self._changed.wait_for(lambda: bool(self._sts & (self._en | STS_PWRBTN) & _WAKE_MASK), timeout_s)
            if awake:
                self._sts |= STS_WAK
            return awake

    def reset(self) -> None:
        """Nothing is enabled and nothing has happened; the timer goes on."""
        with self._lock:
            self._sts = self._en = self._gpe_sts = self._gpe_en = 0
            self._cnt = CNT_SCI_EN
            self._update_irq()
            self._arm()

    def pause(self) -> None:
        """Let the timer rest, and the interrupt's line be: a button that is pressed is seen when it goes on."""
        self._timer.pause()
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        """Go on; what came meanwhile comes now."""
        with self._lock:
            self._paused = False
            self._update_irq()
        self._timer.resume()

    def close(self) -> None:
        """End the timer thread, if there is one."""
        self._timer.close()

    def _ticks(self) -> int:
        return (self._clock_ns() - self._epoch_ns) * PM_TIMER_HZ // _NS

    def _advance(self) -> None:
        """TMR_STS is set whenever the timer's highest bit changes (section 4.8.3.1.1)."""
        ticks = self._ticks()
        if self._seen_ticks >> 31 != ticks >> 31:
            self._sts |= STS_TMR
        self._seen_ticks = ticks

    def _update_irq(self) -> None:
        level = int(bool(self._sts & self._en & _EN_MASK or self._gpe_sts & self._gpe_en))
        if level != self._irq_level and not self._paused:
            self._irq_level = level
            if self._set_irq is not None:
                self._set_irq(level)

    @property
    def irq_level(self) -> int:
        """How the device drives its interrupt line."""
        return self._irq_level

    def _arm(self) -> None:
        if not self._en & STS_TMR:
            self._timer.arm(None)
            return
        change = (self._ticks() >> 31) + 1 << 31
        self._timer.arm(self._epoch_ns - (-change * _NS // PM_TIMER_HZ))

    def _timer_expired(self) -> None:
        with self._lock:
            self._advance()
            self._update_irq()
            self._arm()

    def save(self) -> dict[str, Any]:
        """The registers, and the nanoseconds since the timer was zero."""
        with self._lock:
            self._advance()
            return {
                "sts": self._sts,
                "en": self._en,
                "cnt": self._cnt,
                "gpe_sts": self._gpe_sts,
                "gpe_en": self._gpe_en,
                "elapsed_ns": self._clock_ns() - self._epoch_ns,
                "irq_level": self._irq_level,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the timer goes on from its saved count."""
        with self._lock:
            self._sts = state["sts"]
            self._en = state["en"]
            self._cnt = state["cnt"]
            self._gpe_sts = state["gpe_sts"]
            self._gpe_en = state["gpe_en"]
            self._epoch_ns = self._clock_ns() - state["elapsed_ns"]
            self._seen_ticks = self._ticks()
            self._irq_level = state["irq_level"]
            self._arm()


class ResetRegister:
    """The reset control register at port 0xCF9: setting RST_CPU resets the machine (FADT.RESET_REG)."""

    def __init__(self, reset: Callable[[], object] | None = None) -> None:
        self._reset = reset
        self._value = 0

    def read(self, offset: int, size: int = 1) -> int:
        """The bits last written; RST_CPU reads as zero."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Any write with RST_CPU set resets."""
        self._value = value & _SYS_RST
        if value & _RST_CPU and self._reset is not None:
            self._reset()

    def save(self) -> dict[str, Any]:
        """The register."""
        return {"value": self._value}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._value = state["value"]
