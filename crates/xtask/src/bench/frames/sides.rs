//! Who takes part in the frames bench: the three paths of `spmem_core::frames`, and others from crates.io.
#![allow(
    unsafe_code,
    reason = "frame-alloc keeps its metadata in the memory it manages, and takes frames back unchecked; so does an allocator of bytes"
)]

use super::FRAMES;
use super::floors::{Apart, Bare};
use anyhow::Context;
use bitmap_allocator::{BitAlloc, BitAlloc16M};
use frame_alloc::{
    CpuId, DepotAllocator, PageSize, PhysRange, PhysicalAllocator, Provenance, RegionInit, SummaryBuddyAllocator,
};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use spmem_core::frames::{Cache, Frames, Metadata, PerCpu};
use spmem_core::units::{FrameCount, FrameNumber, Order};
use std::cell::Cell;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Names of our own.
pub(super) const OWNER: &str = "spmem, owner-cached";
pub(super) const PER_CPU: &str = "spmem, per processor";
pub(super) const ZONES: &str = "spmem, zones";
/// The same with an allocator for each thread.
pub(super) const OWNER_APART: &str = "owner-cached, a node each";
pub(super) const PER_CPU_APART: &str = "per processor, a node each";
pub(super) const ZONES_APART: &str = "zones, a node each";
/// What they cannot do without.
pub(super) const BARE: &str = "floor: bytes, bits, a stack";
pub(super) const BARE_LOCKED: &str = "floor: the same, locked";

/// One allocator.
pub(super) trait Side: Sync {
    /// What a thread has of its own.
    type Handle: Send;
    /// It knows blocks of more than one frame.
    const HAS_ORDERS: bool = true;
    /// It takes and gives many at a time.
    const HAS_BATCH: bool = false;
    /// The fragmentation protocol is run on it.
    const IS_CHURNED: bool = Self::HAS_ORDERS;

    fn handle(&self) -> Self::Handle;
    fn alloc(&self, handle: &mut Self::Handle, order: u8) -> Option<usize>;
    fn free(&self, handle: &mut Self::Handle, frame: usize, order: u8);
    fn finish(&self, _handle: &mut Self::Handle) {}
    /// Takes as many frames as a huge frame has, and keeps them in the handle, as their owner would.
    fn alloc_batch(&self, _handle: &mut Self::Handle) {}
    /// Gives them back.
    fn free_batch(&self, _handle: &mut Self::Handle) {}
}

/// Whoever wants to see all of them.
pub(super) trait Sides {
    fn side<S: Side>(&mut self, name: &'static str, make: impl Fn() -> anyhow::Result<S>) -> anyhow::Result<()>;
}

/// Shows every side to `sides`, each made anew as often as it likes.
pub(super) fn visit(sides: &mut impl Sides) -> anyhow::Result<()> {
    let owner = || Ok(Owner(fresh()?));
    let per_cpu = || Ok(Shared { frames: fresh()?, caches: PerCpu::new(2)?, next: AtomicUsize::new(0) });
    let zones = || Ok(Zones(fresh()?));
    sides.side(OWNER, owner)?;
    sides.side(PER_CPU, per_cpu)?;
    sides.side(ZONES, zones)?;
    sides.side(OWNER_APART, || Apart::new(owner))?;
    sides.side(PER_CPU_APART, || Apart::new(per_cpu))?;
    sides.side(ZONES_APART, || Apart::new(zones))?;
    sides.side(BARE, || Ok(Bare::<false>::new()))?;
    sides.side(BARE_LOCKED, || Ok(Bare::<true>::new()))?;
    sides.side("frame-alloc, depot", Depot::new)?;
    sides.side("buddy_system_allocator, mutex", Buddy::new)?;
    sides.side("bitmap-allocator, mutex", Bitmap::new)?;
    #[cfg(feature = "jemalloc")]
    sides.side("jemalloc, bytes", || Ok(Jemalloc))?;
    Ok(())
}

fn fresh() -> anyhow::Result<Frames> {
    let count = FrameCount(FRAMES as u64);
    let mut frames = Frames::with_relax(std::thread::yield_now);
    frames.add_range(count, Metadata::from_heap(count)?)?;
    Ok(frames)
}

fn order(order: u8) -> Order {
    Order::new(order).expect("0 to 10")
}

fn number(frame: usize) -> FrameNumber {
    FrameNumber(u32::try_from(frame).expect("frames are few"))
}

/// A cache for each thread.
struct Owner(Frames);

impl Side for Owner {
    type Handle = Cache;

