//! What a crash leaves: every step of a persistent node's life is recorded, and the medium made as a crash after that step may
//! leave it. Each is opened, and every byte checked.
//!
//! The crash: what was flushed is there; of each cache line that was not, the stores up to some point are, in order (x86
//! keeps the order within a line, not among lines). Stores are words. All combinations are tried where they are few;
//! random ones, and both extremes, where not.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use spmem_core::frames::Metadata;
use spmem_core::node::{Class, Services};
use spmem_core::units::{DomainId, FrameCount, NodeId, Order, PAGE_SIZE};
use spmem_node::mapped::{
    MappedNode, Medium, MediumError, OpenError, Overwrite, Peer, PeerId, Refused, Repair, mapped_spec,
};
use spmem_node::{Backend, Handle, PAGE_BYTES, Page};

use super::backend::page_with_noise;

const LINE: u64 = 64;
/// Combinations of a crash that are tried.
const MOST: u64 = 100;
const FRAMES: u64 = 12;
const SIZE: u64 = (3 + FRAMES) * PAGE_SIZE;
const DATA: u64 = 3 * PAGE_SIZE;

/// What was done to a medium.
enum Step {
    Word(u64, u64),
    Flush(u64, u64),
}

/// A medium in memory whose steps are kept.
#[derive(Clone)]
struct Recorder(Rc<RefCell<Recording>>);

struct Recording {
    /// What is read: all stores.
    bytes: Vec<u8>,
    steps: Vec<Step>,
}

impl Recorder {
    fn new(bytes: Vec<u8>) -> Self {
        Self(Rc::new(RefCell::new(Recording { bytes, steps: Vec::new() })))
    }

    fn steps(&self) -> usize {
        self.0.borrow().steps.len()
    }
}

impl Medium for Recorder {
    fn len(&self) -> u64 {
        self.0.borrow().bytes.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let offset = usize::try_from(offset).unwrap();
        into.copy_from_slice(&self.0.borrow().bytes[offset..offset + into.len()]);
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        let mut recording = self.0.borrow_mut();
        for (at, word) in (offset..).step_by(8).zip(bytes.as_chunks::<8>().0) {
            let place = usize::try_from(at).unwrap();
            recording.bytes[place..place + 8].copy_from_slice(word);
            recording.steps.push(Step::Word(at, u64::from_le_bytes(*word)));
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), MediumError> {
        self.write(offset, &vec![0; usize::try_from(len).unwrap()])
    }

    fn flush(&mut self, offset: u64, len: u64) -> Result<(), MediumError> {
        self.0.borrow_mut().steps.push(Step::Flush(offset, len));
        Ok(())
    }
}

/// Media that crashes leave, built up step by step.
struct Crashes {
    durable: Vec<u8>,
    /// By line: the stores since it was flushed.
    pending: BTreeMap<u64, Vec<(u64, u64)>>,
    random: u64,
}

impl Crashes {
    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Word(at, word) => self.pending.entry(at / LINE).or_default().push((at, word)),
            Step::Flush(offset, len) => {
                let lines = offset / LINE..(offset + len).div_ceil(LINE);
                let flushed: Vec<u64> = self.pending.range(lines).map(|(&line, _)| line).collect();
                for line in flushed {
                    for (at, word) in self.pending.remove(&line).unwrap() {
                        put(&mut self.durable, at, word);
                    }
                }
            }
        }
    }

    fn combinations(&self) -> u64 {
        self.pending.values().fold(1, |all: u64, stores| all.saturating_mul(stores.len() as u64 + 1))
    }

    /// Calls `check` with every medium that a crash now may leave, or some of them.
    fn each(&mut self, mut check: impl FnMut(Vec<u8>)) {
        let all = self.combinations();
        let tried = all.min(MOST);
        for number in 0..tried {
            let mut medium = self.durable.clone();
            let mut rest = number;
            for stores in self.pending.values() {
                let ways = stores.len() as u64 + 1;
                let kept = match number {
                    _ if all <= MOST => {
                        let kept = rest % ways;
                        rest /= ways;
                        kept
                    }
                    0 => 0,
                    1 => ways - 1,
                    _ => {
                        self.random ^= self.random << 13;
                        self.random ^= self.random >> 7;
                        self.random ^= self.random << 17;
                        self.random % ways
                    }
                };
                for &(at, word) in &stores[..usize::try_from(kept).unwrap()] {
                    put(&mut medium, at, word);
                }
            }
            check(medium);
        }
    }
}

