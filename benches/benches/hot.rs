//! The hot functions one by one, on one thread: faults, sweeps, hand-offs, the epoch ([`tdp_bench::hot`]).
//!
//! Figures here are absolute and differ between machines; the subcommands of `tdp-bench` measure ratios.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::time::{Duration, Instant};

fn hot(c: &mut Criterion) {
    for mut hot in tdp_bench::hot::all().expect("guests") {
        let mut group = c.benchmark_group(hot.group);
        group.throughput(Throughput::Elements(hot.operations));
        group.bench_function(hot.name, |b| {
            b.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    hot.work.prepare().expect("what the work begins with");
                    let start = Instant::now();
                    hot.work.work().expect("the work");
                    total += start.elapsed();
                }
                total
            });
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .sample_size(20)
        .without_plots();
    targets = hot
}
criterion_main!(benches);
