//! Swap files with real locks: processes are stood in for by open ledgers of their own, and a dax device by a file that is mapped like one, of
//! which what was cut off is SIGBUS to who touches it.

use std::os::fd::IntoRawFd;
use std::vec;
use std::vec::Vec;

use spmem_sys::PAGE;

use super::*;

const SEED: u64 = 7;
const FULL: usize = CLUSTER_FRAMES as usize;

/// What pages are on, and of a device in which units it is mapped.
const MEDIA: [Option<u64>; 3] = [None, Some(PAGE as u64), Some(2 * CLUSTER_BYTES)];

/// A ledger and a file of so many clusters.
struct Run {
    folder: tempfile::TempDir,
    clusters: u32,
    align: Option<u64>,
}

impl Run {
    fn new(clusters: u32, align: Option<u64>) -> Self {
        let folder = tempfile::tempdir().expect("a folder for temporary files");
        for name in ["ledger", "data"] {
            std::fs::write(folder.path().join(name), []).expect("a file");
        }
        let run = Self { folder, clusters, align };
        if let Some(align) = align {
            let bytes = (u64::from(clusters) * CLUSTER_BYTES).next_multiple_of(align);
            run.resize(bytes);
        }
        run
    }

    fn resize(&self, bytes: u64) {
        let data = std::fs::OpenOptions::new().write(true).open(self.folder.path().join("data"));
        data.expect("it is there").set_len(bytes).expect("ftruncate(2)");
    }

    fn open(&self, name: &str) -> Fd {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(self.folder.path().join(name));
        Fd::from_raw(file.expect("it is there").into_raw_fd())
    }

    fn medium(&self) -> Medium {
        let bytes = u64::from(self.clusters) * CLUSTER_BYTES;
        match self.align {
            None => Medium::file(self.open("data")),
            Some(align) => Medium::device(self.open("data"), bytes, align).expect("mmap(2)"),
        }
    }

    fn process(&self) -> SwapFiles {
        let mut files = SwapFiles::new(self.open("ledger"), SEED);
        files.add(0, NodeId::new(2).expect("a node"), self.medium(), self.clusters, 0);
        files
    }
}

