//! Many frames at a time: in one piece, or one by one in a batch. Through the wall and charged as a block is.
//!
//! An interface for components that place much at once; a run needs neither, its store takes a block at a time.

use alloc::vec::Vec;
use core::num::NonZeroU32;

use super::{AllocError, Block, MemoryManager, UNCHARGED};
use crate::frames::{FrameRange, FramesError};
use crate::units::{DomainId, FrameCount, FrameNumber, NodeId, Order};
use crate::wall::{Mobility, Pass, Request};

/// Frames that a batch takes of a node at once.
const BATCH: usize = 64;

/// Frames in one piece, up to 1 GiB; they stay where they are. As a [`Block`]: whoever holds it owns the frames.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped one stays allocated"]
pub struct Contiguous {
    run: FrameRange,
    node: NodeId,
    charged: u16,
    domain: u16,
    registry: NonZeroU32,
    is_zeroed: bool,
}

impl Contiguous {
    /// The node it lies on.
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// Its frames.
    pub const fn run(&self) -> FrameRange {
        self.run
    }

    /// The domain it is charged to; `None` when the request had none.
    pub fn domain(&self) -> Option<DomainId> {
        DomainId::new(self.domain).ok()
    }

    /// As [`Block::is_zeroed`].
    pub const fn is_zeroed(&self) -> bool {
        self.is_zeroed
    }
}

impl MemoryManager {
    /// Lets a request through the wall and allocates `count` neighbouring frames, up to 1 GiB; where they can begin
    /// [`Frames::alloc_contiguous`](crate::frames::Frames::alloc_contiguous) says. Looks at every 4 MiB of a node: slow. Where
    /// no such run is free, [`MemoryManager::plan_emptying`] can make one.
    ///
    /// # Errors
    /// [`AllocError`], of the node tried last; nothing has changed then.
    ///
    /// ```
    /// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
    /// use spmem_core::{frames::Metadata, mm::MemoryManager, wall::Request, zero::Initial};
    /// use spmem_core::units::{DomainId, FrameCount, NodeId};
    /// # let spec = NodeSpec { node_type: NodeType::Sysram, class: Class::Plain, services: Services::empty(),
    /// #     guard: Guard::Hard, owner: "doc".into() };
    /// let mut mm = MemoryManager::new();
    /// let owner = mm.registry_mut().register(NodeId::ZERO, spec.clone()).unwrap().owner;
    /// let lent = Metadata::from_heap(FrameCount(4096)).unwrap();
    /// mm.registry_mut().add_range(&owner, &spec, FrameCount(4096), lent, Initial::Zero).unwrap();
    /// let run = mm.alloc_contiguous(&Request::of(DomainId::ROOT), FrameCount(3000)).unwrap();
    /// assert_eq!(mm.registry().used_by(DomainId::ROOT, NodeId::ZERO), FrameCount(3000));
    /// mm.free_contiguous(run).unwrap();
    /// ```
    pub fn alloc_contiguous(
        &mut self,
        request: &Request<'_>,
        count: FrameCount,
    ) -> Result<Contiguous, AllocError> {
        let mut pass = self.registry.admit(request).map_err(AllocError::Refused)?;
        self.on_each(&mut pass, |mm, pass, node| mm.alloc_contiguous_on(pass, count, node))
    }

    fn alloc_contiguous_on(
        &mut self,
        pass: &Pass,
        count: FrameCount,
        node: NodeId,
    ) -> Result<Contiguous, AllocError> {
        let registry = self.tag();
        let charged = self.enter(pass, count, node)?;
        let entry = self.registry.node_mut(node).expect("an allowed node is registered");
        let run = match entry.frames.alloc_contiguous(count) {
            Ok(run) => run,
            Err(cause) => {
                self.uncharge(charged, count);
                return Err(AllocError::Exhausted { node, cause });
            }
        };
        if let Err(cause) = run.blocks().try_for_each(|(first, _)| entry.prepare(first, Mobility::Unmovable)) {
            let freed = entry.frames.free_contiguous(run);
            assert!(freed.is_ok(), "it has just been taken: {freed:?}");
            self.uncharge(charged, count);
            return Err(AllocError::Exhausted { node, cause });
        }
        let give_out = |is_zeroed, (frame, order)| is_zeroed & entry.contents.give_out(frame, order);
        let is_zeroed = run.blocks().fold(true, give_out);
        if let Some(domain) = pass.domain() {
            self.registry.domains.charge(domain, node, count.0);
        }
        let domain = pass.domain().map_or(UNCHARGED, DomainId::get);
        Ok(Contiguous { run, node, charged, domain, registry, is_zeroed })
    }

