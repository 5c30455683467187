// SPDX-License-Identifier: Apache-2.0
//! The bus lock: one processor works on memory while all the others stand between two instructions.
//!
//! What a locked instruction does across two cache lines is atomic towards everything, plain stores of other processors
//! included (APM vol. 2, 7.3.2). Most hosts can do that in one instruction, within one mapping of a page; but they make
//! it slow on purpose, or a signal, as it holds up everybody (Linux: `split_lock_detect`). So it is done the way the old
//! bus did it. Locked instructions that other processors never let succeed end here, too.
//!
//! A processor *stands* while it certainly executes nothing: outside of a guest, in HLT, or waiting for the bus. Whoever
//! has the bus asks the others for it ([`pending::BUS`]), and waits until all stand. Each takes the bus once to go on,
//! so it goes on when nobody else has it. Running or standing is written before the other's flag is read, on both
//! sides, sequentially consistent: one of the two sees the other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use super::lost::{Lost, guarded};
use super::processors::Processors;
use super::region::RegionTable;
use super::shared::{Patience, Shared, pending, signal};

/// How often the others are looked at before the host's processor is given away: they may wait for it.
const SPINS: u32 = 200;

/// The bus of a machine, with the processors at it.
#[derive(Default)]
pub struct Bus {
    pub(super) processors: Processors,
    lock: Mutex<()>,
    /// Somebody wants all processors to stand, or has them.
    wanted: AtomicBool,
    /// Held for reading by threads of the host that write memory by way of the machine.
    host: RwLock<()>,
}

/// Lets the others go on, however the work ends.
struct Wanted<'a>(&'a Bus);

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.0.wanted.store(false, Ordering::SeqCst);
    }
}

impl Bus {
    fn take(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs `f` while nobody has the bus.
    pub(super) fn with_host_access<R>(&self, f: impl FnOnce() -> R) -> R {
        let _shared = self.host.read().unwrap_or_else(|e| e.into_inner());
        f()
    }

    /// Runs `f` on the thread of the running processor `me`, within an instruction that has changed nothing yet, while
    /// no other processor is within one. `f` must not wait for anybody. `regions` are those that the processor goes by,
    /// of which one may be gone from the machine's.
    ///
    /// # Safety
    /// If `f` touches memory that is lost, it is left in the middle: it has nothing to drop then ([`super::lost`]).
    #[cold]
    pub unsafe fn lock<R>(
        &self,
        me: &Arc<Shared>,
        regions: &RegionTable,
        f: impl FnOnce() -> R,
    ) -> Result<R, Lost> {
        // Whoever has the bus need not wait for this processor, which waits for the bus.
        let bus = self.go_on(me);
        self.wanted.store(true, Ordering::SeqCst);
        let wanted = Wanted(self);
        let others = self.processors.now();
        signal(&others, Some(me), pending::BUS);
        for other in others.iter().filter(|s| !Arc::ptr_eq(s, me)) {
            let (mut looks, mut patience) = (0, Patience::default());
            while !other.stands() {
                looks += 1;
                if looks % SPINS == 0 {
                    if patience.pause() {
                        other.rouse();
                    }
                } else {
                    core::hint::spin_loop();
                }
            }
        }
        let host = self.host.write().unwrap_or_else(|e| e.into_inner());
        // SAFETY: given; a table of regions doesn't change. What the guards around this one expect, this one does: were one of
        // them to return, the bus would be nobody's for ever.
        let done = unsafe { guarded(&|address| regions.find(address).is_some(), f) };
        drop((host, wanted, bus));
        done
    }

    /// Takes the bus to have the processor `me`, which stands or is about to, execute again.
    fn go_on(&self, me: &Shared) -> MutexGuard<'_, ()> {
        me.standing.store(true, Ordering::SeqCst);
        let bus = self.take();
        me.standing.store(false, Ordering::SeqCst);
        bus
    }

    /// Between two instructions of the running processor `me`: lets whoever wants the bus have it.
    #[cold]
    pub fn give_way(&self, me: &Shared) {
        me.pending.fetch_and(!pending::BUS, Ordering::SeqCst);
        drop(self.go_on(me));
    }

    /// Before the first instruction of the processor `me`, which is marked as running.
    #[inline]
    pub fn enter(&self, me: &Shared) {
        if self.wanted.load(Ordering::SeqCst) {
            self.give_way(me);
        }
    }

