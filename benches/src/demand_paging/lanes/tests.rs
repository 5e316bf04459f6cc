//! The check of translations misses nothing.

use super::*;
use tdp_arch::{GfnRange, Pfn};

/// Translates as it should, except at one frame.
struct Wrong {
    backing: Backing,
    mapped: u64,
    leaves: u64,
    at: Gfn,
    says: Option<Translation>,
}

impl Contender for Wrong {
    type Worker = ();
    type Failure = Error;

    fn worker(&self) -> Result<(), Error> {
        Ok(())
    }

    fn resolve(&self, (): &mut (), _gfn: Gfn) -> Result<(), Error> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        if gfn == self.at {
            return self.says;
        }
        let pfn = self.backing.pfn_of(gfn);
        let below = gfn.0 < self.backing.gfns.start.0 + self.mapped;
        below.then_some(Translation {
            pfn,
            level: self.backing.level,
            permitted: true,
        })
    }

    fn leaves(&self) -> Option<u64> {
        Some(self.leaves)
    }
}

fn checked(at: u64, leaves: u64, says: Option<Translation>) -> Checked {
    let gfns = GfnRange::new(Gfn(1 << 18), 8 * 512).unwrap();
    let backing = Backing {
        gfns,
        pfn: Pfn(1 << 19),
        level: Level::L2,
    };
    let contender = Wrong {
        backing,
        mapped: 6 * 512,
        leaves,
        at: Gfn(gfns.start.0 + at),
        says,
    };
    check(&contender, &backing, Gfn(gfns.start.0 + 6 * 512))
}

#[test]
fn every_kind_of_wrong_translation_is_counted() {
    let right = |number: u64| Translation {
        pfn: Pfn((1 << 19) + number),
        level: Level::L2,
        permitted: true,
    };
    let mismatched = |at, says| checked(at, 6, says).mismatched;
    assert_eq!(mismatched(512, Some(right(512))), 0, "right");
    assert_eq!(mismatched(512, None), 1, "missing");
    assert_eq!(
        mismatched(1023, None),
        1,
        "missing at the end of a large page"
    );
    assert_eq!(mismatched(512, Some(right(513))), 1, "another frame");
    assert_eq!(
        mismatched(
            512,
            Some(Translation {
                level: Level::L1,
                ..right(512)
            })
        ),
        1,
        "another size"
    );
    assert_eq!(
        mismatched(
            512,
            Some(Translation {
                permitted: false,
                ..right(512)
            })
        ),
        1,
        "not permitted"
    );
    assert_eq!(
        mismatched(7 * 512, Some(right(7 * 512))),
        1,
        "mapped without having been touched"
    );
    assert_eq!(
        checked(0, 5, Some(right(0))).mismatched,
        1,
        "statistics that miss a leaf"
    );
    assert_eq!(checked(0, 6, Some(right(0))).translated, 6);
}
