//! Placing: cold pages go to memory of a mapped node and stay in their place; the program reads them there, without a fault.
//!
//! In: a page of the holding area is copied by the porter ([`crate::porter`]) to the staging area, looked at (is it on the node? is it
//! equal?) and moved to its own address, under the lock and by the table, as a page that is touched is moved back. So whatever the
//! program did meanwhile, the table knows it or the kernel refuses the move (an unread event). Then the slot's page is given back.
//!
//! Out, behind a fence (R17): the write's fault takes the page into the holding area and copies it back from there, to ordinary memory.
//! Out, by heat: a few placed pages at a time are taken out on *trial*. One that is touched soon comes up; what is not goes back as it is.
//! Where the kernel tells which are used, none is taken out ([`crate::tracking`]).
//! Contents never depend on where a page is: what the table says of placed pages is a count, put right by [`Checker`].
//!
//! Holes: a page that a fork shares counts as the parent's; a write in the microsecond between the move and the fence lands on the node.

use crate::demote::Demoter;
use crate::holding::{Span, State};
use crate::porter::{Client, STAGING_LEN};
use crate::recorder::Happening;
use crate::runtime::{Cram, Runtime};
use crate::space::Space;
use crate::table::{CHUNK, Copy, Entry, Table};
use crate::tracking::Tracker;
use core::sync::atomic::Ordering::Relaxed;
use spmem_core::placing::{LOOK_PAGES, Looks, MAX_TARGETS, PLACE_PAGES, TRIAL_PAGES, TRIALS_MAX, Target, Targets};
use spmem_core::tier::{Promotion, Verdict};
use spmem_core::units::{Bytes, Order, Time};
use spmem_sys::mapping::discard;
use spmem_sys::pagemap::Pagemap;
use spmem_sys::uffd::Uffd;
use spmem_sys::{PAGE, clock, mempolicy};

/// Pages placed under one hold of the lock: a fault may have to wait for it.
const HOLD_PAGES: usize = 4;

/// One thread's way to mapped nodes.
pub(crate) struct Placer {
    client: Client,
    staging: usize,
}

/// What is in the staging area.
struct Landed {
    target: usize,
    /// Whether the page for each slot of the span is there, on the node, and equal.
    is_good: [bool; PLACE_PAGES],
}

impl Placer {
    pub(crate) fn new(runtime: &'static Runtime) -> Option<Self> {
        let client = Client::new(runtime.crossing()?);
        Some(Self { client, staging: runtime.staging_start.load(Relaxed) })
    }

    /// Whether it can take pages now.
    pub(crate) fn is_free(&mut self) -> bool {
        if self.client.has_come_late() {
            discard(self.staging, STAGING_LEN);
        }
        self.client.is_free()
    }

    /// Has the pages at `addresses`, which do not change, copied to a node.
    fn fetch(&mut self, runtime: &Runtime, targets: &mut Targets, target: usize, addresses: &[usize]) -> Landed {
        let mut landed = Landed { target, is_good: [false; PLACE_PAGES] };
        let Some((copied, errno)) = self.client.ask(target, addresses) else { return landed };
        let node = runtime.shared().targets[target].node.load(Relaxed);
        let places: [usize; PLACE_PAGES] = core::array::from_fn(|page| self.staging + page * PAGE);
        let mut nodes = [-1; PLACE_PAGES];
        // Where they are is the kernel's decision: without its word they are nowhere.
        let is_told = copied > 0 && mempolicy::nodes_of(&places[..copied], &mut nodes[..copied]).is_ok();
        for (page, &address) in addresses.iter().enumerate().take(copied).filter(|_| is_told) {
            landed.is_good[page] = u32::try_from(nodes[page]) == Ok(node) && is_equal(places[page], address);
        }
        if landed.is_good.contains(&true) {
            targets.note_placed(target);
        } else if errno != libc::EFAULT {
            targets.note_full(target, clock::now_ns());
            runtime.shared().targets[target].refused_pages.fetch_add(addresses.len() as u64, Relaxed);
        }
        landed
    }
}

/// Byte for byte.
fn is_equal(one: usize, other: usize) -> bool {
    // SAFETY: a page of the staging area, which stays mapped and is nobody else's.
    #[allow(unsafe_code, reason = "pages of our own areas, which are not Rust's memory, are read in place")]
    let one: &[u8; PAGE] = unsafe { &*core::ptr::with_exposed_provenance(one) };
    // SAFETY: the page of a busy slot: it stays mapped and unchanged until its span is discarded.
    #[allow(unsafe_code, reason = "as above")]
    let other: &[u8; PAGE] = unsafe { &*core::ptr::with_exposed_provenance(other) };
    one == other
}

