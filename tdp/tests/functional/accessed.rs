//! INV: volatile-atomic. Bits that the processor sets while a fault changes the same entry are not lost.

use crate::common::host::Memory;
use crate::common::rig::Rig;
use std::sync::atomic::{AtomicBool, Ordering};
use tdp::{Access, AddressSpaceId, Fault, Gfn, Gpa, Level, Outcome, Perms, Pfn, Slot};

const SPACE: AddressSpaceId = AddressSpaceId(0);

/// How often processor and fault meet.
const ROUNDS: usize = 1500;

both_formats! {
    /// The processor reads through a large leaf that nobody has used, which sets its accessed bit, while a fault of
    /// another vCPU splits it.
    fn a_split_keeps_the_accessed_bit<F>() {
        let rig = Rig::<F>::new();
        let slot = Slot::new(Gfn(0)..Gfn(512), Memory::new(Pfn(1 << 20), Level::L2));
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        let mut vcpu = rig.vcpu();
        for round in 0..ROUNDS {
            rig.host().permit(Perms::RX);
            let prefetch = Fault {
                prefetch: true,
                ..Fault::read(Gpa(0))
            };
            assert_eq!(vcpu.fault(prefetch), Ok(Outcome::Fixed { level: Level::L2 }));
            rig.host().permit(Perms::RWX);
            let started = AtomicBool::new(false);
            let (touched, outcome) = std::thread::scope(|scope| {
                let processor = scope.spawn(|| {
                    started.store(true, Ordering::Release);
                    cpu.touch(Gpa(0), Access::Read)
                });
                while !started.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                // The two have to meet: one of them is a little late, now more, now less.
                for _ in 0..round % 64 * 16 {
                    std::hint::spin_loop();
                }
                let outcome = vcpu.fault(Fault::write(Gpa(0x1000)).max_level(Level::L1));
                (processor.join(), outcome)
            });
            assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }));
            let touched = touched.expect("the processor goes on");
            assert!(touched.result.is_ok() && touched.walked);
            let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it is mapped");
            assert_eq!(leaf.level, Level::L1);
            assert!(leaf.spte.0 & F::ACCESSED != 0, "round {round}: {leaf:?}");
            rig.mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
        }
    }
}
