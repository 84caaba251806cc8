//! The control page: what the processes of one `spm run` tree share with each other and with `spm`.
//!
//! `spm` creates it in a sealed memfd and hands it to every agent; it maps it shared. It holds the budget, one
//! [`Slot`] a process, and the counters behind `--report`. Everything is an atomic and every access is `Relaxed`
//! unless said otherwise: the values are statistics and hints, no memory is published through them. The one claim
//! that must be exclusive, taking a slot, is a compare-and-swap on [`Slot::pid`].
//!
//! Slots of processes that have ended are given back by `spm`, or without it by the other processes (identity.rs).

use crate::recorder::Recorder;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, Ordering::Relaxed, fence};
use spmem_core::placing::{self, MAX_TARGETS};
use spmem_core::reclaim::Floor;
use spmem_core::units::Bytes;

/// Marks a mapped control page; the low digits are the layout's version. `spm audit` reads the pages of other builds' runs: a change
/// of what stands where, or means, is another version.
pub const MAGIC: u64 = 0x5350_4d43_544c_0006;
/// The part of [`MAGIC`] that is the layout's version.
pub const VERSION_MASK: u64 = 0xffff;
/// Most processes one tree may hold at a time; one more runs unmanaged and is counted.
pub const SLOTS: usize = 4096;
/// Of a [`Slot::pid`]: it is about to be free.
const LEAVING: u32 = u32::MAX;
/// The limit that means "no limit" (`--sysram max`).
pub const UNLIMITED: u64 = u64::MAX;

/// What all processes of one `spm run` share. Zeroed memory is a valid value but for [`Control::magic`].
#[repr(C)]
pub struct Control {
    /// [`MAGIC`], written by `spm` before the first agent sees the page.
    pub magic: AtomicU64,
    /// The pid namespace of `spm`, by whose numbers slots are known: the inode of /proc/PID/ns/pid.
    pub pid_namespace: AtomicU64,
    /// RAM the tree's managed memory may take in all, bytes; [`UNLIMITED`] for none.
    pub limit_bytes: AtomicU64,
    /// Capacity of node 1 in bytes of frames, over the tree.
    pub store_capacity_bytes: AtomicU64,
    /// Random bits that seed checksums.
    pub seed: AtomicU64,
    /// Highest sum of [`Slot::used_bytes`] seen, bytes.
    pub sysram_peak_bytes: AtomicU64,
    /// Highest excess of that sum over the limit, bytes.
    pub overrun_peak_bytes: AtomicU64,
    /// At the moment of that: what of it lay below the floors of the processes, which is never taken away.
    pub floor_bytes_at_overrun: AtomicU64,
    /// Highest sum of [`Slot::stored_bytes`]: what the pages on node 1 would take uncompressed.
    pub stored_bytes_peak: AtomicU64,
    /// Sum of [`Slot::store_used_bytes`] at the moment of that peak.
    pub store_used_bytes_peak: AtomicU64,
    /// Most of node 1 that was kept free for what processes had under way, bytes (R18).
    pub store_reserve_bytes_peak: AtomicU64,
    /// Highest pressure on node 1: 0 with an eighth of its capacity free above that reserve, 1000 at it.
    pub store_pressure_peak: AtomicU64,
    /// Mapped nodes that pages are placed on, best first; those after the first without a quota are none.
    pub targets: [Target; MAX_TARGETS],
    /// What has become of the porter: 0 where there is none, else one of [`porter`]; the worst that was seen.
    pub porter: AtomicU32,
    /// Whether the kernel tells which placed pages are used, so that none is taken out to see (0 or 1).
    pub is_tracked: AtomicU32,
    /// The kernel's nodes that pages come back to: bit n of word n / 64.
    pub sysram: [AtomicU64; 16],
    /// Slots from this one on were never taken.
    pub slots_ever: AtomicU64,
    /// What happened, over the tree.
    pub counters: Counters,
    /// How long faults took to serve.
    pub faults: Histogram,
    /// One a live process.
    pub slots: [Slot; SLOTS],
    /// What happens to pages, for `spm run --trace`.
    pub recorder: Recorder,
}

/// Node 1, as [`Slot::reading_node`] has it.
pub const NODE_1: u32 = 1;

/// What becomes of a porter.
pub mod porter {
    /// It carries pages.
    pub const WORKS: u32 = 1;
    /// It was stopped for a while.
    pub const WAS_STOPPED: u32 = 2;
    /// It has ended before its run.
    pub const HAS_ENDED: u32 = 3;
}