    fn handle(&self) -> Cache {
        Cache::new()
    }

    fn alloc(&self, cache: &mut Cache, k: u8) -> Option<usize> {
        let frame = if k == 0 { cache.alloc(&self.0) } else { cache.alloc_block(&self.0, order(k)) };
        frame.ok().map(|frame| frame.0 as usize)
    }

    fn free(&self, cache: &mut Cache, frame: usize, k: u8) {
        let frame = number(frame);
        let freed = if k == 0 { cache.free(&self.0, frame) } else { cache.free_block(&self.0, frame, order(k)) };
        freed.expect("allocated");
    }

    fn finish(&self, cache: &mut Cache) {
        cache.drain(&self.0);
    }
}

/// A slot a processor, here a thread.
struct Shared {
    frames: Frames,
    caches: PerCpu,
    next: AtomicUsize,
}

impl Side for Shared {
    type Handle = usize;

    fn handle(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn alloc(&self, slot: &mut usize, k: u8) -> Option<usize> {
        self.caches.alloc(&self.frames, *slot, order(k)).ok().map(|frame| frame.0 as usize)
    }

    fn free(&self, slot: &mut usize, frame: usize, k: u8) {
        self.caches.free_block(&self.frames, *slot, number(frame), order(k)).expect("allocated");
    }
}

/// Without caches.
struct Zones(Frames);

impl Side for Zones {
    type Handle = Vec<FrameNumber>;
    const HAS_BATCH: bool = true;

    fn handle(&self) -> Vec<FrameNumber> {
        vec![FrameNumber(0); super::HUGE_FRAMES]
    }

    fn alloc(&self, _: &mut Vec<FrameNumber>, k: u8) -> Option<usize> {
        self.0.alloc(order(k)).ok().map(|frame| frame.0 as usize)
    }

    fn free(&self, _: &mut Vec<FrameNumber>, frame: usize, k: u8) {
        self.0.free_block(number(frame), order(k)).expect("allocated");
    }

    fn alloc_batch(&self, batch: &mut Vec<FrameNumber>) {
        assert_eq!(self.0.alloc_batch(black_box(batch)), super::HUGE_FRAMES);
    }

    fn free_batch(&self, batch: &mut Vec<FrameNumber>) {
        self.0.free_batch(black_box(batch)).expect("allocated");
    }
}

thread_local! {
    static THREAD: Cell<usize> = const { Cell::new(0) };
}

/// Threads stand for processors.
struct ThreadNumber;

impl CpuId for ThreadNumber {
    fn current_cpu() -> usize {
        THREAD.get()
    }
}

struct Identity;

// SAFETY: addresses are those of a mapping that lives for ever and whose provenance was exposed.
unsafe impl Provenance for Identity {
    unsafe fn create(phys: usize) -> NonNull<u8> {
        NonNull::new(std::ptr::with_exposed_provenance_mut(phys)).expect("a mapping is not at 0")
    }

    unsafe fn destroy<T>(at: NonNull<T>) -> usize {
        at.as_ptr().expose_provenance()
    }
}

const BASE: PageSize = PageSize::from_log2(12);

/// frame-alloc with its cache of two levels.
struct Depot {
    frames: Box<DepotAllocator<SummaryBuddyAllocator<11, Identity>, ThreadNumber, 2>>,
    base: usize,
    next: AtomicUsize,
}

impl Depot {
    fn new() -> anyhow::Result<Self> {
        let len = FRAMES << 12;
        let align = 4 << 20;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len + align, ProtFlags::READ | ProtFlags::WRITE, flags)
        }
        .context("8 GiB of address space")?;
        let base = start.expose_provenance().next_multiple_of(align);
        let frames = Box::new(DepotAllocator::new(BASE, SummaryBuddyAllocator::new(BASE)));
        // SAFETY: the range is ours for ever; nobody else knows the allocator yet.
        unsafe { frames.init(base, len, &[PhysRange { base, len }]) };
        Ok(Self { frames, base, next: AtomicUsize::new(0) })
    }
}

