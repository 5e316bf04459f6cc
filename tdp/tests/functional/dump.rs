//! The picture of the tables.

use crate::common::host::Memory;
use crate::common::rig::Rig;
use tdp::{AddressSpaceId, Decoded, DumpKind, Fault, Gfn, Gpa, Level, Pfn, Slot};

const SPACE: AddressSpaceId = AddressSpaceId(0);

both_formats! {
    fn neighbours_that_are_alike_are_one_line<F>() {
        let rig = Rig::<F>::new();
        rig.mmu
            .slots()
            .insert(Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(0x10_0000), Level::L2)))
            .expect("the first slot");
        let mut vcpu = rig.vcpu();
        for n in [0u64, 1, 2, 5] {
            let fault = Fault::write(Gfn(n).address()).max_level(Level::L1);
            let _ = vcpu.fault(fault).expect("there are frames");
        }
        for block in [1u64, 2] {
            let _ = vcpu.fault(Fault::write(Gfn(block * 512).address())).expect("there are frames");
        }
        // No slot there.
        let _ = vcpu.fault(Fault::read(Gpa(1 << 31))).expect("there are frames");
        let dump = rig.mmu.dump(SPACE);
        assert_eq!(dump.trees.len(), 1);
        let lines = &dump.trees[0].lines;
        let leaves: Vec<_> = lines
            .iter()
            .filter(|line| matches!(line.kind, DumpKind::Leaf { .. }))
            .map(|line| (line.level, line.gfns.start.0, line.gfns.pages(), line.pfn.map(|pfn| pfn.0)))
            .collect();
        assert_eq!(
            leaves,
            [
                (Level::L1, 0, 3, Some(0x10_0000)),
                (Level::L1, 5, 1, Some(0x10_0005)),
                (Level::L2, 512, 1024, Some(0x10_0200)),
            ]
        );
        let tables = lines.iter().filter(|line| line.kind == DumpKind::Table).count() as u64;
        assert_eq!(tables, rig.mmu.stats().tables);
        assert!(lines.iter().any(|line| matches!(line.kind, DumpKind::Mmio { .. })));
        // One frame's entries are the steps of its walk.
        let walk = |gfn: u64| {
            let mut steps = Vec::new();
            rig.mmu.visit_entries(SPACE, Gfn(gfn)..Gfn(gfn + 1), |entry| {
                steps.push((entry.level, entry.gfn.0, entry.decoded));
            });
            steps
        };
        let steps = walk(512 + 3);
        let levels: Vec<_> = steps.iter().map(|step| (step.0, step.1)).collect();
        assert_eq!(levels, [(Level::L4, 0), (Level::L3, 0), (Level::L2, 512)]);
        assert!(matches!(steps[1].2, Decoded::Table(_)) && matches!(steps[2].2, Decoded::Leaf { .. }));
        assert!(matches!(walk(1 << 19).last(), Some((Level::L1, _, Decoded::Mmio(_)))));
        assert_eq!(walk(3).len(), 3);
        let text = dump.to_string();
        assert!(text.contains("L1 [0x0, 0x3) -> 0x100000 rwxu accessed dirty"), "{text}");
        assert!(text.starts_with(F::NAME), "{text}");
        let json = dump.json().to_string();
        assert!(json.contains(r#""level":2,"gfn":512,"frames":1024,"pfn":1049088,"kind":"leaf","perms":"rwxu""#), "{json}");
        let (open, close) = (json.matches('{').count(), json.matches('}').count());
        assert_eq!(open, close);
    }

    fn a_live_mmu_can_be_dumped<F>() {
        let rig = Rig::<F>::new();
        rig.mmu
            .slots()
            .insert(Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(0x10_0000), Level::L1)))
            .expect("the first slot");
        let mmu = rig.mmu.clone();
        let mut vcpu = rig.vcpu();
        let other = std::thread::spawn(move || {
            for round in 0..20 {
                for n in 0..512 {
                    let _ = vcpu.fault(Fault::write(Gfn(round * 512 + n).address())).expect("there are frames");
                }
                mmu.zap(SPACE, Gfn(0)..Gfn(1 << 27)).flush();
            }
        });
        while !other.is_finished() {
            let _ = rig.mmu.dump(SPACE).to_string();
        }
        other.join().expect("nothing goes wrong");
        assert_eq!(rig.mmu.dump(SPACE).trees[0].lines, []);
    }
}
