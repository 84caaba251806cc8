//! Media that another version, a torn write or a failing medium left: an error that says what is wrong, or a repair.

use spmem_core::frames::Metadata;
use spmem_core::node::{Class, Services};
use spmem_core::units::{DomainId, FrameNumber, NodeId, Order, PAGE_SIZE};
use spmem_node::mapped::{
    MappedNode, Medium, MediumError, OpenError, Opened, Operation, Overwrite, PeerId, Refused, Repair, Summary,
    mapped_spec,
};
use spmem_node::{Backend, PAGE_BYTES};

use super::backend::page_with_noise;

const SIZE: usize = 64 * PAGE_BYTES;
const RECORDS: usize = 2 * PAGE_BYTES;

/// Memory of which writes from some offset on are dropped, or fail.
#[derive(Clone, Default)]
struct Ram {
    bytes: Vec<u8>,
    dropped: Option<std::ops::Range<u64>>,
    failing: Option<Operation>,
}

impl Ram {
    fn word(&mut self, at: usize) -> &mut [u8] {
        &mut self.bytes[at..at + 8]
    }

    fn fails(&self, operation: Operation, offset: u64) -> Result<(), MediumError> {
        let is_failing = self.failing == Some(operation);
        if is_failing { Err(MediumError { operation, offset, errno: 5 }) } else { Ok(()) }
    }
}

impl Medium for Ram {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let at = usize::try_from(offset).unwrap();
        into.copy_from_slice(&self.bytes[at..at + into.len()]);
        self.fails(Operation::Read, offset)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        self.fails(Operation::Write, offset)?;
        if !self.dropped.as_ref().is_some_and(|dropped| dropped.contains(&offset)) {
            let at = usize::try_from(offset).unwrap();
            self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), MediumError> {
        self.write(offset, &vec![0; usize::try_from(len).unwrap()])
    }

    fn flush(&mut self, offset: u64, _len: u64) -> Result<(), MediumError> {
        self.fails(Operation::Flush, offset)
    }
}

type Node = MappedNode<Ram>;

fn open(medium: Ram, repair: Repair) -> Result<(Node, Opened), OpenError> {
    let spec = mapped_spec(Class::Shared, Services::MIGRATION, "damage");
    MappedNode::open(medium, NodeId::ONE, spec, repair, Metadata::from_heap)
}

fn refused(medium: &Ram) -> OpenError {
    let summary = Summary::read(medium);
    let error = open(medium.clone(), Repair::Refuse).map(|_| ()).unwrap_err();
    assert!(!error.to_string().is_empty());
    if !matches!(error, OpenError::Record { .. } | OpenError::Overlap { .. }) {
        assert_eq!(summary, Err(error.clone()));
    }
    error
}

/// A closed node with three pages, a block of four frames, and two frames handed over.
fn medium() -> Ram {
    let mut ram = Ram { bytes: vec![0; SIZE], ..Ram::default() };
    Node::format(&mut ram, [5; 16], PAGE_SIZE, Overwrite::No).unwrap();
    assert_eq!(Node::format(&mut ram, [6; 16], PAGE_SIZE, Overwrite::No), Err(OpenError::AlreadyFormatted));
    let (mut node, opened) = open(ram, Repair::Refuse).unwrap();
    assert_eq!(opened, Opened::default());
    for seed in 0..3 {
        node.demote(DomainId::ROOT, &page_with_noise(seed, 256)).unwrap();
    }
    node.alloc(DomainId::ROOT, Order::new(2).unwrap()).unwrap();
    let block = node.alloc(DomainId::ROOT, Order::new(1).unwrap()).unwrap();
    node.hand_over(block, PeerId(4)).unwrap();
    let summary = Summary::read(node.medium()).unwrap();
    assert!(summary.is_open && summary.used.0 == 9, "{summary:?}");
    let ram = node.close().unwrap();
    let summary = Summary::read(&ram).unwrap();
    assert!(!summary.is_open && summary.used.0 == 9 && summary.capacity.0 == 61 && summary.uuid == [5; 16]);
    ram
}