impl Side for Depot {
    type Handle = usize;

    fn handle(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % 2
    }

    fn alloc(&self, slot: &mut usize, k: u8) -> Option<usize> {
        THREAD.set(*slot);
        let count = NonZeroUsize::new(1 << k).expect("not 0");
        self.frames.allocate_physical(BASE, count).ok().map(|address| (address - self.base) >> 12)
    }

    fn free(&self, slot: &mut usize, frame: usize, k: u8) {
        THREAD.set(*slot);
        let count = NonZeroUsize::new(1 << k).expect("not 0");
        // SAFETY: came from `alloc` with the same count, and is not used any more.
        unsafe { self.frames.deallocate_physical(BASE, count, self.base + (frame << 12)) };
    }
}

struct Buddy(Mutex<buddy_system_allocator::FrameAllocator<11>>);

impl Buddy {
    #[allow(clippy::unnecessary_wraps, reason = "as the others are made")]
    fn new() -> anyhow::Result<Self> {
        let mut frames = buddy_system_allocator::FrameAllocator::new();
        frames.add_frame(0, FRAMES);
        Ok(Self(Mutex::new(frames)))
    }
}

impl Side for Buddy {
    type Handle = ();

    fn handle(&self) {}

    fn alloc(&self, (): &mut (), k: u8) -> Option<usize> {
        self.0.lock().expect("not poisoned").alloc(1 << k)
    }

    fn free(&self, (): &mut (), frame: usize, k: u8) {
        self.0.lock().expect("not poisoned").dealloc(frame, 1 << k);
    }
}

struct Bitmap(Mutex<Box<BitAlloc16M>>);

impl Bitmap {
    #[allow(clippy::unnecessary_wraps, reason = "as the others are made")]
    fn new() -> anyhow::Result<Self> {
        let mut frames = Box::new(BitAlloc16M::DEFAULT);
        frames.insert(0..FRAMES);
        Ok(Self(Mutex::new(frames)))
    }
}

impl Side for Bitmap {
    type Handle = ();

    fn handle(&self) {}

    fn alloc(&self, (): &mut (), k: u8) -> Option<usize> {
        let mut frames = self.0.lock().expect("not poisoned");
        if k == 0 { frames.alloc() } else { frames.alloc_contiguous(None, 1 << k, usize::from(k)) }
    }

    fn free(&self, (): &mut (), frame: usize, k: u8) {
        let mut frames = self.0.lock().expect("not poisoned");
        assert!(
            if k == 0 { frames.dealloc(frame) } else { frames.dealloc_contiguous(frame, 1 << k) },
            "allocated"
        );
    }
}

/// An allocator of bytes asked for pages: what a program would use instead.
#[cfg(feature = "jemalloc")]
struct Jemalloc;

#[cfg(feature = "jemalloc")]
impl Side for Jemalloc {
    type Handle = ();
    const HAS_ORDERS: bool = false;

    fn handle(&self) {}

    fn alloc(&self, (): &mut (), k: u8) -> Option<usize> {
        let layout = std::alloc::Layout::from_size_align(4096 << k, 4096).ok()?;
        // SAFETY: the size is not 0.
        let at = unsafe { std::alloc::GlobalAlloc::alloc(&tikv_jemallocator::Jemalloc, layout) };
        (!at.is_null()).then(|| at.expose_provenance())
    }

    fn free(&self, (): &mut (), frame: usize, k: u8) {
        let layout = std::alloc::Layout::from_size_align(4096 << k, 4096).expect("as allocated");
        // SAFETY: came from `alloc` with the same layout, and is not used any more.
        unsafe {
            std::alloc::GlobalAlloc::dealloc(
                &tikv_jemallocator::Jemalloc,
                std::ptr::with_exposed_provenance_mut(frame),
                layout,
            );
        }
    }
}