impl Demoter {
    /// Sends up to `wanted` pages, the oldest of the holding area, to the best node that may have room; how many pages of RAM became
    /// free. `None` when there is none but node 1.
    pub(crate) fn send(&mut self, wanted: usize) -> Option<usize> {
        let runtime = self.runtime;
        let target = self.choose()?;
        let Some(span) = self.claim(wanted.min(PLACE_PAGES)) else {
            runtime.shared().has_arrived(runtime.slot.load(Relaxed), target);
            return None;
        };
        let (mut slots, mut addresses, mut count) = ([0; PLACE_PAGES], [0; PLACE_PAGES], 0);
        if let Some(space) = runtime.space.lock().as_ref() {
            for slot in slots_of(span) {
                let held = space.holding.get(slot);
                if held.state == State::Busy && held.target().is_none() {
                    (slots[count], addresses[count]) = (slot, space.holding.address(slot));
                    count += 1;
                }
            }
        }
        let (slots, addresses) = (&slots[..count], &addresses[..count]);
        let mut freed = match count {
            0 => 0,
            _ if runtime.shared().targets[target].is_swap() => self.swap_out(target, slots, addresses),
            _ => self.place(target, slots, addresses),
        };
        // What is still to be done away with goes to node 1, pages on trial back to their places.
        for slot in slots_of(span) {
            freed += usize::from(self.demote(slot));
        }
        self.discard(span);
        runtime.free_pages(freed);
        runtime.publish_placed();
        runtime.shared().has_arrived(runtime.slot.load(Relaxed), target);
        Some(freed)
    }

    /// The node that pages are to go to now, if any, with room for a batch claimed there.
    fn choose(&mut self) -> Option<usize> {
        let (mut targets, count) = self.runtime.shared().read_targets();
        let is_porter_free = self.placer.as_mut().is_some_and(Placer::is_free);
        for (at, target) in targets[..count].iter_mut().enumerate() {
            let is_swap = self.runtime.shared().targets[at].is_swap();
            if !if is_swap { self.swapper.is_some() } else { is_porter_free } {
                *target = Target::default();
            }
        }
        let target = self.targets.choose(clock::now_ns(), &targets[..count])?;
        let (own, batch) = (self.runtime.slot.load(Relaxed), Bytes((PLACE_PAGES * PAGE) as u64));
        self.runtime.shared().claim_room(own, target, batch).then_some(target)
    }

    /// Places the pages of busy slots on a mapped node; how many pages of RAM become free.
    fn place(&mut self, target: usize, slots: &[u32], addresses: &[usize]) -> usize {
        let (runtime, count) = (self.runtime, slots.len());
        let mut freed = 0;
        if let Some(placer) = self.placer.as_mut() {
            let landed = placer.fetch(runtime, &mut self.targets, target, addresses);
            let (staging, is_free) = (placer.staging, placer.client.is_free());
            for first in (0..count).step_by(HOLD_PAGES) {
                let Some(space) = &mut *runtime.space.lock() else { break };
                for page in (first..(first + HOLD_PAGES).min(count)).filter(|&page| landed.is_good[page]) {
                    freed +=
                        usize::from(self.settle_placed(space, slots[page], staging + page * PAGE, landed.target));
                }
            }
            if is_free {
                // What was dropped or came back meanwhile, or landed elsewhere.
                discard(staging, STAGING_LEN);
            }
        }
        freed
    }

    /// The page of a busy slot is at `staged` on a mapped node, too: that one takes its place. Whether RAM becomes free.
    fn settle_placed(&self, space: &mut Space<Cram>, slot: u32, staged: usize, target: usize) -> bool {
        let runtime = self.runtime;
        let held = space.holding.get(slot);
        let entry = space.table.get(held.owner);
        let Some(pagemap) = self.pagemap.as_deref() else { return false };
        if held.state != State::Busy || !entry.is_away() {
            return false;
        }
        if !put(runtime, space, &self.uffd, pagemap, (held.owner, staged), target) {
            return false;
        }
        if let Some(kept) = space.holding.forget_kept(slot) {
            space.forget(kept);
        }
        space.holding.kill(slot);
        let counters = &runtime.shared().targets[target];
        counters.demoted_pages.fetch_add(1, Relaxed);
        runtime.record(Happening::Place, held.owner, u64::from(counters.id.load(Relaxed)));
        true
    }

