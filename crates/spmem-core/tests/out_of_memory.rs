//! R3, R5, R12, R14: where the heap has nothing left for the records of blocks that move, of nodes, domains, distances and
//! grants, or for lists, the error says so, and nothing has changed and nothing is lost. Every allocation that these make fails here once.
//!
//! Longer than 500 lines: a process has one heap, so all tests of one that fails are in one file.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "a global allocator that fails when told is the only way to make the heap fail")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Write;

use spmem_core::distance::{DistanceError, REMOTE};
use spmem_core::domain::{DomainError, MAX_DEPTH};
use spmem_core::frames::{FrameRange, FramesError, Metadata};
use spmem_core::grant::{Grant, GrantError, Rights, Terms};
use spmem_core::migrate::{Mover, Stay};
use spmem_core::mm::{AllocError, Block, MemoryManager, NodeStats};
use spmem_core::node::{Class, Guard, NodeError, NodeSpec, NodeType, Owner, Services};
use spmem_core::nodemask::NodeMask;
use spmem_core::page::Page;
use spmem_core::policy::{Flags, Mode, Policy};
use spmem_core::registry::Registry;
use spmem_core::tier::DRAM;
use spmem_core::units::{Bytes, DomainId, FrameCount, FrameNumber, NodeId, Order, Time};
use spmem_core::wall::{Mobility, Reason, Request};
use spmem_core::zero::Initial;

/// Gives what the system gives, but for what a test of the same thread lets fail.
struct Heap;

thread_local! {
    /// How many allocations of those that are to fail still succeed, and which are to: all, or those of one size. `None`: none.
    static FAILING: Cell<Option<(usize, Fails)>> = const { Cell::new(None) };
    static FAILED: Cell<usize> = const { Cell::new(0) };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fails {
    All,
    OfSize(usize),
}

fn must_fail(bytes: usize) -> bool {
    let Some((good, fails)) = FAILING.get() else { return false };
    if fails != Fails::All && fails != Fails::OfSize(bytes) {
        return false;
    }
    if good > 0 {
        FAILING.set(Some((good - 1, fails)));
        return false;
    }
    FAILED.set(FAILED.get() + 1);
    true
}

// SAFETY: either what `System` answers, whose contract the callers keep, or null, which an allocator may always answer. The
// cells of the thread are made at compile time and need no drop, so to look at them allocates nothing.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if must_fail(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller has it.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller has it; all that is given out is of `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if must_fail(bytes) {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller has it; all that is given out is of `System`.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static HEAP: Heap = Heap;

/// Does something while allocations fail, after the first `good` of them; how many did.
fn failing<T>(good: usize, fails: Fails, act: impl FnOnce() -> T) -> (T, usize) {
    FAILED.set(0);
    FAILING.set(Some((good, fails)));
    let result = act();
    FAILING.set(None);
    (result, FAILED.get())
}

/// The records of 4 MiB, 20 bits for each of 1024 frames: a size that no growing list has.
const RECORDS: Fails = Fails::OfSize(1024 * 20 / 8);
/// Frames of each node.
const FRAMES: u32 = 2 << 18;
const ALL: Services =
    Services::RECLAIM.union(Services::MIGRATION).union(Services::DEMOTION).union(Services::COMPACTION);

/// Node 0 is sysram, node 1 a slower SPM node, 2 GiB each.
struct Machine {
    mm: MemoryManager,
    owners: Vec<Owner>,
    demote: Grant,
}

/// All that must not change.
type Known = (Vec<NodeStats>, Vec<Vec<Page>>, Vec<[u64; 4]>, Vec<FrameCount>, Bytes);

impl Machine {
    fn new() -> Self {
        let mut mm = MemoryManager::new();
        let mut owners = Vec::new();
        for (node, node_type) in [(NodeId::ZERO, NodeType::Sysram), (NodeId::ONE, NodeType::Spm)] {
            let (class, guard) = (Class::Plain, Guard::Hard);
            let spec = NodeSpec { node_type, class, services: ALL, guard, owner: "test".into() };
            let owner = mm.registry_mut().register(node, spec.clone()).unwrap().owner;
            let count = FrameCount(u64::from(FRAMES));
            let lent = Metadata::from_heap(count).unwrap();
            mm.registry_mut().add_range(&owner, &spec, count, lent, Initial::Zero).unwrap();
            mm.registry_mut().set_abstract_distance(node, DRAM * (1 + 2 * u64::from(node.get()))).unwrap();
            owners.push(owner);
        }
        let demote = mm.registry_mut().grant(&[&owners[1]], Terms::new(Rights::DEMOTE_TO, Bytes::mib(1))).unwrap();
        let mut machine = Self { mm, owners, demote };
        // What a domain uses of a node is counted in memory of its own, which is there from now on.
        let block = machine.mm.alloc(&Request::of(DomainId::ROOT), Order::ZERO).unwrap();
        assert_eq!(block.first_frame(), FrameNumber(0));
        machine
    }

    fn movable() -> Request<'static> {
        Request { mobility: Mobility::Movable, ..Request::of(DomainId::ROOT) }
    }

    fn alloc(&mut self) -> Block {
        self.mm.alloc(&Self::movable(), Order::ZERO).unwrap()
    }

    /// Everything but the bytes that records take: those that were made before memory ran out stay for the next block.
    fn known(&self) -> Known {
        let nodes = [NodeId::ZERO, NodeId::ONE];
        let registry = self.mm.registry();
        let pages = |node| registry.pages(node).unwrap();
        (
            nodes.map(|node| NodeStats { metadata: Bytes(0), ..self.mm.stats(node).unwrap() }).to_vec(),
            nodes.map(|node| pages(node).iter().collect()).to_vec(),
            nodes.map(|node| pages(node).count_by_age()).to_vec(),
            nodes.map(|node| registry.used_by(DomainId::ROOT, node)).to_vec(),
            registry.grant_info(&self.demote).unwrap().used,
        )
    }
}

