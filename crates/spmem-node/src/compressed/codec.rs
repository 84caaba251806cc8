//! From a page to what is stored of it, and back: same-filled pages, lz4, checksums.
//!
//! [`Codec::encode`] turns a page into an [`Encoded`]; [`Encoded::verify`] reads that back and is
//! the only way to a [`Verified`], which is all that the store takes (R19). The store decodes with
//! [`Codec::decode`], which checks what it read (R20).
//!
//! The checksum is xxh3-64 of the page under the machine's seed, and that in turn seeds xxh3-64 of
//! the encoded bytes, of which 52 bits are kept: they tell the page and its encoding, so that a flipped bit is found even
//! where the codec would not care (an lz4 stream has bits that mean nothing). That of a dense object is another one ([`super::dense`]).
//!
//! Pure: needs no store and no lock.

use alloc::boxed::Box;
use alloc::vec;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::class::MAX_SLOT;
use super::dense::{self, DictionaryName, Encoding, Slot};
use super::handle::Fill;
use crate::backend::{Damage, PAGE_BYTES, Page, Stage, Unfit};

/// Bytes in front of each object's payload: length and checksum, in one word.
pub const HEADER_BYTES: usize = 8;
/// The most that an encoded page may take; above it, it is incompressible.
pub const MAX_PAYLOAD_BYTES: usize = MAX_SLOT - HEADER_BYTES;
/// Bits of a checksum; above them a header has the length.
pub(super) const CHECKSUM_BITS: u32 = 52;
pub(super) const CHECKSUM_MASK: u64 = (1 << CHECKSUM_BITS) - 1;

/// Encodes and decodes under one machine's checksum seed.
#[derive(Clone, Copy, Debug)]
pub struct Codec {
    seed: u64,
}

/// Buffers of the encoder: 13 KiB on the heap, made once, used for every page.
pub struct Scratch {
    table: CompressTable,
    out: Box<[u8]>,
}

impl Scratch {
    /// New buffers.
    #[must_use]
    pub fn new() -> Self {
        let out = vec![0; get_maximum_output_size(PAGE_BYTES)].into_boxed_slice();
        Self { table: CompressTable::small(), out }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// A page encoded, not yet read back.
#[derive(Clone, Copy, Debug)]
pub enum Encoded<'a> {
    /// One value throughout: kept in the handle alone.
    SameFilled(Fill),
    /// Compressed to at most [`MAX_PAYLOAD_BYTES`].
    Compressed {
        /// The lz4 block.
        bytes: &'a [u8],
        /// The checksum of the page and of `bytes`, under the codec's seed.
        checksum: u64,
        /// The seed.
        seed: u64,
    },
    /// Not worth storing compressed.
    Incompressible {
        /// Bytes it came to.
        encoded: usize,
    },
}

/// An encoded page that was read back and is byte for byte its source.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'a> {
    pub(super) storable: Storable<'a>,
    /// A store with another seed could not load it.
    pub(super) seed: u64,
}

impl Verified<'_> {
    /// Whether one value fills the page: it takes no frame.
    #[must_use]
    pub const fn is_same_filled(&self) -> bool {
        matches!(self.storable, Storable::Fill(_))
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Storable<'a> {
    Fill(Fill),
    Object {
        bytes: &'a [u8],
        checksum: u64,
        encoding: Encoding,
        /// The one that it needs.
        dictionary: Option<DictionaryName>,
    },
}

impl Codec {
    /// A codec whose checksums depend on `seed`, a random number of this machine.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Encodes `page`. Takes 5-13 us; the result borrows `scratch`.
    ///
    /// ```
    /// use spmem_node::compressed::{Codec, Encoded, Scratch};
    /// let mut scratch = Scratch::new();
    /// let zero = Codec::new(1).encode(&[0; 4096], &mut scratch);
    /// assert!(matches!(zero, Encoded::SameFilled(_)));
    /// ```
    pub fn encode<'a>(&self, page: &Page, scratch: &'a mut Scratch) -> Encoded<'a> {
        if let Some(fill) = Fill::of(page) {
            return Encoded::SameFilled(fill);
        }
        let Scratch { table, out } = scratch;
        let encoded =
            compress_into_with_table(page, out, table).expect("out holds what lz4 can make of a page at worst");
        match out.get(..encoded) {
            Some(bytes) if encoded <= MAX_PAYLOAD_BYTES => {
                Encoded::Compressed { bytes, checksum: self.checksum(page, bytes), seed: self.seed }
            }
            _ => Encoded::Incompressible { encoded },
        }
    }

    /// Writes the page that `bytes` encode, if they and it are what `checksum` was made from;
    /// zeros otherwise.
    pub(super) fn decode(&self, bytes: &[u8], checksum: u64, page: &mut Page) -> Result<(), Damage> {
        let damage = match decompress_into(bytes, page) {
            Err(_) => Damage::Undecodable { decoded: None },
            Ok(decoded) if decoded != PAGE_BYTES => Damage::Undecodable { decoded: Some(decoded) },
            Ok(_) => {
                let found = self.checksum(page, bytes);
                if found == checksum {
                    return Ok(());
                }
                Damage::Checksum { stored: checksum, found }
            }
        };
        page.fill(0);
        Err(damage)
    }

    pub(super) const fn seed(&self) -> u64 {
        self.seed
    }

    /// Could a store with this codec load it?
    pub(super) fn made(&self, page: &Verified<'_>) -> bool {
        page.is_same_filled() || page.seed == self.seed
    }

    /// What is in front of an object that is so encoded; `None` if it needs a dictionary that has no `name`.
    pub(super) fn checksum_of(
        &self,
        encoding: Encoding,
        name: impl FnOnce(Slot) -> Option<DictionaryName>,
        page: &Page,
        bytes: &[u8],
    ) -> Option<u64> {
        let dictionary = match encoding {
            Encoding::Lz4 => return Some(self.checksum(page, bytes)),
            Encoding::Dense { slot: None, .. } => None,
            Encoding::Dense { slot: Some(slot), .. } => Some(name(slot)?),
        };
        Some(dense::checksum(self, dictionary, page, bytes))
    }

    pub(super) fn checksum(&self, page: &Page, bytes: &[u8]) -> u64 {
        xxh3_64_with_seed(bytes, xxh3_64_with_seed(page, self.seed)) & CHECKSUM_MASK
    }
}