    /// Takes it back; who was charged regains it, as with [`MemoryManager::free`].
    ///
    /// # Errors
    /// It again, when another manager allocated it.
    ///
    /// # Panics
    /// When its frames are not what it says: an invariant of this crate is broken.
    pub fn free_contiguous(&mut self, held: Contiguous) -> Result<(), Contiguous> {
        if held.registry != self.tag() {
            return Err(held);
        }
        let entry = self.registry.node_mut(held.node).expect("a node with frames in use stays (R1)");
        let freed = entry.frames.free_contiguous(held.run);
        assert!(freed.is_ok(), "it is not copyable, so it is freed once: {freed:?}");
        self.uncharge(held.charged, held.run.count);
        if let Some(domain) = held.domain() {
            self.registry.domains.uncharge(domain, held.node, held.run.count.0);
        }
        Ok(())
    }

    /// Allocates `count` single frames into `into`, as so many calls of [`MemoryManager::alloc_with`] would, and cheaper where
    /// they come of one node and need not move.
    ///
    /// # Errors
    /// [`AllocError`] of the first that was not to be had; those before it are in `into`.
    ///
    /// # Panics
    /// When the pass is another manager's.
    pub fn alloc_batch(&mut self, pass: &mut Pass, count: usize, into: &mut Vec<Block>) -> Result<(), AllocError> {
        let end = into.len().saturating_add(count);
        while into.len() < end {
            if into.try_reserve(1).is_err() {
                return Err(self.no_memory(pass));
            }
            into.push(self.alloc_with(pass, Order::ZERO)?);
            // Turns are taken frame by frame, and what moves comes from the top.
            if !pass.policy().mode().is_interleaved() && pass.mobility == Mobility::Unmovable {
                self.take_more(pass, end - into.len(), into);
            }
        }
        Ok(())
    }

    /// The heap has nothing left to list what the pass would be given.
    fn no_memory(&self, pass: &mut Pass) -> AllocError {
        if let Err(refusal) = pass.renew(&self.registry) {
            return AllocError::Refused(refusal);
        }
        let node = pass.mask().iter().next().expect("an allowed set is not empty");
        AllocError::Exhausted { node, cause: FramesError::NoMetadata }
    }

    /// Up to a batch of frames like the last of `into`, of its node and charged as it was; none where that is in doubt.
    fn take_more(&mut self, pass: &Pass, wanted: usize, into: &mut Vec<Block>) {
        let Some(&Block { node, charged, domain, registry, .. }) = into.last() else { return };
        let mut frames = [FrameNumber(0); BATCH];
        let frames = &mut frames[..wanted.min(BATCH)];
        // Before anything is taken: nothing has to be given back where the heap fails.
        if into.try_reserve(frames.len()).is_err() {
            return;
        }
        let all = FrameCount(frames.len() as u64);
        let Ok(charged_now) = self.enter(pass, all, node) else { return };
        if charged_now != charged {
            return self.uncharge(charged_now, all);
        }
        let entry = self.registry.node_mut(node).expect("it has just given a frame");
        let mut taken = entry.frames.alloc_batch(frames);
        if frames[..taken].iter().any(|&frame| entry.prepare(frame, Mobility::Unmovable).is_err()) {
            let freed = entry.frames.free_batch(&frames[..taken]);
            assert!(freed.is_ok(), "they have just been taken: {freed:?}");
            taken = 0;
        }
        for &frame in &frames[..taken] {
            let is_zeroed = entry.contents.give_out(frame, Order::ZERO);
            into.push(Block { frame, node, charged, domain, registry, order: Order::ZERO, is_zeroed });
        }
        if let Some(domain) = pass.domain() {
            self.registry.domains.charge(domain, node, taken as u64);
        }
        self.uncharge(charged, FrameCount(all.0 - taken as u64));
    }
}
