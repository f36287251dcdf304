//! The table of `dtmem bench` under criterion: on the CPU, and on the first GPU if there is one.
//! `cargo bench --bench operations -- attention/paper` picks rows.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dtmem::bench::{Visit, each};
use dtmem::train::device::DeviceChoice;

fn operations(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("operations");
    group.sample_size(10);
    each(DeviceChoice::Auto, "", f64::INFINITY, &mut |visit| {
        if let Visit::Case(mut case) = visit {
            group.throughput(Throughput::Elements(case.entry.scale.tokens() as u64));
            group.bench_function(
                format!("{} {}", case.device, case.entry.name()),
                |bencher| {
                    bencher.iter_custom(|runs| {
                        Duration::from_secs_f64(case.time(runs).expect("a timing"))
                    });
                },
            );
        }
        Ok(())
    })
    .expect("a table");
}

criterion_group!(benches, operations);
criterion_main!(benches);
