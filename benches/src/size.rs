//! Sizes on the command line: bytes with a binary suffix, as KVM's selftests take them.

use clap::ValueEnum;
use tdp_arch::addr::MAX_PHYSICAL_BITS;
use tdp_arch::{Level, PAGE_SIZE};

/// A size of private pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrivatePage {
    /// 4 KiB
    #[value(name = "4k")]
    FourK,
    /// 2 MiB
    #[value(name = "2m")]
    TwoM,
}

impl PrivatePage {
    /// Level of a leaf of this size.
    pub const fn level(self) -> Level {
        match self {
            Self::FourK => Level::L1,
            Self::TwoM => Level::L2,
        }
    }
}

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not digits with at most one suffix.
    #[error("not a size: write bytes, or a number with K, M, G or T, as in 512M")]
    Malformed,
    /// Zero.
    #[error("must not be zero")]
    Zero,
    /// Not whole pages.
    #[error("is not a multiple of 4K")]
    Unaligned,
    /// Beyond what a physical address can express.
    #[error("does not fit {MAX_PHYSICAL_BITS} bits of address")]
    TooLarge,
}

/// Parses a size in bytes: a number, with K, M, G or T (powers of 1024, either case) after it. The size is a multiple
/// of 4 KiB, not zero, and fits 52 bits of address.
///
/// # Errors
///
/// See [`SizeError`].
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(SizeError::Malformed),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(SizeError::Malformed);
    }
    // Nothing but digits: what fails now is too large for 64 bits.
    let number: u64 = digits.parse().map_err(|_| SizeError::TooLarge)?;
    let bytes = number.checked_mul(1 << shift).ok_or(SizeError::TooLarge)?;
    if bytes == 0 {
        return Err(SizeError::Zero);
    }
    if bytes > 1 << MAX_PHYSICAL_BITS {
        return Err(SizeError::TooLarge);
    }
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(SizeError::Unaligned);
    }
    Ok(bytes)
}

/// `bytes` with the largest binary suffix that leaves a whole number.
pub fn show(bytes: u64) -> String {
    let (shift, suffix) = match bytes.trailing_zeros() {
        _ if bytes == 0 => (0, ""),
        40.. => (40, "T"),
        30.. => (30, "G"),
        20.. => (20, "M"),
        10.. => (10, "K"),
        _ => (0, ""),
    };
    format!("{}{suffix}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_shows() {
        for bytes in [
            4096,
            8192,
            1 << 20,
            3 << 30,
            1 << 40,
            1 << 52,
            (1 << 30) + 4096,
        ] {
            assert_eq!(parse(&show(bytes)), Ok(bytes));
        }
        assert_eq!(parse("512m"), Ok(512 << 20));
    }

    #[test]
    fn refuses() {
        for (text, error) in [
            ("", SizeError::Malformed),
            ("M", SizeError::Malformed),
            ("-4096", SizeError::Malformed),
            ("4.5K", SizeError::Malformed),
            ("1KB", SizeError::Malformed),
            ("0", SizeError::Zero),
            ("0G", SizeError::Zero),
            ("1", SizeError::Unaligned),
            ("6K", SizeError::Unaligned),
            ("4097T", SizeError::TooLarge),
            ("99999999999999999999", SizeError::TooLarge),
            ("18446744073709551615T", SizeError::TooLarge),
        ] {
            assert_eq!(parse(text), Err(error), "{text:?}");
        }
    }
}
