//! What an episode is like: everything that can be configured, drawn from the seed and the episode's number.

use super::Random;
use super::chaos::Rates;
use serde::Serialize;
use tdp::{DirtyTracking, Level, SlotRemoval};

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Plan {
    pub(super) episode: u64,
    /// Both halves, on the model of the TDX module.
    pub(super) confidential: bool,
    /// NPT instead of EPT.
    pub(super) npt: bool,
    #[serde(serialize_with = "debugged")]
    pub(super) tracking: DirtyTracking,
    /// Entries of each vCPU's dirty ring, 0 for none.
    pub(super) ring: u32,
    pub(super) eager_split: bool,
    pub(super) nx: bool,
    #[serde(serialize_with = "debugged")]
    pub(super) removal: SlotRemoval,
    /// Largest private leaf.
    #[serde(serialize_with = "debugged")]
    pub(super) private_level: Level,
    /// Table frames, in quarters of what all of memory needs.
    pub(super) quarters: u64,
    pub(super) garbage_bound: usize,
    pub(super) rounds: u64,
    pub(super) rates: Rates,
}

fn debugged<S: serde::Serializer>(
    value: &impl std::fmt::Debug,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:?}"))
}

impl Plan {
    /// Draws an episode.
    pub(super) fn new(seed: u64, episode: u64) -> Self {
        let mut random = Random::of([seed, episode, u64::MAX, 0]);
        let mut draw = |n| random.below(n);
        // By turns, so that a short run has each.
        let confidential = episode.is_multiple_of(2);
        let npt = episode % 4 == 3;
        let tracking = match draw(3) {
            0 => DirtyTracking::WriteProtect,
            1 if !npt => DirtyTracking::ModificationLog,
            _ => DirtyTracking::DirtyBit,
        };
        let wrong = draw(8) != 0;
        let rates = Rates {
            busy: 20,
            refused: 200,
            starved: 60,
            lookup: 40,
            panic: 2000,
            pause: 256,
        };
        Self {
            episode,
            confidential,
            npt,
            tracking,
            ring: if draw(2) == 0 { 1024 } else { 0 },
            eager_split: draw(2) == 0,
            nx: draw(3) == 0,
            removal: match draw(2) {
                0 => SlotRemoval::Zap,
                _ => SlotRemoval::InvalidateRoots,
            },
            private_level: if draw(3) == 0 { Level::L1 } else { Level::L2 },
            quarters: 5 + draw(12),
            garbage_bound: [8, 64, 4096][draw(3) as usize],
            rounds: 2 + draw(3),
            rates: if wrong {
                rates
            } else {
                Rates {
                    pause: rates.pause,
                    ..Rates::default()
                }
            },
        }
    }
}
