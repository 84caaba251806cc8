//! What a page must hold: a pure function of seed, page number, version and pokes.
//!
//! So the model of a page is eight bytes, whatever the page holds. The kinds are mixed as programs mix them:
//! 10 % zero, 10 % one word repeated, 20 % sparse, 55 % text-like, 5 % incompressible. Pages of the last three kinds
//! begin with a stamp, by which a wrong page can be named.

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// A page's bytes.
pub type Bytes = [u8; PAGE];

/// Scrambles 64 bits (the finaliser of splitmix64).
pub const fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Seeded choices (xorshift64*).
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator; equal seeds give equal choices.
    pub fn new(seed: u64) -> Self {
        Rng(mix(seed) | 1)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end` (1 at least).
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// A number in `from..to`.
    pub fn between(&mut self, from: usize, to: usize) -> usize {
        from + self.below(to - from)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

const WORDS: [&[u8; 16]; 32] = [
    b"the cold page is",
    b" moved away from",
    b" the sysram node",
    b", compressed and",
    b" stored; a fault",
    b" brings it back.",
    b"\nThe watermark i",
    b"s low: reclaim s",
    b"tarts demoting i",
    b"n the background",
    b"{\"key\":\"user-000",
    b"\",\"value\":12345_",
    b"67,\"tags\":[\"a\",_",
    b"\"b\",\"c\"],\"ok\":t_",
    b"rue,\"next\":null_",
    b"}\n<div class=\"ro",
    b"w\"><a href=\"/ind",
    b"ex.html\">Home</a",
    b"></div>\n    if (",
    b"ptr == NULL) ret",
    b"urn -ENOMEM;\n   ",
    b" for (i = 0; i <",
    b" n; i++) sum += ",
    b"a[i] * b[i];\n\tre",
    b"turn sum;\n}\n\0\0\0\0",
    b"\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0",
    b"\x7f\x7f\0\0\x10\x20\0\0\0\0\0\0\0\0\0\0",
    b"2026-11-22T21:54",
    b":08Z INFO server",
    b": request served",
    b" in 123 us from ",
    b"192.168.100.200\n",
];

/// The kind of a page's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All bytes zero.
    Zero,
    /// One 64-bit word repeated.
    Same,
    /// A stamp and a few words.
    Sparse,
    /// Words of text, markup and code.
    Text,
    /// Random bytes.
    Random,
}

/// The kind of a version of a page. Version 0 is untouched memory: zero.
pub fn kind(seed: u64, index: u64, version: u32) -> Kind {
    if version == 0 {
        return Kind::Zero;
    }
    match hash(seed, index, version) % 100 {
        0..10 => Kind::Zero,
        10..20 => Kind::Same,
        20..40 => Kind::Sparse,
        40..95 => Kind::Text,
        _ => Kind::Random,
    }
}

/// Makes a version of a page.
pub fn page(seed: u64, index: u64, version: u32, out: &mut Bytes) {
    let key = hash(seed, index, version);
    match kind(seed, index, version) {
        Kind::Zero => out.fill(0),
        Kind::Same => words(out, |_| mix(key)),
        Kind::Sparse => {
            out.fill(0);
            stamp(seed, index, version, out);
            let mut rng = Rng::new(key);
            for _ in 0..16 {
                let at = rng.between(2, PAGE / 8) * 8;
                out[at..at + 8].copy_from_slice(&rng.next().to_le_bytes());
            }
        }
        Kind::Text => {
            let mut rng = Rng::new(key);
            for group in out.chunks_exact_mut(8 * 16) {
                let mut choice = rng.next();
                for token in group.chunks_exact_mut(16) {
                    token.copy_from_slice(WORDS[(choice & 31) as usize]);
                    choice >>= 8;
                }
            }
            stamp(seed, index, version, out);
        }
        Kind::Random => {
            random(key, out);
            stamp(seed, index, version, out);
        }
    }
}

/// Fills with bytes that do not compress.
pub fn random(key: u64, out: &mut Bytes) {
    let mut rng = Rng::new(key);
    words(out, |_| rng.next());
}

/// Applies the `poke`-th small write (64 bytes) to a version of a page; gives its offset.
pub fn poke(seed: u64, index: u64, version: u32, poke: u8, out: &mut [u8; 64]) -> usize {
    let key = mix(hash(seed, index, version) ^ (u64::from(poke) << 56));
    for (at, word) in out.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(key ^ (at as u64 & 1)).to_le_bytes());
    }
    (1 + (key % 63) as usize) * 64
}

/// Names what a page holds, if a stamp tells.
pub fn name(seed: u64, bytes: &Bytes) -> String {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or([0; 8]));
    let (index, version) = (word(0) >> 32, word(0) as u32);
    if bytes.iter().all(|&b| b == 0) {
        "all zero".into()
    } else if bytes.chunks_exact(8).all(|w| w == &bytes[..8]) {
        format!("the word {:#018x} repeated", word(0))
    } else if word(8) == mix(hash(seed, index, version)) {
        format!("begins as page {index} version {version:#x} of the same data")
    } else {
        "no known page".into()
    }
}

fn hash(seed: u64, index: u64, version: u32) -> u64 {
    mix(mix(seed ^ (index << 1)) ^ u64::from(version))
}

fn stamp(seed: u64, index: u64, version: u32, out: &mut Bytes) {
    out[..8].copy_from_slice(&((index << 32) | u64::from(version)).to_le_bytes());
    out[8..16].copy_from_slice(&mix(hash(seed, index, version)).to_le_bytes());
}

fn words(out: &mut Bytes, mut next: impl FnMut(usize) -> u64) {
    for (at, word) in out.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&next(at).to_le_bytes());
    }
}
