//! Byte-addressable nodes: their pages are mapped, not copied in and out.
//!
//! [`MappedNode`] is the component, over any [`Medium`]; [`Region`](spmem_sys::region::Region) is the medium of this
//! machine: [`numa`](crate::numa), [`dax`](crate::dax) and [`file`](crate::file) make one. On a persistent medium
//! [`MappedNode::open`] finds what was there, [`Peer`] is who else maps it, [`Summary`] tells without opening.
//!
//! ```
//! use spmem_core::{frames::Metadata, node::{Class, Services}, units::{DomainId, FrameCount, NodeId}};
//! use spmem_core::zero::Initial;
//! use spmem_node::mapped::{MappedNode, Refused, mapped_spec};
//! use spmem_node::numa;
//!
//! let region = numa::region(64 * 4096, 0)?; // sixty-four frames of the kernel's node 0
//! let lent = Metadata::from_heap(FrameCount(64))?;
//! let services = Services::MIGRATION | Services::WRITE_FENCE;
//! let spec = mapped_spec(Class::Slower, services, "doc");
//! let mut node = MappedNode::new(region, NodeId::ONE, spec, lent, Initial::Zero)?;
//!
//! let page = [7; 4096];
//! let handle = node.demote(DomainId::ROOT, &page)?;
//! let grants = [node.frames().grant()];
//! assert!(node.place_to_read(handle, &grants)?.is_some());
//! assert_eq!(node.write(handle, 0, &[1; 8]), Err(Refused::Fenced { node: NodeId::ONE }));
//! let mut back = [0; 4096];
//! node.promote(handle, &mut back)?;
//! assert_eq!(back, page);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod error;
mod frames;
mod ledger;
mod medium;
mod node;
mod peer;
mod record;
mod records;
mod region;
mod superblock;

pub use error::{OpenError, Refused};
pub use frames::{NodeFrames, mapped_spec};
pub use ledger::{Opened, Overwrite, Repair, Summary};
pub use medium::{Medium, MediumError, Operation};
pub use node::{MappedNode, Whole};
pub use peer::{Peer, SharedBlock};
pub use record::PeerId;
pub use superblock::VERSION;
