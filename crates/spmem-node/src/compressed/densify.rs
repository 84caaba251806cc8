//! The dense encoding in the store: of pages that come so, and recompression, where an lz4 encoding gives way to a dense one.
//!
//! [`Store::original`] hands out what to encode anew, [`Store::densify`] takes the result. Nothing is trusted: the old
//! object is decoded and checked, so is the new one, by the decoder that will have to read it, and the two pages are
//! compared byte for byte. Only then is the old object given up. Whatever fails leaves it where it is.
//!
//! A page takes about 20 us here. Called by the runtime under its lock.

use zstd_safe::DCtx;

use super::class::{CLASSES, class_for};
use super::codec::{Codec, HEADER_BYTES, Label, MAX_PAYLOAD_BYTES};
use super::dense::{Dense, DenseDecoder, DictionaryName, Encoding, MAX_DICTIONARY_BYTES, Slot, checksum};
use super::frames::{FrameBytes, FrameSource};
use super::handle::Place;
use super::store::Store;
use crate::backend::{Corrupt, Handle, PAGE_BYTES, Page};

/// An encoding that may give way to a dense one.
#[derive(Clone, Copy, Debug)]
pub struct Original<'a> {
    /// Its length and checksum.
    pub label: Label,
    /// The lz4 block.
    pub bytes: &'a [u8],
}

impl Original<'_> {
    /// Writes the page, if it is what the label says; zeros otherwise.
    pub fn read(&self, codec: &Codec, page: &mut Page) -> bool {
        codec.decode(self.bytes, self.label.word, page).is_ok()
    }
}

/// Why a page keeps the encoding that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Another page is there by now, or none, or it is dense already.
    Changed,
    /// It would take as much as before.
    NoGain,
    /// What was made of it does not read back as the page, here.
    NotReproduced,
    /// No slot, or no memory for the decoder.
    NoRoom,
    /// The encoding that it has is damaged: its page is lost, and says so when it is loaded.
    Corrupt(Corrupt),
}

impl<F: FrameSource, M: FrameBytes> Store<F, M> {
    /// Whether the handle is that of an object in the first encoding, lz4.
    #[must_use]
    pub fn is_first_encoding(handle: Handle) -> bool {
        matches!(Place::unpack(handle), Some(Place::Object { encoding: Encoding::Lz4, .. }))
    }

    /// Whether the handle is that of an object in the dense encoding.
    #[must_use]
    pub fn is_dense(handle: Handle) -> bool {
        matches!(Place::unpack(handle), Some(Place::Object { encoding: Encoding::Dense { .. }, .. }))
    }

    /// Whether the handle is that of an object that was encoded anew.
    #[must_use]
    pub fn is_anew(handle: Handle) -> bool {
        let place = Place::unpack(handle);
        matches!(place, Some(Place::Object { encoding: Encoding::Dense { is_anew: true, .. }, .. }))
    }

    /// Gets the decoder ready for pages that come in the dense encoding; whether there is memory for it.
    pub fn prepare_dense(&mut self) -> bool {
        self.dense.prepare()
    }

    /// The newest dictionary, and its slot.
    pub fn newest_dictionary(&self) -> Option<(Slot, DictionaryName)> {
        self.dense.newest()
    }

    /// Whether this dictionary is the one in that slot.
    pub fn has_dictionary(&self, slot: Slot, name: DictionaryName) -> bool {
        self.dense.name_of(slot) == Some(name)
    }