/// Events since the start, over the tree. All count pages unless the name says otherwise.
#[repr(C)]
#[derive(Default)]
pub struct Counters {
    /// Processes that came under management (an exec in the same process counts once).
    pub processes: AtomicU64,
    /// Processes that could not be managed and run without.
    pub unmanaged_processes: AtomicU64,
    /// Pages that left to node 1.
    pub demoted_pages: AtomicU64,
    /// Of those: an unchanged page whose compressed copy was still there.
    pub clean_pages: AtomicU64,
    /// Of those: pages filled with one value.
    pub same_filled_pages: AtomicU64,
    /// Of those: encoded densely at once.
    pub dense_pages: AtomicU64,
    /// Stored pages whose encoding gave way to a denser one.
    pub recompressed_pages: AtomicU64,
    /// Pages that came back from node 1.
    pub promoted_pages: AtomicU64,
    /// Of those: brought along by fault-around, not asked for.
    pub readahead_pages: AtomicU64,
    /// Pages that came back uncompressed from the holding area.
    pub rescued_pages: AtomicU64,
    /// First touches served while growth was throttled.
    pub zero_filled_pages: AtomicU64,
    /// Not demoted: pinned (direct I/O, io_uring, RDMA).
    pub refused_pinned: AtomicU64,
    /// Not demoted: shared with a forked process.
    pub refused_shared: AtomicU64,
    /// Not demoted: does not compress (R19).
    pub refused_incompressible: AtomicU64,
    /// Not demoted: read-only, executable or locked memory.
    pub refused_protected: AtomicU64,
    /// Not demoted: node 1 full (R18).
    pub refused_full: AtomicU64,
    /// Stored pages that failed their check on the way back (R20): the program got SIGBUS.
    pub corrupt_pages: AtomicU64,
    /// Nanoseconds that faulting threads were made to wait for reclaim.
    pub throttled_ns: AtomicU64,
}

/// A node that pages of the tree go to, by a grant that `spm` holds: one of the kernel's, which they are placed on, or a swap file, or a dax device
/// that stands for one.
#[repr(C)]
#[derive(Default)]
pub struct Target {
    /// The number that the configuration gives it.
    pub id: AtomicU32,
    /// The kernel's number; of a swap file none.
    pub node: AtomicU32,
    /// Clusters of a swap file; 0 of a node of the kernel's.
    pub clusters: AtomicU32,
    /// Of a dax device: in what it is mapped, bytes; 0 of all else.
    pub align: AtomicU64,
    /// Its class.
    pub class: AtomicU32,
    /// 1: pages there are not written, but promoted first (R17).
    pub is_fenced: AtomicU32,
    /// What the tree may have there, bytes.
    pub quota_bytes: AtomicU64,
    /// The most that it had there, bytes.
    pub peak_bytes: AtomicU64,
    /// Pages that were placed there.
    pub demoted_pages: AtomicU64,
    /// Pages that came up: written behind a fence, or used often.
    pub promoted_pages: AtomicU64,
    /// Pages that were found elsewhere: the kernel, or the program, has moved or copied them.
    pub strayed_pages: AtomicU64,
    /// Pages that the node or its grant had no room for.
    pub refused_pages: AtomicU64,
}

impl Target {
    /// Whether it is a file or a dax device, that pages are copied to.
    pub fn is_swap(&self) -> bool {
        self.clusters.load(Relaxed) > 0
    }

    /// Whether it is a dax device.
    pub fn is_device(&self) -> bool {
        self.is_swap() && self.align.load(Relaxed) > 0
    }

    /// Its kind, as a configuration names it.
    pub fn kind(&self) -> &'static str {
        match (self.is_swap(), self.is_device()) {
            (false, _) => "numa",
            (true, false) => "file",
            (true, true) => "dax",
        }
    }
}

