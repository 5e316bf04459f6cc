//! The entry formats on the command line.

use clap::ValueEnum;
use tdp_arch::{Ept, Format, Npt};

/// One entry format, or both one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatChoice {
    /// Extended page tables (Intel)
    Ept,
    /// Nested page tables (AMD)
    Npt,
    /// Both
    Both,
}

impl FormatChoice {
    /// Whether format `F` is chosen.
    pub fn includes<F: Format>(self) -> bool {
        let name = match self {
            Self::Both => return true,
            Self::Ept => Ept::NAME,
            Self::Npt => Npt::NAME,
        };
        F::NAME == name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses() {
        assert!(FormatChoice::Ept.includes::<Ept>() && !FormatChoice::Ept.includes::<Npt>());
        assert!(FormatChoice::Npt.includes::<Npt>() && !FormatChoice::Npt.includes::<Ept>());
        assert!(FormatChoice::Both.includes::<Ept>() && FormatChoice::Both.includes::<Npt>());
    }
}
