//! Conversion: makes guest memory private or shared, while faults run.
//!
//! Protocol. An invalidation window is opened on the range, as for a change by the host: faults on it are held back, those
//! that began before have ended. Inside the window what the other half maps is taken away, shared leaves by a zap and a
//! flush, private pages by removal; then the attributes change; then the window closes. Leaves of a half are installed only
//! where the attributes say so and no window is open, so exactly one half ever maps a frame, for overlapping conversions
//! too: whichever closes last has taken away what its attributes forbid.
//!
//! What a frame is belongs to the guest: a conversion takes place in all address spaces at once.
//!
//! A large leaf that lies in the range in part is split first: what lies outside keeps its mapping, and private memory its
//! content. No larger leaf is installed across the edge afterwards, because levels are chosen by the attributes.

use crate::attributes::Visibility;
use crate::confidential::Phase;
use crate::host::{AddressSpaceId, Host};
use crate::mmu::Shared;
use crate::range::private_sweep::{RemovalError, Removed};
use alloc::vec::Vec;
use tdp_arch::{Format, Gfn, GfnRange};

/// A conversion was refused or could not be completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The guest has no private half.
    #[error("the guest has no private half")]
    NotConfidential,
    /// No frames, frames past what the tables can map (the shared bit among them), or no such address space.
    #[error("frames {range} of address space {} cannot be converted", as_id.0)]
    Range {
        /// Address space.
        as_id: AddressSpaceId,
        /// What was asked for.
        range: GfnRange,
    },
    /// The guest is dead or lost.
    #[error("the guest is {phase:?}")]
    Phase {
        /// Where it is in its life.
        phase: Phase,
    },
    /// Some private memory could not be taken away. The frames are private still; those that were taken away are empty.
    #[error(transparent)]
    Removal(#[from] RemovalError),
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Checks a range of private memory that an embedder names.
    pub(crate) fn check_private(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
    ) -> Result<&crate::confidential::Confidential, ConvertError> {
        let confidential = self
            .confidential
            .as_deref()
            .ok_or(ConvertError::NotConfidential)?;
        if range.is_empty() || range.end > self.roots.limit() || as_id.0 >= self.address_spaces {
            return Err(ConvertError::Range { as_id, range });
        }
        Ok(confidential)
    }

    /// Makes a range private or shared.
    pub(crate) fn convert(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
        to: Visibility,
    ) -> Result<Removed, ConvertError> {
        let confidential = self.check_private(as_id, range)?;
        let phase = confidential.phase();
        if matches!(phase, Phase::Lost | Phase::Dead) {
            return Err(ConvertError::Phase { phase });
        }
        let windows: Vec<_> = self
            .spaces()
            .map(|space| self.invalidate_begin(space, range))
            .collect();
        let removed = match to {
            Visibility::Private => {
                let mut closing = Vec::with_capacity(windows.len());
                for (space, window) in self.spaces().zip(windows) {
                    for end in [range.start, Gfn(range.end.0 - 1)] {
                        self.split_partly_covered(space, range, end);
                    }
                    let flushed = window.zap().flush();
                    closing.push((window, flushed));
                }
                confidential.attributes.set(range, to);
                for (window, flushed) in closing {
                    window.end(flushed);
                }
                Removed::default()
            }
            Visibility::Shared => {
                let removed = self.remove_private_everywhere(range);
                if removed.is_ok() {
                    confidential.attributes.set(range, to);
                }
                for window in windows {
                    window.end(crate::tlb::Flushed::nothing_shared());
                }
                removed?
            }
        };
        Ok(removed)
    }

    fn spaces(&self) -> impl Iterator<Item = AddressSpaceId> {
        (0..self.address_spaces).map(AddressSpaceId)
    }

    /// Takes private memory of a range away in all address spaces.
    pub(crate) fn remove_private_everywhere(
        &self,
        range: GfnRange,
    ) -> Result<Removed, RemovalError> {
        let mut removed = Removed::default();
        let mut failed: Option<RemovalError> = None;
        for space in self.spaces() {
            let part = match self.remove_private(space, range) {
                Ok(part) => part,
                Err(error) => {
                    let all = failed.get_or_insert(RemovalError { failed: 0, ..error });
                    all.failed += error.failed;
                    error.removed
                }
            };
            removed.frames += part.frames;
            removed.tables += part.tables;
            removed.leaked += part.leaked;
        }
        match failed {
            Some(error) => Err(RemovalError { removed, ..error }),
            None => Ok(removed),
        }
    }

    /// Whether a frame is private; `None` without a private half.
    pub(crate) fn visibility(&self, gfn: Gfn) -> Option<Visibility> {
        Some(self.confidential.as_deref()?.attributes.get(gfn))
    }
}
