//! Blocks: taken, used, given back, and frames that fail (R6 to R10, R20, R21).

use spmem_core::grant::{Grant, Rights};
use spmem_core::mm::{AllocError, Block};
use spmem_core::nodemask::NodeMask;
use spmem_core::poison::Damage;
use spmem_core::policy::{Flags, Policy};
use spmem_core::units::{FrameNumber, NodeId, Order};
use spmem_core::wall::{MAX_SHOWN, Mobility, Request};

use super::{Applied, Outcome, World, mask_of, refused};
use crate::check::{Violation, hold};
use crate::model::{self, Payer, Set};
use crate::step::Mode;

impl World {
    pub(super) fn alloc(
        &mut self,
        number: u32,
        order: u8,
        asked: &model::Request<'_>,
        is_movable: bool,
    ) -> Applied {
        let (Ok(order), false) = (Order::new(order), self.blocks.contains_key(&number)) else {
            return refused("no such order, or a block of that number");
        };
        let domain = match asked.domain {
            None => None,
            Some(path) => match self.domain(path) {
                None => return refused("no domain"),
                found => found,
            },
        };
        let policy = match &asked.asked {
            None => Policy::DEFAULT,
            Some(nodes) => match Policy::new(asked.mode.core(), Flags::empty(), mask_of(nodes)) {
                Ok(policy) => policy,
                Err(_) if asked.mode == Mode::Bind => Policy::bind(NodeMask::EMPTY),
                Err(_) => Policy::DEFAULT,
            },
        };
        let shown: Vec<&Grant> =
            asked.grants.iter().filter_map(|grant| self.grants.get(grant)).take(MAX_SHOWN).collect();
        let mobility = if is_movable { Mobility::Movable } else { Mobility::Unmovable };
        let request = Request { policy, domain, grants: &shown, mobility, ..Request::default() };
        let allowed = self.model.allowed(asked);
        match self.mm.alloc(&request, order) {
            Ok(block) => {
                self.take(number, block, asked, &allowed, is_movable)?;
                Ok(Outcome::Done)
            }
            Err(AllocError::Refused(refusal)) => {
                hold("R8", allowed.is_empty(), || format!("{refusal}, but {allowed:?} are allowed"))?;
                refused(refusal)
            }
            Err(error) => {
                let bytes = order.bytes().0;
                let has_room = |node: u16| {
                    let frames = NodeId::new(node).ok().and_then(|node| self.mm.registry().frames(node));
                    let is_paid = self.model.is_free_of_charge(asked, node)
                        || self.model.payer(asked.grants, Rights::ALLOC, node, bytes) != Payer::OverQuota;
                    is_paid && frames.is_some_and(|frames| frames.largest_free() >= Some(order))
                };
                let room = allowed.iter().copied().find(|&node| has_room(node));
                hold("R10", room.is_none(), || format!("{error}, but node {room:?} has room"))?;
                refused(error)
            }
        }
    }

    /// Holds a block that was given against the rules, and takes it into the model.
    pub(super) fn take(
        &mut self,
        number: u32,
        block: Block,
        asked: &model::Request<'_>,
        allowed: &Set,
        is_movable: bool,
    ) -> Result<(), Violation> {
        let (node, first, frames) = (block.node().get(), block.first_frame().0, block.order().frames().0);
        hold("R6", allowed.contains(&node), || format!("{asked:?} got node {node}, allowed are {allowed:?}"))?;
        let mut grant = None;
        let known = &self.model.nodes[&node];
        if known.is_spm {
            let is_free = self.model.is_free_of_charge(asked, node);
            match self.model.payer(asked.grants, Rights::ALLOC, node, block.bytes().0) {
                Payer::Grant(payer) => grant = Some(payer),
                Payer::Nobody => {
                    hold("R9", is_free, || format!("{asked:?} got SPM node {node} without a grant"))?;
                }
                Payer::OverQuota if is_free => {}
                Payer::OverQuota => hold("R12", false, || format!("{asked:?} exceeds its quota on node {node}"))?,
            }
        }
        let domain = asked.domain.map(str::to_owned);
        self.settle(number, block, model::Block { domain, grant, node, first, frames, is_movable })?;
        self.check_node(node)
    }