#[test]
fn a_block_whose_records_cannot_be_made_is_refused_and_the_next_one_is_given() {
    let mut failures = 0;
    loop {
        let mut machine = Machine::new();
        let (before, bytes) = (machine.known(), machine.mm.stats(NodeId::ZERO).unwrap().metadata);
        let mut pass = machine.mm.registry().admit(&Machine::movable()).unwrap();
        let (result, failed) = failing(failures, Fails::All, || machine.mm.alloc_with(&mut pass, Order::HUGE));
        if failed == 0 {
            machine.mm.free(result.unwrap()).unwrap();
            break;
        }
        let (node, cause) = (NodeId::ZERO, FramesError::NoMetadata);
        assert_eq!(result, Err(AllocError::Exhausted { node, cause }), "failure {failures}");
        assert_eq!(machine.known(), before, "failure {failures}");
        let block = machine.mm.alloc_with(&mut pass, Order::HUGE).unwrap();
        assert_eq!(block.first_frame(), FrameNumber(FRAMES - 512), "nothing of the node was lost");
        machine.mm.free(block).unwrap();
        let first = machine.mm.alloc(&Request::of(DomainId::ROOT), Order::ZERO).unwrap();
        assert_eq!(first.first_frame(), FrameNumber(1));
        assert!(machine.mm.stats(NodeId::ZERO).unwrap().metadata > bytes);
        failures += 1;
    }
    assert_eq!(failures, 4, "the list of tables, a table, its records, and the zero state");
}

