//! The conformance suite on what every machine has, and what a crash at any point leaves of a persistent node.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod backend;
mod crash;
mod damage;
mod killed;
mod suite;

use std::fs::OpenOptions;
use std::path::Path;
use std::time::Duration;

use spmem_core::frames::Metadata;
use spmem_core::units::{Bytes, FrameCount};
use spmem_node::compressed::{GrantedFrames, Store};
use spmem_node::model::{Device, Shape};
use spmem_node::{PAGE_BYTES, file, numa};
use spmem_sys::Errno;
use spmem_sys::fd::Fd;
use spmem_sys::region::{Access, Region};
use suite::{Kind, Mapped, claims};

/// An open file, made where there is none.
fn fd(path: &Path) -> Fd {
    use std::os::fd::IntoRawFd;
    let mut options = OpenOptions::new();
    Fd::from_raw(options.read(true).write(true).create(true).truncate(false).open(path).unwrap().into_raw_fd())
}

/// Waits for a lock that was let go: a child that another test starts has it, too, until it executes its program.
fn patiently<T: std::fmt::Debug>(open: impl Fn() -> Result<T, Errno>) -> T {
    for _ in 0..500 {
        match open() {
            Err(Errno::EAGAIN) => std::thread::sleep(Duration::from_millis(10)),
            other => return other.unwrap(),
        }
    }
    open().unwrap()
}

fn hold<M: Mapped>(kind: &Kind<M>) {
    for (name, claim) in claims(kind) {
        println!("{}: {name}", kind.name);
        claim(kind);
    }
}

#[test]
fn every_claim_holds_on_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node");
    let again = path.clone();
    hold(&Kind {
        name: "file".to_owned(),
        region: Box::new(move || patiently(|| file::create(fd(&path), 4 << 20))),
        again: Some(Box::new(move || patiently(|| file::map(fd(&again), Access::ReadWrite)))),
        unit: 4096,
    });
}

#[test]
fn every_claim_holds_on_the_kernels_node_0() {
    hold(&Kind {
        name: "numa".to_owned(),
        region: Box::new(|| numa::region(4 << 20, 0).unwrap()),
        again: None,
        unit: 4096,
    });
}

impl Mapped for Device {
    fn region(&self) -> &Region {
        Device::region(self)
    }
}

/// The claims are about every byte of random pages, so the model has memory for all of them.
#[test]
fn every_claim_holds_on_the_model_of_a_compressing_device() {
    for shape in [Shape::new(Bytes::mib(4)), Shape { granule: 64, sector: 8, ..Shape::new(Bytes::mib(4)) }] {
        let region = move || Device::new(numa::region(4 << 20, 0).unwrap(), shape).unwrap();
        hold(&Kind { name: "model".to_owned(), region: Box::new(region), again: None, unit: 4096 });
    }
}

#[test]
fn every_claim_about_pages_that_are_copied_holds_on_compressed_memory() {
    let make = |frames: usize| {
        let count = FrameCount(frames as u64);
        let granted = GrantedFrames::embedded(count, Metadata::from_heap(count).unwrap()).unwrap();
        Store::new(granted, vec![0; frames * PAGE_BYTES], 0x5eed)
    };
    backend::what_is_stored_comes_back(make);
    backend::same_as_tells_the_page_from_any_other(make);
    backend::a_forgotten_page_is_gone_and_its_room_is_back(make);
    backend::a_full_back_end_refuses_and_loses_nothing(make);
}

#[test]
fn a_file_is_one_nodes_at_a_time_and_made_with_all_its_room() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node");
    let region: Region = file::create(fd(&path), 1 << 20).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    assert_eq!(file::region(fd(&path)).map(|region| region.len()), Err(Errno::EAGAIN));
    assert_eq!(file::map(fd(&path), Access::Read).unwrap().len(), 1 << 20);
    drop(region);
    assert_eq!(patiently(|| file::region(fd(&path))).len(), 1 << 20);
}

#[test]
fn a_node_that_was_copied_with_holes_has_all_its_room_once_it_is_open() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let region = file::region(fd(&path)).unwrap();
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= 1 << 20);
    let mut bytes = vec![1; 1 << 20];
    region.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
}

/// Takes root, to mount a small file system.
#[test]
fn a_node_whose_holes_find_no_room_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mount =
        |words: &[&str]| std::process::Command::new(words[0]).args(&words[1..]).arg(folder.path()).status();
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=1M", "none"]).is_ok_and(|status| status.success()) {
        println!("skipped: nothing can be mounted here");
        return;
    }
    let path = folder.path().join("node");
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let result = file::region(fd(&path)).map(|region| region.len());
    mount(&["umount"]).unwrap();
    // ENOSPC
    assert_eq!(result, Err(Errno(28)));
}
