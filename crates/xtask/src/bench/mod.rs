//! `cargo xtask bench`: speed, always as a ratio to something run beside it.

mod access_rows;
mod auto;
mod density;
mod fits;
mod frames;
mod heat;
mod peer;
mod redis_rows;
mod wall;
mod zram;
mod zram_plot;

use clap::Subcommand;

/// Which bench.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Automatic budgets: beside bare runs.
    Auto(auto::Options),
    /// What a page takes once it is cold: beside zram, on the memory of real programs (root).
    Density(density::Options),
    /// A program that fits its budget: pairs of bare and managed runs.
    Fits(fits::Options),
    /// The frame allocator: beside others.
    Frames(frames::Options),
    /// Sources of heat: how soon each follows a hot set that moves.
    Heat(heat::Options),
    /// A check of the wall: beside working it out each time.
    Wall(wall::Options),
    /// Cold pages: beside kernel swap on zram at equal total RAM (root).
    Zram(zram::Options),
}

/// Runs it.
pub(crate) fn run(which: &Bench) -> anyhow::Result<()> {
    match which {
        Bench::Auto(options) => auto::run(options),
        Bench::Density(options) => density::run(options),
        Bench::Fits(options) => fits::run(options),
        Bench::Frames(options) => frames::run(options),
        Bench::Heat(options) => heat::run(options),
        Bench::Wall(options) => wall::run(options),
        Bench::Zram(options) => zram::run(options),
    }
}