#[test]
fn records_that_were_made_in_vain_go_with_their_range() {
    for failures in 0..6 {
        let mut machine = Machine::new();
        let bytes = machine.mm.stats(NodeId::ONE).unwrap().metadata;
        let terms = Terms::new(Rights::ALLOC, Bytes::mib(1));
        let grant = machine.mm.registry_mut().grant(&[&machine.owners[1]], terms).unwrap();
        let shown = [&grant];
        let request = Request { mobility: Mobility::Movable, ..Request::on(DomainId::ROOT, NodeId::ONE, &shown) };
        let mut pass = machine.mm.registry().admit(&request).unwrap();
        let (result, failed) = failing(failures, Fails::All, || machine.mm.alloc_with(&mut pass, Order::ZERO));
        assert!(result.is_err() && failed > 0);
        assert_eq!(machine.mm.registry().grant_info(&grant).unwrap().used, Bytes(0), "R12");
        let (range, _) = machine.mm.registry_mut().remove_range(&machine.owners[1], FrameNumber(0)).unwrap();
        let (words, states) = Metadata::size(range.count);
        let left = machine.mm.stats(NodeId::ONE).unwrap().metadata;
        assert_eq!(left.0 + (words * 8 + states) as u64, bytes.0, "failure {failures}");
    }
}

#[test]
fn a_block_that_cannot_be_recorded_where_it_goes_stays_where_it_is() {
    let mut machine = Machine::new();
    let block = machine.alloc();
    let before = machine.known();
    let isolated = machine.mm.take(&block, Mover::Holder(&[])).unwrap();
    let (planned, failed) = failing(0, RECORDS, || machine.mm.plan_demotion(isolated, &[&machine.demote]));
    let cause = AllocError::Exhausted { node: NodeId::ONE, cause: FramesError::NoMetadata };
    assert_eq!(planned, Err(Stay::NoRoom { cause }));
    assert!(failed > 0);
    assert_eq!(machine.known(), before, "the quota, too, is what it was (R12)");
    let isolated = machine.mm.take(&block, Mover::Holder(&[])).unwrap();
    let planned = machine.mm.plan_demotion(isolated, &[&machine.demote]).unwrap();
    let block = machine.mm.complete(planned, block).unwrap();
    assert_eq!(block.node(), NodeId::ONE);
    machine.mm.free(block).unwrap();
}

#[test]
fn a_run_that_cannot_be_emptied_for_want_of_records_keeps_its_blocks() {
    let mut machine = Machine::new();
    let blocks = [machine.alloc(), machine.alloc()];
    let before = machine.known();
    let run = FrameRange { first: FrameNumber(FRAMES - 1024), count: FrameCount(1024) };
    let (emptying, failed) = failing(0, RECORDS, || machine.mm.plan_emptying(NodeId::ZERO, run));
    let emptying = emptying.unwrap();
    assert!(emptying.moves.is_empty() && failed > 0);
    let mut stuck = emptying.stuck;
    stuck.sort_unstable();
    let mut places = blocks.each_ref().map(Block::first_frame);
    places.sort_unstable();
    assert_eq!(stuck, places);
    assert_eq!(machine.known(), before);
    let emptying = machine.mm.plan_emptying(NodeId::ZERO, run).unwrap();
    assert_eq!((emptying.moves.len(), emptying.stuck.len()), (2, 0));
}

#[test]
fn cold_blocks_that_cannot_be_listed_are_not_taken_and_nothing_ages() {
    let mut machine = Machine::new();
    let blocks = [machine.alloc(), machine.alloc(), machine.alloc()];
    let before = machine.known();
    let (taken, failed) = failing(0, Fails::All, || machine.mm.take_cold(NodeId::ZERO, usize::MAX));
    assert_eq!(taken, Err(FramesError::NoMetadata));
    assert_eq!((failed, machine.known()), (1, before));
    let taken = machine.mm.take_cold(NodeId::ZERO, usize::MAX).unwrap();
    assert_eq!(taken.len(), 3, "all can be had once there is memory");
    taken.into_iter().for_each(|isolated| machine.mm.put_back(isolated));
    blocks.into_iter().for_each(|block| machine.mm.free(block).unwrap());
}

#[test]
fn to_look_for_cold_blocks_takes_one_allocation() {
    let mut machine = Machine::new();
    let _blocks: Vec<Block> = (0..100).map(|_| machine.alloc()).collect();
    let (taken, failed) = failing(1, Fails::All, || machine.mm.take_cold(NodeId::ZERO, 64));
    assert_eq!((taken.unwrap().len(), failed), (64, 0));
}

