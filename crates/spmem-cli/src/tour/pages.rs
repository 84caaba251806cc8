//! Pages: data such as programs hold, made from a page's number and generation, so that it can be made again to check.
//!
//! Half of the pages are a server's log, a quarter records with random numbers in them, a quarter is slack filled with
//! one value, as heaps have it.

use std::io::Write;

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// Fills `page` with what page `number` holds in its `generation`.
pub fn fill(page: &mut [u8; PAGE], number: u64, generation: u32) {
    let mut random = Random::new(number << 32 | u64::from(generation));
    match number % 4 {
        0 => page.fill(random.next().to_le_bytes()[0]),
        1 => fill_with(page, |line| write_record(line, &mut random)),
        _ => {
            let mut milliseconds = random.next() % 86_400_000;
            fill_with(page, |line| {
                milliseconds += random.next() % 50;
                write_log(line, milliseconds, &mut random)
            });
        }
    }
}

fn fill_with(page: &mut [u8; PAGE], mut write_line: impl FnMut(&mut &mut [u8]) -> std::io::Result<()>) {
    let mut rest = &mut page[..];
    // The last line is cut where the page ends.
    while !rest.is_empty() && write_line(&mut rest).is_ok() {}
}

fn write_log(to: &mut &mut [u8], milliseconds: u64, random: &mut Random) -> std::io::Result<()> {
    const PATHS: [&str; 4] = ["/api/v2/orders/list", "/api/v2/orders/status", "/static/app.js", "/healthz"];
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    let path = PATHS[random.below(PATHS.len())];
    writeln!(
        to,
        "2026-03-14T{:02}:{:02}:{:02}.{rest:03}Z INFO  http: request served method=GET path={path} status=200 bytes={}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        512 + random.below(8) * 256,
    )
}

fn write_record(to: &mut &mut [u8], random: &mut Random) -> std::io::Result<()> {
    const CITIES: [&str; 5] = ["Lisbon", "Osaka", "Nairobi", "Quito", "Tromso"];
    writeln!(
        to,
        r#"{{"id":{},"customer":"customer-{:04}","city":"{}","balance":{}.{:02},"active":true,"tags":["retail","web"]}}"#,
        random.below(10_000_000),
        random.below(10_000),
        CITIES[random.below(CITIES.len())],
        random.below(5_000),
        random.below(100),
    )
}

/// SplitMix64 (Steele, Lea and Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `bound`.
    #[allow(clippy::cast_possible_truncation, reason = "the remainder is below a usize")]
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spmem_node::compressed::{Codec, Encoded, Scratch};

    fn page(number: u64, generation: u32) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        fill(&mut page, number, generation);
        page
    }

    #[test]
    fn a_page_can_be_made_again_and_differs_from_every_other() {
        for number in 1..4 {
            assert!(page(number, 3) == page(number, 3));
            assert!(page(number, 3) != page(number, 4));
            assert!(page(number, 3) != page(number + 4, 3));
        }
    }

    #[test]
    fn the_data_compresses_as_much_as_the_budget_needs() {
        let (codec, mut scratch) = (Codec::new(1), Scratch::new());
        let sizes = (0..400).map(|number| match codec.encode(&page(number, 0), &mut scratch) {
            Encoded::SameFilled(_) => 0,
            Encoded::Compressed { bytes, .. } => bytes.len(),
            Encoded::Incompressible { .. } => PAGE,
        });
        let ratio = (400 * PAGE) as f64 / sizes.sum::<usize>() as f64;
        assert!((5.0..9.0).contains(&ratio), "{ratio}");
    }
}