#[test]
fn a_medium_with_nothing_on_it_another_version_or_too_short_is_refused_with_the_reason() {
    let good = medium();
    assert_eq!(refused(&Ram { bytes: vec![0; SIZE], ..Ram::default() }), OpenError::NotFormatted);
    assert_eq!(refused(&Ram { bytes: vec![0x77; SIZE], ..Ram::default() }), OpenError::NotFormatted);
    assert_eq!(refused(&Ram { bytes: vec![0; 512], ..Ram::default() }), OpenError::NotFormatted);
    for slot in [0, PAGE_BYTES] {
        let mut newer = good.clone();
        newer.bytes[slot + 8] = 2;
        assert_eq!(refused(&newer), OpenError::Version { found: 2, known: 1 });
        assert_eq!(
            Node::format(&mut newer, [6; 16], PAGE_SIZE, Overwrite::No),
            Err(OpenError::AlreadyFormatted),
            "nor is it overwritten"
        );
    }
    let mut short = good.clone();
    short.bytes.truncate(SIZE - PAGE_BYTES);
    assert_eq!(refused(&short), OpenError::Truncated { size: SIZE as u64, found: (SIZE - PAGE_BYTES) as u64 });
    let mut tiny = Ram { bytes: vec![0; 3 * PAGE_BYTES], ..Ram::default() };
    let too_small = Err(OpenError::Size { bytes: 3 * PAGE_SIZE });
    assert_eq!(Node::format(&mut tiny, [6; 16], PAGE_SIZE, Overwrite::No), too_small);
}

#[test]
fn one_torn_slot_is_repaired_and_two_are_an_error() {
    let good = medium();
    for slot in [0, PAGE_BYTES] {
        let mut torn = good.clone();
        torn.word(slot + 72).fill(0xff);
        let (node, opened) = open(torn.clone(), Repair::Refuse).unwrap();
        assert!(opened.is_superblock_repaired);
        assert_eq!(node.handles().count(), 5);
        let (node, opened) = open(node.close().unwrap(), Repair::Refuse).unwrap();
        assert!(!opened.is_superblock_repaired && !opened.was_left_open);
        assert_eq!(node.handles().count(), 5);
        torn.word(PAGE_BYTES - slot + 72).fill(0xff);
        assert!(matches!(refused(&torn), OpenError::Superblock { .. }));
    }
    // Two slots that are both whole, of two nodes.
    let mut other = medium();
    Node::format(&mut other, [6; 16], PAGE_SIZE, Overwrite::Yes).unwrap();
    let mut both = good;
    both.bytes[..PAGE_BYTES].copy_from_slice(&other.bytes[..PAGE_BYTES]);
    assert!(matches!(refused(&both), OpenError::Superblock { .. }));
}

/// The blocks of [`medium`], as first frame and frames: three pages, four frames, two.
fn blocks(medium: &Ram) -> Vec<(u32, u32)> {
    let (node, _) = open(medium.clone(), Repair::Refuse).unwrap();
    let block = |(handle, order): (spmem_node::Handle, Order)| {
        (u32::try_from(handle.raw() & 0xffff_ffff).unwrap(), 1 << order.get())
    };
    node.handles().map(block).collect()
}

fn block_of(blocks: &[(u32, u32)], frames: u32) -> u32 {
    blocks.iter().find(|(_, count)| *count == frames).unwrap().0
}

#[test]
fn a_damaged_record_is_refused_or_what_it_may_speak_of_taken_out_of_use() {
    let good = medium();
    let blocks = blocks(&good);
    let inside = block_of(&blocks, 4) + 1;
    // What a block that began there may have reached, up to the next that is known.
    let reach = |frame: u32| {
        let next = blocks.iter().map(|(first, _)| *first).filter(|first| *first > frame).min().unwrap_or(61);
        frame..(frame + (1 << frame.trailing_zeros().min(10))).min(next).min(61)
    };
    let firsts = [block_of(&blocks, 1), block_of(&blocks, 4), block_of(&blocks, 2), 48, 1]
        .map(|frame| (frame, reach(frame)));
    for (frame, retired) in firsts.into_iter().chain([(inside, inside..inside + 1)]) {
        let mut damaged = good.clone();
        damaged.word(RECORDS + frame as usize * 16 + 8)[2] ^= 0x40;
        let first = FrameNumber(frame);
        assert_eq!(refused(&damaged), OpenError::Record { frame: first, count: 1 });
        let (node, opened) = open(damaged, Repair::Retire).unwrap();
        let retired: Vec<FrameNumber> = retired.map(FrameNumber).collect();
        assert_eq!(opened.retired, retired, "frame {frame}");
        let (node, opened) = open(node.close().unwrap(), Repair::Refuse).unwrap();
        assert_eq!(opened.retired, []);
        let stats = node.frames().mm().stats(NodeId::ONE).unwrap();
        // A frame inside a block that is in use goes out of use with the block.
        let is_inside = frame == inside;
        assert_eq!(stats.poisoned.0, if is_inside { 0 } else { retired.len() as u64 });
        assert_eq!(stats.capacity.0, stats.used.0 + stats.free.0 + stats.poisoned.0);
    }
}

