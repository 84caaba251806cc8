//! Pages that stay away until they are stored more densely, and are then read, written and inherited.
//!
//! The suite looks into the report: pages must have been recompressed.

use std::time::{Duration, Instant};

use crate::harness::{Case, Ctx, Outcome, bail};
use crate::model::{Bytes, PAGE, mix, random};
use crate::sys;

/// Whose report must show recompressed pages.
pub const CASES: &[Case] =
    &[Case::new("store-cold", "pages that stay cold for long come back whole, in a child too", cold)];

/// Longer than a page has to stay away, by a few batches.
const COLD: Duration = Duration::from_secs(14);

/// Records whose fields differ and whose form does not: zstd makes less of them than lz4 does.
fn record_page(key: u64, page: usize, bytes: &mut Bytes) {
    random(mix(key ^ page as u64), bytes);
    for (index, record) in bytes.chunks_exact_mut(64).enumerate() {
        let number = (page * 64 + index) as u64;
        record[..16].copy_from_slice(b"{\"city\":\"Ravenna");
        record[16..24].copy_from_slice(&number.to_le_bytes());
        // Digits: four bits a byte.
        record[24..56].iter_mut().for_each(|byte| *byte = b'0' + (*byte & 7));
        record[56..].copy_from_slice(b"\",\"n\":0}");
    }
}

fn write(base: usize, page: usize, bytes: &Bytes) {
    // SAFETY: a mapped page.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (base + page * PAGE) as *mut u8, PAGE) };
}

fn check(base: usize, page: usize, key: u64, what: &str) -> Outcome {
    let mut wanted = [0; PAGE];
    record_page(key, page, &mut wanted);
    // SAFETY: a mapped page.
    let found = unsafe { std::slice::from_raw_parts((base + page * PAGE) as *const u8, PAGE) };
    if let Some(at) = (0..PAGE).find(|&at| found[at] != wanted[at]) {
        bail!("{what}: page {page}, offset {at}: expected {:#04x}, found {:#04x}", wanted[at], found[at]);
    }
    Ok(())
}

fn cold(ctx: &Ctx) -> Outcome {
    let pages = ctx.pages() * 2;
    let base = sys::anon(pages)?;
    let mut bytes = [0; PAGE];
    // A page's key is that of its last writing.
    let mut keys = vec![ctx.seed; pages];
    for (page, key) in keys.iter().enumerate() {
        record_page(*key, page, &mut bytes);
        write(base, page, &bytes);
    }
    let mut rng = ctx.rng(0);
    for round in ctx.rounds(1) {
        let since = Instant::now();
        while since.elapsed() < COLD {
            // Some of the cold ones are needed all the same, at any moment of their being recompressed; some change.
            let page = rng.below(pages / 8) * 8;
            check(base, page, keys[page], "a page used now and then")?;
            if rng.one_in(4) {
                keys[page] = mix(keys[page]);
                record_page(keys[page], page, &mut bytes);
                write(base, page, &bytes);
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        // SAFETY: the child checks memory and leaves.
        let child = unsafe { libc::fork() };
        if child < 0 {
            bail!("fork: errno {}", sys::errno());
        }
        let who = if child == 0 { "the child's" } else { "the parent's" };
        let result = (0..pages).try_for_each(|page| check(base, page, keys[page], who));
        if child == 0 {
            if let Err(failure) = &result {
                crate::harness::report(&failure.to_string());
            }
            // SAFETY: nothing of this process has to be put in order.
            unsafe { libc::_exit(i32::from(result.is_err())) };
        }
        result?;
        let mut status = 0;
        // SAFETY: writes the status.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        if waited != child || status != 0 {
            bail!("round {round}: the child ended with status {status:#x}");
        }
    }
    sys::unmap(base, pages)
}
