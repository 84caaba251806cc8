//! In a guest of `cargo xtask vm`: a persistent node that outlives the guest, by an orderly end or a power cut.
//!
//! The node lies in a file where something is mounted, else on the dax device. What is done to it is a sequence that its numbers
//! alone decide ([`Model`]): a block is stored, of one page or several, or one is released. How many steps are done is told to the
//! host, which cuts the power at some of them. The next boot opens the node, holds it against the sequence (all that was told
//! is there, whole, and nothing else but what came next, one after the other), and goes on. Called by
//! `cargo xtask vm-test`, boot by boot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use spmem_core::frames::Metadata;
use spmem_core::node::{Class, Services};
use spmem_core::units::{DomainId, FrameNumber, NodeId, Order, PAGE_SIZE};
use spmem_node::machine::{DaxMode, Machine, Overrides};
use spmem_node::mapped::{
    MappedNode, OpenError, Opened, Overwrite, PeerId, Refused, Repair, Summary, mapped_spec,
};
use spmem_node::{Backend, Handle, PAGE_BYTES, Page, dax, file};
use spmem_sys::region::{Access, Region};

use super::vm_backends::backend::page_with_noise;
use super::vm_backends::{MOUNTED, open};

/// Of the file; of a device as much as can be mapped.
const BYTES: u64 = 1 << 20;
/// Blocks that are kept.
const MOST: usize = 50;
/// Steps from one telling to the next.
const TELL: u64 = 16;
/// Whoever was handed a block before the first step.
const PEER: PeerId = PeerId(3);
/// Told before a node is made, and when it was closed.
const MAKING: &str = "making";
const CLOSED: &str = "closed";

type Node = MappedNode<Region>;

/// How far to go.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Steps to do.
    #[arg(long)]
    steps: u64,
    /// Where it is told what was done; and what an earlier boot has told.
    #[arg(long)]
    told: String,
}

/// Runs it.
///
/// # Errors
/// The node is not what it should be.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let said = fs::read_to_string(&options.told).unwrap_or_default();
    // A line that the cut has left without its end says nothing.
    let whole = said.rfind('\n').map_or("", |end| &said[..end]);
    let is_closed = whole.lines().next_back() == Some(CLOSED);
    let steps = whole.lines().filter_map(|line| line.parse().ok()).next_back();
    let mut told = OpenOptions::new().append(true).create(true).open(&options.told).context("cannot tell")?;
    let region = region()?;
    let durability = region.durability();
    let (mut node, mut life) = match steps {
        Some(steps) => recover(region, steps, is_closed)?,
        None => make(region, &mut told, whole.lines().any(|line| line == MAKING))?,
    };
    check_rest(&mut node)?;
    let start = life.model.steps;
    tell(&mut told, &start.to_string())?;
    for _ in 0..options.steps {
        life.step(&mut node)?;
        if life.model.steps.is_multiple_of(TELL) {
            tell(&mut told, &life.model.steps.to_string())?;
        }
    }
    tell(&mut told, &life.model.steps.to_string())?;
    node.close()?;
    tell(&mut told, CLOSED)?;
    println!("from step {start} to {}, durable by {durability:?}", life.model.steps);
    Ok(())
}

/// The host has it when this returns: the share has no cache.
fn tell(told: &mut File, line: &str) -> anyhow::Result<()> {
    told.write_all(format!("{line}\n").as_bytes()).context("cannot tell")
}

fn region() -> anyhow::Result<Region> {
    let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some(MOUNTED)) {
        let path = format!("{MOUNTED}/node");
        let is_there = Path::new(&path).exists();
        let fd = open(&path)?;
        return Ok(if is_there && fd.size()? >= BYTES { file::region(fd)? } else { file::create(fd, BYTES)? });
    }
    let machine = Machine::read(Path::new("/"), &Overrides::new());
    let device = machine.dax.into_iter().find(|dax| dax.mode == DaxMode::Devdax).context("no node can be here")?;
    let align = device.align_bytes.context("no align")?;
    let told = dax::Device { bytes: device.bytes, align, is_persistent: device.is_persistent };
    Ok(dax::region(open(&format!("/dev/{}", device.name))?, &told, BYTES.max(align), Access::ReadWrite)?)
}

fn open_node(region: Region) -> Result<(Node, Opened), OpenError> {
    let spec = mapped_spec(Class::Shared, Services::MIGRATION, "reboots");
    Node::open(region, NodeId::ONE, spec, Repair::Refuse, Metadata::from_heap)
}