fn page(number: u64) -> Page {
    let mut page = [0; PAGE];
    for (word, at) in page.chunks_exact_mut(8).zip(1_u64..) {
        word.copy_from_slice(&number.wrapping_mul(31).wrapping_add(at).to_le_bytes());
    }
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

/// Puts pages there, numbered from `first`; the handles of those that found room.
fn put(files: &mut SwapFiles, first: u64, count: usize) -> Vec<Handle> {
    let mut handles = vec![None; count];
    let taken = files.take(0, &mut handles);
    let handles: Vec<Handle> = handles.into_iter().take(taken).flatten().collect();
    let mut writer = Writer::new(1).expect("mmap(2)");
    let outlet = files.outlet(0).expect("it was added");
    for (number, &handle) in (first..).zip(&handles) {
        assert_eq!(writer.write(outlet, frame(handle), &page(number)), Ok(1));
        files.seal(handle, &page(number));
    }
    handles
}

fn check(files: &SwapFiles, first: u64, handles: &[Handle]) {
    for (number, &handle) in (first..).zip(handles) {
        let mut found = [0; PAGE];
        assert_eq!(files.load(handle, &mut found), Ok(()), "page {number}");
        assert!(found == page(number), "page {number}");
    }
}

/// What a forked child has: the same knowledge, other descriptors.
fn fork(run: &Run, parent: &mut SwapFiles, live: &[Handle]) -> SwapFiles {
    let ledger = parent.lend().expect("fcntl(2)");
    let mut child = SwapFiles::new(Fd::from_raw(-1), SEED);
    for (number, file) in parent.files.iter().enumerate() {
        let file = file.as_ref().expect("each is there");
        // Its mappings are the parent's.
        child.add(number, file.node, run.medium(), file.count, 0);
        let held = &mut child.files[number].as_mut().expect("it was added").held;
        for (&at, cluster) in &file.held {
            let Cluster { is_frozen, is_inherited, live, used, ref checksums } = *cluster;
            held.insert(at, Cluster { is_frozen, is_inherited, live, used, checksums: checksums.clone() });
        }
    }
    child.adopt(ledger, core::iter::once(run.open("data"))).expect("pipe2(2)");
    child.retain(live.iter().copied());
    child
}

#[test]
fn pages_come_back_as_they_were_and_their_frames_are_used_again() {
    for medium in MEDIA {
        let run = Run::new(2, medium);
        let mut files = run.process();
        let first = put(&mut files, 0, 2 * FULL + 5);
        assert_eq!((first.len(), files.pages(0)), (2 * FULL, 2 * FULL as u64), "what does not fit is not taken");
        check(&files, 0, &first);
        for &handle in &first[10..20] {
            files.forget(handle);
            files.forget(handle);
        }
        assert_eq!(files.pages(0), 2 * FULL as u64 - 10, "a page is forgotten once");
        let again = put(&mut files, 5000, 20);
        assert_eq!(again.len(), 10);
        check(&files, 5000, &again);
        check(&files, 0, &first[..10]);
        check(&files, 20, &first[20..]);
    }
}

#[test]
fn processes_never_share_a_cluster_and_one_that_ends_gives_all_back() {
    for medium in MEDIA {
        let run = Run::new(3, medium);
        let (mut one, mut other) = (run.process(), run.process());
        let ours = put(&mut one, 0, FULL + 1);
        let theirs = put(&mut other, 9000, 3 * FULL);
        assert_eq!(
            (ours.len(), theirs.len()),
            (FULL + 1, FULL),
            "two clusters are one's, the last is the other's"
        );
        check(&one, 0, &ours);
        check(&other, 9000, &theirs);
        drop(one);
        assert_eq!(put(&mut other, 20_000, 3 * FULL).len(), 2 * FULL);
    }
}

#[test]
fn nobody_writes_where_a_forked_relative_may_read_until_one_has_let_go() {
    for medium in MEDIA {
        let run = Run::new(2, medium);
        let mut parent = run.process();
        let shared = put(&mut parent, 0, 100);
        let mut child = fork(&run, &mut parent, &shared);
        assert_eq!((parent.pages(0), child.pages(0)), (100, 0), "they are counted once");
        // The parent frees its pages and writes as many as there is room for: only to the other cluster.
        shared[..90].iter().for_each(|&handle| parent.forget(handle));
        let new = put(&mut parent, 3000, 2 * FULL);
        assert_eq!(new.len(), FULL);
        check(&child, 0, &shared);
        assert!(put(&mut child, 4000, 1).is_empty(), "all that is left is frozen");
        check(&parent, 90, &shared[90..]);
        // The child keeps one page: still nothing may be written.
        shared[1..].iter().for_each(|&handle| child.forget(handle));
        assert!(put(&mut parent, 5000, 1).is_empty());
        check(&child, 0, &shared[..1]);
        drop(child);
        let thawed = put(&mut parent, 6000, FULL);
        assert_eq!(thawed.len(), FULL - 10, "what the child has let go of is the parent's alone again");
        check(&parent, 6000, &thawed);
        check(&parent, 90, &shared[90..]);
    }
}

#[test]
fn a_child_outlives_its_parent_with_all_its_pages() {
    for medium in MEDIA {
        let run = Run::new(2, medium);
        let mut parent = run.process();
        let shared = put(&mut parent, 0, 300);
        let mut child = fork(&run, &mut parent, &shared[..200]);
        let mut grandchild = fork(&run, &mut child, &shared[..200]);
        drop(parent);
        let mut stranger = run.process();
        assert_eq!(
            put(&mut stranger, 7000, 2 * FULL).len(),
            FULL,
            "the cluster of the dead is held by its children"
        );
        drop(child);
        check(&grandchild, 0, &shared[..200]);
        let new = put(&mut grandchild, 8000, FULL);
        assert_eq!((new.len(), grandchild.pages(0)), (FULL - 200, FULL as u64), "nobody else is left");
        check(&grandchild, 0, &shared[..200]);
        check(&grandchild, 8000, &new);
    }
}

#[test]
fn a_child_that_has_none_of_a_clusters_pages_lets_go_of_it() {
    for medium in MEDIA {
        let run = Run::new(1, medium);
        let mut parent = run.process();
        let pages = put(&mut parent, 0, 10);
        let _child = fork(&run, &mut parent, &[]);
        check(&parent, 0, &pages);
        assert_eq!(put(&mut parent, 100, FULL).len(), FULL - 10);
    }
}

#[test]
fn pages_are_written_in_rows_across_windows_and_what_has_gone_is_not_there() {
    for medium in MEDIA {
        let run = Run::new(4, medium);
        let files = run.process();
        let (mut writer, outlet) = (Writer::new(16).expect("mmap(2)"), files.outlet(0).expect("it was added"));
        let row: Vec<u8> = (0..16).flat_map(page).collect();
        let edge = |cluster: u32| FrameNumber(cluster * CLUSTER_FRAMES - 5);
        for cluster in 1..4 {
            assert_eq!(writer.write(outlet, edge(cluster), &row), Ok(16));
        }
        let mut found = [0; PAGE];
        for (number, frame) in (0..16).zip(edge(2).0..) {
            assert_eq!(run.medium().load(FrameNumber(frame), &mut found), Ok(()));
            assert!(found == page(number), "page {number} beside an edge");
        }
        // A file grows again where it is written.
        if run.align.is_some() {
            run.resize(u64::from(edge(1).0 + 2) * PAGE_SIZE);
            assert_eq!(writer.write(outlet, edge(1), &row), Err(Errno::EFAULT));
            assert_eq!(writer.write(outlet, FrameNumber(0), &row), Ok(16), "what is left is as good as before");
        }
    }
}

#[test]
fn a_forked_child_does_not_get_what_a_writer_has_mapped() {
    for align in [PAGE as u64, 2 * CLUSTER_BYTES] {
        let run = Run::new(4, Some(align));
        let files = run.process();
        let mut writer = Writer::new(1).expect("mmap(2)");
        let outlet = files.outlet(0).expect("it was added");
        assert_eq!(writer.write(outlet, FrameNumber(0), &page(1)), Ok(1));
        let path = run.folder.path().join("data");
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("/proc");
        let is_window = |line: &&str| line.ends_with(path.to_str().expect("a name")) && line.contains(" rw-s ");
        let window = maps.split_once(maps.lines().find(is_window).expect("a window")).expect("it is there").1;
        let flags = window.lines().find(|line| line.starts_with("VmFlags:")).expect("proc_pid_smaps(5)");
        assert!(flags.contains(" dc"), "{flags}");
    }
}

#[test]
fn damage_is_told_and_never_handed_out() {
    for medium in MEDIA {
        use std::os::unix::fs::FileExt;
        let run = Run::new(1, medium);
        let mut files = run.process();
        let pages = put(&mut files, 0, 4);
        let data =
            std::fs::OpenOptions::new().write(true).open(run.folder.path().join("data")).expect("it is there");
        let at = u64::from(frame(pages[1]).0) * PAGE_SIZE + 1234;
        data.write_all_at(&[page(1)[1234] ^ 4], at).expect("pwrite(2)");
        // Another page's bytes, whole.
        data.write_all_at(&page(0), u64::from(frame(pages[2]).0) * PAGE_SIZE).expect("pwrite(2)");
        run.resize(u64::from(frame(pages[3]).0) * PAGE_SIZE);
        let damage = |handle| match files.load(handle, &mut [0; PAGE]) {
            Err(Unloaded::Lost(corrupt)) => corrupt.damage,
            other => panic!("{other:?}"),
        };
        check(&files, 0, &pages[..1]);
        assert!(matches!(damage(pages[1]), Damage::Checksum { .. }));
        assert!(matches!(damage(pages[2]), Damage::Checksum { .. }), "no page passes for another");
        assert_eq!(damage(pages[3]), Damage::Unreadable);
        files.forget(pages[0]);
        let load = |handle| files.load(handle, &mut [0; PAGE]);
        assert!(
            matches!(load(pages[0]), Err(Unloaded::Lost(Corrupt { damage: Damage::UnknownHandle, .. }))),
            "what was freed is nobody's"
        );
    }
}
