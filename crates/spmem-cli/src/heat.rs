//! Heat: which sources this kernel has, for `spm nodes -v`, and whether the one that the configuration asks for is among them.

use std::path::Path;

use anyhow::bail;
use spmem_core::heat::{Asker, Facts, Source, Standing, Wish, choose, standing};

use crate::run::kernel;

/// A source, and how it stands.
pub struct HeatLine {
    /// Which.
    pub source: Source,
    /// Whether it is the one, and why not.
    pub standing: Standing,
    /// Why nobody here would ask it: `spm run` refuses.
    pub refusal: Option<String>,
}

impl HeatLine {
    /// Whether who asks gets this one.
    pub fn is_chosen(&self) -> bool {
        self.standing == Standing::Chosen && self.refusal.is_none()
    }

    /// How it stands, in words.
    pub fn reason(&self) -> String {
        self.refusal
            .as_ref()
            .map_or(self.standing.to_string(), |refusal| format!("spm run would refuse: {refusal}"))
    }
}

/// All of them.
pub fn lines(wish: Wish) -> Vec<HeatLine> {
    let facts = facts();
    // What is asked within a program is asked in programs of `spm run` only.
    let refusal = kernel::open().err().map(|lack| lack.to_string());
    let line = |source: Source| {
        let standing = standing(source, wish, &facts);
        let is_within = source.asker() == Asker::Within && !matches!(standing, Standing::Lacking(_));
        HeatLine { source, standing, refusal: refusal.clone().filter(|_| is_within) }
    };
    Source::ALL.into_iter().map(line).collect()
}

/// Looks whether what is asked for can be had. Without a wish it can, and nothing is looked at.
///
/// # Errors
/// It cannot; the message says why and what would work.
pub fn check(wish: Wish) -> anyhow::Result<()> {
    let Wish::Only(source) = wish else { return Ok(()) };
    match choose(wish, &facts(), source.asker()) {
        Ok(_) => Ok(()),
        Err(refusal) => bail!("[run] of the configuration: {refusal}; spm nodes -v shows all"),
    }
}

/// Whether the kernel is to tell a program which of its placed pages are used.
pub fn is_tracked(wish: Wish) -> bool {
    choose(wish, &facts(), Asker::Within) == Ok(Source::Rwp)
}

fn facts() -> Facts {
    spmem_node::heat::facts(Path::new("/"))
}
