//! Aging, with the processor's accessed bit and without.

use crate::common::host::{Answer, Memory};
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup};
use tdp::{
    Access, AdBits, AddressSpaceId, Gfn, Gpa, Level, Lookup, Outcome, Perms, Pfn, Slot, Spte,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const BASE: u64 = 1 << 20;
const ALL: std::ops::Range<Gfn> = Gfn(0)..Gfn(1 << 18);

fn rig_with<F: Processor>(ad_bits: AdBits, level: Level) -> Rig<F> {
    let rig = Rig::with_ad_bits(ad_bits);
    let slot = Slot::new(ALL, Memory::new(Pfn(BASE), level));
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

fn leaf<F: Processor>(rig: &Rig<F>, gfn: Gfn) -> Spte {
    rig.mmu.translate(SPACE, gfn).expect("it is mapped").spte
}

both_formats! {
    /// The processor's accessed bit says which pages are young; aging clears it and changes nothing else.
    fn aging_clears_the_accessed_bit_and_no_other<F>() {
        for level in [Level::L1, Level::L2, Level::L3] {
            let rig = rig_with::<F>(AdBits::Processor, level);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            let before = leaf(&rig, Gfn(0));
            assert!(before.0 & F::DIRTY != 0);
            assert!(rig.mmu.test_age(SPACE, ALL));
            assert_eq!(leaf(&rig, Gfn(0)), before, "a test changes nothing");
            assert!(rig.mmu.age(SPACE, ALL));
            assert_eq!(leaf(&rig, Gfn(0)), Spte(before.0 & !F::ACCESSED));
            assert!(!rig.mmu.test_age(SPACE, ALL) && !rig.mmu.age(SPACE, ALL));
            assert_eq!(rig.host().take_flushes(), [], "nobody waits for a flush");
            // Another processor walks, and sets it again.
            let mut other = rig.processor(rig.vcpu());
            assert!(other.touch(Gpa(8), Access::Read).result.is_ok());
            assert!(rig.mmu.test_age(SPACE, Gfn(0)..Gfn(1)));
            assert_eq!(leaf(&rig, Gfn(0)), before);
        }
    }

    /// A range is judged by the pages in it.
    fn aging_keeps_to_its_range<F>() {
        for ad_bits in [AdBits::Processor, AdBits::Software] {
            let rig = rig_with::<F>(ad_bits, Level::L1);
            let mut cpu = rig.processor(rig.vcpu());
            for gfn in [3, 511, 512, 1 << 17] {
                assert!(cpu.run(Gfn(gfn).address(), Access::Read).is_ok());
            }
            assert!(!rig.mmu.age(SPACE, Gfn(4)..Gfn(511)));
            assert!(rig.mmu.age(SPACE, Gfn(511)..Gfn(512)));
            assert!(!rig.mmu.test_age(SPACE, Gfn(4)..Gfn(512)));
            for gfn in [3, 512, 1 << 17] {
                assert!(rig.mmu.test_age(SPACE, Gfn(gfn)..Gfn(gfn + 1)), "{gfn}");
            }
            assert!(rig.mmu.age(SPACE, ALL));
            assert!(!rig.mmu.age(SPACE, ALL));
        }
    }

    /// Without the bit the permissions are saved and taken away; the next access gets them back, all but writing,
    /// which a write gets back. The host is not asked.
    fn a_tracked_leaf_is_repaired_by_the_next_access<F>() {
        for level in [Level::L1, Level::L2] {
            let rig = rig_with::<F>(AdBits::Software, level);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            let before = leaf(&rig, Gfn(0));
            assert!(rig.mmu.age(SPACE, ALL));
            assert!(F::is_access_tracked(leaf(&rig, Gfn(0))));
            assert!(!rig.mmu.test_age(SPACE, ALL));
            assert_eq!(rig.host().take_flushes(), []);
            rig.host().set_answer(Answer::Blocking(
                crate::common::host::BlockingAnswer::Fixed(Lookup::Failed),
            ));
            let mut other = rig.processor(rig.vcpu());
            assert!(other.run(Gpa(0), Access::Read).is_ok());
            assert_eq!(leaf(&rig, Gfn(0)), Spte(before.0 & !F::WRITABLE));
            rig.assert_maps(&mut other.vcpu, Gfn(0), Pfn(BASE), level, Perms::RX);
            assert!(rig.mmu.test_age(SPACE, ALL));
            assert!(other.run(Gpa(0), Access::Write).is_ok());
            assert_eq!(leaf(&rig, Gfn(0)), before);
            assert_eq!(rig.mmu.stats().upgrades, 2);
            // From tracked to written in one step.
            assert!(rig.mmu.age(SPACE, ALL));
            let mut third = rig.processor(rig.vcpu());
            assert!(third.run(Gpa(0), Access::Write).is_ok());
            assert_eq!(leaf(&rig, Gfn(0)), before);
        }
    }

    /// What was never permitted is not permitted by a repair.
    fn a_repair_gives_no_more_than_was_taken<F>() {
        let rig = rig_with::<F>(AdBits::Software, Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        rig.host().permit(Perms::READ);
        assert!(cpu.run(Gpa(0), Access::Read).is_ok());
        assert!(rig.mmu.age(SPACE, ALL));
        let mut other = rig.processor(rig.vcpu());
        for access in [Access::Write, Access::Execute] {
            let outcome = other.run(Gpa(0), access);
            assert!(matches!(outcome, Err(Outcome::MemoryFault(_))), "{outcome:?}");
        }
        assert!(other.run(Gpa(0), Access::Read).is_ok());
        rig.assert_maps(&mut other.vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::READ);
    }

    /// A page that was taken back while it was tracked is not brought back by a repair.
    fn a_zapped_leaf_is_not_repaired<F>() {
        let rig = rig_with::<F>(AdBits::Software, Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        assert!(rig.mmu.age(SPACE, ALL));
        let pending = rig.mmu.zap(SPACE, ALL);
        assert!(!pending.is_empty(), "the old translation may be cached");
        pending.flush();
        rig.host().set_answer(Answer::Fixed(Lookup::Failed));
        assert!(cpu.run(Gpa(0), Access::Read).is_err());
    }

    /// Both address spaces are aged apart.
    fn address_spaces_age_apart<F>() {
        let rig = Rig::<F>::with(RigSetup::default());
        for space in [0, 1] {
            let slot = Slot::new(ALL, Memory::new(Pfn(BASE), Level::L1)).in_space(AddressSpaceId(space));
            rig.mmu.slots().insert(slot).expect("the first slot");
        }
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Read).is_ok());
        assert!(!rig.mmu.age(AddressSpaceId(1), ALL));
        assert!(!rig.mmu.age(AddressSpaceId(7), ALL));
        assert!(rig.mmu.age(SPACE, ALL));
    }
}
