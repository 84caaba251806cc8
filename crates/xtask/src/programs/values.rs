//! Realistic values for key-value stores: what `key` holds at `version`, made again wherever it is to be checked.
//!
//! JSON records, prose, log lines, numeric rows and tokens, 0.2 to 4 KiB, about 1.2 KiB on average, of different
//! entropy; no two alike.

use std::io::Write;
use std::sync::LazyLock;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Appends the value of `key` at `version` to `out`; the same bytes for the same arguments.
pub(crate) fn write_value(key: u32, version: u32, out: &mut Vec<u8>) {
    let mut rng = SmallRng::seed_from_u64(u64::from(key) << 32 | u64::from(version));
    let start = out.len();
    let length = 200 + rng.random_range(0..1000_usize) + rng.random_range(0..1000_usize);
    match key % 16 {
        0..=8 => write_json(key, version, length, &mut rng, out),
        9..=10 => write_prose(length, &mut rng, out),
        11..=12 => write_log(length, &mut rng, out),
        13..=14 => write_rows(length, &mut rng, out),
        _ => write_token(length, &mut rng, out),
    }
    out.truncate(start + length);
}

/// The name of `key` in a store: another one for each key, in scattered order.
pub(crate) fn key_name(key: u32) -> String {
    format!("user:{:08x}:record", key.wrapping_mul(0x9e37_79b1))
}

fn write_json(key: u32, version: u32, length: usize, rng: &mut SmallRng, out: &mut Vec<u8>) {
    let end = out.len() + length;
    let (first, last) = (sample_word(rng), sample_word(rng));
    put(out, format_args!("{{\"id\":{key},\"version\":{version},\"name\":\"{first} {last}\",\"email\":\""));
    put(out, format_args!("{first}.{last}{}@example.org\",\"active\":{},", key % 97, rng.random_bool(0.7)));
    put(
        out,
        format_args!("\"session\":\"{:016x}{:016x}\",\"orders\":[", rng.random::<u64>(), rng.random::<u64>()),
    );
    while out.len() < end {
        let (cents, count) = (rng.random_range(99..99_999_u32), rng.random_range(1..9_u8));
        let status =
            ["delivered", "delivered", "delivered", "shipped", "open", "cancelled"][rng.random_range(0..6_usize)];
        put(out, format_args!("{{\"article\":\"{}-{:04}\",", sample_word(rng), rng.random_range(0..9999_u32)));
        put(out, format_args!("\"quantity\":{count},\"unit_price\":{}.{:02},", cents / 100, cents % 100));
        put(
            out,
            format_args!("\"currency\":\"EUR\",\"status\":\"{status}\",\"note\":\"{}\"}},", sample_word(rng)),
        );
    }
}

fn write_prose(length: usize, rng: &mut SmallRng, out: &mut Vec<u8>) {
    let end = out.len() + length;
    while out.len() < end {
        let words = rng.random_range(5..16);
        for index in 0..words {
            let gap = if index + 1 == words { ". " } else { " " };
            put(out, format_args!("{}{gap}", sample_word(rng)));
        }
    }
}

fn write_log(length: usize, rng: &mut SmallRng, out: &mut Vec<u8>) {
    let end = out.len() + length;
    let mut time_ms = rng.random_range(0..86_400_000_u32);
    while out.len() < end {
        time_ms += rng.random_range(1..4000_u32);
        let level = ["INFO", "INFO", "INFO", "DEBUG", "WARN", "ERROR"][rng.random_range(0..6_usize)];
        let (hours, rest) = (time_ms / 3_600_000 % 24, time_ms % 3_600_000);
        put(
            out,
            format_args!("{hours:02}:{:02}:{:02}.{:03} {level:5} ", rest / 60_000, rest / 1000 % 60, rest % 1000),
        );
        let (ip, port) = (rng.random_range(0..65_536_u32), rng.random_range(1024..65_535_u16));
        put(out, format_args!("[{}] 10.0.{}.{}:{port} ", sample_word(rng), ip >> 8, ip & 255));
        put(
            out,
            format_args!(
                "{} {} took {} us\n",
                sample_word(rng),
                sample_word(rng),
                rng.random_range(10..99_999_u32)
            ),
        );
    }
}

fn write_rows(length: usize, rng: &mut SmallRng, out: &mut Vec<u8>) {
    let end = out.len() + length;
    let mut level = rng.random_range(-500.0..500.0_f64);
    while out.len() < end {
        level += rng.random_range(-1.0..1.0);
        put(out, format_args!("{level:.3};{};{:.1}\n", rng.random_range(0..5000_u16), level * 0.37));
    }
}

fn write_token(length: usize, rng: &mut SmallRng, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    out.extend((0..length).map(|_| DIGITS[rng.random_range(0..64_usize)]));
}

fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("writing to a Vec does not fail");
}

/// A word; short ones of the list far more often than late ones, as in a language.
pub(crate) fn sample_word(rng: &mut SmallRng) -> &'static str {
    let place = rng.random::<f32>();
    WORDS[(place * place * WORDS.len() as f32) as usize % WORDS.len()]
}

static WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| WORD_LIST.split_ascii_whitespace().collect());

const WORD_LIST: &str = "
the of and to in is that for it as was with be by on not he this are or his from at which but have
an had they you were their one all we can her has there been if more when will would who so order
customer delivery station morning window garden river street paper number office market winter
summer engine signal bridge harbour letter village mountain country general surface current pressure
balance measure account payment invoice transfer storage memory network server request response
timeout session warehouse product quantity discount shipping address language history science
picture question answer problem example several against between through without another because
possible different important together children business interest increase national political
education knowledge particular development government information experience temperature performance
environment organisation international responsibility relationship university production collection
protection connection direction reduction calibration Anderson Bergmann Costa Dubois Eriksen Fischer
Garcia Hoffmann Ivanov Jensen Kowalski Lindholm Moreau Nakamura Okafor Petrov Quinn
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_the_same_each_time_and_another_at_the_next_version() {
        let make = |key, version| {
            let mut out = Vec::new();
            write_value(key, version, &mut out);
            out
        };
        for key in 0..200 {
            assert_eq!(make(key, 3), make(key, 3));
            assert_ne!(make(key, 3), make(key, 4));
            assert!((200..=2200).contains(&make(key, 0).len()));
        }
    }

    #[test]
    fn key_names_are_unique() {
        let names: std::collections::HashSet<String> = (0..100_000).map(key_name).collect();
        assert_eq!(names.len(), 100_000);
    }
}
