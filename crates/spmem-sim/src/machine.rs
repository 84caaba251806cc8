//! Machines to simulate: shapes from a handful of frames to terabytes.

use bytemuck::allocation::zeroed_slice_box;
use core::sync::atomic::{AtomicU8, AtomicU64};
use spmem_core::frames::Metadata;
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

/// Metadata for so many frames: zero pages that are not touched before the frames are. It is never given back.
pub fn lend(count: FrameCount) -> Metadata {
    let (words, states) = Metadata::size(count);
    let words: &'static [AtomicU64] = Box::leak(zeroed_slice_box(words));
    let states: &'static [AtomicU8] = Box::leak(zeroed_slice_box(states));
    Metadata::new(words, states)
}
