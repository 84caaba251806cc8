//! A view: what others than the memory manager may know of a node's frames.
//!
//! [`Frames`] gives frames to whoever has a reference to it, and asks nobody. Behind the wall nobody but the manager has
//! one: [`Registry::frames`](crate::registry::Registry::frames) hands out a [`FramesView`], which takes and gives nothing
//! (R6, R12). Takes no lock but those that looking takes.

use super::{FrameRange, Frames, FramesError, InUse};
use crate::units::{FrameCount, FrameNumber, Order};

/// The frames of a node, to look at.
///
/// ```
/// # use spmem_core::node::{Class, Guard, NodeSpec, NodeType, Services};
/// use spmem_core::{registry::Registry, units::{FrameCount, NodeId}};
/// # let spec = NodeSpec { node_type: NodeType::Sysram, class: Class::Plain, services: Services::empty(),
/// #     guard: Guard::Hard, owner: "doc".into() };
/// let mut registry = Registry::new();
/// registry.register(NodeId::ZERO, spec).unwrap();
/// assert_eq!(registry.frames(NodeId::ZERO).unwrap().free(), FrameCount(0));
/// ```
///
/// There is no way from it to a frame:
///
/// ```compile_fail
/// # use spmem_core::{frames::FramesView, units::Order};
/// fn take(frames: FramesView<'_>) {
///     let _ = frames.alloc(Order::ZERO);
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct FramesView<'a>(&'a Frames);

impl<'a> FramesView<'a> {
    pub(crate) const fn new(frames: &'a Frames) -> Self {
        Self(frames)
    }

    /// As [`Frames::capacity`].
    pub const fn capacity(self) -> FrameCount {
        self.0.capacity()
    }

    /// As [`Frames::free`].
    pub fn free(self) -> FrameCount {
        self.0.free()
    }

    /// As [`Frames::used`].
    pub fn used(self) -> FrameCount {
        self.0.used()
    }

    /// As [`Frames::poisoned`].
    pub fn poisoned(self) -> FrameCount {
        self.0.poisoned()
    }

    /// As [`Frames::poisoned_frames`].
    pub fn poisoned_frames(self) -> impl Iterator<Item = FrameNumber> + 'a {
        self.0.poisoned_frames()
    }

    /// As [`Frames::ranges`].
    pub fn ranges(self) -> impl ExactSizeIterator<Item = FrameRange> + DoubleEndedIterator + 'a {
        self.0.ranges()
    }

    /// As [`Frames::in_use`].
    pub fn in_use(self, part: FrameRange) -> impl Iterator<Item = InUse> + 'a {
        self.0.in_use(part)
    }

    /// As [`Frames::largest_free`].
    pub fn largest_free(self) -> Option<Order> {
        self.0.largest_free()
    }

    /// As [`Frames::count_free_blocks`].
    pub fn count_free_blocks(self) -> [u64; Order::COUNT] {
        self.0.count_free_blocks()
    }

    /// As [`Frames::allocated_order`].
    ///
    /// # Errors
    /// As [`Frames::allocated_order`].
    pub fn allocated_order(self, frame: FrameNumber) -> Result<Order, FramesError> {
        self.0.allocated_order(frame)
    }
}
