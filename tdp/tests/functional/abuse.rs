//! Guests that mean harm: what they can make the MMU spend, and that it ends there.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup};
use tdp::{AddressSpaceId, Fault, FaultError, Gfn, Level, Outcome, Pfn, Slot};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const FIXED: Result<Outcome, FaultError> = Ok(Outcome::Fixed { level: Level::L1 });
/// Table frames of the host.
const FRAMES: usize = 64;

fn rig<F: Processor>() -> Rig<F> {
    let rig = Rig::<F>::with(RigSetup {
        frames: FRAMES,
        ..RigSetup::default()
    });
    let slot = Slot::new(Gfn(0)..Gfn(1 << 27), Memory::new(Pfn(1 << 20), Level::L1));
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

both_formats! {
    /// A guest touches what makes a table each time, memory and nothing, far apart: it gets what the pool has and no more, each
    /// refusal is typed, and a zap brings everything back.
    fn a_guest_that_touches_everything_gets_no_more_frames_than_there_are<F>() {
        let rig = rig::<F>();
        let mut vcpu = rig.vcpu();
        for round in 0..4 {
            let mut refused = 0;
            for n in 0..400_u64 {
                // By turns in the slot and beyond it, where an entry remembers that there is nothing.
                let gfn = if n % 2 == 0 { n << 10 } else { (1 << 27) + (n << 18) };
                match vcpu.fault(Fault::write(Gfn(gfn).address())) {
                    Ok(Outcome::Fixed { .. } | Outcome::Mmio { .. } | Outcome::MemoryFault(_)) => {}
                    Err(FaultError::OutOfFrames) => refused += 1,
                    other => panic!("{other:?} at {gfn:#x}, round {round}"),
                }
                assert!(rig.frames().allocated() <= FRAMES);
            }
            assert!(refused > 300, "the pool is small: {refused}");
            let all = rig.mmu.slots().addressable();
            rig.mmu.zap(SPACE, all).flush();
            rig.mmu.synchronize();
            assert_eq!(rig.mmu.stats().tables, 0);
            assert_eq!(vcpu.fault(Fault::write(Gfn(5).address())), FIXED);
        }
    }
}