    /// A block has a place: nobody else's, and zero if it is said to be.
    pub(super) fn settle(&mut self, number: u32, block: Block, known: model::Block) -> Result<(), Violation> {
        let model::Block { node, first, frames, grant, .. } = known;
        let owner = self.model.owner_of(node, first, frames);
        hold("frames", owner.is_none(), || format!("frame {first} of node {node} is block {owner:?}'s already"))?;
        let is_aligned = u64::from(first).is_multiple_of(frames);
        hold("frames", is_aligned, || format!("a block of {frames} frames at frame {first}"))?;
        let is_hurt = self.model.has_poison(node, first, frames);
        hold("R20", !is_hurt, || format!("a poisoned frame of node {node} is in the block at frame {first}"))?;
        let is_zero = self.model.is_zero(node, first, frames);
        // What compaction took and gave back unused may count as written.
        let is_sure = !self.model.is_vague.contains(&node);
        let is_right = if is_sure { block.is_zeroed() == is_zero } else { is_zero || !block.is_zeroed() };
        hold("R21", is_right, || {
            format!(
                "the block at frame {first} of node {node} is zero: {is_zero}, it is said to be: {}",
                block.is_zeroed()
            )
        })?;
        self.model.set_written(node, first, frames, true);
        if let Some(grant) = grant.and_then(|grant| self.model.grants.get_mut(&grant)) {
            grant.used += block.bytes().0;
        }
        self.model.owned.insert((node, first), (frames, number));
        self.model.blocks.insert(number, known);
        self.blocks.insert(number, block);
        Ok(())
    }

    /// A block leaves its place.
    pub(super) fn unsettle(&mut self, number: u32) -> Option<(Block, model::Block)> {
        let (block, known) = (self.blocks.remove(&number)?, self.model.blocks.remove(&number)?);
        self.model.owned.remove(&(known.node, known.first));
        if let Some(grant) = known.grant.and_then(|grant| self.model.grants.get_mut(&grant)) {
            grant.used -= block.bytes().0;
        }
        Some((block, known))
    }

    pub(super) fn free(&mut self, number: u32, is_zeroed: bool) -> Applied {
        let Some((block, known)) = self.unsettle(number) else { return refused("no block") };
        let freed = if is_zeroed { self.mm.free_zeroed(block) } else { self.mm.free(block) };
        hold("frames", freed.is_ok(), || format!("block {number} is not taken back: {freed:?}"))?;
        if is_zeroed {
            self.model.set_written(known.node, known.first, known.frames, false);
        }
        self.check_node(known.node)?;
        Ok(Outcome::Done)
    }

    pub(super) fn note_used(&mut self, number: u32) -> Applied {
        let Some(block) = self.blocks.get(&number) else { return refused("no block") };
        self.mm.note_used(block);
        Ok(Outcome::Done)
    }

    /// R20: who is hurt is who owns the frame, and it is out of use at the latest when that one gives it back.
    pub(super) fn poison(&mut self, node: u16, frame: u32) -> Applied {
        let Ok(id) = NodeId::new(node) else { return refused("no such node can be") };
        let report = match self.mm.poison(id, FrameNumber(frame)) {
            Ok(report) => report,
            Err(error) => return refused(error),
        };
        let is_new = self.model.poisoned.insert((node, frame));
        hold("R20", report.is_new == is_new, || {
            format!("frame {frame} of node {node} is said to be poisoned anew: {}", report.is_new)
        })?;
        let owner = self.model.owner_of(node, frame, 1);
        let is_right = match (report.damage, owner) {
            (Damage::OutOfUse, None) => true,
            (Damage::Holder(holder), Some(owner)) => {
                let (block, known) = (&self.blocks[&owner], &self.model.blocks[&owner]);
                let domain = known.domain.as_deref().and_then(|path| self.domain(path));
                (holder.block.first, holder.block.order) == (block.first_frame(), Some(block.order()))
                    && holder.page.is_none_or(|page| page.domain == domain)
            }
            _ => false,
        };
        hold("R20", is_right, || {
            format!("frame {frame} of node {node} is block {owner:?}'s, hurt is {:?}", report.damage)
        })?;
        self.check_node(node)?;
        Ok(Outcome::Done)
    }
}
