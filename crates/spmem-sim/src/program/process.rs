//! One process: its pages, its store on node 1, its pressure loop and its faults.

use std::collections::VecDeque;

use spmem_core::grant::Grant;
use spmem_core::lru::{self, Age, Verdict};
use spmem_core::mm::{Block, MemoryManager};
use spmem_core::readahead::Readahead;
use spmem_core::reclaim::{
    Admission, Cover, Coverage, Extent, Facts, Floor, Look, Movable, PATIENCE_NS, Plan, Progress, Retry, Throttle,
    Turnstile, is_near, keeps_copies, plan,
};
use spmem_core::units::{Bytes, DomainId, FrameCount, NodeId, Order, PAGE_SIZE};
use spmem_core::wall::Request;

use super::page::{Page, Place, Stored};
use super::source::Thread;
use super::{Content, Costs, Program, Report};
use crate::check::{Violation, hold};

/// Bytes of tables for each page.
const TABLES: u64 = 12;
/// What a stored page takes beside its bytes.
const LABEL: u64 = 16;

/// What became of a touch.
pub(super) enum Touched {
    /// The thread goes on at this time, ns.
    At(u64),
    /// It has to be tried again.
    Waits { is_new: bool },
}

/// What a process sees of its tree.
pub(super) struct Surroundings {
    pub(super) limit: Bytes,
    pub(super) used: Bytes,
    pub(super) fixed: Bytes,
    pub(super) count: u32,
    pub(super) processors: u32,
}

pub(super) struct Process {
    seed: u64,
    pages: Vec<Page>,
    content: Content,
    pub(super) threads: Vec<Thread>,
    pub(super) ticket: u64,
    pub(super) floor_pages: u64,
    grant: Grant,
    frames: Vec<Block>,
    /// Bytes of all that is stored, and of it what is a copy.
    stored: u64,
    kept: u64,
    resident: u64,
    refused: u64,
    /// Pages and slots, oldest first; one that has come back since is passed over.
    holding: VecDeque<(usize, u64)>,
    next_slot: u64,
    held: u64,
    hand: usize,
    handler_ns: u64,
    published: u64,
    is_covered: bool,
    is_prepared: bool,
    keeps_copies: bool,
    last: (u64, u64),
    freed: u64,
    admission: Admission,
    floor: Floor,
    throttle: Throttle,
    turnstile: Turnstile,
    coverage: Coverage,
    progress: Progress,
    retry: Retry,
    readahead: Readahead,
}

