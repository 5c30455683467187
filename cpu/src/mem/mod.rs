// SPDX-License-Identifier: Apache-2.0
//! The physical machine: host memory that processors may touch, and what is known of each of its pages.
//!
//! A physical address is a host virtual address. A processor refuses every frame outside the registered regions. Each
//! page has a mask of 64-byte chunks that hold code some processor has decoded; stores into such a chunk tell every
//! processor to check its decoded code against memory again (see `engine::block`).

mod bus;
pub mod flush;
mod flush_queue;
mod forks;
pub mod futex;
mod holes;
mod host;
pub mod lost;
mod pool;
mod processors;
mod published;
mod region;
pub mod remote;
mod shared;

pub use bus::Bus;
pub use forks::{forked, forks};
pub use host::{
    PATIENCE, host_cas, host_equal, host_fill, host_load, host_load128, host_move, host_read, host_store,
    host_store128, host_touch, host_write, is_atomic,
};
pub use region::{PAGE_SIZE, PageInfo, Region, RegionError, RegionTable, chunk_mask};
pub use shared::{Shared, Wake, pending};

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak};

use pool::Pool;
use published::Published;
use region::Owner;
use shared::{Patience, signal};

/// Memory regions and processors; usually one per virtual machine.
#[derive(Default)]
pub struct Machine {
    table: RwLock<Arc<RegionTable>>,
    /// The same, for those who may not wait.
    published: Published,
    /// Counts the events that every processor must catch up with (code pages armed, regions removed).
    generation: AtomicU64,
    pool: Mutex<Pool>,
    bus: Bus,
    /// [`forks`] when the machine was made.
    forks: u64,
}

/// Machines, with the process that has made them (its [`forks`]).
struct Machines {
    all: Mutex<Vec<Weak<Machine>>>,
    forks: u64,
}

/// All machines of the process: one's pages must not lie where another's user has its memory, or may have it later.
/// A forked child makes a list of its own at its first: the lock of its parent's may be held by a thread that is not in
/// it, and the parent's machines are nothing to it. Lists are never freed.
static MACHINES: AtomicPtr<Machines> = AtomicPtr::new(core::ptr::null_mut());

fn machines() -> MutexGuard<'static, Vec<Weak<Machine>>> {
    list().all.lock().unwrap_or_else(|e| e.into_inner())
}

fn list() -> &'static Machines {
    let forks = forks();
    let mut known = MACHINES.load(Ordering::SeqCst);
    loop {
        // SAFETY: null, or a list, and those are never freed.
        match unsafe { known.as_ref() } {
            Some(machines) if machines.forks == forks => {
                return machines;
            }
            _ => {
                let new = Box::into_raw(Box::new(Machines { all: Mutex::default(), forks }));
                match MACHINES.compare_exchange(known, new, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => known = new,
                    Err(other) => {
                        // SAFETY: nobody else has seen it.
                        drop(unsafe { Box::from_raw(new) });
                        known = other;
                    }
                }
            }
        }
    }
}

/// Those of a list that are still there.
fn living(all: &[Weak<Machine>]) -> impl Iterator<Item = Arc<Machine>> {
    all.iter().filter_map(Weak::upgrade)
}

impl Machine {
    /// A machine with no memory and no processors.
    pub fn new() -> Arc<Machine> {
        let mut machine = Machine::default();
        machine.forks = forks();
        let machine = Arc::new(machine);
        let mut all = machines();
        all.retain(|m| m.strong_count() != 0);
        all.push(Arc::downgrade(&machine));
        machine
    }

    /// Whether this is the copy that a child got of its parent's machine. Its processors may run for ever by what is
    /// written here, and its locks be held: the threads that would change that are not in this process. Nothing can be
    /// done with it but to drop it.
    pub fn inherited(&self) -> bool {
        self.forks != forks()
    }