    /// Runs `f`, which waits, within an instruction of the running processor `me`.
    pub fn stand<R>(&self, me: &Shared, f: impl FnOnce() -> R) -> R {
        me.standing.store(true, Ordering::SeqCst);
        let result = f();
        self.give_way(me);
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use super::super::Machine;
    use super::*;

    /// Long enough for a thread that may run to do so, most of the time.
    const A_WHILE: Duration = Duration::from_millis(2);

    fn lock_bus(machine: &Machine, me: &Arc<Shared>, f: impl FnOnce()) {
        // SAFETY: these functions touch no memory that could be lost.
        unsafe { machine.bus.lock(me, &machine.regions(), f) }.unwrap();
    }

    fn processor(machine: &Machine) -> Arc<Shared> {
        let shared = Arc::new(Shared::new());
        machine.attach(shared.clone());
        shared
    }

    #[test]
    fn processors_execute_nothing_while_one_has_the_bus() {
        let machine = Machine::new();
        // Dropped when the test ends, however it does.
        let done = Arc::new(());
        let steps = Arc::new([const { AtomicU64::new(0) }; 2]);
        // One stays in the guest for long, one enters it again and again.
        let threads = [1000, 1].map(|instructions| {
            let (me, machine, done, steps) =
                (processor(&machine), machine.clone(), Arc::downgrade(&done), steps.clone());
            std::thread::spawn(move || {
                let work = || (0..if cfg!(miri) { 2 } else { 20_000 }).for_each(|_| core::hint::spin_loop());
                while done.upgrade().is_some() {
                    me.start();
                    machine.bus.enter(&me);
                    for _ in 0..instructions {
                        work();
                        steps[(instructions == 1) as usize].fetch_add(1, Ordering::SeqCst);
                        if me.pending.load(Ordering::SeqCst) & pending::BUS != 0 {
                            machine.bus.give_way(&me);
                        }
                        if done.upgrade().is_none() {
                            break;
                        }
                    }
                    me.stop();
                    work();
                }
            })
        });
        let me = processor(&machine);
        me.start();
        let look = || [0, 1].map(|n: usize| steps[n].load(Ordering::SeqCst));
        for _ in 0..if cfg!(miri) { 3 } else { 50 } {
            let before = look();
            while look().iter().zip(before).any(|(now, then)| *now == then) {
                std::thread::yield_now();
            }
            lock_bus(&machine, &me, || {
                let before = look();
                std::thread::sleep(A_WHILE);
                assert_eq!(look(), before);
            });
        }
        drop(done);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn whoever_wants_the_bus_at_the_same_time_gets_it_in_turn() {
        const ROUNDS: u64 = if cfg!(miri) { 10 } else { 1000 };
        let machine = Machine::new();
        let count = AtomicU64::new(0);
        let add = || {
            let before = count.load(Ordering::SeqCst);
            (0..200).for_each(|_| core::hint::spin_loop());
            count.store(before + 1, Ordering::SeqCst);
        };
        std::thread::scope(|s| {
            for _ in 0..3 {
                let (me, machine) = (processor(&machine), &machine);
                s.spawn(move || {
                    me.start();
                    for _ in 0..ROUNDS {
                        machine.bus.enter(&me);
                        lock_bus(machine, &me, add);
                    }
                    me.stop();
                });
            }
            // And a thread that is no processor's.
            s.spawn(|| (0..ROUNDS).for_each(|_| machine.bus.with_host_access(add)));
        });
        assert_eq!(count.load(Ordering::SeqCst), 4 * ROUNDS);
    }

    #[test]
    fn a_processor_that_waits_goes_on_when_nobody_has_the_bus() {
        let machine = Machine::new();
        let (me, other) = (processor(&machine), processor(&machine));
        let went_on = AtomicBool::new(false);
        me.start();
        other.start();
        std::thread::scope(|s| {
            machine.bus.stand(&me, || {
                lock_bus(&machine, &other, || {
                    s.spawn(|| {
                        machine.bus.give_way(&me);
                        went_on.store(true, Ordering::SeqCst);
                    });
                    std::thread::sleep(A_WHILE);
                    assert!(!went_on.load(Ordering::SeqCst));
                });
            });
        });
        assert!(went_on.load(Ordering::SeqCst));
    }

    #[test]
    #[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
    fn memory_that_is_lost_on_its_way_out_of_the_machine_leaves_the_bus_to_others() {
        use super::super::region::PAGE_SIZE;
        let machine = Machine::new();
        let me = processor(&machine);
        // SAFETY: a new mapping, which nobody has access to.
        let page = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(core::ptr::null_mut(), PAGE_SIZE, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: it is for the guests alone.
        unsafe { machine.add_region(page as usize, PAGE_SIZE) }.unwrap();
        // The processor goes by this table until it catches up, which it can't within an instruction.
        let regions = machine.regions();
        machine.remove_region(page as usize).unwrap();
        me.start();
        let work = || unsafe { machine.bus.lock(&me, &regions, || page.cast::<u8>().read_volatile()) };
        // SAFETY: around it is what guards a run of the processor.
        let done = unsafe { guarded(&|address| regions.find(address).is_some(), work) };
        assert!(matches!(done, Ok(Err(lost)) if lost.address == page as usize), "{done:?}");
        assert!(!machine.bus.wanted.load(Ordering::SeqCst) && machine.bus.lock.try_lock().is_ok());
        // SAFETY: the mapping from above.
        unsafe { libc::munmap(page, PAGE_SIZE) };
    }
}
