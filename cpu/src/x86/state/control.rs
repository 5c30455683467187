// SPDX-License-Identifier: Apache-2.0
//! What VMRUN and #VMEXIT hand over beside the registers.

/// An exception waiting to be delivered (or intercepted).
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector 0..31.
    pub vector: u8,
    /// Error code, if the exception pushes one.
    pub error: Option<u32>,
    /// #PF: the linear address for CR2. #DB: the bits for DR6.
    pub address: u64,
}

/// What #VMEXIT will report.
#[derive(Clone, Copy, Default, Debug)]
pub struct Exit {
    /// EXITCODE (APM vol. 2, appendix C).
    pub code: u64,
    /// EXITINFO1.
    pub info1: u64,
    /// EXITINFO2.
    pub info2: u64,
}

/// The VMCB's control area as the running processor needs it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Control {
    /// Intercept vectors 0..5 (VMCB offsets 0x000..0x014).
    pub intercepts: [u32; 6],
    /// Physical address of the I/O permission map, 0 when not used.
    pub iopm: u64,
    /// Physical address of the MSR permission map.
    pub msrpm: u64,
    /// Added to the TSC.
    pub tsc_offset: u64,
    /// ASID.
    pub asid: u32,
    /// V_INTR_MASKING.
    pub v_intr_masking: bool,
    /// V_TPR (CR8).
    pub v_tpr: u8,
    /// V_IRQ: a virtual interrupt is pending.
    pub v_irq: bool,
    /// V_INTR_PRIO.
    pub v_intr_prio: u8,
    /// V_IGN_TPR.
    pub v_ign_tpr: bool,
    /// V_INTR_VECTOR.
    pub v_intr_vector: u8,
    /// Nested paging enabled.
    pub nested_paging: bool,
    /// Nested CR3 (host physical).
    pub nested_cr3: u64,
    /// Pause filter count and threshold.
    pub pause_count: u16,
    /// Pause filter threshold in cycles, which are instructions.
    pub pause_threshold: u16,
    /// Bus locks that the guest may still take, if they are intercepted.
    pub bus_locks: u16,
}

/// Bookkeeping of the system instructions beside the architectural state.
#[derive(Clone, Copy, Default, Debug)]
pub struct SystemState {
    /// The instruction that ran inhibits the single-step trap after itself: it entered a handler that TF is not for.
    pub no_step: bool,
    /// Data breakpoints that MOV SS or POP SS hit, in DR6 format, until the next instruction has ended.
    pub deferred_hits: u64,
    /// PAUSEs left before the pause filter exits.
    pub pause_left: u16,
    /// Instructions that had retired at the last PAUSE.
    pub pause_last: u64,
    /// MONITOR has run and MWAIT has not.
    pub monitor_armed: bool,
    /// What UMONITOR has armed.
    pub monitor: Monitor,
    /// Events that have been delivered to the guest: exceptions, interrupts, INT n.
    pub deliveries: u64,
    /// What the instruction that runs by itself goes on with if it doesn't retire.
    pub held: Held,
}

/// Bytes of a cache line; as many as one mark of decoded code stands for.
pub const LINE: usize = 64;

/// A line of memory that is monitored (UMONITOR).
#[derive(Clone, Copy, Default, Debug)]
pub struct Monitor {
    /// There is one.
    pub armed: bool,
    /// Its host address.
    pub line: usize,
    /// The engine's stamp when it was armed: another one says that something has been stored.
    pub stamp: u64,
    /// What it held then.
    pub contents: [u64; LINE / 8],
}

/// State that ends with the next instruction.
#[derive(Clone, Copy, Default, Debug)]
pub struct Held {
    /// The interrupt shadow was in force.
    pub shadow: bool,
    /// RFLAGS.RF, in place.
    pub resume: u64,
}