    /// The regions as they are now.
    pub fn regions(&self) -> Arc<RegionTable> {
        self.table.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Whether some of `size` bytes at `hva` is of a region that [`Machine::add_region`] has made usable; not in a child.
    /// Takes no lock, and may be asked in a signal's handler.
    pub fn has_region(&self, hva: usize, size: usize) -> bool {
        !self.inherited() && self.published.look(|table| table.meets_user(hva, size)).unwrap_or(false)
    }

    fn put_region(&self, region: Region) -> Result<(), RegionError> {
        {
            let mut table = self.table.write().unwrap_or_else(|e| e.into_inner());
            *table = Arc::new(table.with(region)?);
            self.published.publish(&table);
        }
        self.advance(None);
        Ok(())
    }

    fn take_region(&self, hva: usize, owner: Owner) -> Result<(), RegionError> {
        {
            let mut table = self.table.write().unwrap_or_else(|e| e.into_inner());
            *table = Arc::new(table.without(hva, owner)?);
            self.published.publish(&table);
        }
        let generation = self.advance(None);
        let mut patience = Patience::default();
        while !self.caught_up(generation, None) {
            if patience.pause() {
                self.bus.processors.rouse();
            }
        }
        Ok(())
    }

    /// Makes `size` bytes of host memory at `hva` usable; refuses pages of this or any other machine's own. Where nothing
    /// is mapped yet, nothing will be that does not name the address ([`holes`]).
    ///
    /// # Safety
    /// What is mapped there is the guests' until the region is removed.
    pub unsafe fn add_region(&self, hva: usize, size: usize) -> Result<(), RegionError> {
        Region::check(hva, size)?;
        let all = machines();
        if living(&all).any(|m| m.regions().meets_own(hva, size)) {
            return Err(RegionError::Overlap);
        }
        // First of all: what is known of the region's pages must not come to lie in its holes.
        let filled = holes::fill(hva, size);
        let done = Region::new(hva, size, Owner::User).and_then(|region| {
            region.filled.store(filled, Ordering::Relaxed);
            self.put_region(region)
        });
        if done.is_err() && filled {
            free_holes(&all, hva, size);
        }
        done
    }

    /// Has nothing be mapped any more in holes of the region that holds `address`, of whose user it has turned out that
    /// its memory is gone, but what names the place.
    pub fn fill_holes(&self, address: usize) {
        if let Some(region) = self.regions().find(address)
            && holes::fill(region.base(), region.end() - region.base())
        {
            region.filled.store(true, Ordering::Relaxed);
        }
    }

    /// Takes a region away; returns when no running processor can reach it any more.
    pub fn remove_region(&self, hva: usize) -> Result<(), RegionError> {
        let regions = self.regions();
        self.take_region(hva, Owner::User)?;
        if let Some(region) = regions.find(hva)
            && region.filled.load(Ordering::Relaxed)
        {
            free_holes(&machines(), region.base(), region.end() - region.base());
        }
        Ok(())
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Address of `count` new pages in a row, zeroed and usable: page tables, control blocks. That the processors learn
    /// of them is only necessary once for many pages.
    pub fn alloc_pages(&self, count: usize) -> Result<usize, RegionError> {
        let mut pool = self.pool();
        if let Some(address) = pool.take(count) {
            return Ok(address);
        }
        let size = Pool::chunk_size(count).ok_or(RegionError::NoMemory)?;
        let all = machines();
        let chunk = pool::map(size, |base, size| {
            let tables = living(&all).map(|m| m.regions());
            tables.into_iter().find_map(|t| t.meets(base, size).map(|r| (r.base(), r.end())))
        })?;
        self.put_region(Region::new(chunk.base(), chunk.size(), Owner::Machine)?)?;
        pool.add(chunk);
        pool.take(count).ok_or(RegionError::NoMemory)
    }

    /// Gives `count` pages back that [`Machine::alloc_pages`] has given. No table names them any more, and no processor
    /// has a translation from a time when one did; they may be given out again at once.
    pub fn free_pages(&self, address: usize, count: usize) {
        if self.inherited() {
            return; // they go with the machine
        }
        let unused = self.pool().give(address, count);
        if let Some(chunk) = unused {
            // A region of this machine's, and its mapping goes when nobody reaches it.
            let _ = self.take_region(chunk.base(), Owner::Machine);
        }
    }

    /// The bus.
    #[inline(always)]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Adds a processor's shared part.
    pub fn attach(&self, shared: Arc<Shared>) {
        self.bus.processors.add(shared);
    }

    /// Removes a processor's shared part.
    pub fn detach(&self, shared: &Arc<Shared>) {
        if self.inherited() {
            return;
        }
        self.bus.processors.remove(shared);
    }

    /// The newest generation.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Starts a new generation and asks every processor but `me` to catch up with it.
    pub fn advance(&self, me: Option<&Arc<Shared>>) -> u64 {
        self.advance_locked(&self.bus.processors.lock(), me)
    }

    fn advance_locked(&self, cpus: &[Arc<Shared>], me: Option<&Arc<Shared>>) -> u64 {
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        signal(cpus, me, pending::TLB_SYNC);
        generation
    }

    /// Marks chunks of a page as code for the processor `me`; returns the generation that knows of all of the page's
    /// marks, and whether these are its first. Whoever finds chunks marked comes here, too: the processor that marked
    /// them may not have come to its new generation yet.
    pub fn mark_code(&self, page: &PageInfo, chunks: u64, me: &Arc<Shared>) -> (u64, bool) {
        let cpus = self.bus.processors.lock();
        if page.code.fetch_or(chunks, Ordering::SeqCst) == 0 {
            (self.advance_locked(&cpus, Some(me)), true)
        } else {
            (self.generation(), false)
        }
    }

    /// Sets pending bits of every processor but `me`.
    pub fn signal(&self, me: Option<&Arc<Shared>>, bits: u32) {
        self.bus.processors.signal(me, bits);
    }

    /// Rings at the processor with a number, if there is one.
    pub fn doorbell(&self, index: u32) {
        if let Some(shared) = self.bus.processors.find(index) {
            shared.ring();
        }
    }

    /// Whether every running processor but `me` has caught up with `generation`.
    pub fn caught_up(&self, generation: u64, me: Option<&Arc<Shared>>) -> bool {
        self.bus.processors.caught_up(generation, me)
    }
}

/// Frees the holes of a region that is gone. Those that others name are theirs to free.
fn free_holes(all: &[Weak<Machine>], base: usize, size: usize) {
    let tables: Vec<_> = living(all).map(|m| m.regions()).collect();
    holes::free(base, size, |base, size| {
        let other = tables.iter().filter_map(|t| t.meets(base, size)).min_by_key(|r| r.base())?;
        other.filled.store(true, Ordering::Relaxed);
        Some((other.base(), other.end()))
    });
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The last one to let go may be somebody who looks through all machines: then the holes stay filled.
        if self.inherited() {
            return;
        }
        let Ok(all) = list().all.try_lock() else { return };
        for region in self.regions().users().filter(|r| r.filled.load(Ordering::Relaxed)) {
            free_holes(&all, region.base(), region.end() - region.base());
        }
    }
}
