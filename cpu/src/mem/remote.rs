// SPDX-License-Identifier: Apache-2.0
//! A machine's memory as threads use it that are no processor's: KVM, devices.

use std::sync::atomic::AtomicU64;

use super::Machine;
use super::host::{host_read, host_write};
use super::lost::{Lost, guarded};
use super::region::{PAGE_SIZE, RegionTable};
use super::shared::pending;

/// Why memory was not accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// Not inside of a region, or not aligned.
    Unregistered,
    /// It is registered, and not there (any more), or not for writing.
    Lost(Lost),
}

impl From<Lost> for AccessError {
    fn from(lost: Lost) -> AccessError {
        AccessError::Lost(lost)
    }
}

impl Machine {
    /// Calls `f`, which touches `size` bytes at `address`, if they are registered. No processor has the bus meanwhile.
    fn access<R>(&self, address: usize, size: usize, f: impl FnOnce() -> R) -> Result<R, AccessError> {
        let regions: &RegionTable = &self.regions();
        if !regions.contains(address, size) {
            return Err(AccessError::Unregistered);
        }
        let covers = |lost: usize| lost.wrapping_sub(address & !(PAGE_SIZE - 1)) < size + PAGE_SIZE;
        // SAFETY: the functions below have nothing to drop; what `covers` looks at does not change.
        Ok(self.bus.with_host_access(|| unsafe { guarded(&covers, f) })?)
    }

    /// Copies memory out; while others write there the bytes may be old and new ones.
    pub fn read(&self, address: usize, out: &mut [u8]) -> Result<(), AccessError> {
        // SAFETY: registered memory is mapped, or its loss is expected.
        self.access(address, out.len(), || unsafe { host_read(address as *const u8, out) })
    }

    /// Reads a byte of the page at `address`, to have the owner of the memory, or the host, put something there. That may
    /// take as long as they like: no lock is held.
    pub fn populate(&self, address: usize) -> Result<(), AccessError> {
        let regions: &RegionTable = &self.regions();
        if !regions.contains(address, 1) {
            return Err(AccessError::Unregistered);
        }
        let covers = |lost: usize| lost == address;
        let mut byte = [0];
        // SAFETY: registered memory is mapped, or its loss is expected; there is nothing to drop.
        unsafe { guarded(&covers, || host_read(address as *const u8, &mut byte)) }?;
        Ok(())
    }

    /// Copies bytes into memory.
    pub fn write(&self, address: usize, bytes: &[u8]) -> Result<(), AccessError> {
        // SAFETY: as above.
        self.access(address, bytes.len(), || unsafe { host_write(bytes, address as *mut u8) })?;
        self.notify_write(address, bytes.len());
        Ok(())
    }

    /// Calls `f` with `count` words at `address`, a multiple of 8: entries of page tables. `f` must not have anything to
    /// drop while it looks at them.
    ///
    /// # Safety
    /// `f` is left in the middle if the memory is lost: what it has on the stack then needs no drop.
    pub unsafe fn words<R>(
        &self,
        address: usize,
        count: usize,
        f: impl FnOnce(&[AtomicU64]) -> R,
    ) -> Result<R, AccessError> {
        if address % 8 != 0 {
            return Err(AccessError::Unregistered);
        }
        let words = address as *const AtomicU64;
        // SAFETY: registered memory is mapped, or its loss is expected; AtomicU64 has the layout of u64 and allows
        // concurrent writers.
        self.access(address, count.saturating_mul(8), || {
            f(unsafe { core::slice::from_raw_parts(words, count) })
        })
    }

    /// Gives `size` bytes of pages at `address` back to the host: they read as zeroes from then on, and are memory again
    /// when they are touched. `shared` memory (a memfd's, of which no other mapping keeps it either) has holes punched. No
    /// translation leads there meanwhile; that is the caller's to see to.
    ///
    /// The system call is made here: the C library's function may be one of ours, which has KVM told of what it does.
    pub fn discard(&self, address: usize, size: usize, shared: bool) -> std::io::Result<()> {
        let regions = self.regions();
        if address % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 || !regions.contains(address, size) {
            return Err(std::io::Error::from_raw_os_error(libc::EFAULT));
        }
        let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: registered memory is the guests', to whom it may become zero as by any write.
        let result =
            self.bus.with_host_access(|| unsafe { libc::syscall(libc::SYS_madvise, address, size, advice) });
        if result != 0 {
            return Err(std::io::Error::last_os_error());
        }
        self.notify_write(address, size);
        Ok(())
    }

    /// The host wrote `size` bytes at `address` (a device, KVM): cached code there is checked again before it runs.
    pub fn notify_write(&self, address: usize, size: usize) {
        if self.regions().take_code(address, size) {
            self.signal(None, pending::CODE_CHANGED);
        }
    }
}

#[cfg(test)]
#[cfg(not(miri))]
mod tests {
    use super::*;

    /// Two pages of the process's own memory, or of a file's.
    fn map(shared: bool) -> usize {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (kind, fd) = if shared {
            // SAFETY: a new file.
            let fd = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) };
            // SAFETY: a file of this test's.
            assert_eq!(unsafe { libc::ftruncate(fd, 2 * PAGE_SIZE as i64) }, 0);
            (libc::MAP_SHARED, fd)
        } else {
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
        };
        // SAFETY: a new mapping.
        let p = unsafe { libc::mmap(core::ptr::null_mut(), 2 * PAGE_SIZE, protection, kind, fd, 0) };
        assert_ne!(p, libc::MAP_FAILED);
        p as usize
    }

    #[test]
    fn memory_that_is_given_back_reads_as_zeroes_and_is_memory_again() {
        for shared in [false, true] {
            let at = map(shared);
            let machine = Machine::new();
            // SAFETY: it stays mapped, and is the machine's alone.
            unsafe { machine.add_region(at, 2 * PAGE_SIZE) }.unwrap();
            machine.write(at, &[7; 2 * PAGE_SIZE]).unwrap();
            machine.discard(at, PAGE_SIZE, shared).unwrap();
            let mut bytes = [1; 2 * PAGE_SIZE];
            machine.read(at, &mut bytes).unwrap();
            assert_eq!(bytes[..PAGE_SIZE], [0; PAGE_SIZE]);
            assert_eq!(bytes[PAGE_SIZE..], [7; PAGE_SIZE]);
            machine.write(at, &[9]).unwrap();
            machine.read(at, &mut bytes[..1]).unwrap();
            assert_eq!(bytes[0], 9);
            for (address, size) in [(at + 8, PAGE_SIZE), (at, 8), (at, 3 * PAGE_SIZE), (0, PAGE_SIZE)] {
                assert!(machine.discard(address, size, shared).is_err());
            }
        }
    }
}
