//! The dense encoding: zstd, with or without a dictionary, for pages that leave, and for those that are stored already and stay cold.
//!
//! [`DenseStage`] encodes a page that leaves, and reads it back. [`DenseEncoder`] encodes one that is stored; the store takes the result
//! ([`super::Store::densify`]) once [`DenseDecoder`], its own, has made the same page of it. A dictionary has one of two
//! [`Slot`]s, so that a new one can be used while pages still need the old one.
//!
//! An encoding is a zstd frame without magic and sizes. The decoder, which is C, is run on bytes that an encoder made, not on what damage made of
//! them: [`CHECK_BYTES`] of xxh3 come along with a frame for a stored page, and of the checksum in front of an object half of the bits are the frame's, looked at
//! before it is decoded, and half the page's ([`checksum`]).
//!
//! Takes no lock. The decoder's memory is there before it is needed: decoding allocates nothing, as a fork may be under
//! way.

use alloc::boxed::Box;
use alloc::vec;
use core::cell::Cell;

use xxhash_rust::xxh3::xxh3_64_with_seed;
use zstd_safe::{CCtx, CParameter, DCtx, DDict, DParameter, FrameFormat};

use super::codec::{CHECKSUM_BITS, CHECKSUM_MASK, Codec, MAX_PAYLOAD_BYTES, Storable, Verified};
use crate::backend::{Damage, PAGE_BYTES, Page};

/// The check at the end of an encoding that has not been stored.
const CHECK_BYTES: usize = 4;
/// Bits of an object's checksum that are the page's; those above are the frame's.
const PAGE_BITS: u32 = CHECKSUM_BITS / 2;
const PAGE_MASK: u64 = (1 << PAGE_BITS) - 1;
/// Longest dictionary: more of it makes pages hardly smaller, and each process has a digest of it (ADR 24).
pub const MAX_DICTIONARY_BYTES: usize = 4096;
/// Higher ones give a percent for several times the time.
const LEVEL: i32 = 1;
/// What a page cannot come to: zstd's bound for one is 4096 + 80 bytes.
const OUT_BYTES: usize = PAGE_BYTES + 256;

/// One of the two dictionaries that can be in use at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The first.
    A,
    /// The other.
    B,
}

impl Slot {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    pub(super) const fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// How an object's payload is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// An lz4 block.
    Lz4,
    /// A zstd frame.
    Dense {
        /// The dictionary that it needs.
        slot: Option<Slot>,
        /// Whether the page was stored as lz4 before.
        is_anew: bool,
    },
}

/// What tells a dictionary from others: xxh3 of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DictionaryName(pub u64);

impl DictionaryName {
    /// Of these bytes, for stores with that codec.
    #[must_use]
    pub fn of(codec: &Codec, bytes: &[u8]) -> Self {
        Self(xxh3_64_with_seed(bytes, codec.seed()))
    }
}

/// A page in the dense encoding, not compared with anything yet.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    /// The frame and its check.
    pub bytes: &'a [u8],
    /// The dictionary that it needs.
    pub slot: Option<Slot>,
}

impl<'a> Dense<'a> {
    /// Bytes that a store would keep.
    pub(super) fn frame_bytes(&self) -> usize {
        self.bytes.len().saturating_sub(CHECK_BYTES)
    }

    /// The frame, if it is what an encoder for stores with that codec made.
    pub(super) fn frame(&self, codec: &Codec) -> Option<&'a [u8]> {
        let (frame, check) = self.bytes.split_last_chunk()?;
        (check_of(frame, codec.seed()) == *check).then_some(frame)
    }
}

/// What is in front of a dense object: of xxh3 over its frame, seeded by the dictionary that it needs as well, the upper bits, of that over its
/// page the lower ones.
pub(super) fn checksum(codec: &Codec, dictionary: Option<DictionaryName>, page: &Page, frame: &[u8]) -> u64 {
    upper(codec, dictionary, frame) | xxh3_64_with_seed(page, codec.seed()) & PAGE_MASK
}

fn upper(codec: &Codec, dictionary: Option<DictionaryName>, frame: &[u8]) -> u64 {
    let seed = codec.seed() ^ dictionary.map_or(0, |name| name.0);
    xxh3_64_with_seed(frame, seed) << PAGE_BITS & CHECKSUM_MASK
}

/// Makes dense encodings. About 70 KiB of heap, and 150 for each dictionary.
pub struct DenseEncoder {
    seed: u64,
    plain: CCtx<'static>,
    with: [Option<CCtx<'static>>; 2],
    out: Box<[u8]>,
}

impl DenseEncoder {
    /// An encoder for the stores with that codec.
    #[must_use]
    pub fn new(codec: &Codec) -> Self {
        Self {
            seed: codec.seed(),
            plain: context(),
            with: [None, None],
            out: vec![0; OUT_BYTES].into_boxed_slice(),
        }
    }

