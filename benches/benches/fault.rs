//! The fault path, one thread: bare map, whole fault, batches, spurious faults, taking tables and zapping.
//!
//! Figures here are absolute and differ between machines; `tdp-bench demand-paging` measures ratios.

use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use tdp::{
    Access, AddressSpaceId, Ept, Fault, FaultError, Format, Gfn, GfnRange, Level, LinearBacking,
    Mapping, MmapPool, Mmu, Npt, Outcome, Perms, Pfn, PoolConfig, Slot, SoftwareHost, Vcpu,
};

/// Guest memory: two leaf tables' worth of small pages.
const PAGES: u64 = 1024;
const SPACE: AddressSpaceId = AddressSpaceId(0);
const HOST: Pfn = Pfn(1 << 27);

struct Guest<F: Format> {
    mmu: Mmu<F, SoftwareHost>,
    vcpu: Vcpu<F, SoftwareHost>,
}

impl<F: Format> Guest<F> {
    fn new() -> Self {
        let pool = MmapPool::new(PoolConfig {
            frames: 256,
            base: Pfn(1 << 20),
            huge_pages: false,
        })
        .expect("a pool");
        pool.populate();
        let mmu = Mmu::builder(SoftwareHost::new(pool))
            .build()
            .expect("an MMU");
        mmu.slots()
            .insert(Slot::new(range(), LinearBacking::new(HOST, Level::L1)))
            .expect("a slot");
        let vcpu = mmu.vcpu().expect("a vCPU");
        let mut guest = Self { mmu, vcpu };
        guest.fault();
        guest
    }

    fn fault(&mut self) {
        for gfn in 0..PAGES {
            let fault = Fault::write(Gfn(gfn).address());
            resolved(self.vcpu.fault(fault));
        }
    }

    fn map(&mut self) {
        for gfn in 0..PAGES {
            let mapping = Mapping::memory(Pfn(HOST.0 + gfn), Level::L1, Perms::RWX);
            resolved(self.vcpu.map(Gfn(gfn), mapping, Access::Write));
        }
    }

    fn batch(&mut self) {
        let mut batch = self.vcpu.batch().expect("a batch");
        for gfn in 0..PAGES {
            let fault = Fault::write(Gfn(gfn).address());
            resolved(batch.fault(fault));
        }
    }

    fn zap_leaves(&mut self) {
        self.mmu.zap_leaves(SPACE, range()).flush();
    }

    fn zap(&mut self) {
        self.mmu.zap(SPACE, Gfn(0)..Level::L4.gfn_limit()).flush();
        self.mmu.synchronize();
    }
}

/// Nobody else is at work, so every fault has but two outcomes.
fn resolved(outcome: Result<Outcome, FaultError>) {
    match outcome {
        Ok(Outcome::Fixed { .. } | Outcome::Spurious) => {}
        other => panic!("{other:?}"),
    }
}

fn range() -> GfnRange {
    GfnRange {
        start: Gfn(0),
        end: Gfn(PAGES),
    }
}

fn format<F: Format>(c: &mut Criterion) {
    let mut group = c.benchmark_group(F::NAME);
    group.throughput(Throughput::Elements(PAGES));
    let mut guest = Guest::<F>::new();
    group.bench_function("map, tables warm", |b| {
        timed(b, &mut guest, Guest::zap_leaves, Guest::map)
    });
    group.bench_function("fault, tables warm", |b| {
        timed(b, &mut guest, Guest::zap_leaves, Guest::fault)
    });
    group.bench_function("fault in a batch, tables warm", |b| {
        timed(b, &mut guest, Guest::zap_leaves, Guest::batch)
    });
    group.bench_function("fault, no tables", |b| {
        timed(b, &mut guest, Guest::zap, Guest::fault)
    });
    group.bench_function("spurious fault", |b| b.iter(|| guest.fault()));
    group.bench_function("zap leaves", |b| {
        timed(b, &mut guest, Guest::fault, Guest::zap_leaves)
    });
    group.finish();
}

fn timed<F: Format>(
    b: &mut Bencher<'_>,
    guest: &mut Guest<F>,
    prepare: impl Fn(&mut Guest<F>),
    work: impl Fn(&mut Guest<F>),
) {
    b.iter_custom(|iterations| {
        let mut total = Duration::ZERO;
        for _ in 0..iterations {
            prepare(guest);
            let start = std::time::Instant::now();
            work(guest);
            total += start.elapsed();
        }
        total
    });
}

fn fault_path(c: &mut Criterion) {
    format::<Ept>(c);
    format::<Npt>(c);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .sample_size(20)
        .without_plots();
    targets = fault_path
}
criterion_main!(benches);
