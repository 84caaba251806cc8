//! Compressed RAM made in software: the back end of class 4 nodes (cram).
//!
//! A page goes through [`Codec`] (same-filled, lz4, checksum) or [`DenseStage`] (zstd), is read back ([`Verified`]), and is
//! kept by [`Store`] in a slot of its size class, in frames from a [`FrameSource`] whose bytes are
//! [`FrameBytes`]. [`Stats`] names every byte, used or wasted.
//!
//! The line of a store, one file a step: `codec` -> `store` -> `class` -> `block` -> `frames`. What stays cold is encoded
//! once more, smaller: `dense` -> `densify`.
//!
//! ```
//! use spmem_node::compressed::{Scratch, Store};
//! # use spmem_node::compressed::{FrameBytes, GrantedFrames};
//! # use spmem_core::{frames::Metadata, units::FrameCount};
//! # struct Ram(Vec<u8>);
//! # impl FrameBytes for Ram {
//! #     fn bytes(&self, offset: usize, len: usize) -> &[u8] { &self.0[offset..offset + len] }
//! #     fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
//! #         &mut self.0[offset..offset + len]
//! #     }
//! #     fn discard(&mut self, offset: usize, len: usize) { self.0[offset..offset + len].fill(0) }
//! # }
//! # let ram = Ram(vec![0; 64 * 4096]);
//! let lent = Metadata::from_heap(FrameCount(64)).expect("a little memory");
//! let frames = GrantedFrames::embedded(FrameCount(64), lent)?;
//! let mut store = Store::new(frames, ram, 0x5eed);
//! let mut page = [0; 4096];
//! for (i, byte) in page.iter_mut().enumerate() {
//!     *byte = (i % 50) as u8;
//! }
//!
//! let (mut scratch, mut readback) = (Scratch::new(), [0; 4096]);
//! let verified = store.codec().encode(&page, &mut scratch).verify(&page, &mut readback)?;
//! let handle = store.insert(&verified)?;
//!
//! let mut back = [0; 4096];
//! store.load(handle, &mut back)?;
//! assert_eq!(back, page);
//! store.remove(handle)?;
//! assert_eq!(store.stats().object_pages, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod block;
mod class;
mod codec;
mod dense;
#[cfg(test)]
mod dense_tests;
mod densify;
mod frames;
mod granted;
mod handle;
mod stats;
mod store;
#[cfg(test)]
mod store_tests;

pub use codec::{Codec, Encoded, HEADER_BYTES, Label, MAX_PAYLOAD_BYTES, Scratch, Verified, Workspace};
#[cfg(any(test, feature = "train"))]
pub use dense::train;
pub use dense::{Dense, DenseEncoder, DenseStage, DictionaryName, Encoding, MAX_DICTIONARY_BYTES, Slot};
pub use densify::{Kept, Original};
pub use frames::{FrameBlock, FrameBytes, FrameSource};
pub use granted::{GrantedFrames, Owners, SetupError, cram_spec, sysram_spec};
pub use handle::Fill;
pub use stats::Stats;
pub use store::Store;