#[test]
fn records_that_overlap_are_refused() {
    let mut medium = medium();
    let blocks = blocks(&medium);
    let (inside, page) = (block_of(&blocks, 4) + 1, block_of(&blocks, 1));
    let at = RECORDS + inside as usize * 16 + 8;
    // As if a page had moved there: the record is another frame's, which is seen.
    let copy = medium.word(RECORDS + page as usize * 16 + 8).to_vec();
    medium.word(at).copy_from_slice(&copy);
    assert!(matches!(refused(&medium), OpenError::Record { frame, .. } if frame.0 == inside));
    // A right record within a block: written by a medium on which that block is not in use.
    let mut other = Ram { bytes: vec![0; SIZE], ..Ram::default() };
    Node::format(&mut other, [5; 16], PAGE_SIZE, Overwrite::No).unwrap();
    let (mut node, _) = open(other, Repair::Refuse).unwrap();
    for seed in 0..61 {
        node.demote(DomainId::ROOT, &page_with_noise(seed, 9)).unwrap();
    }
    let mut other = node.close().unwrap();
    medium.word(at).copy_from_slice(other.word(at));
    assert!(matches!(refused(&medium), OpenError::Overlap { frame, .. } if frame.0 == inside));
}

#[test]
fn a_medium_that_drops_writes_or_fails_gives_no_page_away_and_its_frames_go_out_of_use() {
    let (node, _) = open(medium(), Repair::Refuse).unwrap();
    let mut ram = node.close().unwrap();
    ram.dropped = Some(3 * PAGE_SIZE..SIZE as u64);
    let (mut node, _) = open(ram, Repair::Refuse).unwrap();
    let page = page_with_noise(77, 256);
    assert!(matches!(node.demote(DomainId::ROOT, &page), Err(Refused::Corrupt(_))));
    assert_eq!(node.frames().mm().stats(NodeId::ONE).unwrap().poisoned.0, 3, "one for each try");
    let mut ram = node.close().unwrap();
    ram.dropped = None;
    let (mut node, _) = open(ram.clone(), Repair::Refuse).unwrap();
    assert_eq!(node.frames().mm().stats(NodeId::ONE).unwrap().poisoned.0, 3, "and they stay so");
    node.demote(DomainId::ROOT, &page).unwrap();
    drop(node);
    for operation in [Operation::Read, Operation::Write, Operation::Flush] {
        let failing = Ram { failing: Some(operation), ..ram.clone() };
        assert!(
            matches!(open(failing, Repair::Refuse), Err(OpenError::Medium(cause)) if cause.operation == operation)
        );
    }
}

#[test]
fn a_handle_from_before_a_restart_names_nothing_that_came_later() {
    let mut medium = medium();
    let mut gone: Vec<spmem_node::Handle> = Vec::new();
    for round in 0..4 {
        let (mut node, _) = open(medium, Repair::Refuse).unwrap();
        let mut new = Vec::new();
        while let Ok(handle) = node.demote(DomainId::ROOT, &page_with_noise(round, 64)) {
            new.push(handle);
        }
        assert!(new.len() >= 52, "{} pages", new.len());
        for &handle in &gone {
            let mut page = [1; PAGE_BYTES];
            assert!(node.load(handle, &mut page).is_err(), "round {round}: {handle:?} names another page");
            assert_eq!(page, [0; PAGE_BYTES]);
        }
        new.iter().for_each(|&handle| node.release(handle).unwrap());
        gone.append(&mut new);
        medium = node.close().unwrap();
    }
}
