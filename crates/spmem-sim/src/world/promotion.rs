//! Promotion at a limited rate, and pins, which keep blocks where they are (R14, R15).

use spmem_core::grant::Rights;
use spmem_core::migrate::{Mover, Stay};
use spmem_core::node::Services;
use spmem_core::tier::{Promotion, Verdict};
use spmem_core::units::{Bytes, NodeId, PAGE_SIZE, Time};

use super::requests::shown;
use super::{Applied, Outcome, World, refused};
use crate::check::{Violation, hold};
use crate::model::Goal;

/// What may come up from a node in a second, and at once after a rest.
const RATE: u64 = 96 * PAGE_SIZE;
/// Used again within this is hot, however much is.
const HOT_NS: u64 = 125_000_000;
/// Not used again within this is cold, however little is hot.
const COLD_NS: u64 = 2_000_000_000;
const SECOND_NS: u128 = 1_000_000_000;

impl World {
    /// R14, R15: a block that is used often goes up, where its node offers that, its domain reaches and the rate allows.
    pub(super) fn promote(
        &mut self,
        number: u32,
        used_at: u16,
        since_use_ns: u64,
        grants: &[u32],
        is_completed: bool,
    ) -> Applied {
        let (Some(block), Ok(near)) = (self.blocks.get(&number), NodeId::new(used_at)) else {
            return refused("no block");
        };
        let node = self.model.blocks[&number].node;
        self.mm.note_used(block);
        let (order, now) = (block.order(), self.model.now);
        let promotion = self.promotions.entry(node).or_insert_with(|| Promotion::new(Bytes(RATE), Time(now)));
        let verdict = promotion.consider(order, since_use_ns, Time(now));
        let threshold = promotion.threshold_ns();
        self.check_verdict(node, order.bytes().0, since_use_ns, threshold, verdict)?;
        if verdict != Verdict::Promote {
            return refused(format!("{verdict:?}"));
        }
        self.model.promoted.entry(node).or_default().push((now, order.bytes().0));
        let known = &self.model.blocks[&number];
        let services = self.model.nodes[&node].spec.services;
        let can_move = known.is_movable && !known.is_pinned && services.contains(Services::MIGRATION);
        let may = self.model.may(grants, Rights::MIGRATE_FROM, node);
        let isolated = match self.mm.take(&self.blocks[&number], Mover::Holder(&shown(&self.grants, grants))) {
            Ok(isolated) => isolated,
            Err(stay @ Stay::NotMovable { .. }) => {
                hold("R11", may && (!known.is_movable || known.is_pinned), || {
                    format!("block {number}, {known:?}: {stay}")
                })?;
                return refused(stay);
            }
            Err(stay) => {
                self.check_stay(node, Services::MIGRATION, Rights::MIGRATE_FROM, grants, stay)?;
                return refused(stay);
            }
        };
        hold("R15", can_move, || format!("block {number} of node {node} is taken, {known:?}"))?;
        hold("R12", may, || format!("block {number} is taken off node {node} with {grants:?} shown"))?;
        let targets = self.model.targets(known, Goal::Up { used_at }, &[]);
        let best = self.first_with_room(&targets, &[], order);
        let needs = Services::PROMOTION | Services::MIGRATION;
        match self.mm.plan_promotion(isolated, near) {
            Ok(planned) => {
                hold("R15", services.contains(needs), || format!("node {node} promotes without the services"))?;
                let to = planned.to().node().get();
                hold("R14", best == Some(to), || {
                    format!("block {number} goes up to node {to}, not {best:?}, of {targets:?}")
                })?;
                self.finish(planned, &[], is_completed)?;
                Ok(Outcome::Done)
            }
            Err(stay) => {
                self.check_no_move(number, needs, &targets, best, &[], order, stay)?;
                refused(stay)
            }
        }
    }

    /// Whether no more comes up than the rate lets, and what does not come up is cold or too much.
    fn check_verdict(
        &self,
        node: u16,
        bytes: u64,
        since_use_ns: u64,
        threshold: u64,
        verdict: Verdict,
    ) -> Result<(), Violation> {
        let is_cold = since_use_ns > threshold && since_use_ns > HOT_NS || since_use_ns > COLD_NS;
        let came = self.model.promoted.get(&node).map(Vec::as_slice).unwrap_or_default();
        // Since each time at which something came up: all that did, and this.
        let exceeds = |slack: u64| {
            let mut sum = u128::from(bytes + slack);
            let mut since = came.iter().rev().map(|&(at, bytes)| {
                sum += u128::from(bytes);
                sum * SECOND_NS > u128::from(RATE) * (SECOND_NS + u128::from(self.model.now - at))
            });
            bytes > RATE || since.any(|is_over| is_over)
        };
        // What the time brings is rounded to bytes, each time that it is looked at.
        let (is_over, is_nearly) = (exceeds(0), exceeds(PAGE_SIZE));
        let is_right = match verdict {
            Verdict::Cold => is_cold,
            Verdict::OverRate => !is_cold && is_nearly,
            Verdict::Promote => !is_cold && !is_over,
        };
        hold("R14", is_right, || {
            format!(
                "{bytes} bytes of node {node}, used again after {since_use_ns} ns, after {came:?}: {verdict:?}"
            )
        })
    }

    /// R12, R15: a pin for long needs the service and, on an SPM node, the right.
    pub(super) fn pin(&mut self, number: u32, grants: &[u32]) -> Applied {
        let Some(block) = self.blocks.get(&number) else { return refused("no block") };
        let known = &self.model.blocks[&number];
        let (node, is_movable) = (known.node, known.is_movable);
        let services = self.model.nodes[&node].spec.services;
        match self.mm.pin(block, &shown(&self.grants, grants)) {
            Ok(is_pinned) => {
                hold("R15", services.contains(Services::LONGTERM_PIN), || {
                    format!("block {number} is pinned on node {node} without the service")
                })?;
                hold("R12", self.model.may(grants, Rights::PIN, node), || {
                    format!("block {number} is pinned on node {node} with {grants:?} shown")
                })?;
                let is_tracked = is_movable && services.intersects(Services::RECLAIM | Services::MIGRATION);
                hold("R15", is_pinned == is_tracked, || format!("block {number} is pinned: {is_pinned}"))?;
                self.model.blocks.entry(number).and_modify(|known| known.is_pinned = is_pinned);
                if is_pinned { Ok(Outcome::Done) } else { refused("it never moves") }
            }
            Err(stay) => {
                self.check_stay(node, Services::LONGTERM_PIN, Rights::PIN, grants, stay)?;
                refused(stay)
            }
        }
    }

    pub(super) fn unpin(&mut self, number: u32) -> Applied {
        let (Some(block), Some(known)) = (self.blocks.get(&number), self.model.blocks.get_mut(&number)) else {
            return refused("no block");
        };
        self.mm.unpin(block);
        if std::mem::take(&mut known.is_pinned) { Ok(Outcome::Done) } else { refused("it is not pinned") }
    }
}