/// What is in front of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) length: u16,
    pub(super) checksum: u64,
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        debug_assert!(self.checksum <= CHECKSUM_MASK && usize::from(self.length) <= MAX_PAYLOAD_BYTES);
        (u64::from(self.length) << CHECKSUM_BITS | self.checksum).to_le_bytes()
    }

    pub(super) fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Self {
        let word = u64::from_le_bytes(bytes);
        let length = u16::try_from(word >> CHECKSUM_BITS).expect("twelve bits");
        Self { length, checksum: word & CHECKSUM_MASK }
    }
}

const _: () = assert!(MAX_PAYLOAD_BYTES < 1 << (u64::BITS - CHECKSUM_BITS));

impl<'a> Encoded<'a> {
    /// Reads the page back into `readback` and compares every byte with `page` (R19).
    ///
    /// # Errors
    /// [`Unfit`] if it is incompressible or does not read back.
    pub fn verify(&self, page: &Page, readback: &mut Page) -> Result<Verified<'a>, Unfit> {
        let (storable, seed, is_same) = match *self {
            Self::Incompressible { encoded } => {
                return Err(Unfit::Incompressible { encoded, limit: MAX_PAYLOAD_BYTES });
            }
            Self::SameFilled(fill) => (Storable::Fill(fill), 0, fill.is(page)),
            Self::Compressed { bytes, checksum, seed } => {
                let is_whole = matches!(decompress_into(bytes, readback), Ok(PAGE_BYTES));
                let object = Storable::Object { bytes, checksum, encoding: Encoding::Lz4, dictionary: None };
                (object, seed, is_whole && readback == page)
            }
        };
        if is_same { Ok(Verified { storable, seed }) } else { Err(Unfit::NotReproduced) }
    }
}

/// What another process of the same machine was told of a [`Verified`] page, next to its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Bytes of the encoding; 0 for a same-filled page.
    pub len: usize,
    /// The checksum, or the value that fills the page.
    pub word: u64,
    /// How the bytes are to be read.
    pub encoding: Encoding,
}

impl<'a> Verified<'a> {
    /// What to send: label and bytes.
    pub fn to_parcel(&self) -> (Label, &'a [u8]) {
        match self.storable {
            Storable::Fill(fill) => (Label { len: 0, word: fill.value(), encoding: Encoding::Lz4 }, &[]),
            Storable::Object { bytes, checksum, encoding, .. } => {
                (Label { len: bytes.len(), word: checksum, encoding }, bytes)
            }
        }
    }

    /// What [`Verified::to_parcel`] of a codec with the same seed sent of `page`; `dictionary` is the one that it was encoded with, if
    /// the label says that it was with one. `None` if it was something else: the checksum, or the value that fills a page, is held against the
    /// page itself (R19).
    pub fn from_parcel(
        codec: &Codec,
        label: Label,
        dictionary: Option<DictionaryName>,
        bytes: &'a [u8],
        page: &Page,
    ) -> Option<Self> {
        let storable = match label.len {
            0 => Storable::Fill(Fill::from_value(label.word).filter(|fill| fill.is(page))?),
            len if len <= MAX_PAYLOAD_BYTES => {
                let bytes = bytes.get(..len)?;
                let checksum = codec.checksum_of(label.encoding, |_| dictionary, page, bytes)?;
                Storable::Object {
                    bytes,
                    checksum: Some(label.word).filter(|&word| word == checksum)?,
                    encoding: label.encoding,
                    dictionary,
                }
            }
            _ => return None,
        };
        Some(Self { storable, seed: codec.seed })
    }
}

/// The buffers that staging a page needs: encoder and read-back.
pub struct Workspace {
    scratch: Scratch,
    readback: Box<Page>,
}

impl Stage for Codec {
    type Workspace = Workspace;
    type Staged<'a> = Verified<'a>;

    fn workspace(&self) -> Workspace {
        Workspace { scratch: Scratch::new(), readback: Box::new([0; PAGE_BYTES]) }
    }

    fn stage<'a>(&self, page: &'a Page, workspace: &'a mut Workspace) -> Result<Verified<'a>, Unfit> {
        let Workspace { scratch, readback } = workspace;
        self.encode(page, scratch).verify(page, readback)
    }
}