/// A process's share, written by its own agent only.
#[repr(C, align(128))]
pub struct Slot {
    /// Process id, as `spm`'s pid namespace has it; 0 = free. Taken by compare-and-swap, freed by `spm` when the process is gone.
    pub pid: AtomicU32,
    /// 1 while a forked child is taking over its own faults, 2 when it has.
    pub adoption: AtomicU32,
    /// Anonymous memory of the process, its agent's included, counted as the kernel counts it, bytes.
    pub used_bytes: AtomicU64,
    /// Of it: pages in the holding area, bytes.
    pub holding_bytes: AtomicU64,
    /// What the pages on node 1 would take uncompressed, bytes.
    pub stored_bytes: AtomicU64,
    /// Frames of node 1 in use, bytes.
    pub store_used_bytes: AtomicU64,
    /// Tables of the agent, bytes.
    pub metadata_bytes: AtomicU64,
    /// Pages on mapped nodes and in swap files, bytes; not part of the memory in use.
    pub placed_bytes: [AtomicU64; MAX_TARGETS],
    /// What is on its way there, bytes: see [`Control::claim_room`].
    pub coming_bytes: [AtomicU64; MAX_TARGETS],
    /// Of the memory in use: pages that could not leave when last tried, bytes.
    pub refused_bytes: AtomicU64,
    /// Processor time of the process's agent threads, ns.
    pub agent_ns: AtomicU64,
    /// Address of the page of which an agent thread reads or writes what is stored at this moment; 0 for none. Memory that has failed ends
    /// the process there, by SIGBUS: only this tells why.
    pub reading: AtomicU64,
    /// The node that it is on, as the configuration numbers it; 0 for none that is known.
    pub reading_node: AtomicU32,
}

/// Buckets of a [`Histogram`]: eight to each power of two of nanoseconds, up to 2^40.
pub const BUCKETS: usize = 41 * 8;

/// Durations in nanoseconds, in buckets an eighth of a power of two wide (6 % error at most).
#[repr(C)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    max_ns: AtomicU64,
    total_ns: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, ns: u64) {
        self.buckets[bucket(ns)].fetch_add(1, Relaxed);
        self.max_ns.fetch_max(ns, Relaxed);
        self.total_ns.fetch_add(ns, Relaxed);
    }

    /// All durations together, ns.
    pub fn total_ns(&self) -> u64 {
        self.total_ns.load(Relaxed)
    }

    /// Durations counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Relaxed)).sum()
    }

    /// The longest duration, ns; 0 when none was counted.
    pub fn max_ns(&self) -> u64 {
        self.max_ns.load(Relaxed)
    }

    /// The duration that `per_mille` of a thousand do not exceed, ns (upper edge of its bucket, never above the
    /// maximum); 0 when none was counted.
    pub fn quantile_ns(&self, per_mille: u64) -> u64 {
        let rank = (self.count() * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            seen += bucket.load(Relaxed);
            if seen >= rank {
                return upper_edge_ns(index).min(self.max_ns());
            }
        }
        0
    }
}

fn bucket(ns: u64) -> usize {
    if ns < 8 {
        return ns as usize & 7;
    }
    let power = ns.ilog2() as usize;
    let eighth = (ns >> (power - 3)) as usize & 7;
    ((power - 2) * 8 + eighth).min(BUCKETS - 1)
}

fn upper_edge_ns(index: usize) -> u64 {
    if index < 8 {
        return index as u64;
    }
    let (power, eighth) = (index / 8 + 2, index as u64 % 8);
    (1 << power) + ((eighth + 1) << (power - 3)) - 1
}

impl Control {
    /// Sum over the live slots of what `field` reads, bytes.
    pub fn sum(&self, field: impl Fn(&Slot) -> &AtomicU64) -> u64 {
        self.live_slots().map(|slot| field(slot).load(Relaxed)).sum()
    }

    /// The slots that belong to a process.
    pub fn live_slots(&self) -> impl Iterator<Item = &Slot> {
        self.live_indices().map(|index| &self.slots[index])
    }

    /// How many processes are managed now.
    pub fn count_processes(&self) -> u32 {
        u32::try_from(self.live_slots().count()).unwrap_or(u32::MAX)
    }

    fn live_indices(&self) -> impl Iterator<Item = usize> {
        let ever = self.slots_ever.load(Relaxed).min(SLOTS as u64) as usize;
        (0..ever).filter(|&index| !matches!(self.slots[index].pid.load(Relaxed), 0 | LEAVING))
    }

    /// Takes a free slot for `pid`, or finds the one it has: its index and whether it is new; `None` when all are
    /// taken.
    pub fn claim_slot(&self, pid: u32) -> Option<(usize, bool)> {
        if let Some(index) = self.live_indices().find(|&index| self.slots[index].pid.load(Relaxed) == pid) {
            return Some((index, false));
        }
        let index = self.slots.iter().position(|slot| {
            slot.pid.load(Relaxed) == 0 && slot.pid.compare_exchange(0, pid, Relaxed, Relaxed).is_ok()
        })?;
        self.slots_ever.fetch_max(index as u64 + 1, Relaxed);
        Some((index, true))
    }