fn put(bytes: &mut [u8], at: u64, word: u64) {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
}

type Node = MappedNode<Recorder>;

fn open(medium: Recorder) -> Result<Node, OpenError> {
    let spec = mapped_spec(Class::Shared, Services::MIGRATION, "crash");
    MappedNode::open(medium, NodeId::ONE, spec, Repair::Refuse, Metadata::from_heap).map(|(node, _)| node)
}

/// What must be on the medium when the steps up to some number have been done.
#[derive(Clone, Default)]
struct Expected {
    /// Pages, whole.
    pages: BTreeMap<u64, Page>,
    /// One of these may be there, or not.
    in_flight: Option<(u64, Page)>,
    /// Who owns the block of two frames, one of these; none before it is there.
    owners: Vec<PeerId>,
}

/// A life: what it does, and after how many steps what is expected.
struct Life {
    /// The medium before the first step.
    start: Vec<u8>,
    medium: Recorder,
    node: Node,
    expected: Expected,
    /// From that step on.
    timeline: Vec<(usize, Expected)>,
}

impl Life {
    fn now(&mut self) {
        self.timeline.push((self.medium.steps(), self.expected.clone()));
    }

    fn demote(&mut self, seed: u64) -> Handle {
        let page = page_with_noise(seed, 256);
        // Which handle it will have is known from a medium that did the same before: the lowest free frame, the next generation.
        self.expected.in_flight = Some((0, page));
        self.now();
        let handle = self.node.demote(DomainId::ROOT, &page).unwrap();
        self.expected.in_flight = None;
        self.expected.pages.insert(handle.raw(), page);
        self.now();
        handle
    }

    fn release(&mut self, handle: Handle) {
        let page = self.expected.pages.remove(&handle.raw()).unwrap();
        self.expected.in_flight = Some((handle.raw(), page));
        self.now();
        self.node.release(handle).unwrap();
        self.expected.in_flight = None;
        self.now();
    }
}

/// Opens a medium and holds it against what must be there.
fn check(medium: Vec<u8>, expected: &Expected) {
    let recorder = Recorder::new(medium);
    let mut node = open(recorder.clone()).unwrap_or_else(|error| panic!("it opens after any crash: {error}"));
    let mut left = expected.pages.clone();
    let mut blocks = 0;
    let mut back = [0; PAGE_BYTES];
    for (handle, order) in node.handles().collect::<Vec<_>>() {
        if order != Order::ZERO {
            blocks += 1;
            let owners: Vec<PeerId> = Peer::open(recorder.clone(), PeerId(7))
                .unwrap()
                .blocks()
                .unwrap()
                .iter()
                .filter(|block| block.order != Order::ZERO)
                .map(|block| block.owner)
                .collect();
            assert!(
                owners.len() == 1 && expected.owners.contains(&owners[0]),
                "{owners:?}, {:?}",
                expected.owners
            );
            continue;
        }
        node.load(handle, &mut back).expect("what is recorded is whole");
        match left.remove(&handle.raw()) {
            Some(page) => assert!(back == page, "every byte"),
            None => {
                assert!(expected.in_flight.is_some_and(|(_, page)| back == page), "what was in flight, or nothing")
            }
        }
    }
    assert!(left.is_empty(), "{} pages are lost", left.len());
    assert!(blocks == 1 || (blocks == 0 && expected.owners.len() < 2), "the block is there");
    // It works: room is what is not in use, and what is given is zero.
    let used = node.usage().used.frames_floor().0;
    let room = FRAMES - used;
    for _ in 0..room {
        let handle = node.alloc(DomainId::ROOT, Order::ZERO).expect("a frame that nobody has");
        node.read(handle, 0, &mut back).unwrap();
        assert!(back == [0; PAGE_BYTES], "every byte is zero (R21)");
    }
    assert!(matches!(node.alloc(DomainId::ROOT, Order::ZERO), Err(Refused::Alloc(_))));
    assert_eq!(node.frames().mm().stats(NodeId::ONE).unwrap().free, FrameCount(0));
}