    /// Ends the trials that have gone on for too long.
    pub(crate) fn end_trials(&self) {
        let mut slots = [0; TRIALS_MAX];
        let space = self.runtime.space.lock();
        let count = space.as_ref().map_or(0, |space| space.holding.overdue(now_ms(), &mut slots));
        drop(space);
        for &slot in &slots[..count] {
            self.end_trial(slot, State::Held);
        }
    }

    /// A page that was on trial and is cold goes back to its place as it is; whether it did. `state`: busy by the caller's claim, or held.
    pub(crate) fn end_trial(&self, slot: u32, state: State) -> bool {
        let runtime = self.runtime;
        let Some(space) = &mut *runtime.space.lock() else { return false };
        let held = space.holding.get(slot);
        let (Some(target), Some(pagemap)) = (held.target(), self.pagemap.as_deref()) else { return false };
        if held.state != state || !space.table.get(held.owner).is_away() {
            return false;
        }
        let from = space.holding.address(slot);
        let is_back = put(runtime, space, &self.uffd, pagemap, (held.owner, from), target);
        match state {
            State::Held if is_back => space.holding.vacate(slot),
            _ if is_back => space.holding.kill(slot),
            _ => {}
        }
        is_back
    }
}

fn slots_of(span: Span) -> core::ops::Range<u32> {
    span.first..span.first + span.len
}

/// Moves a page that is on a mapped node from an area of ours to its place, where it is missing, and fences it if its node is fenced.
fn put(
    runtime: &Runtime,
    space: &mut Space<Cram>,
    uffd: &Uffd,
    pagemap: &Pagemap,
    (owner, from): (usize, usize),
    target: usize,
) -> bool {
    if !space.is_settled() || uffd.move_present(owner, from, PAGE, pagemap).stopped.is_some() {
        return false;
    }
    let age = space.table.get(owner).age();
    space.table.set(owner, Entry::placed(target, age));
    if runtime.shared().targets[target].is_fenced.load(Relaxed) != 0 && uffd.fence(owner, PAGE).is_err() {
        // Without its fence it may not stay.
        raise(runtime, space, target, &[owner]);
    }
    true
}

/// Has the kernel move placed pages to ordinary memory, in their places; how many are there now.
pub(crate) fn raise(runtime: &Runtime, space: &mut Space<Cram>, target: usize, pages: &[usize]) -> usize {
    let shared = runtime.shared();
    let own = mempolicy::own_node();
    let node = if shared.is_sysram(i32::from(own)) { Some(own) } else { first_sysram(runtime) };
    let mut nodes = [-1; LOOK_PAGES];
    let nodes = &mut nodes[..pages.len().min(LOOK_PAGES)];
    let Some(node) = node else { return 0 };
    if mempolicy::move_to(&pages[..nodes.len()], node, nodes).is_err() {
        return 0;
    }
    let mut raised = 0;
    for (&page, &node) in pages.iter().zip(&*nodes) {
        let entry = space.table.get(page);
        if shared.is_sysram(node) && entry.target() == Some(target) {
            space.table.set(page, Entry::present(Copy::None, spmem_core::lru::on_promoted(entry.age())));
            raised += 1;
        }
    }
    runtime.room_pages.fetch_sub(raised as i64, Relaxed);
    shared.targets[target].promoted_pages.fetch_add(raised as u64, Relaxed);
    raised
}

fn first_sysram(runtime: &Runtime) -> Option<u16> {
    (0..1024).find(|&node| runtime.shared().is_sysram(i32::from(node)))
}

/// Looks at placed pages in turn.
pub(crate) struct Checker {
    looks: Looks,
    /// Chunk to look at next, and the address in it.
    chunk: usize,
    at: usize,
    /// Looks that gave pages for a trial.
    turn: usize,
    /// `None` where pages are tried out.
    tracker: Option<Tracker>,
}

impl Checker {
    pub(crate) fn new(runtime: &Runtime) -> Self {
        Self { looks: Looks::new(), chunk: 0, at: 0, turn: 0, tracker: Tracker::new(runtime) }
    }

