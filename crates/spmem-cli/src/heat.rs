//! Heat: which sources this kernel has, for `spm nodes -v`, and whether the one that the configuration asks for is among them.

use std::path::Path;

use anyhow::bail;
use spmem_core::heat::{Asker, Facts, Source, Standing, Wish, choose, standing};

/// A source, and how it stands.
pub struct HeatLine {
    /// Which.
    pub source: Source,
    /// Whether it is the one, and why not.
    pub standing: Standing,
}

/// All of them.
pub fn lines(wish: Wish) -> Vec<HeatLine> {
    let facts = facts();
    Source::ALL.into_iter().map(|source| HeatLine { source, standing: standing(source, wish, &facts) }).collect()
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
