//! A page of a simulated process: where it is, and what it would hold.

use spmem_core::lru::Age;

/// What was stored of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) bytes: u64,
    pub(super) version: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Nowhere,
    /// In its place, maybe with a copy from before.
    Present(Option<Stored>),
    /// In the holding area, in the slot of that number, maybe with a copy from before.
    Held {
        slot: u64,
        version: u32,
        copy: Option<Stored>,
    },
    Away(Stored),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) place: Place,
    pub(super) age: Age,
    /// In place of its bytes: how often it was written.
    pub(super) version: u32,
    pub(super) is_refused: bool,
}