#[test]
fn what_a_domain_uses_is_counted_or_nothing_is_given() {
    // Frames by node, up to node 1: a size that nothing else has here.
    const USES: Fails = Fails::OfSize(16);
    let mut machine = Machine::new();
    let terms = Terms::new(Rights::ALLOC, Bytes::mib(1));
    let grant = machine.mm.registry_mut().grant(&[&machine.owners[1]], terms).unwrap();
    let job = machine.mm.registry_mut().create_domain(DomainId::ROOT, "job").unwrap();
    let shown = [&grant];
    let request = Request::on(job, NodeId::ONE, &shown);
    let no_memory = AllocError::Exhausted { node: NodeId::ONE, cause: FramesError::NoMetadata };
    let before = machine.known();

    let (block, failed) = failing(0, USES, || machine.mm.alloc(&request, Order::HUGE));
    assert_eq!((block, failed), (Err(no_memory), 1));
    let (run, failed) = failing(0, USES, || machine.mm.alloc_contiguous(&request, FrameCount(9)));
    assert_eq!((run, failed), (Err(no_memory), 1));
    let mut pass = machine.mm.registry().admit(&request).unwrap();
    let mut into = Vec::with_capacity(9);
    let (batch, failed) = failing(0, USES, || machine.mm.alloc_batch(&mut pass, 9, &mut into));
    assert_eq!((batch, failed, into.len()), (Err(no_memory), 1, 0));
    assert_eq!(machine.known(), before);
    assert_eq!(machine.mm.registry().grant_info(&grant).unwrap().used, Bytes(0), "R12");

    let block = machine.mm.alloc(&Request { domain: Some(job), ..Machine::movable() }, Order::ZERO).unwrap();
    let before = machine.known();
    let isolated = machine.mm.take(&block, Mover::Holder(&[])).unwrap();
    let (planned, failed) = failing(0, USES, || machine.mm.plan_demotion(isolated, &[&machine.demote]));
    assert_eq!((planned, failed), (Err(Stay::NoRoom { cause: no_memory }), 1));
    assert_eq!(machine.known(), before, "it stays where it is, and can be taken again");
    machine.mm.free(block).unwrap();
    machine.mm.registry_mut().remove_domain(job).unwrap();
}

#[test]
fn a_request_is_refused_where_its_pass_cannot_be_made() {
    let mut machine = Machine::new();
    let terms = Terms::new(Rights::ALLOC, Bytes::mib(1));
    let grant = machine.mm.registry_mut().grant(&[&machine.owners[1]], terms).unwrap();
    let shown = [&grant];
    let policy = Policy::new(Mode::Preferred, Flags::empty(), NodeId::ONE.into()).unwrap();
    let request = Request { policy, grants: &shown, ..Request::of(DomainId::ROOT) };
    let mut failures = 0;
    loop {
        let (pass, failed) = failing(failures, Fails::All, || machine.mm.registry().admit(&request));
        if failed == 0 {
            assert!(pass.is_ok());
            break;
        }
        assert_eq!(pass.map(|_| ()).unwrap_err().reason, Reason::NoMemory, "failure {failures}");
        failures += 1;
    }
    assert_eq!(failures, 3, "the grants shown, and two lists of nodes");
    // A pass that is kept looks again, and is refused until there is memory.
    let mut pass = machine.mm.registry().admit(&request).unwrap();
    machine.mm.registry_mut().set_mems(DomainId::ROOT, NodeMask::EMPTY).unwrap();
    let (result, failed) = failing(0, Fails::All, || pass.allowed(machine.mm.registry()).copied());
    assert_eq!((result.map(|_| ()).unwrap_err().reason, failed), (Reason::NoMemory, 1));
    assert!(pass.allowed(machine.mm.registry()).is_ok());
}

