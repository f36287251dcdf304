//! The table of `dtmem bench` under criterion: on the CPU, and on the first GPU if there is one.
//!
//! A case is called `operation/scale/device`. Beneath what criterion says stands its line of `dtmem bench`, from the
//! fastest sample.

use std::collections::BTreeMap;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use dtmem::bench::{Group, Selection, Visit, each};
use dtmem::train::device::DeviceChoice;

/// Times what the table has of a group, or all of it, as far as the arguments of the command line choose it.
pub fn run(group: Option<Group>) {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    let selection = Selection {
        group,
        filter: "",
        seconds: f64::INFINITY,
    };
    let mut skipped = BTreeMap::<_, u32>::new();
    each(DeviceChoice::Auto, selection, &mut |visit| {
        let mut case = match visit {
            Visit::Case(case) => case,
            Visit::Skipped { device, reason, .. } => {
                *skipped.entry(format!("{device}: {reason}")).or_default() += 1;
                return Ok(());
            }
        };
        let mut fastest = f64::INFINITY;
        let mut group = criterion.benchmark_group(case.entry.name());
        group.throughput(Throughput::Elements(case.entry.scale.tokens() as u64));
        group.bench_function(case.device, |bencher| {
            bencher.iter_custom(|runs| {
                let seconds = case.time(runs).expect("a timing");
                fastest = fastest.min(seconds / runs as f64);
                Duration::from_secs_f64(seconds)
            });
        });
        group.finish();
        if fastest.is_finite() {
            println!("{}\n", case.row(fastest)?);
        }
        Ok(())
    })
    .expect("a table");
    for (why, cases) in skipped {
        eprintln!("{cases} cases skipped on {why}");
    }
    criterion.final_summary();
}