/// A new node: one frame out of use, one block a peer's. Where the power was cut while one was made, that is refused, or a node
/// of which every block is whole.
fn make(mut region: Region, told: &mut File, was_cut: bool) -> anyhow::Result<(Node, Life)> {
    if was_cut {
        match open_node(region) {
            Ok((node, opened)) => {
                println!("what the cut has left of a new node opens: {opened:?}");
                for (handle, order) in node.handles().filter(|(_, order)| *order == Order::ZERO) {
                    let mut page = [0; PAGE_BYTES];
                    node.load(handle, &mut page).with_context(|| format!("a block of order {}", order.get()))?;
                }
            }
            Err(error @ (OpenError::NotFormatted | OpenError::Superblock { .. })) => {
                println!("what the cut has left of a new node is refused: {error}");
            }
            Err(error) => bail!("what the cut has left of a new node: {error}"),
        }
        region = self::region()?;
    }
    tell(told, MAKING)?;
    Node::format(&mut region, [5; 16], PAGE_SIZE, Overwrite::Yes)?;
    let (mut node, _) = open_node(region)?;
    let hurt = node.demote(DomainId::ROOT, &page_with_noise(1, 256))?;
    node.poison(FrameNumber(u32::try_from(hurt.raw() & 0xffff_ffff)?))?;
    node.release(hurt)?;
    let block = node.alloc(DomainId::ROOT, Order::new(1)?)?;
    node.hand_over(block, PEER)?;
    Ok((node, Life::default()))
}

/// Opens what a boot has left that had told of so many steps, and finds how many there were.
fn recover(region: Region, told: u64, is_closed: bool) -> anyhow::Result<(Node, Life)> {
    let summary = Summary::read(&region)?;
    let (mut node, opened) = open_node(region).context("it opens after any boot")?;
    ensure!(opened.was_left_open != is_closed, "closed before: {is_closed}; found: {opened:?}");
    let stats = node.frames().mm().stats(NodeId::ONE).context("no such node")?;
    ensure!(
        (summary.used, summary.poisoned, summary.is_open) == (stats.used, stats.poisoned, !is_closed),
        "{summary:?} is told, {stats:?} is so"
    );
    ensure!(stats.poisoned.0 == 1, "{} frames are out of use, not the one", stats.poisoned.0);

    let known: BTreeMap<[u8; 8], u64> = (0..told + TELL).map(|key| (word_of(&contents(key)), key)).collect();
    let (mut found, mut torn, mut peers) = (BTreeMap::new(), Vec::new(), 0);
    for (handle, order) in node.handles().collect::<Vec<_>>() {
        match pages_of(&node, handle, order) {
            Ok(pages) => match known.get(&word_of(&pages)) {
                Some(&key) if pages == contents(key) => {
                    ensure!(found.insert(key, handle).is_none(), "what step {key} stored is there twice");
                }
                _ => torn.push((handle, order)),
            },
            Err(Refused::HandedOver { to: PEER }) => peers += 1,
            Err(error) => bail!("a block of order {} cannot be read: {error}", order.get()),
        }
    }
    ensure!(peers == 1, "{peers} blocks are the peer's, not the one");
    let mut model = Model::after(told);
    while model.blocks() != found.keys().copied().collect() {
        ensure!(
            model.steps < told + TELL && !is_closed,
            "the blocks of no step from {told} on: {:?}, torn: {torn:?}",
            found.keys()
        );
        model.step();
    }
    println!("{told} steps were told, {} were done, {} blocks, {opened:?}", model.steps, found.len());
    if let Some((handle, order)) = torn.pop() {
        check_torn(&node, handle, order, &model)?;
        ensure!(torn.is_empty(), "more than one block is torn: {torn:?}");
        node.release(handle)?;
    }
    Ok((node, Life { model, handles: found }))
}

