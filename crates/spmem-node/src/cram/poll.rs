//! Polling: what the device says, what follows from it, and doing that. Notices are hints: one that is lost is made up for by
//! the next poll, a thousand are as good as one.

use alloc::boxed::Box;
use alloc::vec::Vec;

use spmem_core::compressed::{Change, Plan};
use spmem_core::mm::AllocError;
use spmem_core::units::{DomainId, FrameCount, FrameNumber, Order, PAGE_SIZE, Time};

use super::component::{Cram, Entry};
use super::{Notice, PageId, Telemetry};
use crate::backend::{Backend, PAGE_BYTES};
use crate::mapped::Medium;

/// Notices taken at a time: a storm must not keep the component from its work.
pub const MAX_NOTICES: usize = 1024;
/// Pages that leave at a time for the balloon, ...
const EVACUATED: usize = 64;
/// ... and because the node is short of frames by its watermarks, which pressure boosts.
const RELIEF: u64 = 16;

/// What a program keeps free of its sysram when pages come back that it did not ask for.
#[derive(Clone, Copy)]
enum Spare {
    /// Nothing: they must leave.
    Nothing,
    /// An eighth of its limit, so that they do not have to go again at once.
    Eighth,
}

impl<D: Medium + Telemetry> Cram<D> {
    /// Asks the device, and does what follows: who is hurt by poison is found, the watermarks are boosted, the balloon goes a
    /// step. Call it when a notice comes, when a writer waits, and now and then.
    pub fn poll(&mut self, now: Time) -> Plan {
        for _ in 0..MAX_NOTICES {
            match self.node.medium().take_notice() {
                Some(Notice::Poison { offset }) => self.on_poison(offset),
                // The reading that follows says more.
                Some(Notice::Low | Notice::High) => {}
                None => break,
            }
        }
        let mark = self.supply.mark();
        let reading = self.node.medium().reading();
        self.supply.observe(now, mark, reading);
        let plan = self.supply.plan(self.perceived, &self.marks);
        let mut marks = self.marks;
        marks.boost(plan.boost);
        let (mm, owner) = self.node.frames_mut().parts_mut();
        let set = mm.registry_mut().set_watermarks(owner, marks);
        assert!(set.is_ok(), "the token is this node's owner's: {set:?}");
        self.move_balloon(plan.balloon);
        let short = self.node.frames().mm().shortage(self.node.node());
        self.evacuate(FrameCount(short.0.min(RELIEF)), Spare::Eighth);
        self.last_plan = Some(plan);
        plan
    }

    /// What the last poll came to.
    pub const fn last_plan(&self) -> Option<&Plan> {
        self.last_plan.as_ref()
    }

    /// Who has what is lost there is told (R20).
    fn on_poison(&mut self, offset: u64) {
        let Ok(frame) = u32::try_from(offset / PAGE_SIZE).map(FrameNumber) else { return };
        let id = self.in_frame.get(&frame).copied();
        match id.and_then(|id| Some((id, self.pages.get(&id)?))) {
            Some((id, &Entry::Device(handle))) => {
                // It may have been put right since, or be of who had the frame before.
                let mut page = [0; PAGE_BYTES];
                if let Err(corrupt) = self.node.load(handle, &mut page) {
                    self.lose(id, handle, corrupt.damage);
                }
            }
            _ => {
                // Nobody has it: it is not given out again. One that is no frame of the node is no concern of it.
                let _ = self.node.poison(frame);
            }
        }
    }

    fn move_balloon(&mut self, change: Change) {
        match change {
            Change::Stay => self.is_stalled = false,
            Change::Take(wanted) => {
                let mut taken = self.inflate(wanted);
                if taken.0 < wanted.0 {
                    self.evacuate(FrameCount(wanted.0 - taken.0), Spare::Nothing);
                    taken.0 += self.inflate(FrameCount(wanted.0 - taken.0)).0;
                }
                self.is_stalled = taken.0 == 0;
            }
            Change::Give(wanted) => {
                self.is_stalled = false;
                let mut given = FrameCount(0);
                // Blocks are taken largest first, so the last ones are the smallest.
                while given.0 < wanted.0
                    && let Some(block) = self.balloon.pop()
                {
                    let frames = block.order().frames();
                    let freed = self.node.frames_mut().mm_mut().free(block);
                    assert!(freed.is_ok(), "the balloon's blocks are this manager's: {freed:?}");
                    given.0 += frames.0;
                    self.supply.balloon_mut().gave(frames);
                }
                // What a block was too large by.
                self.inflate(FrameCount(given.0.saturating_sub(wanted.0)));
            }
        }
        let is_short = matches!(self.supply.balloon().next(), Change::Take(_));
        match (is_short, self.converging.take()) {
            (true, None) => self.converging = self.supply.gates_mut().set().ok(),
            (false, Some(key)) => {
                let cleared = self.supply.gates_mut().clear(key);
                assert!(cleared.is_ok(), "the key is of this node");
            }
            (_, key) => self.converging = key,
        }
    }

    /// Takes up to so many frames of the node that nobody has, in blocks as large as can be had; how many.
    fn inflate(&mut self, wanted: FrameCount) -> FrameCount {
        let mut taken = 0;
        for order in Order::all().rev() {
            while taken + order.frames().0 <= wanted.0 {
                let block = self.node.frames_mut().alloc(DomainId::ROOT, order);
                match block {
                    Ok(block) => {
                        taken += order.frames().0;
                        self.balloon.push(block);
                        self.supply.balloon_mut().took(order.frames());
                    }
                    Err(AllocError::Refused(_)) => return FrameCount(taken),
                    Err(_) => break,
                }
            }
        }
        FrameCount(taken)
    }

    /// Moves up to so many pages to sysram, where their programs have room below their limits.
    fn evacuate(&mut self, wanted: FrameCount, spare: Spare) {
        if wanted.0 == 0 {
            return;
        }
        let most = usize::try_from(wanted.0).unwrap_or(EVACUATED).min(EVACUATED);
        let there: Vec<PageId> = self.in_frame.values().copied().collect();
        let mut left = most;
        for id in there {
            if left == 0 {
                return;
            }
            let has_room = self.programs.get(&id.owner).is_some_and(|program| {
                let spare = match spare {
                    Spare::Nothing => 0,
                    Spare::Eighth => program.limit.0.div_ceil(8),
                };
                program.resident.0 + spare < program.limit.0 && program.waiting.is_empty()
            });
            if has_room && self.promote(id) {
                left -= 1;
            }
        }
    }

    /// Moves a page of the device to sysram as it is; whether it could be read.
    pub(super) fn promote(&mut self, id: PageId) -> bool {
        let Some(&Entry::Device(handle)) = self.pages.get(&id) else { return false };
        let mut page = Box::new([0; PAGE_BYTES]);
        match self.node.load(handle, &mut page) {
            Ok(()) => {
                self.release(handle);
                self.settle(id, page);
                true
            }
            Err(corrupt) => {
                self.lose(id, handle, corrupt.damage);
                false
            }
        }
    }
}
