//! Amounts of memory as a person writes and reads them.
//!
//! [`parse_bytes`] and [`SysramLimit`] read the command line and the configuration, [`human`] writes tables. Powers of
//! two throughout, as `numactl`, cgroup files and `free -h` have it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// The RAM a program may take: the value of `--sysram`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SysramLimit {
    /// No limit: pages leave only when something else asks for it.
    Max,
    /// A share of the machine's RAM, 1 to 100.
    Percent(u8),
    /// Bytes, at least [`LEAST_BYTES`].
    Bytes(u64),
    /// The smallest at which the program stays within a [`Slowdown`].
    Auto,
}

/// What an automatic budget may cost: the value of `--slowdown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slowdown(u32);

impl Slowdown {
    /// Per mille of the time that the program computes, 1 to 1000.
    pub const fn per_mille(self) -> u32 {
        self.0
    }
}

impl Default for Slowdown {
    /// 5 %.
    fn default() -> Self {
        Self(50)
    }
}

/// The smallest budget: less is a forgotten suffix.
const LEAST_BYTES: u64 = 1 << 20;

impl SysramLimit {
    /// The limit in bytes on a machine with `total_bytes` of RAM; `None` for no limit. An automatic one begins with all of it.
    pub fn bytes(self, total_bytes: u64) -> Option<u64> {
        match self {
            Self::Max => None,
            Self::Auto => Some(total_bytes),
            Self::Percent(percent) => Some(total_bytes / 100 * u64::from(percent)),
            Self::Bytes(bytes) => Some(bytes),
        }
    }
}

/// Why a size was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Not a whole number with an optional suffix.
    NotASize(String),
    /// More than 2^64 - 1 bytes.
    TooLarge(String),
    /// `0` for what has to have a size.
    Zero,
    /// A budget of less than [`LEAST_BYTES`].
    TooSmall(String),
    /// A percentage outside 1 to 100.
    PercentRange(String),
    /// No percentage of 0.1 to 100 with one decimal.
    NotASlowdown(String),
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotASize(text) => {
                write!(f, "`{text}` is not a size: write bytes, or a whole number with K, M, G or T, such as 512M")
            }
            Self::TooLarge(text) => write!(f, "`{text}` is more than 2^64 - 1 bytes"),
            Self::Zero => write!(f, "a size of 0 holds nothing"),
            Self::TooSmall(text) => {
                write!(
                    f,
                    "`{text}` is less than 1M (without K, M, G or T it is bytes): no program can run in that"
                )
            }
            Self::NotASlowdown(text) => {
                write!(f, "`{text}` is no slow-down: write a percentage from 0.1% to 100%, such as 5%")
            }
            Self::PercentRange(text) => write!(f, "`{text}` is not a whole percentage from 1% to 100%"),
        }
    }
}

impl std::error::Error for SizeError {}

impl FromStr for SysramLimit {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        match text {
            "max" => return Ok(Self::Max),
            "auto" => return Ok(Self::Auto),
            _ => {}
        }
        if let Some(number) = text.strip_suffix('%') {
            return match number.parse::<u8>() {
                Ok(percent @ 1..=100) if is_digits(number) => Ok(Self::Percent(percent)),
                _ => Err(SizeError::PercentRange(text.to_owned())),
            };
        }
        match parse_bytes(text)? {
            0..LEAST_BYTES => Err(SizeError::TooSmall(text.to_owned())),
            bytes => Ok(Self::Bytes(bytes)),
        }
    }
}

impl FromStr for Slowdown {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError::NotASlowdown(text.to_owned());
        let number = text.strip_suffix('%').ok_or_else(error)?;
        let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
        if !is_digits(whole) || !is_digits(tenths) || tenths.len() != 1 {
            return Err(error());
        }
        let whole = whole.parse::<u32>().map_err(|_| error())?;
        let per_mille = whole.saturating_mul(10).saturating_add(tenths.parse::<u32>().map_err(|_| error())?);
        if (1..=1000).contains(&per_mille) { Ok(Self(per_mille)) } else { Err(error()) }
    }
}

impl<'de> Deserialize<'de> for Slowdown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for SysramLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Reads `4096`, `512K`, `512M`, `2G`, `1T`; `MiB` and lower case are accepted, `MB` is not (it may mean 10^6).
///
/// # Errors
/// What is wrong with the text, see [`SizeError`].
pub fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(SizeError::NotASize(text.to_owned())),
    };
    if !is_digits(number) {
        return Err(SizeError::NotASize(text.to_owned()));
    }
    let number = number.parse::<u64>().map_err(|_| SizeError::TooLarge(text.to_owned()))?;
    number.checked_mul(1 << shift).ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

/// Four characters or so for a table: `0`, `812`, `4.0K`, `131.2M`, `23.5G`.
pub fn human(bytes: u64) -> String {
    let units = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
    match units.iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => {
            // Tenths in integers: exact for every u64.
            let tenths = (u128::from(bytes) * 10) >> shift;
            format!("{}.{}{unit}", tenths / 10, tenths % 10)
        }
        None => bytes.to_string(),
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two() {
        for (text, bytes) in [
            ("4194304", 4 << 20),
            ("2048K", 2 << 20),
            ("512M", 512 << 20),
            ("2g", 2 << 30),
            ("1T", 1 << 40),
            ("3GiB", 3 << 30),
        ] {
            assert_eq!(text.parse(), Ok(SysramLimit::Bytes(bytes)), "{text}");
        }
        assert_eq!((parse_bytes("4096"), parse_bytes("512K")), (Ok(4096), Ok(512 << 10)));
        assert_eq!("max".parse(), Ok(SysramLimit::Max));
        assert_eq!("25%".parse(), Ok(SysramLimit::Percent(25)));
        assert_eq!(SysramLimit::Percent(25).bytes(1000), Some(250));
        assert_eq!(SysramLimit::Max.bytes(1000), None);
        assert_eq!("auto".parse(), Ok(SysramLimit::Auto));
    }

    #[test]
    fn a_slow_down_is_a_percentage_with_a_decimal_at_most() {
        for (text, per_mille) in [("5%", 50), ("0.5%", 5), ("0.1%", 1), ("12.5%", 125), ("100%", 1000)] {
            assert_eq!(text.parse::<Slowdown>().map(Slowdown::per_mille), Ok(per_mille), "{text}");
        }
        for text in ["", "5", "0%", "0.0%", "100.1%", "5.25%", ".5%", "5.%", "-5%", "+5%", "%", "99999999999%"] {
            assert!(text.parse::<Slowdown>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "M", "-1", "+1", "1.5G", "512MB", "5X", "1 G", "0", "0M", "512", "512K", "0%", "101%", "+5%", "%",
            "MAX",
        ] {
            assert!(text.parse::<SysramLimit>().is_err(), "{text}");
        }
        assert_eq!(parse_bytes("99999999T"), Err(SizeError::TooLarge("99999999T".to_owned())));
        assert_eq!(
            parse_bytes("99999999999999999999"),
            Err(SizeError::TooLarge("99999999999999999999".to_owned()))
        );
    }

    #[test]
    fn human_sizes_keep_one_decimal() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1.0K"),
            (1536, "1.5K"),
            (137_573_171, "131.1M"),
            (u64::MAX, "16777215.9T"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
