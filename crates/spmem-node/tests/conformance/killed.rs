//! A process that runs a persistent node is killed (SIGKILL) at random moments: what it had done is there, whole.
//!
//! The child is this test binary once more. It tells what it has done in lines, after it has done it; what it was about to do
//! it tells before.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use spmem_core::frames::Metadata;
use spmem_core::node::{Class, Services};
use spmem_core::units::{DomainId, NodeId, Order, PAGE_SIZE};
use spmem_node::mapped::{MappedNode, Overwrite, PeerId, Refused, Repair, mapped_spec};
use spmem_node::{Backend, Handle, PAGE_BYTES, file};
use spmem_sys::region::Region;

use super::backend::page_with_noise;
use super::fd;

const FILE: &str = "SPMEM_KILLED_FILE";
const SEED: &str = "SPMEM_KILLED_SEED";
const ROUNDS: u64 = 25;
/// Pages that a child keeps.
const KEPT: usize = 150;

fn open(path: &Path) -> (MappedNode<Region>, spmem_node::mapped::Opened) {
    let spec = mapped_spec(Class::Shared, Services::MIGRATION, "killed");
    let region = file::region(fd(path)).unwrap();
    MappedNode::open(region, NodeId::ONE, spec, Repair::Refuse, Metadata::from_heap).unwrap()
}

/// Stores, releases and hands over pages until it is killed.
#[test]
fn child_of_the_test_below() {
    let (Ok(path), Ok(seed)) = (std::env::var(FILE), std::env::var(SEED)) else { return };
    let mut random: u64 = seed.parse::<u64>().unwrap() | 1;
    let (mut node, _) = open(path.as_ref());
    let mut stored: Vec<Handle> =
        node.handles().filter(|(_, order)| *order == Order::ZERO).map(|(one, _)| one).collect();
    let mut out = std::io::stdout().lock();
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        if stored.len() >= KEPT || (random.is_multiple_of(3) && !stored.is_empty()) {
            let at = usize::try_from(random >> 8).unwrap() % stored.len();
            let handle = stored.swap_remove(at);
            writeln!(out, "\n@ release {}", handle.raw()).unwrap();
            node.release(handle).unwrap();
            writeln!(out, "@ released {}", handle.raw()).unwrap();
        } else {
            writeln!(out, "\n@ store {random}").unwrap();
            let handle = node.demote(DomainId::ROOT, &page_with_noise(random, 256)).unwrap();
            writeln!(out, "@ stored {} {random}", handle.raw()).unwrap();
            stored.push(handle);
        }
    }
}

#[test]
fn a_killed_process_leaves_what_it_had_done_and_every_byte_of_it() {
    // In RAM, where there is such a file system: msync(2) matters to the power's end, not to the process's.
    let shm = Path::new("/dev/shm");
    let folder = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
    let path = folder.path().join("node");
    let mut region = file::create(fd(&path), 300 * PAGE_SIZE).unwrap();
    MappedNode::format(&mut region, [8; 16], PAGE_SIZE, Overwrite::No).unwrap();
    drop(region);
    let (mut node, _) = open(&path);
    let block = node.alloc(DomainId::ROOT, Order::new(1).unwrap()).unwrap();
    node.hand_over(block, PeerId(2)).unwrap();
    drop(node);
    // By handle: the seed of the page.
    let mut expected: BTreeMap<u64, u64> = BTreeMap::new();
    let mut operations = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::child_of_the_test_below", "--nocapture", "--test-threads", "1"])
            .env(FILE, &path)
            .env(SEED, (round * 7919 + 17).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let mut told = Vec::new();
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                told.extend(line.strip_suffix('\n').and_then(|line| line.strip_prefix("@ ")).map(str::to_owned));
                line.clear();
            }
            told
        });
        std::thread::sleep(Duration::from_micros(15_000 + round * 1371 % 23_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut in_flight = None;
        for line in reader.join().unwrap() {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap();
            match words[0] {
                "store" => in_flight = Some((None, number(1))),
                "release" => in_flight = Some((Some(number(1)), expected[&number(1)])),
                "stored" => {
                    assert_eq!(expected.insert(number(1), number(2)), None);
                    (in_flight, operations) = (None, operations + 1);
                }
                "released" => {
                    expected.remove(&number(1)).unwrap();
                    (in_flight, operations) = (None, operations + 1);
                }
                other => panic!("{other}"),
            }
        }
        check(&path, &mut expected, in_flight);
    }
    println!("{operations} operations");
    assert!(operations > 500, "{operations}");
}

/// Opens it and holds it against what was told; what was in flight is taken as it is found.
fn check(path: &Path, expected: &mut BTreeMap<u64, u64>, in_flight: Option<(Option<u64>, u64)>) {
    let (node, _) = open(path);
    let mut found = BTreeMap::new();
    let mut back = [0; PAGE_BYTES];
    for (handle, order) in node.handles() {
        if order != Order::ZERO {
            assert!(matches!(node.read(handle, 0, &mut back), Err(Refused::HandedOver { to: PeerId(2) })));
            continue;
        }
        node.load(handle, &mut back).unwrap();
        let seed = expected.get(&handle.raw()).copied().or(in_flight.map(|(_, seed)| seed)).expect("it was told");
        assert!(back == page_with_noise(seed, 256), "every byte");
        found.insert(handle.raw(), seed);
    }
    let lost: Vec<_> = expected.keys().filter(|one| !found.contains_key(one)).collect();
    match in_flight {
        Some((Some(released), _)) => assert!(lost.iter().all(|&&one| one == released), "{lost:?}"),
        _ => assert!(lost.is_empty(), "{lost:?}"),
    }
    let new = found.keys().filter(|one| !expected.contains_key(one)).count();
    assert!(new <= usize::from(matches!(in_flight, Some((None, _)))), "{new}");
    assert_eq!(node.usage().used.frames_floor().0, found.len() as u64 + 2);
    *expected = found;
}
