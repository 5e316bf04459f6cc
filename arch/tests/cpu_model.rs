//! A software vCPU against a model that knows everything that every entry has been since it was last flushed: an
//! answer must be one that some of those values gives, and after a flush it must be the answer of today.

mod walker_support;

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{
    EptConfig, EptWalker, GuestAccess, NptConfig, NptWalker, Permissions, ReadOnly, WalkError,
    Walker,
};
use tdp_arch::{Gpa, Hpa};
use walker_support::Memory;

const ROOT: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
/// Tables of level 1 that an entry of the directory can point to.
const TABLES: [u64; 3] = [0x4000, 0x5000, 0x6000];
const REGIONS: usize = 2;
const PAGES: usize = 3;
/// Memory type write-back of EPT; ignored or PAT for NPT.
const WB: u64 = 6 << 3;

#[derive(Clone, Debug)]
enum Step {
    /// Entry of a region in the directory: nothing, a table, or a 2 MiB page.
    Directory {
        region: usize,
        entry: u64,
    },
    /// Entry of a page in a table.
    Leaf {
        table: usize,
        page: usize,
        entry: u64,
    },
    Access {
        region: usize,
        page: usize,
        access: GuestAccess,
    },
    FlushAll,
    /// From one page of the region on, so many pages.
    FlushPages {
        region: usize,
        page: usize,
        pages: u64,
    },
}

fn steps() -> impl Strategy<Value = Step> {
    let rights = || prop::sample::select(vec![1u64, 3, 5, 7, 7, 7]);
    let directory = prop_oneof![
        1 => Just(0),
        5 => (0..TABLES.len(), rights()).prop_map(|(table, low)| TABLES[table] | low),
        2 => (1..64u64, rights()).prop_map(|(frame, low)| frame << 21 | 0x80 | WB | low),
    ];
    let leaf = prop_oneof![1 => Just(0), 4 => (0x100..0x200u64, rights()).prop_map(|(frame, low)| frame << 12 | WB | low)];
    let access = prop::sample::select(vec![
        GuestAccess::Read,
        GuestAccess::Read,
        GuestAccess::Write,
        GuestAccess::Fetch,
    ]);
    prop_oneof![
        2 => (0..REGIONS, directory).prop_map(|(region, entry)| Step::Directory { region, entry }),
        5 => (0..TABLES.len(), 0..PAGES, leaf).prop_map(|(table, page, entry)| Step::Leaf { table, page, entry }),
        12 => (0..REGIONS, 0..PAGES, access).prop_map(|(region, page, access)| Step::Access { region, page, access }),
        1 => Just(Step::FlushAll),
        2 => (0..REGIONS, 0..PAGES, 1..3u64).prop_map(|(region, page, pages)| Step::FlushPages { region, page, pages }),
    ]
}

fn gpa(region: usize, page: usize) -> Gpa {
    Gpa((region as u64) << 21 | (page as u64) << 12 | 0x18)
}

/// Values since the last flush of a page: of its entry in the directory and of its entry in each table.
#[derive(Clone, Default)]
struct History {
    directory: BTreeSet<u64>,
    leaves: [BTreeSet<u64>; TABLES.len()],
}

/// The tables as software wrote them, without the flags that walks set.
#[derive(Default)]
struct Model {
    directory: [u64; REGIONS],
    leaves: [[u64; PAGES]; TABLES.len()],
    history: [[History; PAGES]; REGIONS],
}

impl Model {
    fn forget(&mut self, region: usize, page: usize) {
        self.history[region][page] = History {
            directory: BTreeSet::from([self.directory[region]]),
            leaves: std::array::from_fn(|table| BTreeSet::from([self.leaves[table][page]])),
        };
    }

    /// Whether some values of the past give `hpa` for the access, or a fault if it is `None`.
    fn explains(&self, region: usize, page: usize, rights: u64, hpa: Option<u64>) -> bool {
        let history = &self.history[region][page];
        let address = gpa(region, page).0;
        history.directory.iter().any(|&upper| {
            if upper & 7 == 0 {
                return hpa.is_none();
            }
            if upper & 0x80 != 0 {
                let reached = upper & 0xf_ffff_ffe0_0000 | address & 0x1f_ffff;
                return if upper & rights == rights {
                    hpa == Some(reached)
                } else {
                    hpa.is_none()
                };
            }
            let table = TABLES
                .iter()
                .position(|&table| table == upper & 0xf_ffff_ffff_f000)
                .expect("a table");
            history.leaves[table].iter().any(|&leaf| {
                let reached = leaf & 0xf_ffff_ffff_f000 | address & 0xfff;
                if upper & leaf & rights == rights {
                    hpa == Some(reached)
                } else {
                    hpa.is_none()
                }
            })
        })
    }
}