/// Only what the next step was to store may be there in part, and only if it is written in place: of its words each, or zero.
fn check_torn(node: &Node, handle: Handle, order: Order, model: &Model) -> anyhow::Result<()> {
    let next = model.clone().step();
    ensure!(
        next == Step::Store(model.steps) && order == order_of(model.steps),
        "a block of order {order:?} is torn"
    );
    ensure!(order != Order::ZERO, "a page is torn");
    let (seen, right) = (pages_of(node, handle, order)?, contents(model.steps));
    let pairs = seen.as_flattened().as_chunks::<8>().0.iter().zip(right.as_flattened().as_chunks::<8>().0);
    let words = pairs.len();
    let wrong = pairs.clone().filter(|(seen, right)| seen != right && **seen != [0; 8]).count();
    let written = pairs.filter(|(seen, right)| seen == right).count();
    println!("on its way: a block of order {}, {written} of its {words} words written", order.get());
    ensure!(wrong == 0, "{wrong} words are neither zero nor what was written");
    Ok(())
}

/// What no block has is free, all of it, and comes as zeros (R21).
fn check_rest(node: &mut Node) -> anyhow::Result<()> {
    let usage = node.usage();
    let rest = (usage.capacity.0 - usage.used.0) / PAGE_SIZE - 1;
    let mut taken = Vec::new();
    let mut back = [0; PAGE_BYTES];
    loop {
        match node.alloc(DomainId::ROOT, Order::ZERO) {
            Ok(handle) => {
                node.read(handle, 0, &mut back)?;
                ensure!(back == [0; PAGE_BYTES], "what was free comes with bytes of another");
                taken.push(handle);
            }
            Err(Refused::Alloc(_)) => break,
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(taken.len() as u64 == rest, "{} frames are free, not {rest}", taken.len());
    taken.into_iter().try_for_each(|handle| node.release(handle))?;
    println!("{rest} frames are free and come as zeros");
    Ok(())
}

/// What a step does; a block is named by the step that stored it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Store(u64),
    Release(u64),
}

/// What is on the node after so many steps.
#[derive(Clone, Default)]
struct Model {
    steps: u64,
    live: Vec<u64>,
}

impl Model {
    fn after(steps: u64) -> Self {
        let mut model = Self::default();
        while model.steps < steps {
            model.step();
        }
        model
    }

    fn step(&mut self) -> Step {
        let key = self.steps;
        let random = random(key);
        self.steps += 1;
        if self.live.len() >= MOST || (random.is_multiple_of(3) && !self.live.is_empty()) {
            let at = usize::try_from(random >> 32).unwrap_or(0) % self.live.len();
            return Step::Release(self.live.swap_remove(at));
        }
        self.live.push(key);
        Step::Store(key)
    }

    fn blocks(&self) -> BTreeSet<u64> {
        self.live.iter().copied().collect()
    }
}

/// The sequence, and where on the node its blocks are.
#[derive(Default)]
struct Life {
    model: Model,
    handles: BTreeMap<u64, Handle>,
}

impl Life {
    fn step(&mut self, node: &mut Node) -> anyhow::Result<()> {
        match self.model.step() {
            Step::Release(key) => node.release(self.handles.remove(&key).context("it is not there")?)?,
            Step::Store(key) => {
                let (order, pages) = (order_of(key), contents(key));
                let handle = if order == Order::ZERO {
                    node.demote(DomainId::ROOT, &pages[0])?
                } else {
                    let handle = node.alloc(DomainId::ROOT, order)?;
                    node.write(handle, 0, pages.as_flattened())?;
                    node.flush(handle)?;
                    handle
                };
                self.handles.insert(key, handle);
            }
        }
        Ok(())
    }
}

/// Of a step: splitmix64.
fn random(key: u64) -> u64 {
    let mut word = key.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Most blocks are pages that are sealed, every sixth is written in place.
fn order_of(key: u64) -> Order {
    let random = random(key) >> 8;
    let order = if random.is_multiple_of(6) { 1 + random / 6 % 2 } else { 0 };
    u8::try_from(order).ok().and_then(|order| Order::new(order).ok()).unwrap_or(Order::ZERO)
}

fn contents(key: u64) -> Vec<Page> {
    (0..order_of(key).frames().0).map(|page| page_with_noise(key * 8 + page + 100, 256)).collect()
}

/// By which a block is found.
fn word_of(pages: &[Page]) -> [u8; 8] {
    *pages[0].first_chunk().expect("a page has more than a word")
}

fn pages_of(node: &Node, handle: Handle, order: Order) -> Result<Vec<Page>, Refused> {
    let mut pages = vec![[0; PAGE_BYTES]; usize::try_from(order.frames().0).unwrap_or(1)];
    if order == Order::ZERO {
        node.load(handle, &mut pages[0])?;
    } else {
        node.read(handle, 0, pages.as_flattened_mut())?;
    }
    Ok(pages)
}
