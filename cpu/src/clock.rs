// SPDX-License-Identifier: Apache-2.0
//! The physical clock and the time-stamp counter, which ticks once per nanosecond of it (1 GHz, invariant).
//!
//! In the process of a client that executes RDTSC itself the counter is the host's instead ([`use_host_tsc`]), as it is
//! where the processor is the client's own.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::Duration;

/// The frequency of the processor's own counter.
const OWN_KHZ: u64 = 1_000_000;
/// How long the host's counter is measured at least.
const MEASURED_NS: u64 = 20_000_000;

/// The frequency of the host's counter; 0 while it is not used.
static HOST_KHZ: AtomicU64 = AtomicU64::new(0);

/// CLOCK_MONOTONIC in nanoseconds: what `time.monotonic_ns()` gives in Python.
#[inline]
pub fn clock_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid clock and a valid pointer; cannot fail on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// In order: not before what a guest has loaded before it, although a processor may do that (SDM vol. 2, RDTSC). Here there
/// is more between the two than one instruction, and a guest's counters would seem to go backwards much oftener.
#[cfg(target_arch = "x86_64")]
fn host_tsc() -> u64 {
    // SAFETY: instructions that every x86-64 processor has.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn host_tsc() -> u64 {
    clock_ns()
}

/// The physical time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    if HOST_KHZ.load(Ordering::Relaxed) == 0 { clock_ns() } else { host_tsc() }
}

/// Its frequency.
pub fn tsc_khz() -> u64 {
    match HOST_KHZ.load(Ordering::Relaxed) {
        0 => OWN_KHZ,
        khz => khz,
    }
}

/// The time-stamp counter and the clock at one moment.
#[derive(Clone, Copy)]
pub struct Moment {
    /// [`tsc`].
    pub tsc: u64,
    /// [`clock_ns`].
    pub ns: u64,
}

/// The host's two clocks, and how many ticks they may be apart.
fn host_moment() -> (Moment, u64) {
    let before = host_tsc();
    let ns = clock_ns();
    let width = host_tsc().wrapping_sub(before);
    (Moment { tsc: before.wrapping_add(width / 2), ns }, width)
}

/// Now, by both clocks.
pub fn moment() -> Moment {
    if HOST_KHZ.load(Ordering::Relaxed) == 0 {
        let ns = clock_ns();
        return Moment { tsc: ns, ns };
    }
    host_moment().0
}

/// The best of some: nothing has come between its readings.
fn exact_moment() -> Moment {
    let moments = core::array::from_fn::<_, 8, _>(|_| host_moment());
    moments.iter().min_by_key(|(_, width)| *width).map_or(moments[0].0, |(moment, _)| *moment)
}

static START: OnceLock<Moment> = OnceLock::new();

/// Notes where a measurement of the host's counter may begin.
pub fn begin_measurement() {
    START.get_or_init(exact_moment);
}

/// Makes the host's counter the processor's; its frequency in kHz. It is measured from [`begin_measurement`] on.
pub fn use_host_tsc() -> u64 {
    begin_measurement();
    let start = START.get().copied().unwrap_or_else(exact_moment);
    let passed = clock_ns().saturating_sub(start.ns);
    std::thread::sleep(Duration::from_nanos(MEASURED_NS.saturating_sub(passed)));
    let end = exact_moment();
    let ticks = u128::from(end.tsc.wrapping_sub(start.tsc)) * 1_000_000;
    let ns = u128::from(end.ns.saturating_sub(start.ns).max(1));
    let khz = ((ticks + ns / 2) / ns) as u64;
    HOST_KHZ.store(khz, Ordering::Relaxed);
    khz
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_own_counter_is_the_clock() {
        let now = moment();
        assert_eq!(now.tsc, now.ns);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_moment_of_the_host_has_its_counter_between_two_others() {
        let before = host_tsc();
        let (now, width) = host_moment();
        assert!(before <= now.tsc && now.tsc <= host_tsc());
        assert!(width <= host_tsc() - before);
    }
}