/// Runs the steps; `rights` are the bits of an entry that an access needs.
fn run<W: Walker>(
    walker: W,
    steps: &[Step],
    rights: fn(GuestAccess) -> u64,
) -> Result<(), TestCaseError> {
    let memory = Memory::new();
    memory.set(ROOT, PDPT | 7);
    memory.set(PDPT, DIRECTORY | 7);
    let mut model = Model::default();
    for (region, page) in (0..REGIONS).flat_map(|region| (0..PAGES).map(move |page| (region, page)))
    {
        model.forget(region, page);
    }
    let mut vcpu = SoftwareVcpu::<W, 4>::new(walker, Hpa(ROOT));
    // Pages that were flushed and not touched since: what they answer must be what the tables say.
    let mut fresh = [[true; PAGES]; REGIONS];
    for step in steps {
        match *step {
            Step::Directory { region, entry } => {
                model.directory[region] = entry;
                for history in &mut model.history[region] {
                    history.directory.insert(entry);
                }
                memory.set(DIRECTORY + 8 * region as u64, entry);
            }
            Step::Leaf { table, page, entry } => {
                model.leaves[table][page] = entry;
                for pages in &mut model.history {
                    pages[page].leaves[table].insert(entry);
                }
                memory.set(TABLES[table] + 8 * page as u64, entry);
            }
            Step::FlushAll => {
                vcpu.flush_all();
                for (region, page) in
                    (0..REGIONS).flat_map(|region| (0..PAGES).map(move |page| (region, page)))
                {
                    model.forget(region, page);
                    fresh[region][page] = true;
                }
            }
            Step::FlushPages {
                region,
                page,
                pages,
            } => {
                let start = Gpa(gpa(region, page).0 & !0xfff);
                vcpu.flush_gpa_range(start, Gpa(start.0 + (pages << 12)));
                for page in (page..PAGES).take(pages as usize) {
                    model.forget(region, page);
                    fresh[region][page] = true;
                }
            }
            Step::Access {
                region,
                page,
                access,
            } => {
                let address = gpa(region, page);
                let truth = vcpu
                    .walker()
                    .walk(&ReadOnly(&memory), Hpa(ROOT), address, access);
                let result = vcpu.access(&memory, address, access);
                let hpa = result.ok().map(|found| found.hpa.0);
                prop_assert!(
                    model.explains(region, page, rights(access), hpa),
                    "{address} {access:?}: {result:x?}"
                );
                if fresh[region][page] {
                    prop_assert_eq!(result.map(|t| t.hpa), truth.map(|t| t.hpa), "after a flush");
                }
                // A walk to one page may fill the cache for all pages of a region.
                fresh[region] = [false; PAGES];
                match result {
                    Ok(found) => {
                        prop_assert!(found.permissions.contains(vcpu.walker().needs(access)));
                        if vcpu.walker().needs(access).contains(Permissions::WRITE) {
                            prop_assert!(found.dirty);
                        }
                    }
                    // A fault leaves nothing behind: the next access sees the tables as they are.
                    Err(WalkError::Fault(_)) => {
                        let again = vcpu.access(&memory, address, access);
                        prop_assert_eq!(
                            again.map(|t| t.hpa),
                            truth.map(|t| t.hpa),
                            "after a fault"
                        );
                    }
                    Err(other) => prop_assert!(false, "{:?}", other),
                }
            }
        }
    }
    let counters = vcpu.counters();
    prop_assert!(
        counters.walks >= counters.misses + counters.upgrades
            && counters.short_walks <= counters.walks
    );
    Ok(())
}

proptest! {
    #![proptest_config(Config {
        cases: 512,
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0x7db_0002),
        ..Config::default()
    })]

    #[test]
    fn ept_answers_are_explained(steps in prop::collection::vec(steps(), 1..120)) {
        let walker = EptWalker::new(EptConfig::default()).expect("a valid configuration");
        run(walker, &steps, |access| match access {
            GuestAccess::Write => 2,
            GuestAccess::Fetch => 4,
            _ => 1,
        })?;
    }

    /// The same values as nested page tables: bit 0 present, bit 1 writable, bit 2 user; all accesses need bits 0, 2.
    #[test]
    fn npt_answers_are_explained(steps in prop::collection::vec(steps(), 1..120)) {
        let walker = NptWalker::new(NptConfig::default()).expect("a valid configuration");
        run(walker, &steps, |access| match access {
            GuestAccess::Write => 7,
            _ => 5,
        })?;
    }
}
