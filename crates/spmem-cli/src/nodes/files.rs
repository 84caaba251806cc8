//! Nodes of kind "file": what their superblocks say.
//!
//! [`line()`] reads one, without its lock and without changing it; [`create`] makes those that are not there.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use spmem_core::node::{NodeSpec, NodeType, Services};
use spmem_core::units::{FrameCount, PAGE_SIZE};
use spmem_node::file;
use spmem_node::mapped::{MappedNode, OpenError, Overwrite, Summary, mapped_spec};
use spmem_sys::fd::Fd;
use spmem_sys::region::{Access, Region};

use super::list::{NodeLine, Origin, service_names};
use crate::config::FileNode;
use crate::remark::remark;

/// What such a node is registered as.
fn spec(node: &FileNode) -> NodeSpec {
    let fence = if node.is_fenced { Services::WRITE_FENCE } else { Services::empty() };
    mapped_spec(node.class, Services::MIGRATION | fence, "file")
}

/// The node's line; sizes are not known of one that cannot be read, and a remark says why.
pub fn line(node: &FileNode) -> NodeLine {
    let summary = read(node).inspect_err(|error| remark(format_args!("node {}: {error:#}", node.id))).ok();
    let bytes = |count: fn(&Summary) -> FrameCount| summary.as_ref().map(|summary| count(summary).bytes().0);
    let spec = spec(node);
    NodeLine {
        id: node.id,
        origin: Origin::Spmem,
        node_type: NodeType::Spm,
        class: spec.class,
        reason: "configured".to_owned(),
        services: service_names(&spec),
        guard: Some(spec.guard.to_string()),
        owner: spec.owner.clone().into_owned(),
        capacity: bytes(|summary| summary.capacity),
        used: bytes(|summary| summary.used),
        free: bytes(|summary| FrameCount(summary.capacity.0.saturating_sub(summary.used.0 + summary.poisoned.0))),
        devices: vec![node.path.display().to_string()],
        measured: None,
    }
}

fn read(node: &FileNode) -> anyhow::Result<Summary> {
    let path = node.path.display();
    // Of a named pipe it would wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&node.path).with_context(
        || match node.path.try_exists() {
            Ok(false) if node.path.is_symlink() => format!("{path} is a link to what is not there"),
            Ok(false) => format!("{path} is not there (`spm nodes --create` makes it)"),
            _ => format!("{path} cannot be opened"),
        },
    )?;
    let data = file.metadata().with_context(|| format!("{path} cannot be looked at"))?;
    ensure!(!data.is_dir(), "{path} is a directory; the path of a file in it would do");
    if data.len() < PAGE_SIZE {
        return Err(OpenError::NotFormatted).with_context(|| path.to_string());
    }
    let region = file::map(Fd::from_raw(file.into_raw_fd()), Access::Read);
    let region = region.map_err(|errno| anyhow::anyhow!("{path} cannot be mapped: {errno}"))?;
    Summary::read(&region).with_context(|| path.to_string())
}

/// Makes the files that are not there, empty nodes in them: under another name, until they are whole. What somebody was
/// interrupted in is begun anew; a file without a node in it is finished if it is all zeros, else said and left alone.
///
/// # Errors
/// One cannot be made: no room, for one. What had been begun of it is gone then.
pub fn create(nodes: &[FileNode]) -> anyhow::Result<()> {
    for node in nodes {
        let made = match node.path.symlink_metadata() {
            Ok(_) => finish(node),
            Err(error) if error.kind() == ErrorKind::NotFound => make(node),
            Err(error) => Err(error.into()),
        };
        made.with_context(|| format!("node {}: {} cannot be made", node.id, node.path.display()))?;
    }
    Ok(())
}

/// Where a node is made before it has its name.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".spm-create");
    path.with_file_name(name)
}

fn make(node: &FileNode) -> anyhow::Result<()> {
    let part = unfinished(&node.path);
    let (fd, file) = open_unfinished(&part)?;
    let made = fill(fd, node.bytes).and_then(|region| {
        file.sync_all()?;
        // Where somebody else was faster, his stays.
        renameat_with(CWD, &part, CWD, &node.path, RenameFlags::NOREPLACE)?;
        drop(region);
        Ok(())
    });
    if made.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    made
}

/// An empty file of that name that nobody else is filling, locked; and the same open file to synchronize.
fn open_unfinished(part: &Path) -> anyhow::Result<(Fd, File)> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(libc::O_NOFOLLOW)
            .open(part)?;
        let fd = Fd::from_raw(file.try_clone()?.into_raw_fd());
        fd.lock_exclusive().map_err(|errno| anyhow::anyhow!("another spm is about it: {errno}"))?;
        // It may have got its name, and be a node, before the lock was ours.
        let (ours, there) = (file.metadata()?, part.symlink_metadata());
        if there.is_ok_and(|there| there.ino() == ours.ino() && there.dev() == ours.dev()) {
            file.set_len(0)?;
            return Ok((fd, file));
        }
    }
}

fn fill(fd: Fd, bytes: u64) -> anyhow::Result<Region> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())?;
    let mut region = file::create(fd, bytes)?;
    MappedNode::format(&mut region, uuid, file::data_align(bytes), Overwrite::No)?;
    Ok(region)
}

/// A file that is there already: a node, what an interrupted version of long ago left, or somebody's.
fn finish(node: &FileNode) -> anyhow::Result<()> {
    let path = node.path.display();
    // Of what cannot be read, and of what a torn write left, its line says so.
    let is_unformatted =
        read(node).is_err_and(|error| matches!(error.downcast_ref(), Some(OpenError::NotFormatted)));
    if !is_unformatted {
        return Ok(());
    }
    let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).to_owned();
    let Ok(file) = options.open(&node.path) else { return Ok(()) };
    let is_begun = file.metadata()?.is_file() && is_all_zero(&file, node.bytes.next_multiple_of(PAGE_SIZE))?;
    if !is_begun {
        remark(format_args!(
            "node {}: {path} is there, but is no node and not empty: it is left alone; move it away to have one made",
            node.id
        ));
        return Ok(());
    }
    remark(format_args!("node {}: {path} was begun and never finished: it is finished now", node.id));
    fill(Fd::from_raw(file.into_raw_fd()), node.bytes).map(|_| ())
}

/// Whether a file has just so many bytes, or none yet, all zero.
fn is_all_zero(file: &File, bytes: u64) -> anyhow::Result<bool> {
    let len = file.metadata()?.len();
    if len != 0 && len != bytes {
        return Ok(false);
    }
    let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
    while at < len {
        let read = file.read_at(&mut buffer, at)?;
        if read == 0 || buffer[..read].iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
        at += read as u64;
    }
    Ok(true)
}