    /// From now on `slot` means this dictionary; whether zstd takes it.
    pub fn set_dictionary(&mut self, slot: Slot, bytes: &[u8]) -> bool {
        let mut with = context();
        let is_taken = with.load_dictionary(bytes).is_ok();
        self.with[slot.index()] = is_taken.then_some(with);
        is_taken
    }

    /// Encodes `page`; `None` if it needs a dictionary that is not there, or comes to more than a page.
    pub fn encode(&mut self, page: &Page, slot: Option<Slot>) -> Option<Dense<'_>> {
        let len = self.frame(page, slot)?.len();
        let check = check_of(&self.out[..len], self.seed);
        self.out[len..len + CHECK_BYTES].copy_from_slice(&check);
        (len + CHECK_BYTES <= PAGE_BYTES).then_some(Dense { bytes: &self.out[..len + CHECK_BYTES], slot })
    }

    /// The frame alone, behind which there is room for a check.
    fn frame(&mut self, page: &Page, slot: Option<Slot>) -> Option<&[u8]> {
        let context = match slot {
            None => &mut self.plain,
            Some(slot) => self.with[slot.index()].as_mut()?,
        };
        let room = self.out.len() - CHECK_BYTES;
        let len = context.compress2(&mut self.out[..room], page).ok()?;
        self.out.get(..len)
    }
}

/// Encodes pages densely the first time that they are stored. About 0.2 MiB of heap, and as much for a dictionary.
pub struct DenseStage {
    codec: Codec,
    encoder: DenseEncoder,
    decoder: DenseDecoder,
    readback: Box<Page>,
    dictionary: Option<DictionaryName>,
}

/// Where a stage has its one dictionary; which slot the store has it in is the store's affair.
const STAGE_SLOT: Slot = Slot::A;

impl DenseStage {
    /// For the stores with that codec; `None` without memory for it.
    #[must_use]
    pub fn new(codec: &Codec) -> Option<Self> {
        let mut decoder = DenseDecoder::new();
        decoder.prepare().then(|| Self {
            codec: *codec,
            encoder: DenseEncoder::new(codec),
            decoder,
            readback: Box::new([0; PAGE_BYTES]),
            dictionary: None,
        })
    }

    /// The dictionary that it has.
    #[must_use]
    pub const fn dictionary(&self) -> Option<DictionaryName> {
        self.dictionary
    }

    /// Takes this dictionary in the place of the one that it has; if zstd does not, it has none.
    pub fn set_dictionary(&mut self, bytes: &[u8]) {
        let is_taken = self.encoder.set_dictionary(STAGE_SLOT, bytes)
            && self.decoder.set_dictionary(STAGE_SLOT, DictionaryName::of(&self.codec, bytes), bytes);
        self.dictionary = is_taken.then(|| DictionaryName::of(&self.codec, bytes));
    }

    /// Encodes `page`, reads it back and compares every byte (R19); `None` if it cannot be stored so. It is one for a store
    /// that has the stage's dictionary in `slot`; without one it takes none.
    pub fn stage(&mut self, page: &Page, slot: Option<Slot>) -> Option<Verified<'_>> {
        let own_slot = slot.map(|_| STAGE_SLOT);
        let frame = self.encoder.frame(page, own_slot)?;
        let is_same =
            self.decoder.decompress(frame, own_slot, &mut self.readback).is_ok() && *self.readback == *page;
        (is_same && frame.len() <= MAX_PAYLOAD_BYTES).then(|| {
            let dictionary = self.dictionary.filter(|_| slot.is_some());
            let checksum = checksum(&self.codec, dictionary, page, frame);
            let encoding = Encoding::Dense { slot, is_anew: false };
            let storable = Storable::Object { bytes: frame, checksum, encoding, dictionary };
            Verified { storable, seed: self.codec.seed() }
        })
    }
}

fn context() -> CCtx<'static> {
    let mut context = CCtx::create();
    let parameters = [
        CParameter::CompressionLevel(LEVEL),
        // What a frame would say of itself is known: 4096 bytes, this codec, a checksum of ours.
        CParameter::Format(FrameFormat::Magicless),
        CParameter::ContentSizeFlag(false),
        CParameter::ChecksumFlag(false),
        CParameter::DictIdFlag(false),
    ];
    for parameter in parameters {
        context.set_parameter(parameter).expect("zstd knows its own parameters");
    }
    context
}

fn check_of(frame: &[u8], seed: u64) -> [u8; CHECK_BYTES] {
    let [a, b, c, d, ..] = xxh3_64_with_seed(frame, seed).to_le_bytes();
    [a, b, c, d]
}