    /// Gives the slot of `pid` back; nothing happens when it has none. Whoever else does so at the same time touches no slot that is another's by then.
    pub fn release_slot(&self, pid: u32) {
        let is_taken = |slot: &&Slot| slot.pid.compare_exchange(pid, LEAVING, Relaxed, Relaxed).is_ok();
        for slot in self.slots.iter().filter(is_taken) {
            for field in slot.placed_bytes.iter().chain(&slot.coming_bytes).chain([
                &slot.used_bytes,
                &slot.holding_bytes,
                &slot.stored_bytes,
                &slot.store_used_bytes,
                &slot.metadata_bytes,
                &slot.refused_bytes,
                &slot.agent_ns,
                &slot.reading,
            ]) {
                field.store(0, Relaxed);
            }
            slot.reading_node.store(0, Relaxed);
            slot.pid.store(0, Relaxed);
        }
    }

    /// RAM in use over the tree; keeps the peaks up to date. Bytes.
    pub fn observe(&self) -> u64 {
        let used = self.sum(|slot| &slot.used_bytes);
        self.sysram_peak_bytes.fetch_max(used, Relaxed);
        let limit = self.limit_bytes.load(Relaxed);
        let overrun = used.saturating_sub(limit);
        if self.overrun_peak_bytes.fetch_max(overrun, Relaxed) < overrun {
            let count = self.count_processes();
            let floor = Floor::default().update(Bytes(limit), Bytes(0), Bytes(0), count).bytes().0;
            let floors = self.live_slots().map(|slot| slot.used_bytes.load(Relaxed).min(floor)).sum();
            self.floor_bytes_at_overrun.store(floors, Relaxed);
        }
        let stored = self.sum(|slot| &slot.stored_bytes);
        if self.stored_bytes_peak.fetch_max(stored, Relaxed) < stored {
            self.store_used_bytes_peak.store(self.sum(|slot| &slot.store_used_bytes), Relaxed);
        }
        for (index, target) in self.targets().enumerate() {
            target.peak_bytes.fetch_max(self.sum(|slot| &slot.placed_bytes[index]), Relaxed);
        }
        used
    }

