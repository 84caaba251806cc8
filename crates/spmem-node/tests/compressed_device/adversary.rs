//! An adversary fills the device with what compresses well and rewrites it with what does not, as fast as it can.

use spmem_core::units::{Bytes, DomainId, FrameCount};
use spmem_node::cram::{Denied, PageId};
use spmem_node::mapped::{MappedNode, mapped_spec};
use spmem_node::model::Shape;
use spmem_node::{Backend, Handle, PAGE_BYTES, Page};

use super::harness::{BY_GRANULE, BY_LINE, Bench, PERCEIVED, Random, device, page_of};

const STEPS: u64 = 600;

/// What came of a run.
#[derive(Debug, Default)]
struct Outcome {
    refused: u64,
    dropped: u64,
    lost: usize,
    peak: u64,
}

/// An adversary and a bystander for a while. `is_checked`: nothing may be lost.
fn run(seed: u64, shape: Shape, reserve: Option<u64>, is_checked: bool) -> Outcome {
    let mut bench = Bench::new(seed, shape, 24, |settings| {
        settings.reserve = reserve.map_or(settings.reserve, Bytes);
    });
    let (adversary, bystander) = (bench.program("adversary", 12), bench.program("bystander", 12));
    let mut outcome = Outcome::default();
    // The most that does not compress, of what the device lets in where it tells.
    let worst = if shape.does_weigh { 52 } else { 64 };
    for step in 0..STEPS {
        bench.drained = usize::try_from(bench.random.below(40)).unwrap();
        let is_adversary = step % 4 != 0;
        let id = if is_adversary {
            page_of(adversary, bench.random.below(100))
        } else {
            page_of(bystander, bench.random.below(20))
        };
        let is_bad = is_adversary && (step > STEPS / 6 || bench.random.below(3) == 0);
        let page = bench.random.page(if is_bad { worst } else { 2 });
        // Whole pages, and parts of them, of which the rest comes from the device.
        let from =
            if bench.random.below(2) == 0 { 0 } else { 64 * usize::try_from(bench.random.below(8)).unwrap() };
        match bench.write(id, from, &page[from..]) {
            Ok(()) => {}
            Err(Denied::OverLimit { page: PageId { owner, .. }, .. }) => {
                assert!(!is_checked || owner == id.owner);
                outcome.refused += 1;
            }
            Err(Denied::Hurt(_)) if !is_checked => {
                bench.model.remove(&id);
                bench.cram.discard(id);
                outcome.lost += 1;
            }
            Err(other) => panic!("{other}"),
        }
        if bench.random.below(3) == 0 {
            bench.tick();
        }
        if is_checked {
            let number = bench.random.below(100);
            bench.check(page_of(adversary, number));
            bench.check(page_of(bystander, number % 20));
        }
    }
    bench.device.drain(usize::MAX);
    bench.tick();
    if is_checked {
        bench.check_all();
    }
    outcome.lost += bench.count_lost();
    let counts = bench.device.counts();
    (outcome.dropped, outcome.peak) = (counts.dropped_lines, counts.peak.0);
    outcome
}

#[test]
fn the_device_is_never_overrun_and_every_byte_is_there() {
    for shape in [BY_LINE, BY_GRANULE] {
        for does_weigh in [true, false] {
            let shape = Shape { does_weigh, ..shape };
            let (mut refused, mut peak) = (0, 0);
            for seed in 0..25 {
                let outcome = run(seed, shape, None, true);
                assert_eq!((outcome.dropped, outcome.lost), (0, 0), "seed {seed}, {shape:?}");
                (refused, peak) = (refused + outcome.refused, peak.max(outcome.peak));
            }
            println!(
                "granule {} weighs {does_weigh}: peak {peak} of {}, {refused} refused",
                shape.granule, shape.physical
            );
            // The adversary is one: it drives the device as far as it may go.
            assert!(peak > shape.physical.0 / 2 && refused > 0, "peak {peak}, {refused} refused");
        }
    }
}

#[test]
fn a_component_without_a_reserve_is_overrun_by_the_same_adversary() {
    let shape = Shape { does_weigh: false, ..BY_LINE };
    let outcomes: Vec<Outcome> = (0..25).map(|seed| run(seed, shape, Some(0), false)).collect();
    let (dropped, lost) =
        (outcomes.iter().map(|one| one.dropped).sum::<u64>(), outcomes.iter().map(|one| one.lost).sum::<usize>());
    println!("without a reserve: {dropped} lines dropped, {lost} pages lost");
    assert!(dropped > 0 && lost > 0, "{outcomes:?}");
}

#[test]
fn a_component_that_trusts_what_the_device_promises_is_overrun() {
    let device = device(Shape { does_weigh: false, ..BY_LINE });
    let lent = spmem_core::frames::Metadata::from_heap(FrameCount(PERCEIVED)).unwrap();
    let spec = mapped_spec(
        spmem_core::node::Class::Featured,
        spmem_core::node::Services::MIGRATION | spmem_core::node::Services::WRITE_FENCE,
        "naive",
    );
    let node = spmem_core::units::NodeId::ONE;
    let mut naive = MappedNode::new(device.clone(), node, spec, lent, spmem_core::zero::Initial::Zero).unwrap();
    let mut random = Random::new(1);
    // There are frames for all of them, so it takes them all.
    let pages: Vec<(Option<Handle>, Page)> = (0..PERCEIVED)
        .map(|_| {
            let page = random.page(64);
            (naive.demote(DomainId::ROOT, &page).ok(), page)
        })
        .collect();
    device.drain(usize::MAX);
    let mut back = [0; PAGE_BYTES];
    let is_lost = |(handle, page): &&(Option<Handle>, Page)| {
        let read = handle.map(|handle| naive.load(handle, &mut back));
        assert!(read != Some(Ok(())) || back == *page, "wrong bytes are never handed out");
        matches!(read, Some(Err(_)))
    };
    let lost = pages.iter().filter(is_lost).count();
    assert!(device.counts().dropped_lines > 0 && lost > 0, "{}", device.counts());
}