impl Process {
    pub(super) fn new(seed: u64, program: Program, grant: Grant) -> Self {
        let page = Page { place: Place::Nowhere, age: Age::COLDEST, version: 0, is_refused: false };
        let threads = program.threads.into_iter();
        Self {
            seed,
            pages: vec![page; program.pages],
            content: program.content,
            threads: threads.map(|source| Thread { source, next: None, since_ns: None }).collect(),
            ticket: 0,
            floor_pages: 0,
            grant,
            frames: Vec::new(),
            stored: 0,
            kept: 0,
            resident: 0,
            refused: 0,
            holding: VecDeque::new(),
            next_slot: 0,
            held: 0,
            hand: 0,
            handler_ns: 0,
            published: 0,
            is_covered: false,
            is_prepared: false,
            keeps_copies: false,
            last: (0, 0),
            freed: 0,
            admission: Admission { room_pages: i64::MAX, patience_ns: PATIENCE_NS },
            floor: Floor::default(),
            throttle: Throttle::new(0),
            turnstile: Turnstile::default(),
            coverage: Coverage::default(),
            progress: Progress::default(),
            retry: Retry::default(),
            readahead: Readahead::default(),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.threads.iter().all(|thread| thread.next.is_none())
    }

    /// RAM in use now.
    pub(super) fn used(&self) -> u64 {
        let tables = if self.is_prepared { self.pages.len() as u64 * TABLES } else { 0 };
        (self.resident + self.held + self.frames.len() as u64) * PAGE_SIZE + tables
    }

    /// RAM in use when it looked last.
    pub(super) const fn published(&self) -> u64 {
        self.published
    }

    pub(super) fn publish(&mut self) {
        self.published = self.used();
    }

    /// What of it cannot be made less, as the process knows, bytes.
    pub(super) fn fixed(&self) -> u64 {
        (self.frames.len() as u64 + self.refused.min(self.resident)) * PAGE_SIZE
    }

    /// What of it no budget could take away, bytes.
    pub(super) fn unavoidable(&self) -> u64 {
        self.fixed() + self.floor_pages * PAGE_SIZE
    }

    /// A thread touches its page.
    pub(super) fn touch(
        &mut self,
        now: u64,
        thread: usize,
        costs: &Costs,
        report: &mut Report,
        mm: &mut MemoryManager,
    ) -> Result<Touched, Violation> {
        let Some(access) = self.threads[thread].next else { return Ok(Touched::At(now)) };
        let place = self.pages[access.page].place;
        let done = match place {
            Place::Present(_) => now,
            Place::Nowhere if !self.is_covered => {
                self.arrive(access.page, lru::on_first_touch(), None);
                now + costs.first_touch
            }
            _ => {
                let since = *self.threads[thread].since_ns.get_or_insert(now);
                if !self.turnstile.admits(now, since, self.admission) {
                    return Ok(Touched::Waits { is_new: since == now });
                }
                let begin = now.max(self.handler_ns);
                let done = begin + self.serve(access.page, costs, report, mm)?;
                self.handler_ns = done;
                report.faults_ns.push(done - since);
                report.stalled_ns += now - since;
                done
            }
        };
        self.threads[thread].since_ns = None;
        if access.is_write {
            self.pages[access.page].version += 1;
        }
        Ok(Touched::At(done))
    }

    /// A page is in its place again.
    fn arrive(&mut self, page: usize, age: Age, copy: Option<Stored>) {
        let page = &mut self.pages[page];
        (page.place, page.age) = (Place::Present(copy), age);
        self.resident += 1;
        self.kept += copy.map_or(0, |copy| copy.bytes);
    }

    /// Brings a page back; how long it takes, ns.
    fn serve(
        &mut self,
        number: usize,
        costs: &Costs,
        report: &mut Report,
        mm: &mut MemoryManager,
    ) -> Result<u64, Violation> {
        let page = self.pages[number];
        match page.place {
            Place::Present(_) => Ok(0),
            Place::Nowhere => {
                self.arrive(number, lru::on_first_touch(), None);
                self.admission.room_pages -= 1;
                Ok(costs.rescue)
            }
            Place::Held { version, copy, .. } => {
                hold("R20", version == page.version, || format!("page {number} is held as it was before"))?;
                self.kept -= copy.map_or(0, |copy| copy.bytes); // counted again below
                self.held -= 1;
                self.arrive(number, lru::on_rescued(page.age), copy);
                report.rescued += 1;
                Ok(costs.rescue)
            }
            Place::Away(_) => {
                let window = self.readahead.window(number as u64, self.admission.room_pages);
                let mut count = 0;
                for at in (number..).take(window as usize) {
                    if !self.promote(at, mm)? {
                        break;
                    }
                    count += 1;
                }
                self.readahead.advance(number as u64, count);
                self.admission.room_pages -= i64::from(count);
                report.promoted += u64::from(count);
                report.read_ahead += u64::from(count - 1);
                Ok(costs.promote * u64::from(count))
            }
        }
    }

    /// From node 1, if it is there.
    fn promote(&mut self, number: usize, mm: &mut MemoryManager) -> Result<bool, Violation> {
        let Some(page) = self.pages.get(number).copied() else { return Ok(false) };
        let Place::Away(stored) = page.place else { return Ok(false) };
        hold("R20", stored.version == page.version, || format!("page {number} comes back as it was before"))?;
        self.arrive(number, lru::on_promoted(page.age), Some(stored));
        if !self.keeps_copies {
            self.forget_copy(number, mm);
        }
        Ok(true)
    }

    fn forget_copy(&mut self, number: usize, mm: &mut MemoryManager) {
        if let Place::Present(Some(copy)) = self.pages[number].place {
            self.pages[number].place = Place::Present(None);
            self.kept -= copy.bytes;
            self.unstore(copy.bytes, mm);
        }
    }

    fn unstore(&mut self, bytes: u64, mm: &mut MemoryManager) {
        self.stored -= bytes + LABEL;
        while self.frames.len() as u64 > self.stored.div_ceil(PAGE_SIZE) {
            let block = self.frames.pop().expect("as many as there are");
            mm.free(block).expect("it is ours");
        }
    }

    /// Whether node 1 has room for so many bytes more: through the wall, charged to the grant.
    fn store(&mut self, bytes: u64, mm: &mut MemoryManager) -> bool {
        let stored = self.stored + bytes + LABEL;
        while (self.frames.len() as u64) < stored.div_ceil(PAGE_SIZE) {
            let grants = [&self.grant];
            let request = Request::on(DomainId::ROOT, NodeId::ONE, &grants);
            match mm.alloc(&request, Order::ZERO) {
                Ok(block) => self.frames.push(block),
                Err(_) => return false,
            }
        }
        self.stored = stored;
        true
    }

    /// One look of the pressure loop and what it calls for; when to look again, ns.
    pub(super) fn look(
        &mut self,
        now: u64,
        around: &Surroundings,
        costs: &Costs,
        report: &mut Report,
        mm: &mut MemoryManager,
    ) -> Result<u64, Violation> {
        let FrameCount(floor) = self.floor.update(around.limit, around.fixed, Bytes(self.stored), around.count);
        self.floor_pages = floor;
        let movable = Movable::above(FrameCount(floor), self.resident, self.held, self.refused);
        self.keeps_copies = keeps_copies(around.limit, around.used, Bytes(self.kept));
        let (last_ns, last_used) = core::mem::replace(&mut self.last, (now, around.used.0));
        let facts = Facts {
            limit: Some(around.limit),
            tree_used: around.used,
            own_used: Bytes(self.published),
            own_resident_pages: movable.resident_pages,
            holding_pages: movable.holding_pages,
            since_last_ns: now - last_ns,
            growth: Bytes(around.used.0.saturating_sub(last_used)),
            processes: around.count,
            processors: around.processors,
        };
        let plan = plan(&facts);
        self.admission = self.throttle.look(&Look {
            now_ns: now,
            limit: around.limit,
            tree_used: around.used,
            gate: plan.gate,
            freed_pages: self.freed,
            resident_pages: self.resident,
            refused_pages: self.refused,
            floor_pages: floor,
            is_hopeless: self.floor.is_hopeless(),
            is_stuck: self.progress.is_stuck(),
        });
        let now = now + costs.look;
        self.is_prepared |= is_near(&facts);
        if !self.is_prepared {
            return Ok(now + plan.sleep_ns);
        }
        // What a program of the simulator may use is mapped from the start.
        let extent = Extent { writable: Bytes(self.pages.len() as u64 * PAGE_SIZE), used: Bytes(self.used()) };
        match self.coverage.look(plan.gate, now, extent) {
            Cover::Keep => {}
            Cover::All => {
                self.is_covered = true;
                self.coverage.covered(now, 1, extent);
            }
            Cover::Nothing => self.is_covered = false,
        }
        if plan.evict_pages == 0 {
            return Ok(now + plan.sleep_ns);
        }
        let (done, took) = self.batch(&plan, now, costs, report, mm)?;
        Ok(now + took + self.progress.note(done).unwrap_or(0))
    }

    /// One batch: pages moved or demoted, and how long it took, ns.
    fn batch(
        &mut self,
        plan: &Plan,
        now: u64,
        costs: &Costs,
        report: &mut Report,
        mm: &mut MemoryManager,
    ) -> Result<(u64, u64), Violation> {
        let held = self.held;
        let moved = self.sweep(plan.sweep_pages(held, 0), now, report, mm);
        let (mut freed, mut encoded) = (0, 0);
        for _ in 0..plan.demote_pages(held, moved) {
            match self.demote(report, mm)? {
                Demoted::Nothing => break,
                Demoted::Clean => freed += 1,
                Demoted::Encoded => (freed, encoded) = (freed + 1, encoded + 1),
                Demoted::GivenBack => encoded += 1,
            }
        }
        self.freed += freed;
        Ok((moved + freed, moved * costs.sweep + encoded * costs.demote))
    }

    /// The clock hand; how many pages it moved into the holding area.
    fn sweep(&mut self, wanted: u64, now: u64, report: &mut Report, mm: &mut MemoryManager) -> u64 {
        let (mut moved, mut wraps) = (0, 0);
        while moved < wanted && wraps < 2 {
            let Some(&page) = self.pages.get(self.hand) else {
                self.hand = 0;
                self.retry.begin_round(now);
                wraps += 1;
                continue;
            };
            let number = self.hand;
            self.hand += 1;
            let Place::Present(copy) = page.place else { continue };
            if page.is_refused && !self.retry.is_turn(number as u64) {
                continue;
            }
            match lru::on_sweep(page.age) {
                Verdict::Keep(age) => {
                    self.forget_copy(number, mm);
                    self.pages[number].age = age;
                }
                Verdict::Evict(_) if self.is_pinned(number) => self.refuse(number, report),
                Verdict::Evict(age) => {
                    let page = &mut self.pages[number];
                    self.refused -= u64::from(core::mem::take(&mut page.is_refused));
                    let (slot, version) = (self.next_slot, page.version);
                    (page.place, page.age) = (Place::Held { slot, version, copy }, age);
                    self.holding.push_back((number, slot));
                    self.next_slot += 1;
                    self.resident -= 1;
                    self.held += 1;
                    moved += 1;
                }
            }
        }
        moved
    }

    fn refuse(&mut self, number: usize, report: &mut Report) {
        let page = &mut self.pages[number];
        self.refused += u64::from(!core::mem::replace(&mut page.is_refused, true));
        report.refused += 1;
    }

    /// The oldest page of the holding area leaves for node 1.
    fn demote(&mut self, report: &mut Report, mm: &mut MemoryManager) -> Result<Demoted, Violation> {
        let (number, slot, version, copy) = loop {
            let Some((number, at)) = self.holding.pop_front() else { return Ok(Demoted::Nothing) };
            if let Place::Held { slot, version, copy } = self.pages[number].place
                && slot == at
            {
                break (number, slot, version, copy);
            }
        };
        let page = self.pages[number];
        hold("R17", version == page.version, || format!("page {number} was written while it was held"))?;
        if let Some(copy) = copy {
            self.kept -= copy.bytes;
            if copy.version == version {
                self.pages[number].place = Place::Away(copy);
                self.held -= 1;
                report.demoted += 1;
                report.clean += 1;
                return Ok(Demoted::Clean);
            }
            self.unstore(copy.bytes, mm);
            self.pages[number].place = Place::Held { slot, version, copy: None };
        }
        let Some(bytes) = self.size(number) else {
            self.held -= 1;
            self.arrive(number, page.age, None);
            self.refuse(number, report);
            return Ok(Demoted::GivenBack);
        };
        if !self.store(bytes, mm) {
            // R18: nothing is dropped to make room.
            self.holding.push_front((number, slot));
            report.full += 1;
            return Ok(Demoted::Nothing);
        }
        self.pages[number].place = Place::Away(Stored { bytes, version });
        self.held -= 1;
        report.demoted += 1;
        Ok(Demoted::Encoded)
    }

    /// A number that is a page's own.
    fn draw(&self, number: usize, salt: u64) -> u64 {
        let mut bits = (number as u64 ^ self.seed << 48 ^ salt << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ bits >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits ^ bits >> 29
    }

    fn is_pinned(&self, number: usize) -> bool {
        matches!(&self.content, Content::Made(mix) if self.draw(number, 1) % 1000 < mix.pinned)
    }

    /// What a page takes on node 1; none: it does not compress (R19).
    fn size(&self, number: usize) -> Option<u64> {
        let mix = match &self.content {
            Content::Known(sizes) => return sizes[number].map(u64::from),
            Content::Made(mix) => mix,
        };
        let is_incompressible = self.draw(number, 2) % 1000 < mix.incompressible;
        let mean = mix.mean_bytes.max(2);
        (!is_incompressible).then(|| (mean / 2 + self.draw(number, 3) % mean).min(PAGE_SIZE - 1))
    }

    /// Every page once more, all counts, and an end to all that is stored.
    pub(super) fn check_all(&mut self, mm: &mut MemoryManager) -> Result<(), Violation> {
        let (mut resident, mut held, mut stored) = (0, 0, 0);
        for (number, page) in self.pages.iter().enumerate() {
            let (version, copy) = match page.place {
                Place::Nowhere => (page.version, None),
                Place::Present(copy) => (page.version, copy),
                Place::Held { version, copy, .. } => (version, copy),
                Place::Away(stored) => (stored.version, Some(stored)),
            };
            hold("R20", version == page.version, || format!("page {number} is not as it was written"))?;
            resident += u64::from(matches!(page.place, Place::Present(_)));
            held += u64::from(matches!(page.place, Place::Held { .. }));
            stored += copy.map_or(0, |copy| copy.bytes + LABEL);
        }
        let counts = (self.resident, self.held, self.stored);
        hold("frames", counts == (resident, held, stored), || {
            format!("counted {counts:?} resident, held, stored; there are {:?}", (resident, held, stored))
        })?;
        self.frames.drain(..).try_for_each(|block| {
            let freed = mm.free(block);
            hold("frames", freed.is_ok(), || format!("a frame of the store is not taken back: {freed:?}"))
        })
    }
}

enum Demoted {
    Nothing,
    Clean,
    Encoded,
    GivenBack,
}
