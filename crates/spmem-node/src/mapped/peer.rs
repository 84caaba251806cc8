//! Peers: other processes, or other hosts, that map the medium of a persistent node (class 6).
//!
//! Every peer may read what is sealed or its own. A block is written by its owner alone; the owner is in the block's
//! record, one word, so a crash leaves exactly one at any time. Handing over is: make the data durable, then the word; taking: drop
//! what a cache holds, then say so. Frames are given out by the component alone.
//!
//! Holes: peers trust each other to write what they own only. A peer that ends keeps what it owns.

use alloc::vec::Vec;

use spmem_core::units::{FrameNumber, Order};

use super::error::{OpenError, Refused};
use super::ledger::Ledger;
use super::medium::Medium;
use super::node::check_range;
use super::record::{Entry, PeerId, Record};
use super::records::Records;
use crate::backend::Page;

/// A block that peers see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedBlock {
    /// Its first frame.
    pub frame: FrameNumber,
    /// Its order.
    pub order: Order,
    /// Who may write it.
    pub owner: PeerId,
    /// Its owner has not taken it yet ([`Peer::accept`]).
    pub is_fresh: bool,
    /// Nobody writes it.
    pub is_sealed: bool,
}

/// Somebody who maps the medium of a node that another process runs.
#[derive(Debug)]
pub struct Peer<M> {
    medium: M,
    records: Records,
    id: PeerId,
}

impl<M: Medium> Peer<M> {
    /// Looks at a medium as the peer of that number. Writes nothing: a medium that may only be read will do for reading.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(medium: M, id: PeerId) -> Result<Self, OpenError> {
        let (ledger, _) = Ledger::find(&medium)?;
        Ok(Self { medium, records: ledger.records, id })
    }

    /// What it looks at.
    pub const fn medium(&self) -> &M {
        &self.medium
    }

    /// All blocks in use, lowest first.
    ///
    /// # Errors
    /// [`OpenError::Medium`], [`OpenError::Record`].
    pub fn blocks(&self) -> Result<Vec<SharedBlock>, OpenError> {
        let scan = self.records.scan(&self.medium)?;
        if let Some(&frame) = scan.damaged.first() {
            return Err(OpenError::Record { frame, count: scan.damaged.len() as u64 });
        }
        let shared = |(frame, entry, _): (FrameNumber, Entry, u64)| {
            let Entry { order, owner, is_fresh, is_sealed, .. } = entry;
            SharedBlock { frame, order, owner, is_fresh, is_sealed }
        };
        Ok(scan.blocks.into_iter().map(shared).collect())
    }

    /// Copies a sealed page out, checked; whether there is one, unchanged from beginning to end.
    ///
    /// # Errors
    /// [`Refused::Medium`].
    pub fn load(&self, frame: FrameNumber, page: &mut Page) -> Result<bool, Refused> {
        let before = self.records.read(&self.medium, frame)?;
        let sealed = before.0.ok().and_then(|record| record.block).filter(|entry| entry.is_sealed);
        self.medium.read(self.records.data(frame), page)?;
        let is_whole = self.records.checksum(frame, page) == before.1;
        let is_there = sealed.is_some() && is_whole && self.records.read(&self.medium, frame)? == before;
        if !is_there {
            page.fill(0);
        }
        Ok(is_there)
    }

    /// Takes a block that was handed over to this peer. What its former owner wrote is seen from now on.
    ///
    /// # Errors
    /// [`Refused::HandedOver`] when it is somebody else's, [`Refused::OutOfBlock`] when there is none, [`Refused::Medium`].
    pub fn accept(&mut self, frame: FrameNumber) -> Result<(), Refused> {
        self.records.invalidate(&mut self.medium, frame)?;
        let (record, entry) = self.own(frame)?;
        self.medium.invalidate(self.records.data(frame), entry.order.bytes().0)?;
        let block = Some(Entry { is_fresh: false, ..entry });
        Ok(self.records.write(&mut self.medium, frame, Record { block, ..record })?)
    }

    /// Copies bytes of a block of its own out.
    ///
    /// # Errors
    /// As [`Peer::write`].
    pub fn read(&self, frame: FrameNumber, offset: u64, into: &mut [u8]) -> Result<(), Refused> {
        let (_, entry) = self.taken(frame)?;
        check_range(entry.order, offset, into.len() as u64)?;
        Ok(self.medium.read(self.records.data(frame) + offset, into)?)
    }

    /// Writes bytes of a block of its own.
    ///
    /// # Errors
    /// [`Refused::HandedOver`] when it is somebody else's or not taken yet, [`Refused::OutOfBlock`], [`Refused::Medium`].
    pub fn write(&mut self, frame: FrameNumber, offset: u64, bytes: &[u8]) -> Result<(), Refused> {
        let (_, entry) = self.taken(frame)?;
        check_range(entry.order, offset, bytes.len() as u64)?;
        Ok(self.medium.write(self.records.data(frame) + offset, bytes)?)
    }

    /// Hands a block of its own on, to another peer or back to the component. What it holds is durable before.
    ///
    /// # Errors
    /// As [`Peer::write`].
    pub fn hand_over(&mut self, frame: FrameNumber, to: PeerId) -> Result<(), Refused> {
        let (record, entry) = self.taken(frame)?;
        self.medium.flush(self.records.data(frame), entry.order.bytes().0)?;
        let block = Some(Entry { owner: to, is_fresh: true, ..entry });
        Ok(self.records.write(&mut self.medium, frame, Record { block, ..record })?)
    }

    fn own(&self, frame: FrameNumber) -> Result<(Record, Entry), Refused> {
        let none = Refused::OutOfBlock { offset: frame.offset().0, len: 0 };
        if u64::from(frame.0) >= self.records.frames().0 {
            return Err(none);
        }
        let record = self.records.read(&self.medium, frame)?.0.map_err(|_| none.clone())?;
        let entry = record.block.ok_or(none)?;
        if entry.owner == self.id { Ok((record, entry)) } else { Err(Refused::HandedOver { to: entry.owner }) }
    }

    fn taken(&self, frame: FrameNumber) -> Result<(Record, Entry), Refused> {
        let (record, entry) = self.own(frame)?;
        if entry.is_fresh { Err(Refused::HandedOver { to: self.id }) } else { Ok((record, entry)) }
    }
}
