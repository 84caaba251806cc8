//! Blocks: taken, used, given back, and frames that fail (R6, R9, R12, R20, R21).

use spmem_core::grant::Rights;
use spmem_core::mm::Block;
use spmem_core::poison::Damage;
use spmem_core::units::{FrameNumber, NodeId};

use super::{Applied, Outcome, World, refused};
use crate::check::{Violation, hold};
use crate::model::{self, Payer, Set};

impl World {
    /// Holds a block that was given against the rules, and takes it into the model.
    pub(super) fn take(
        &mut self,
        number: u32,
        block: Block,
        asked: &model::Request,
        allowed: &Set,
        is_movable: bool,
    ) -> Result<(), Violation> {
        let (node, first, frames) = (block.node().get(), block.first_frame().0, block.order().frames().0);
        hold("R6", allowed.contains(&node), || format!("{asked:?} got node {node}, allowed are {allowed:?}"))?;
        let grant = self.payer_of(asked, node, block.bytes().0)?;
        let (domain, is_pinned) = (asked.domain.clone(), false);
        self.settle(number, block, model::Block { domain, grant, node, first, frames, is_movable, is_pinned })
    }

    /// R9, R12: the grant that has to pay for what was given.
    pub(super) fn payer_of(
        &self,
        asked: &model::Request,
        node: u16,
        bytes: u64,
    ) -> Result<Option<u32>, Violation> {
        let mut grant = None;
        let known = &self.model.nodes[&node];
        if known.spec.is_spm {
            let is_free = self.model.is_free_of_charge(asked, node);
            match self.model.payer(&asked.grants, Rights::ALLOC, node, bytes) {
                Payer::Grant(payer) => grant = Some(payer),
                Payer::Nobody => {
                    hold("R9", is_free, || format!("{asked:?} got SPM node {node} without a grant"))?;
                }
                Payer::OverQuota if is_free => {}
                Payer::OverQuota => hold("R12", false, || format!("{asked:?} exceeds its quota on node {node}"))?,
            }
        }
        Ok(grant)
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
        if self.runs.contains_key(&number) {
            return self.free_contiguous(number);
        }
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
                let (known, piece) = (&self.model.blocks[&owner], self.model.piece_of(node, frame));
                let domain = known.domain.as_deref().and_then(|path| self.domain(path));
                let order = holder.block.order.map_or(0, |order| order.frames().0);
                (holder.block.first.0, order) == piece && holder.page.is_none_or(|page| page.domain == domain)
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