fn live() -> Life {
    // Not zero: what was there before must not show.
    let mut medium = Recorder::new(vec![0xa5; usize::try_from(SIZE).unwrap()]);
    Node::format(&mut medium, [3; 16], PAGE_SIZE, Overwrite::No).unwrap();
    let start = medium.0.borrow().bytes.clone();
    let medium = Recorder::new(start.clone());
    let node = open(medium.clone()).unwrap();
    let mut life = Life { start, medium, node, expected: Expected::default(), timeline: Vec::new() };
    life.now();
    let first = life.demote(1);
    let second = life.demote(2);
    life.release(first);
    life.demote(3);
    let (component, one) = (PeerId::COMPONENT, PeerId(1));
    life.expected.owners = vec![component];
    life.now();
    let block = life.node.alloc(DomainId::ROOT, Order::new(1).unwrap()).unwrap();
    let frame = spmem_core::units::FrameNumber(u32::try_from(block.raw() & 0xffff_ffff).unwrap());
    let pair = |life: &mut Life, owners: [PeerId; 2], step: &mut dyn FnMut(&mut Node)| {
        life.expected.owners = owners.to_vec();
        life.now();
        step(&mut life.node);
        life.expected.owners = vec![owners[1], owners[1]];
        life.now();
    };
    pair(&mut life, [component; 2], &mut |node| node.write(block, 0, &page_with_noise(4, 256)).unwrap());
    pair(&mut life, [component, one], &mut |node| node.hand_over(block, one).unwrap());
    let mut peer = Peer::open(life.medium.clone(), one).unwrap();
    pair(&mut life, [one; 2], &mut |_| peer.accept(frame).unwrap());
    pair(&mut life, [one, component], &mut |_| peer.hand_over(frame, component).unwrap());
    pair(&mut life, [component; 2], &mut |node| node.accept(block).unwrap());
    life.release(second);
    life
}

#[test]
fn after_a_crash_at_any_step_everything_is_whole_and_owned_once() {
    let life = live();
    // The life goes on to its end: closed.
    let Life { start, medium, node, expected, mut timeline } = life;
    node.close().unwrap();
    timeline.push((usize::MAX, expected));
    let recording = medium.0.borrow();
    let mut crashes = Crashes { durable: start, pending: BTreeMap::new(), random: 0x5eed };
    let (mut media, mut step_of) = (0, 0);
    for (number, step) in recording.steps.iter().enumerate() {
        while timeline[step_of + 1].0 <= number {
            step_of += 1;
        }
        crashes.apply(step);
        // Within a page's data each word would be a crash of its own: every sixty-fourth is one.
        let is_data = matches!(step, Step::Word(at, _) if *at >= DATA);
        if is_data && number % 64 != 0 {
            continue;
        }
        crashes.each(|image| {
            media += 1;
            check(image, &timeline[step_of].1);
        });
    }
    println!("{} steps, {media} media", recording.steps.len());
    assert!(media > 1000, "{media}");
}

#[test]
fn a_format_that_is_cut_short_leaves_nothing_or_a_node() {
    let before = vec![0xa5; usize::try_from(SIZE).unwrap()];
    let mut medium = Recorder::new(before.clone());
    Node::format(&mut medium, [3; 16], PAGE_SIZE, Overwrite::No).unwrap();
    let mut crashes = Crashes { durable: before, pending: BTreeMap::new(), random: 0x5eed };
    let (mut nodes, mut nothing) = (0, 0);
    for step in &medium.0.borrow().steps {
        crashes.apply(step);
        crashes.each(|image| match open(Recorder::new(image)) {
            Ok(node) => {
                nodes += 1;
                assert_eq!((node.usage().used.0, node.handles().count()), (0, 0));
            }
            Err(OpenError::NotFormatted | OpenError::Superblock { .. }) => nothing += 1,
            Err(other) => panic!("{other}"),
        });
    }
    assert!(nodes > 10 && nothing > 100, "{nodes} {nothing}");
}