/// What a store needs to read dense encodings: about 35 KiB, once there is one (95 where zstd is not built as for the agent), and
/// 31 KiB for each dictionary.
pub(super) struct DenseDecoder {
    /// Taken while it works.
    context: Cell<Option<DCtx<'static>>>,
    dictionaries: [Option<(DictionaryName, DDict<'static>)>; 2],
    /// Which of them came last.
    newest: Option<Slot>,
    bytes: usize,
}

impl DenseDecoder {
    pub(super) const fn new() -> Self {
        Self { context: Cell::new(None), dictionaries: [None, None], newest: None, bytes: 0 }
    }

    /// Heap that it takes.
    pub(super) fn metadata_bytes(&self) -> usize {
        self.bytes + self.dictionaries.iter().flatten().map(|(_, dictionary)| dictionary.sizeof()).sum::<usize>()
    }

    /// Gets ready; whether there is memory for it.
    pub(super) fn prepare(&mut self) -> bool {
        if self.context.get_mut().is_none() {
            *self.context.get_mut() = Self::make();
        }
        self.bytes = self.context.get_mut().as_ref().map_or(0, DCtx::sizeof);
        self.bytes > 0
    }

    /// In a forked child: the parent may have been decoding, in memory that is torn now. It is left as it is, and `make` makes another;
    /// whether it did, if there was one.
    pub(super) fn renew(&mut self, make: impl FnOnce() -> Option<DCtx<'static>>) -> bool {
        if self.bytes == 0 {
            return true;
        }
        core::mem::forget(self.context.replace(make()));
        self.bytes = self.context.get_mut().as_ref().map_or(0, DCtx::sizeof);
        self.bytes > 0
    }

    /// As a fork in the middle of a decoding leaves it.
    #[cfg(test)]
    pub(super) fn lose_context(&self) {
        core::mem::forget(self.context.take());
    }

    pub(super) fn make() -> Option<DCtx<'static>> {
        let mut context = DCtx::try_create()?;
        context.set_parameter(DParameter::Format(FrameFormat::Magicless)).ok()?;
        Some(context)
    }

    /// From now on `slot` means this dictionary: no object may need another. Whether zstd and memory allow it.
    pub(super) fn set_dictionary(&mut self, slot: Slot, name: DictionaryName, bytes: &[u8]) -> bool {
        let dictionary = &mut self.dictionaries[slot.index()];
        *dictionary = DDict::try_create(bytes).map(|digest| (name, digest));
        let is_made = dictionary.is_some();
        self.newest = if is_made { Some(slot) } else { self.newest.filter(|&newest| newest != slot) };
        is_made
    }

    /// The dictionary that came last, and its slot.
    pub(super) fn newest(&self) -> Option<(Slot, DictionaryName)> {
        self.newest.and_then(|slot| Some((slot, self.name_of(slot)?)))
    }

    pub(super) fn name_of(&self, slot: Slot) -> Option<DictionaryName> {
        self.dictionaries[slot.index()].as_ref().map(|(name, _)| *name)
    }

    /// Whether it is ready for such an encoding, with that dictionary where it is one with a dictionary.
    pub(super) fn reads(&self, encoding: Encoding, dictionary: Option<DictionaryName>) -> bool {
        let Encoding::Dense { slot, .. } = encoding else { return true };
        let has = |slot| dictionary.is_some() && self.name_of(slot) == dictionary;
        self.bytes > 0 && slot.is_none_or(has)
    }

    /// Writes the page of a stored frame, if they are what `checksum` was made from; it is anything after an error.
    pub(super) fn decode(
        &self,
        codec: &Codec,
        (frame, checksum): (&[u8], u64),
        slot: Option<Slot>,
        page: &mut Page,
    ) -> Result<(), Damage> {
        let damage = |found| Err(Damage::Checksum { stored: checksum, found });
        let dictionary = slot.and_then(|slot| self.name_of(slot));
        let found = upper(codec, dictionary, frame);
        if found != checksum & !PAGE_MASK {
            return damage(found | checksum & PAGE_MASK);
        }
        self.decompress(frame, slot, page)?;
        let found = self::checksum(codec, dictionary, page, frame);
        if found == checksum { Ok(()) } else { damage(found) }
    }

    /// Writes the page that an encoder's frame makes; it is anything after an error.
    pub(super) fn decompress(&self, frame: &[u8], slot: Option<Slot>, page: &mut Page) -> Result<(), Damage> {
        let mut context = self.context.take().ok_or(Damage::Undecodable { decoded: None })?;
        let decoded = match slot {
            None => context.decompress(&mut page[..], frame).ok(),
            Some(slot) => self.dictionaries[slot.index()]
                .as_ref()
                .and_then(|(_, dictionary)| context.decompress_using_ddict(&mut page[..], frame, dictionary).ok()),
        };
        self.context.set(Some(context));
        if decoded == Some(PAGE_BYTES) { Ok(()) } else { Err(Damage::Undecodable { decoded }) }
    }
}

/// A dictionary for pages like these; `None` if zstd finds nothing that they have in common.
#[cfg(any(test, feature = "train"))]
#[must_use]
pub fn train(pages: &[Page]) -> Option<Box<[u8]>> {
    let mut dictionary = vec![0; MAX_DICTIONARY_BYTES];
    let sizes = vec![PAGE_BYTES; pages.len()];
    let len = zstd_safe::train_from_buffer(&mut dictionary[..], pages.as_flattened(), &sizes).ok()?;
    dictionary.truncate(len);
    Some(dictionary.into_boxed_slice())
}
