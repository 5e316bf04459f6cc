//! Durations on the command line: a number with a unit.

use std::time::Duration;

/// Longest duration that a call of a module may take.
const LONGEST: Duration = Duration::from_secs(1);

/// Why a text is not a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimeError {
    /// Not digits and a unit.
    #[error("not a duration: write 0, or a number with ns, us or ms, as in 5us")]
    Malformed,
    /// Longer than makes sense.
    #[error("is more than {LONGEST:?}")]
    TooLong,
}

/// Parses a duration of at most a second: 0, or digits with `ns`, `us` or `ms` after them.
///
/// # Errors
///
/// See [`TimeError`].
pub fn parse(text: &str) -> Result<Duration, TimeError> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(TimeError::Malformed);
    }
    // Nothing but digits: what fails now is too large for 64 bits.
    let number: u64 = digits.parse().map_err(|_| TimeError::TooLong)?;
    let time = match &text[digits.len()..] {
        "" if number == 0 => Duration::ZERO,
        "ns" => Duration::from_nanos(number),
        "us" => Duration::from_micros(number),
        "ms" => Duration::from_millis(number),
        _ => return Err(TimeError::Malformed),
    };
    if time > LONGEST {
        return Err(TimeError::TooLong);
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads() {
        assert_eq!(parse("0"), Ok(Duration::ZERO));
        assert_eq!(parse("250ns"), Ok(Duration::from_nanos(250)));
        assert_eq!(parse("5us"), Ok(Duration::from_micros(5)));
        assert_eq!(parse("1000ms"), Ok(LONGEST));
    }

    #[test]
    fn refuses() {
        for (text, error) in [
            ("", TimeError::Malformed),
            ("us", TimeError::Malformed),
            ("5", TimeError::Malformed),
            ("-5us", TimeError::Malformed),
            ("5 us", TimeError::Malformed),
            ("5s", TimeError::Malformed),
            ("1001ms", TimeError::TooLong),
            ("99999999999999999999us", TimeError::TooLong),
        ] {
            assert_eq!(parse(text), Err(error), "{text:?}");
        }
    }
}