    /// Whether it is time for another look.
    pub(crate) fn is_due(&mut self) -> bool {
        self.looks.is_due(clock::now_ns())
    }

    /// Puts right what is known of some placed pages, and brings up what the kernel says is used; else gives some of them
    /// for a trial: how many.
    pub(crate) fn check(&mut self, runtime: &Runtime, trial: &mut [usize; TRIAL_PAGES]) -> usize {
        let (mut pages, mut nodes) = ([0; LOOK_PAGES], [-1; LOOK_PAGES]);
        let count = runtime.space.lock().as_mut().map_or(0, |space| self.collect(&mut space.table, &mut pages));
        if count == 0 || mempolicy::nodes_of(&pages[..count], &mut nodes[..count]).is_err() {
            return 0;
        }
        let mut strayed = 0_u64;
        if let Some(space) = runtime.space.lock().as_mut() {
            for (&page, &node) in pages[..count].iter().zip(&nodes) {
                let entry = space.table.get(page);
                let Some(target) = entry.target().map(|target| &runtime.shared().targets[target]) else {
                    continue;
                };
                if u32::try_from(node) != Ok(target.node.load(Relaxed)) {
                    space.table.set(page, Entry::present(Copy::None, entry.age()));
                    // One that is nowhere was unmapped a moment ago.
                    strayed += u64::from(node >= 0);
                    target.strayed_pages.fetch_add(u64::from(node >= 0), Relaxed);
                }
            }
        }
        if strayed > 0 {
            // Where some have gone there may be more.
            self.looks.hurry();
            runtime.publish_placed();
            return 0;
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.raise_used(runtime);
            tracker.watch(&pages[..count]);
            return 0;
        }
        // Not the same ones again when the hand comes round.
        let step = count.div_ceil(TRIAL_PAGES).max(1);
        self.turn = self.turn.wrapping_add(1);
        let chosen = pages[..count].iter().skip(self.turn % step).step_by(step).take(TRIAL_PAGES);
        trial.iter_mut().zip(chosen).map(|(to, page)| *to = *page).count()
    }

    /// The next placed pages.
    fn collect(&mut self, table: &mut Table, pages: &mut [usize; LOOK_PAGES]) -> usize {
        let mut count = 0;
        for _ in 0..=table.len() {
            if self.chunk >= table.len() {
                (self.chunk, self.at) = (0, 0);
                if table.is_empty() || count > 0 {
                    break;
                }
            }
            let chunk = table.chunk(self.chunk);
            if chunk.placed > 0 {
                while self.at < CHUNK && count < LOOK_PAGES {
                    let page = chunk.start + self.at;
                    if chunk.get(page).target().is_some() {
                        pages[count] = page;
                        count += 1;
                    }
                    self.at += PAGE;
                }
            }
            if count == LOOK_PAGES && self.at < CHUNK {
                break;
            }
            (self.chunk, self.at) = (self.chunk + 1, 0);
        }
        count
    }
}

/// The clock of trials.
pub(crate) fn now_ms() -> u32 {
    (clock::now_ns() / 1_000_000) as u32
}

/// Whether a page that was touched so long after its trial began comes up.
pub(crate) fn comes_up(promotion: &mut Promotion, trial_ms: u32) -> bool {
    let since_use_ns = u64::from(trial_ms).saturating_mul(1_000_000);
    promotion.consider(Order::ZERO, since_use_ns, Time(clock::now_ns())) == Verdict::Promote
}

impl Runtime {
    /// Tells the others of the tree, and the porter, what is placed and what is in swap files; placed pages in all.
    pub(crate) fn publish_placed(&self) -> u64 {
        if self.shared().targets().next().is_none() {
            return 0;
        }
        let none = [0; MAX_TARGETS];
        let (placed, swapped) = self.space.lock().as_ref().map_or((none, none), |space| {
            // Pages on trial are on the node still, and go back.
            let (placed, trials) = (space.table.count_placed(), space.holding.trials());
            let placed = core::array::from_fn(|target| placed[target] + u64::from(trials[target]));
            let swapped = |target| space.swap.as_ref().map_or(0, |swap| swap.pages(target));
            (placed, core::array::from_fn(swapped))
        });
        for ((to, placed), swapped) in self.own_slot().placed_bytes.iter().zip(placed).zip(swapped) {
            to.store((placed + swapped) * PAGE as u64, Relaxed);
        }
        placed.iter().sum()
    }
}