#[test]
fn a_range_that_cannot_be_recorded_is_not_added() {
    for failures in 0..2 {
        let mut machine = Machine::new();
        let before = machine.known();
        let spec = machine.mm.registry().spec(NodeId::ONE).unwrap().clone();
        // So many that the next one needs room in both lists of ranges.
        let lent = |_| Metadata::from_heap(FrameCount(1024)).unwrap();
        let lent: Vec<Metadata> = (0..4).map(lent).collect();
        let Machine { mm, owners, .. } = &mut machine;
        for lent in &lent[..3] {
            mm.registry_mut().add_range(&owners[1], &spec, FrameCount(1024), *lent, Initial::Zero).unwrap();
        }
        let add = || mm.registry_mut().add_range(&owners[1], &spec, FrameCount(1024), lent[3], Initial::Zero);
        let (added, failed) = failing(failures, Fails::All, add);
        assert_eq!(added, Err(NodeError::Frames(FramesError::NoMetadata)), "failure {failures}");
        assert_eq!((failed, machine.known().0[1].capacity), (1, FrameCount(before.0[1].capacity.0 + 3 * 1024)));
    }
}

#[test]
fn grants_are_made_and_revoked_whole_or_not_at_all() {
    let mut machine = Machine::new();
    let terms = Terms::new(Rights::ALLOC, Bytes::mib(1));
    let Machine { mm, owners, .. } = &mut machine;
    let mut made = 0;
    for failures in 0..3 {
        // Until the lists of grants are full: they grow together.
        let refused = (0..20).any(|_| {
            let (grant, failed) = failing(failures, Fails::All, || mm.registry_mut().grant(&[&owners[1]], terms));
            made += usize::from(failed == 0);
            assert_eq!(grant.as_ref().err(), (failed > 0).then_some(&GrantError::NoMemory));
            failed > 0
        });
        assert!(refused, "failure {failures}, {made} made");
    }
    let grant = mm.registry_mut().grant(&[&owners[1]], terms).unwrap();
    let part = mm.registry_mut().narrow(&grant, NodeId::ONE.into(), terms).unwrap();
    let shown = [&part];
    let block = mm.alloc(&Request::on(DomainId::ROOT, NodeId::ONE, &shown), Order::ZERO).unwrap();
    let id = grant.id();
    assert_eq!(failing(0, Fails::All, || mm.registry().held(id)), (Err(GrantError::NoMemory), 1));
    let (revoked, failed) = failing(0, Fails::All, || mm.registry_mut().revoke(&owners[1], id));
    assert_eq!((revoked, failed), (Err(GrantError::NoMemory), 1));
    assert!(mm.registry().grant_info(&part).is_ok(), "nothing has ended");
    assert_eq!(mm.registry_mut().revoke(&owners[1], id).unwrap().len(), 1);
    assert!(mm.registry().grant_info(&part).is_err());
    let (freed, failed) = failing(0, Fails::All, || mm.free(block));
    assert_eq!((freed, failed), (Ok(()), 0), "what ends takes no memory");
}

#[test]
fn a_run_is_emptied_by_a_whole_plan_or_none() {
    let run = FrameRange { first: FrameNumber(FRAMES - 1024), count: FrameCount(1024) };
    let mut failures = 0;
    loop {
        let mut machine = Machine::new();
        let blocks = [machine.alloc(), machine.alloc()];
        let _huge = machine.mm.alloc(&Machine::movable(), Order::HUGE).unwrap();
        let before = machine.known();
        let (emptying, failed) = failing(failures, Fails::All, || machine.mm.plan_emptying(NodeId::ZERO, run));
        if failed == 0 {
            assert_eq!(emptying.unwrap().moves.len(), 3);
            break;
        }
        // Where a target has no records its block is stuck; where a list cannot grow there is no plan.
        for planned in emptying.map_or_else(|_| Vec::new(), |emptying| emptying.moves) {
            machine.mm.call_off(planned).unwrap();
        }
        let after = machine.known();
        assert_eq!((after.1, after.2, after.3), (before.1, before.2, before.3), "failure {failures}");
        assert_eq!(after.0.iter().map(|node| node.free).max(), before.0.iter().map(|node| node.free).max());
        assert_eq!(blocks.len(), 2);
        failures += 1;
    }
    assert!(failures >= 4, "lists of blocks, of moves, of what is stuck, of what is held: {failures}");
}