    /// The mapped nodes that pages are placed on.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        self.targets.iter().take_while(|target| target.quota_bytes.load(Relaxed) > 0)
    }

    /// What the tree has on each of them.
    pub fn read_targets(&self) -> ([placing::Target; MAX_TARGETS], usize) {
        let mut targets = [placing::Target::default(); MAX_TARGETS];
        let mut count = 0;
        for (index, (to, target)) in targets.iter_mut().zip(self.targets()).enumerate() {
            *to = placing::Target { quota: Bytes(target.quota_bytes.load(Relaxed)), placed: self.taken(index) };
            count += 1;
        }
        (targets, count)
    }

    /// What the tree has on one of them, with what is on its way there.
    fn taken(&self, target: usize) -> Bytes {
        let taken = |slot: &Slot| {
            // First: what has arrived meanwhile is counted twice, not left out. Acquire pairs with `has_arrived`.
            let coming = slot.coming_bytes[target].load(Ordering::Acquire);
            coming + slot.placed_bytes[target].load(Relaxed)
        };
        Bytes(self.live_slots().map(taken).sum())
    }

    /// Room for `bytes` more of the process of slot `own` within a target's quota; whether there is. Of two that want the last of it at
    /// the same time one or none gets it. It is the process's until [`has_arrived`](Self::has_arrived).
    pub fn claim_room(&self, own: usize, target: usize, bytes: Bytes) -> bool {
        self.slots[own].coming_bytes[target].store(bytes.0, Relaxed);
        // Either this one sees what the other has announced, or the other this.
        fence(Ordering::SeqCst);
        let is_there = self.taken(target).0 <= self.targets[target].quota_bytes.load(Relaxed);
        if !is_there {
            self.has_arrived(own, target);
        }
        is_there
    }

    /// What was on its way is counted in [`Slot::placed_bytes`], or has not come.
    pub fn has_arrived(&self, own: usize, target: usize) {
        // Release: whoever sees it gone sees it placed.
        self.slots[own].coming_bytes[target].store(0, Ordering::Release);
    }

    /// Whether a node is one that pages come back to.
    pub fn is_sysram(&self, node: i32) -> bool {
        let Ok(node) = usize::try_from(node) else { return false };
        self.sysram.get(node / 64).is_some_and(|word| word.load(Relaxed) >> (node % 64) & 1 != 0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    extern crate std;
    use super::*;

    /// A control page of zeros.
    pub(crate) fn control() -> std::boxed::Box<Control> {
        #![allow(unsafe_code, reason = "too large for a stack")]
        // SAFETY: of the layout of a `Control`, which is not empty.
        let zeros = unsafe { std::alloc::alloc_zeroed(std::alloc::Layout::new::<Control>()) };
        // SAFETY: as above; zeros are a valid value.
        unsafe { std::boxed::Box::from_raw(zeros.cast()) }
    }

    #[test]
    fn a_slot_is_given_back_by_its_number_and_no_other_is_touched() {
        let control = control();
        let slots: std::vec::Vec<usize> =
            (1..=5).map(|pid| control.claim_slot(pid).expect("a free slot").0).collect();
        assert_eq!(control.claim_slot(3), Some((slots[2], false)));
        for slot in &control.slots[..5] {
            slot.used_bytes.store(7, Relaxed);
        }
        control.release_slot(3);
        control.release_slot(3);
        assert_eq!((control.count_processes(), control.sum(|slot| &slot.used_bytes)), (4, 28));
        // Who is giving a slot back holds it until it is empty.
        control.slots[slots[1]].pid.store(LEAVING, Relaxed);
        assert_eq!((control.count_processes(), control.sum(|slot| &slot.used_bytes)), (3, 21));
        assert_eq!(control.claim_slot(9), Some((slots[2], true)));
        assert_eq!(control.claim_slot(10), Some((5, true)));
    }

    #[test]
    fn processes_that_place_at_the_same_time_stay_within_the_quota() {
        const BATCH: u64 = 16;
        let control = control();
        control.targets[0].quota_bytes.store(2 * BATCH, Relaxed);
        let present = AtomicU64::new(0);
        let place = |pid: u32| {
            let (own, _) = control.claim_slot(pid).expect("a free slot");
            let mut granted = 0;
            for round in 0..20_000 {
                if !control.claim_room(own, 0, Bytes(BATCH)) {
                    continue;
                }
                granted += 1;
                let there = present.fetch_add(BATCH, Relaxed) + BATCH;
                assert!(there <= 2 * BATCH, "{there} bytes in round {round}");
                std::thread::yield_now();
                let placed = &control.slots[own].placed_bytes[0];
                placed.store(BATCH, Relaxed);
                control.has_arrived(own, 0);
                // It leaves again: first in fact, then by the count.
                present.fetch_sub(BATCH, Relaxed);
                placed.store(0, Relaxed);
            }
            granted
        };
        let granted: std::vec::Vec<u64> = std::thread::scope(|scope| {
            let threads: std::vec::Vec<_> = (1..=6).map(|pid| scope.spawn(move || place(pid))).collect();
            threads.into_iter().map(|thread| thread.join().expect("within the quota")).collect()
        });
        assert!(granted.iter().sum::<u64>() > 0, "{granted:?}");
    }

    #[test]
    fn room_that_others_are_about_to_fill_is_not_there() {
        let control = control();
        control.targets[1].quota_bytes.store(100, Relaxed);
        let slots = [1, 2].map(|pid| control.claim_slot(pid).expect("a free slot").0);
        assert!(control.claim_room(slots[0], 1, Bytes(60)));
        assert!(!control.claim_room(slots[1], 1, Bytes(60)));
        assert!(control.claim_room(slots[1], 1, Bytes(40)));
        control.slots[slots[0]].placed_bytes[1].store(10, Relaxed);
        control.has_arrived(slots[0], 1);
        assert!(!control.claim_room(slots[1], 1, Bytes(91)));
        assert!(control.claim_room(slots[1], 1, Bytes(90)));
        // Who ends takes nothing with him.
        control.release_slot(2);
        assert!(control.claim_room(slots[0], 1, Bytes(90)));
    }

    #[test]
    fn every_duration_falls_into_the_bucket_whose_edges_hold_it() {
        for ns in (0..4096).chain((12..38).flat_map(|p| [(1 << p) - 1, 1 << p, (1 << p) + (1 << (p - 1))])) {
            let index = bucket(ns);
            assert!(ns <= upper_edge_ns(index), "{ns}");
            assert!(index == 0 || ns > upper_edge_ns(index - 1), "{ns}");
        }
    }
}
