//! Runs: neighbouring frames, which are asked for and given back as one and never move (R6, R12, R20, R21).

use spmem_core::frames::{FramesError, MAX_CONTIGUOUS};
use spmem_core::grant::{GrantError, Rights};
use spmem_core::mm::{AllocError, Contiguous};
use spmem_core::units::{FrameCount, Order, PAGE_SIZE};
use spmem_core::wall::Request;

use super::refusals::Asked;
use super::requests::shown;
use super::{Applied, Outcome, World, refused};
use crate::check::{Violation, hold};
use crate::model::{self, Payer, Set, Turn};
use crate::step::Ask;

impl World {
    /// R6 to R12: somebody asks for neighbouring frames.
    pub(super) fn alloc_contiguous(&mut self, number: u32, frames: u32, ask: &Ask) -> Applied {
        if frames == 0 || self.model.blocks.contains_key(&number) {
            return refused("no frames, or a block of that number");
        }
        let frames = u64::from(frames);
        let asked = match self.asked(ask)? {
            Ok(asked) => asked,
            Err(why) => return refused(why),
        };
        let request = &asked.request;
        let choice = self.model.bind(request).map(|bound| self.model.choice(request, &bound)).unwrap_or_default();
        let turn = self.model.take_turn(request, &choice, &mut Turn::default());
        let ranks = self.model.ranks(request, &choice, turn);
        let has_room = |node: &u16| self.lack_of_run(request, *node, frames).is_none();
        let room: Set = choice.allowed().into_iter().filter(has_room).collect();
        let grants = shown(&self.grants, &request.grants);
        match self.mm.alloc_contiguous(&Request { grants: &grants, ..asked.core }, FrameCount(frames)) {
            Ok(run) => {
                let node = run.node().get();
                let rank = ranks.get(&node).copied().unwrap_or(usize::MAX);
                let before = room.iter().find(|other| ranks[*other] < rank);
                hold("distance", before.is_none(), || {
                    format!("{request:?} got a run on node {node}, but {before:?} has room and comes first")
                })?;
                hold("R6", choice.allowed().contains(&node), || format!("{request:?} got a run on node {node}"))?;
                self.settle_run(number, run, &asked, frames)?;
                self.check_node(node)?;
                Ok(Outcome::Done)
            }
            Err(AllocError::Refused(refusal)) => self.note_refused(&asked, &choice, refusal),
            Err(error) => {
                hold("R10", room.is_empty(), || format!("{frames} in a row: {error}, but {room:?} have room"))?;
                let last = ranks.values().max();
                let mut told = ranks.iter().filter(|(_, rank)| Some(*rank) == last);
                let is_true = told.any(|(&node, _)| self.lack_of_run(request, node, frames) == Some(error));
                hold("R11", is_true, || format!("{frames} in a row: {error:?}, of {ranks:?}"))?;
                refused(error)
            }
        }
    }

    /// What a node lacks for a run, as it should be told; `None`: it has one.
    fn lack_of_run(&self, request: &model::Request, node: u16, frames: u64) -> Option<AllocError> {
        let id = spmem_core::units::NodeId::new(node).ok()?;
        let (known, free) = (&self.model.nodes[&node], self.model.frames_free(node));
        if !request.uses_reserve && known.reserve > 0 && free < known.reserve.saturating_add(frames) {
            let (free, min) = (FrameCount(free), FrameCount(known.reserve));
            return Some(AllocError::ReserveOnly { node: id, free, min });
        }
        let bytes = frames * PAGE_SIZE;
        let is_paid = !known.spec.is_spm || self.model.is_free_of_charge(request, node);
        if !is_paid && self.model.payer(&request.grants, Rights::ALLOC, node, bytes) == Payer::OverQuota {
            // The first one shown that opens the node says how much it has left.
            let opens = |grant: &&u32| self.model.opens(**grant, Rights::ALLOC).contains(&node);
            let left = request.grants.iter().find(opens).map_or(0, |&grant| self.model.left(grant));
            let (wanted, left) = (FrameCount(frames).bytes(), spmem_core::units::Bytes(left));
            return Some(AllocError::Grant { node: id, cause: GrantError::OverQuota { wanted, left } });
        }
        if frames > MAX_CONTIGUOUS {
            let cause = FramesError::Contiguous { count: FrameCount(frames) };
            return Some(AllocError::Exhausted { node: id, cause });
        }
        if self.model.free_runs(node, frames).next().is_some() {
            return None;
        }
        let order = Order::fitting(FrameCount(frames).bytes()).unwrap_or(Order::MAX);
        let largest = self.model.largest_free(node).and_then(|order| Order::new(order).ok());
        Some(AllocError::Exhausted {
            node: id,
            cause: FramesError::Exhausted { order, free: FrameCount(free), largest },
        })
    }

    /// A run has a place: the lowest there is, nobody else's, and zero if it is said to be.
    fn settle_run(&mut self, number: u32, run: Contiguous, asked: &Asked, frames: u64) -> Result<(), Violation> {
        let (node, first) = (run.node().get(), run.run().first.0);
        let lowest = self.model.free_runs(node, frames).next();
        hold("frames", run.run().count.0 == frames && lowest == Some(first), || {
            format!("{frames} frames in a row at frame {first} of node {node}, the lowest free ones at {lowest:?}")
        })?;
        let grant = self.payer_of(&asked.request, node, frames * PAGE_SIZE)?;
        let is_zero = self.model.is_zero(node, first, frames);
        let is_sure = !self.model.is_vague.contains(&node);
        let is_right = if is_sure { run.is_zeroed() == is_zero } else { is_zero || !run.is_zeroed() };
        hold("R21", is_right, || format!("the run at frame {first} of node {node} is zero: {is_zero}"))?;
        self.model.set_written(node, first, frames, true);
        if let Some(grant) = grant.and_then(|grant| self.model.grants.get_mut(&grant)) {
            grant.used += frames * PAGE_SIZE;
        }
        for (at, count) in pieces(first, frames) {
            self.model.owned.insert((node, at), (count, number));
        }
        let (domain, is_movable, is_pinned) = (asked.request.domain.clone(), false, false);
        let known = model::Block { domain, grant, node, first, frames, is_movable, is_pinned };
        self.model.blocks.insert(number, known);
        self.runs.insert(number, run);
        Ok(())
    }

    /// A run is given back whole.
    pub(super) fn free_contiguous(&mut self, number: u32) -> Applied {
        let (Some(run), Some(known)) = (self.runs.remove(&number), self.model.blocks.remove(&number)) else {
            return refused("no run");
        };
        for (at, _) in pieces(known.first, known.frames) {
            self.model.owned.remove(&(known.node, at));
        }
        if let Some(grant) = known.grant.and_then(|grant| self.model.grants.get_mut(&grant)) {
            grant.used -= known.frames * PAGE_SIZE;
        }
        let freed = self.mm.free_contiguous(run);
        hold("frames", freed.is_ok(), || format!("run {number} is not taken back: {freed:?}"))?;
        self.check_node(known.node)?;
        Ok(Outcome::Done)
    }
}

/// The blocks that a run is to others: each as large as its place and what is left allow.
fn pieces(first: u32, frames: u64) -> impl Iterator<Item = (u32, u64)> {
    let (mut at, end) = (u64::from(first), u64::from(first) + frames);
    core::iter::from_fn(move || {
        let fits = |order: &u32| at.is_multiple_of(1 << order) && at + (1 << order) <= end;
        let count = 1_u64 << (0..=10).rev().find(fits).filter(|_| at < end)?;
        let piece = (u32::try_from(at).ok()?, count);
        at += count;
        Some(piece)
    })
}