#[test]
fn a_node_or_a_domain_is_made_whole_or_not_at_all() {
    let spec = Machine::new().mm.registry().spec(NodeId::ZERO).unwrap().clone();
    let mut failures = 0;
    loop {
        let mut machine = Machine::new();
        let registry = machine.mm.registry_mut();
        // What the root uses lies outside once the new node is there.
        let node = NodeId::new(7).unwrap();
        registry.set_mems(DomainId::ROOT, node.into()).unwrap();
        let spec = spec.clone();
        let (made, failed) = failing(failures, Fails::All, || registry.register(node, spec));
        if failed == 0 {
            assert_eq!(made.unwrap().outside.len(), 1);
            break;
        }
        assert_eq!(made, Err(NodeError::Frames(FramesError::NoMetadata)), "failure {failures}");
        assert!(!registry.present().contains(node) && !registry.sysram().contains(node));
        assert!(registry.effective(DomainId::ROOT).unwrap().contains(NodeId::ZERO), "R4: as if it had never been");
        failures += 1;
    }
    assert_eq!(failures, 3, "the node, the list of nodes, and what lies outside");
    let mut failures = 0;
    loop {
        let mut registry = Registry::new();
        let (made, failed) = failing(failures, Fails::All, || registry.create_domain(DomainId::ROOT, "job"));
        if failed == 0 {
            let (gone, failed) = failing(0, Fails::All, || registry.remove_domain(made.unwrap()));
            assert_eq!((gone, failed), (Ok(()), 0), "what ends takes no memory");
            break;
        }
        assert_eq!(made, Err(DomainError::NoMemory), "failure {failures}");
        assert_eq!((registry.domains().count(), registry.find_domain("/job")), (1, None));
        assert!(registry.create_domain(DomainId::ROOT, "job").is_ok());
        failures += 1;
    }
    assert_eq!(failures, 5, "the domain, its name, its parent's children, and two lists");
}

#[test]
fn a_distance_or_a_tier_is_set_or_nothing_has_changed_and_a_path_takes_no_memory() {
    let mut registry = Registry::new();
    let job = registry.create_domain(DomainId::ROOT, "batch.slice").unwrap();
    let job = registry.create_domain(job, "job").unwrap();
    let (near, far) = (NodeId::new(2).unwrap(), NodeId::new(900).unwrap());
    for failures in 0..2 {
        let (set, failed) = failing(failures, Fails::All, || registry.set_distance(near, far, 31));
        assert_eq!((set, failed), (Err(DistanceError::NoMemory), 1), "failure {failures}");
        assert_eq!(registry.distances().get(near, far), REMOTE);
    }
    let (set, failed) = failing(0, Fails::All, || registry.set_abstract_distance(far, 3 * DRAM));
    assert_eq!((set, failed), (Err(FramesError::NoMetadata), 1));
    assert_eq!(registry.tiers().tier(far), registry.tiers().tier(near));
    registry.set_distance(near, far, 31).unwrap();
    registry.set_abstract_distance(far, 3 * DRAM).unwrap();
    assert_eq!((registry.distances().get(near, far), registry.distances().get(far, near)), (31, REMOTE));
    assert!(registry.tiers().tier(far) > registry.tiers().tier(near));
    // What has been set once is set again without memory.
    let again = || (registry.set_distance(near, far, 32), registry.set_abstract_distance(far, DRAM));
    assert_eq!(failing(0, Fails::All, again), ((Ok(()), Ok(())), 0));

    let mut text = String::with_capacity(64);
    let what = Reason::OutsideDomain { domain: job }.what(&registry);
    let write = || write!(text, "{} {what}", registry.domain_path(job).unwrap());
    assert_eq!(failing(0, Fails::All, write), (Ok(()), 0));
    assert_eq!(text, "/batch.slice/job outside the masks of domain /batch.slice/job");
    assert_eq!(registry.domain_path(DomainId::ROOT).unwrap().to_string(), "/");
}

