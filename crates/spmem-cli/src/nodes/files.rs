//! Nodes of kind "file": what their superblocks say.
//!
//! [`line()`] reads one, without its lock and without changing it; [`create`] makes those that are not there.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Context;
use spmem_core::node::{NodeSpec, NodeType, Services};
use spmem_core::units::{FrameCount, PAGE_SIZE};
use spmem_node::file;
use spmem_node::mapped::{MappedNode, OpenError, Overwrite, Summary, mapped_spec};
use spmem_sys::fd::Fd;
use spmem_sys::region::Access;

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
    if file.metadata().is_ok_and(|data| data.len() < PAGE_SIZE) {
        return Err(OpenError::NotFormatted).with_context(|| path.to_string());
    }
    let region = file::map(Fd::from_raw(file.into_raw_fd()), Access::Read);
    let region = region.map_err(|errno| anyhow::anyhow!("{path} cannot be mapped: {errno}"))?;
    Summary::read(&region).with_context(|| path.to_string())
}

/// Makes the files that are not there, empty nodes in them.
///
/// # Errors
/// One cannot be made: no room, for one. What had been begun of it is gone then.
pub fn create(nodes: &[FileNode]) -> anyhow::Result<()> {
    for node in nodes {
        let path = node.path.display();
        let file = match OpenOptions::new().read(true).write(true).create_new(true).open(&node.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error).with_context(|| format!("node {}: {path} cannot be made", node.id)),
        };
        let made = make(file, node.bytes).with_context(|| format!("node {}: {path} cannot be made", node.id));
        if made.is_err() {
            let _ = std::fs::remove_file(&node.path);
        }
        made?;
    }
    Ok(())
}

fn make(file: File, bytes: u64) -> anyhow::Result<()> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())?;
    let mut region = file::create(Fd::from_raw(file.into_raw_fd()), bytes)?;
    MappedNode::format(&mut region, uuid, file::data_align(bytes), Overwrite::No)?;
    Ok(())
}