    /// What is stored of a page in the first encoding; `None` if it is not, or not any more.
    pub fn original(&self, handle: Handle) -> Option<Original<'_>> {
        let Some(Place::Object { block, slot, tag, encoding: Encoding::Lz4 }) = Place::unpack(handle) else {
            return None;
        };
        let object = self.object(block, slot, tag).ok()?;
        Some(Original {
            label: Label { len: object.payload.len(), word: object.checksum, encoding: Encoding::Lz4 },
            bytes: object.payload,
        })
    }

    /// Puts `dense` in the place of the encoding that was handed out with `label`; the new handle. The old one is void then.
    ///
    /// # Errors
    /// Why not; then nothing has changed, and the old handle is good.
    pub fn densify(&mut self, handle: Handle, label: Label, dense: &Dense<'_>) -> Result<Handle, Kept> {
        let Some(Place::Object { block, slot, tag, encoding: Encoding::Lz4 }) = Place::unpack(handle) else {
            return Err(Kept::Changed);
        };
        let bytes = dense.frame_bytes();
        let (Some(class), Ok(length)) = (class_for(HEADER_BYTES + bytes), u16::try_from(bytes)) else {
            return Err(Kept::NoGain);
        };
        let (_, old_slot_bytes) = self.slot_range(block, slot).ok_or(Kept::Changed)?;
        let slot_bytes = CLASSES[usize::from(self.populous_class(class))].slot_bytes();
        if bytes > MAX_PAYLOAD_BYTES || slot_bytes >= old_slot_bytes {
            return Err(Kept::NoGain);
        }
        if !self.dense.prepare() {
            return Err(Kept::NoRoom);
        }
        let (frame, checksum) = self.compare(handle, (block, slot, tag), label, dense)?;
        let Some(target) = self.block_with_room(class) else { return Err(Kept::NoRoom) };
        // For want of frames it may be of a larger class.
        if self.blocks.get(target).is_none_or(|block| block.class().slot_bytes() >= old_slot_bytes) {
            return Err(Kept::NoRoom);
        }
        let new = self.write(target, frame, length, checksum, Encoding::Dense { slot: dense.slot, is_anew: true });
        // It was read a moment ago.
        self.remove(handle).map_err(Kept::Corrupt)?;
        Ok(new)
    }

    /// Both decoded and compared: the new frame and what is to be in front of it.
    fn compare<'a>(
        &self,
        handle: Handle,
        (block, slot, tag): (u32, u8, u16),
        label: Label,
        dense: &Dense<'a>,
    ) -> Result<(&'a [u8], u64), Kept> {
        let (mut old, mut new) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let object = self.object(block, slot, tag).map_err(|_| Kept::Changed)?;
        if (object.payload.len(), object.checksum) != (label.len, label.word) {
            return Err(Kept::Changed);
        }
        self.decode(&object, Encoding::Lz4, &mut old)
            .map_err(|damage| Kept::Corrupt(self.corrupt(handle, damage)))?;
        let frame = dense.frame(&self.codec).ok_or(Kept::NotReproduced)?;
        let is_read = self.dense.decompress(frame, dense.slot, &mut new).is_ok();
        if is_read && old == new {
            let dictionary = dense.slot.and_then(|slot| self.dense.name_of(slot));
            Ok((frame, checksum(&self.codec, dictionary, &new, frame)))
        } else {
            Err(Kept::NotReproduced)
        }
    }

    /// Pages that need the dictionary of that slot.
    pub fn dictionary_pages(&self, slot: Slot) -> u64 {
        self.totals.dense_pages[1 + slot.index()]
    }

    /// From now on `slot` means this dictionary. `false`, and nothing has changed, while pages need another, or if it
    /// cannot be one.
    pub fn set_dictionary(&mut self, slot: Slot, bytes: &[u8]) -> bool {
        self.dictionary_pages(slot) == 0
            && bytes.len() <= MAX_DICTIONARY_BYTES
            && self.dense.prepare()
            && self.dense.set_dictionary(slot, DictionaryName::of(&self.codec, bytes), bytes)
    }

    /// In a forked child, before anything is loaded: see [`super::dense`]. Whether what is stored can be read: `false` where there is no memory
    /// for another decoder, and pages that need one.
    #[must_use]
    pub fn settle_after_fork(&mut self) -> bool {
        self.settle_with(DenseDecoder::make)
    }

    pub(super) fn settle_with(&mut self, make: impl FnOnce() -> Option<DCtx<'static>>) -> bool {
        self.dense.renew(make) || self.totals.dense_pages == [0; 3]
    }
}