#[test]
fn a_mask_whose_outside_cannot_be_listed_stays_as_it_was() {
    let mut machine = Machine::new();
    let before = *machine.mm.registry().effective(DomainId::ROOT).unwrap();
    let registry = machine.mm.registry_mut();
    let (set, failed) = failing(0, Fails::All, || registry.set_mems(DomainId::ROOT, NodeId::ONE.into()));
    assert_eq!((set, failed), (Err(DomainError::NoMemory), 1));
    assert_eq!((registry.effective(DomainId::ROOT), registry.outside(DomainId::ROOT).count()), (Some(&before), 0));
    assert_eq!(registry.configured(DomainId::ROOT).unwrap().0, &NodeMask::EMPTY);
    let listed = registry.set_mems(DomainId::ROOT, NodeId::ONE.into()).unwrap();
    let (again, failed) = failing(0, Fails::All, || registry.outside(DomainId::ROOT).eq(listed.iter().copied()));
    assert_eq!((again, failed, listed.len()), (true, 0, 1), "to look takes no memory");
}

#[test]
fn time_goes_on_without_memory() {
    let mut machine = Machine::new();
    let Machine { mm, owners, .. } = &mut machine;
    let mut grant = |ends| {
        let terms = Terms::new(Rights::ALLOC, Bytes::mib(1)).until(Time(ends));
        mm.registry_mut().grant(&[&owners[1]], terms).unwrap().id()
    };
    let ids: Vec<_> = (1..=20).map(&mut grant).collect();
    let (told, failed) = failing(0, Fails::All, || mm.registry_mut().advance(Time(10)) == &ids[..10]);
    assert_eq!((told, failed), (true, 0), "R12: what ended is told");
    let (told, failed) = failing(0, Fails::All, || mm.registry_mut().advance(Time(20)) == &ids[10..]);
    assert_eq!((told, failed), (true, 0));
    assert!(mm.registry_mut().advance(Time(21)).is_empty());
}

#[test]
fn a_batch_that_cannot_be_listed_ends_where_the_list_does() {
    let mut machine = Machine::new();
    let before = machine.known();
    let mut pass = machine.mm.registry().admit(&Request::of(DomainId::ROOT)).unwrap();
    let mut into = Vec::new();
    let (batch, failed) = failing(0, Fails::All, || machine.mm.alloc_batch(&mut pass, 9, &mut into));
    let no_memory = AllocError::Exhausted { node: NodeId::ZERO, cause: FramesError::NoMetadata };
    assert_eq!((batch, failed, into.len()), (Err(no_memory), 1, 0));
    assert_eq!(machine.known(), before);
    // One at a time, as those that move are had: what was given by then is in the list.
    let mut pass = machine.mm.registry().admit(&Machine::movable()).unwrap();
    let mut into = Vec::with_capacity(3);
    let (batch, failed) = failing(0, Fails::All, || machine.mm.alloc_batch(&mut pass, 9, &mut into));
    assert!(batch.is_err() && failed > 0 && into.len() <= 3);
    into.into_iter().for_each(|block| machine.mm.free(block).unwrap());
    assert_eq!(machine.known().0, before.0);
}

#[test]
fn masks_change_without_memory() {
    let mut registry = Registry::new();
    let spec = Machine::new().mm.registry().spec(NodeId::ONE).unwrap().clone();
    registry.register(NodeId::ONE, spec).unwrap();
    let mut deep = DomainId::ROOT;
    for level in 0..MAX_DEPTH {
        deep = registry.create_domain(deep, "level").unwrap();
        if level % 9 == 1 {
            registry.create_domain(deep, "aside").unwrap();
        }
    }
    let (set, failed) = failing(0, Fails::All, || registry.set_mems(DomainId::ROOT, NodeId::ONE.into()).is_ok());
    assert_eq!((set, failed), (true, 0));
    assert_eq!(registry.effective(deep), Some(&NodeId::ONE.into()));
}
