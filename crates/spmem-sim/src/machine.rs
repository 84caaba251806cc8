//! Machines to simulate: shapes from a handful of frames to terabytes.

use bytemuck::allocation::try_zeroed_slice_box;
use core::sync::atomic::{AtomicU8, AtomicU64};
use spmem_core::frames::{MAX_FRAMES, Metadata};
use spmem_core::units::FrameCount;

use crate::step::{Step, Terms};

/// What a machine has. Node 0 is sysram; of the others every second is SPM, and of those every second has an easy guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Nodes.
    pub nodes: u16,
    /// 4 KiB frames of each.
    pub frames_per_node: u64,
    /// Domains below the root.
    pub domains: u16,
    /// Levels that they are spread over.
    pub depth: u16,
}

impl Shape {
    /// 1 TiB on 64 nodes, 1000 domains.
    pub const TERABYTE: Self = Self { nodes: 64, frames_per_node: 1 << 22, domains: 1000, depth: 8 };

    /// The steps that build it: nodes, domains, and for each SPM node a grant with its number.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for node in 0..self.nodes {
            let (is_spm, is_easy) = (node % 2 == 1, node % 4 == 3);
            steps.push(Step::AddNode {
                node,
                is_spm,
                is_easy,
                frames: self.frames_per_node,
                is_zero: true,
                services: spmem_core::node::Services::all().bits(),
                tier: u8::from(is_spm),
                class: None,
            });
            if is_spm {
                let terms = Terms { rights: 0x3f, quota: u64::MAX, expires: None };
                steps.push(Step::Grant { grant: u32::from(node), nodes: vec![node], terms });
            }
        }
        steps.extend((0..self.domains).map(|number| Step::MakeDomain { path: self.path(number) }));
        steps
    }

    /// The path of a domain: chains of `depth` levels.
    pub fn path(&self, number: u16) -> String {
        let depth = self.depth.max(1);
        let (chain, level) = (number / depth, number % depth);
        (0..=level).map(|level| format!("/d{chain}.{level}")).collect()
    }
}

/// Metadata for so many frames, if there is memory for it: zero pages that are not touched before the frames are. It is never
/// given back.
pub(crate) fn lend(count: FrameCount) -> Option<Metadata> {
    if count.0 > MAX_FRAMES {
        return None;
    }
    let (words, states) = Metadata::size(count);
    let words: Box<[AtomicU64]> = try_zeroed_slice_box(words).ok()?;
    let states: Box<[AtomicU8]> = try_zeroed_slice_box(states).ok()?;
    Some(Metadata::new(Box::leak(words), Box::leak(states)))
}
