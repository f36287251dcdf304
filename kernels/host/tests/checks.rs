//! Defects that a person would plant are found, with thread, memory and line; kernels without any are left alone.

mod common;

use common::in_every_order;
use dtmem_host::{Arg, Check, Error, Executor, Finding, Launch, Memory, Order, View, kernels};

fn launch(threads: u32) -> Launch {
    Launch::new([1, 1, 1], [threads, 1, 1])
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32).collect()
}

/// The finding that the launch ends with, in whatever order the threads run.
#[track_caller]
fn finding(
    kernel: &str,
    launch: Launch,
    args: impl Fn(&Executor) -> Vec<(Arg, Box<dyn std::any::Any>)>,
) -> Finding {
    let mut executor = Executor::new();
    executor.set_budget(1 << 20);
    let mut found = Vec::new();
    for order in Order::ALL {
        executor.set_order(order);
        let (args, _buffers): (Vec<_>, Vec<_>) = args(&executor).into_iter().unzip();
        match executor.launch(kernel, launch, &args) {
            Err(Error::Finding(finding)) => found.push(*finding),
            other => panic!("{kernel}, {order:?}: {other:?}"),
        }
    }
    for finding in &found {
        println!("{finding}");
        assert_eq!(finding.check, found[0].check, "{found:#?}");
        let location = finding.place.location.as_ref().expect("a line");
        assert!(
            location.file.starts_with("kernels/") && location.line > 0,
            "{location:?}"
        );
    }
    found.remove(0)
}

type Passed = (Arg, Box<dyn std::any::Any>);

fn input(executor: &Executor, n: usize) -> Passed {
    let buffer = executor.upload(&numbers(n));
    (Arg::Input(buffer.view()), Box::new(buffer))
}

fn output(executor: &Executor, n: usize) -> Passed {
    let buffer = executor.scratch::<f32>(n);
    (Arg::Output(buffer.view()), Box::new(buffer))
}

fn value(x: i32) -> Passed {
    (Arg::I32(x), Box::new(()))
}

fn shared(name: &str, offset: i64, extent: u64) -> Option<Memory> {
    Some(Memory::Shared {
        variable: name.to_owned(),
        offset,
        extent,
    })
}

fn memory(finding: &Finding) -> Option<Memory> {
    finding.access.as_ref().map(|access| access.memory.clone())
}

/// The lines of tests/kernels/defects.cu that hold `text`, to compare with a finding's.
fn lines(text: &str) -> Vec<u32> {
    let source = include_str!("kernels/defects.cu");
    let found: Vec<u32> = (1..)
        .zip(source.lines())
        .filter(|(_, line)| line.contains(text))
        .map(|(n, _)| n)
        .collect();
    assert!(!found.is_empty(), "{text}");
    found
}

fn line(finding: &Finding) -> u32 {
    finding
        .place
        .location
        .as_ref()
        .map_or(0, |location| location.line)
}

#[test]
fn a_read_past_a_buffer_is_found() {
    let finding = finding("test_offset", launch(64), |e| {
        vec![input(e, 64), output(e, 64), value(1)]
    });
    assert_eq!(finding.check, Check::OutOfBounds);
    assert_eq!(finding.place.thread, [63, 0, 0]);
    assert_eq!(
        memory(&finding),
        Some(Memory::Global {
            argument: 0,
            offset: 256,
            extent: 256
        })
    );
    assert_eq!(vec![line(&finding)], lines("y[i] = x[i + offset];"));
}

#[test]
fn a_read_before_a_buffer_is_found() {
    let finding = finding("test_offset", launch(64), |e| {
        vec![input(e, 64), output(e, 64), value(-2)]
    });
    assert_eq!(finding.check, Check::OutOfBounds);
    assert!(
        matches!(
            memory(&finding),
            Some(Memory::Global {
                argument: 0,
                offset: -8 | -4,
                ..
            })
        ),
        "{finding}"
    );
}

#[test]
fn a_write_past_a_view_is_found_even_inside_of_its_buffer() {
    let executor = Executor::new();
    let [x, y] = [executor.upload(&numbers(64)), executor.upload(&numbers(64))];
    let args = [
        Arg::Input(x.view()),
        Arg::Output(y.slice(0..32)),
        Arg::I32(0),
    ];
    let error = executor
        .launch("test_offset", launch(64), &args)
        .unwrap_err();
    let finding = error.finding().expect("a finding");
    assert_eq!(
        (finding.check, finding.place.thread),
        (Check::OutOfBounds, [32, 0, 0])
    );
    assert_eq!(
        memory(finding),
        Some(Memory::Global {
            argument: 1,
            offset: 128,
            extent: 128
        })
    );
}

#[test]
fn a_null_pointer_is_found() {
    let finding = finding("test_offset", launch(64), |e| {
        vec![
            (Arg::Input(View::NULL), Box::new(())),
            output(e, 64),
            value(0),
        ]
    });
    assert_eq!(finding.check, Check::OutOfBounds);
    assert!(matches!(memory(&finding), Some(Memory::Unknown { .. })));
}

#[test]
fn a_write_to_an_input_is_found() {
    let finding = finding("test_write_input", launch(32), |e| vec![input(e, 32)]);
    assert_eq!(finding.check, Check::ReadOnly);
}

#[test]
fn a_read_of_uninitialised_global_memory_is_found() {
    let finding = finding("test_increment", launch(64), |e| vec![output(e, 64)]);
    assert_eq!(finding.check, Check::Uninitialised);
}

#[test]
fn what_the_host_writes_to_a_buffer_counts_as_initialised_and_nothing_beside_it() {
    let executor = Executor::new();
    let buffer = executor.scratch::<f32>(64);
    let increment = || executor.launch("test_increment", launch(64), &[Arg::Output(buffer.view())]);
    executor
        .write(buffer.slice(1..64), &numbers(63))
        .expect("inside");
    let error = increment().unwrap_err();
    assert_eq!(
        error.finding().map(|finding| finding.check),
        Some(Check::Uninitialised)
    );
    executor.write(buffer.view(), &numbers(64)).expect("inside");
    increment().expect("all of it is written");
    assert_eq!(
        executor.read::<f32>(buffer.slice(62..64)).expect("inside"),
        [63.0, 64.0]
    );
    let beyond = executor.write(buffer.slice(60..64), &numbers(5));
    assert!(matches!(beyond, Err(Error::NotHeld { .. })), "{beyond:?}");
}

fn reverse(defect: i32) -> Finding {
    finding("test_reverse", launch(64), |e| {
        vec![input(e, 64), output(e, 64), value(defect)]
    })
}

#[test]
fn a_removed_barrier_is_found() {
    // Whether the reader or the writer comes first depends on the order: the word is uninitialised, or a race.
    let mut executor = Executor::new();
    for (order, check) in [
        (Order::Forward, Check::Uninitialised),
        (Order::Reversed, Check::Uninitialised),
    ] {
        executor.set_order(order);
        let [x, y] = [executor.upload(&numbers(64)), executor.scratch(64)];
        let args = [Arg::Input(x.view()), Arg::Output(y.view()), Arg::I32(1)];
        let error = executor
            .launch("test_reverse", launch(64), &args)
            .unwrap_err();
        assert_eq!(error.finding().map(|finding| finding.check), Some(check));
    }
}

#[test]
fn a_read_of_uninitialised_shared_memory_is_found() {
    let finding = reverse(2);
    assert_eq!(
        (finding.check, finding.place.thread),
        (Check::Uninitialised, [46, 0, 0])
    );
    assert_eq!(memory(&finding), shared("tile", 17 * 4, 256));
}

#[test]
fn a_write_past_a_shared_variable_is_found() {
    let finding = reverse(3);
    assert_eq!(finding.check, Check::OutOfBounds);
    assert!(
        matches!(memory(&finding), Some(Memory::Shared { variable, offset: 256.., .. }) if variable == "tile")
    );
    assert_eq!(vec![line(&finding)], lines("*cell = x[i]"));
}

#[test]
fn half_a_block_that_skips_a_barrier_is_found() {
    let finding = reverse(4);
    assert_eq!(finding.check, Check::Divergence);
    assert!(
        finding
            .detail
            .contains("32 of 64 threads, from (0, 0, 0), have ended"),
        "{finding}"
    );
    assert!(
        finding
            .detail
            .contains("32 of 64 threads, from (32, 0, 0), wait in __syncthreads"),
        "{finding}"
    );
}

#[test]
fn half_a_block_that_ends_before_a_barrier_is_found() {
    let finding = reverse(5);
    assert_eq!(
        (finding.check, finding.place.thread),
        (Check::Divergence, [0, 0, 0])
    );
    assert!(
        finding
            .detail
            .contains("32 of 64 threads, from (32, 0, 0), have ended"),
        "{finding}"
    );
}

#[test]
fn threads_that_meet_in_different_barriers_are_found() {
    let finding = reverse(6);
    assert_eq!(finding.check, Check::Divergence);
    assert!(lines("__syncthreads();").contains(&line(&finding)));
}

#[test]
fn a_race_of_two_warps_on_one_word_is_found() {
    let finding = finding("test_two_warps", launch(64), |e| {
        vec![output(e, 1), value(0)]
    });
    assert_eq!(finding.check, Check::Race);
    assert_eq!(memory(&finding), shared("word", 0, 4));
    assert_eq!(finding.place.thread, [32, 0, 0]);
    assert_eq!(vec![line(&finding)], lines("word = 2.0f"));
    let (other, is_write) = finding.other.expect("the other thread");
    assert_eq!((other.thread, is_write), ([0, 0, 0], true));
    assert!(lines("word = 1.0f").contains(&other.location.expect("a line").line));
}

#[test]
fn a_race_inside_of_a_warp_is_found() {
    let executor = Executor::new();
    let y = executor.scratch::<f32>(32);
    let error = executor
        .launch(
            "test_one_lane",
            launch(32),
            &[Arg::Output(y.view()), Arg::I32(0)],
        )
        .unwrap_err();
    let finding = error.finding().expect("a finding");
    assert_eq!(
        (finding.check, finding.place.thread),
        (Check::Race, [1, 0, 0])
    );
}

#[test]
fn a_race_of_two_blocks_is_found() {
    let two = Launch::new([2, 1, 1], [32, 1, 1]);
    let finding = finding("test_two_blocks", two, |e| vec![output(e, 1)]);
    assert_eq!(
        (finding.check, finding.place.block),
        (Check::Race, [1, 0, 0])
    );
    assert_eq!(finding.other.expect("the other thread").0.block, [0, 0, 0]);
}

#[test]
fn a_forgotten_named_barrier_is_found() {
    let executor = Executor::new();
    let [x, y] = [executor.upload(&numbers(64)), executor.scratch(64)];
    let args = |synchronised| {
        [
            Arg::Input(x.view()),
            Arg::Output(y.view()),
            Arg::I32(synchronised),
        ]
    };
    let error = executor
        .launch("test_producer", launch(128), &args(0))
        .unwrap_err();
    assert_eq!(
        error.finding().map(|finding| finding.check),
        Some(Check::Race)
    );
    executor
        .launch("test_producer", launch(128), &args(1))
        .expect("with it");
}

fn copy(defect: i32) -> Finding {
    finding("test_async_copy", launch(32), |e| {
        vec![input(e, 128), output(e, 128), value(1), value(defect)]
    })
}

#[test]
fn a_copy_that_nobody_waited_for_is_found() {
    for defect in [1, 2] {
        let finding = copy(defect);
        assert_eq!(finding.check, Check::Pending);
        assert_eq!(vec![line(&finding)], lines("= tile[source * 4 + i]"));
    }
}

#[test]
fn a_copy_that_another_thread_waited_for_is_found() {
    // Before the other thread's wait the word is pending, after it a race.
    let executor = Executor::new();
    let [x, y] = [executor.upload(&numbers(128)), executor.scratch(128)];
    let args = [
        Arg::Input(x.view()),
        Arg::Output(y.view()),
        Arg::I32(0),
        Arg::I32(3),
    ];
    let error = executor
        .launch("test_async_copy", launch(32), &args)
        .unwrap_err();
    let found = error.finding().expect("a finding").check;
    assert!(
        matches!(found, Check::Pending | Check::Race | Check::Uninitialised),
        "{error}"
    );
}

#[test]
fn a_copy_that_is_under_way_at_the_end_is_found() {
    assert_eq!(copy(4).check, Check::Unawaited);
}

#[test]
fn a_misaligned_copy_is_found() {
    assert_eq!(copy(5).check, Check::Misaligned);
}

#[test]
fn an_asynchronous_copy_fills_with_zeros() {
    let y = in_every_order(|executor| {
        let [x, y] = [executor.upload(&numbers(128)), executor.scratch::<f32>(128)];
        let args = [
            Arg::Input(x.view()),
            Arg::Output(y.view()),
            Arg::I32(1),
            Arg::I32(0),
        ];
        executor
            .launch("test_async_copy", launch(32), &args)
            .unwrap_or_else(|error| panic!("{error}"));
        y.download()
    });
    for (at, &y) in y.iter().enumerate() {
        let source = (31 - at / 4) * 4 + at % 4;
        assert_eq!(y, if at % 4 == 3 { 0.0 } else { source as f32 });
    }
}

fn odd(which: i32) -> Finding {
    finding("test_odd", launch(32), |e| {
        vec![input(e, 32), output(e, 32), value(which)]
    })
}

#[test]
fn other_defects_are_found() {
    assert_eq!(odd(0).check, Check::Misaligned);
    assert_eq!(odd(1).check, Check::Arithmetic);
    assert_eq!(odd(2).check, Check::Collective);
    assert_eq!(odd(3).check, Check::Divergence);
    assert_eq!(odd(4).check, Check::Runaway);
    assert_eq!(odd(5).check, Check::SharedSize);
    let finding = odd(6);
    assert_eq!(
        (finding.check, finding.place.thread),
        (Check::Arithmetic, [3, 0, 0])
    );
}

#[test]
fn right_kernels_pass() {
    in_every_order(|executor| {
        let [x, y] = [executor.upload(&numbers(64)), executor.scratch::<f32>(64)];
        let args = [Arg::Input(x.view()), Arg::Output(y.view()), Arg::I32(0)];
        executor
            .launch("test_reverse", launch(64), &args)
            .unwrap_or_else(|error| panic!("{error}"));
        executor
            .launch(
                "test_one_lane",
                launch(32),
                &[Arg::Output(y.slice(0..32)), Arg::I32(1)],
            )
            .unwrap();
        executor
            .launch(
                "test_two_warps",
                launch(64),
                &[Arg::Output(y.slice(0..1)), Arg::I32(1)],
            )
            .unwrap();
        y.download()
    });
}

#[test]
fn warp_functions_give_what_cuda_defines() {
    let y = in_every_order(|executor| {
        let y = executor.scratch::<i32>(64 * 8);
        executor
            .launch("test_warp_functions", launch(64), &[Arg::Output(y.view())])
            .unwrap();
        y.download()
    });
    for (thread, found) in y.chunks(8).enumerate() {
        let lane = thread as i32 % 32;
        let thirds = (0..32)
            .filter(|lane| lane % 3 == 0)
            .fold(0_u32, |votes, lane| votes | 1 << lane);
        let expected = [
            5,
            lane / 8 * 8 + 3,
            lane ^ 9,
            if lane < 3 { lane } else { lane - 3 },
            if lane % 16 < 13 { lane + 3 } else { lane },
            thirds.cast_signed(),
            2,
            lane ^ 1,
        ];
        assert_eq!(found, expected, "lane {lane}");
    }
}

fn in_clusters(blocks: u32) -> Launch {
    Launch {
        cluster: blocks,
        ..Launch::new([12, 1, 1], [64, 1, 1])
    }
}

fn cluster(defect: i32) -> Finding {
    finding("test_cluster", in_clusters(3), |e| {
        vec![input(e, 768), output(e, 768), value(3), value(defect)]
    })
}

/// What is found in each order.
fn cluster_findings(defect: i32) -> [Check; 3] {
    Order::ALL.map(|order| {
        let mut executor = Executor::new();
        executor.set_order(order);
        let [x, y] = [executor.upload(&numbers(768)), executor.scratch(768)];
        let args = [
            Arg::Input(x.view()),
            Arg::Output(y.view()),
            Arg::I32(3),
            Arg::I32(defect),
        ];
        let error = executor
            .launch("test_cluster", in_clusters(3), &args)
            .unwrap_err();
        println!("{error}");
        error.finding().expect("a finding").check
    })
}

#[test]
fn blocks_of_a_cluster_use_each_other_s_shared_memory() {
    for blocks in [1, 2, 3, 4, 12] {
        let y = in_every_order(|executor| {
            let [x, y] = [executor.upload(&numbers(768)), executor.scratch::<f32>(768)];
            let args = [
                Arg::Input(x.view()),
                Arg::Output(y.view()),
                Arg::I32(blocks),
                Arg::I32(0),
            ];
            executor
                .launch("test_cluster", in_clusters(blocks.unsigned_abs()), &args)
                .unwrap_or_else(|error| panic!("{error}"));
            y.download()
        });
        assert_eq!(y, numbers(768), "{blocks} blocks");
    }
}

#[test]
fn a_missing_cluster_barrier_is_found() {
    // Whether the reader or the writer comes first depends on the order.
    // None, one that only the threads of a block wait at, and a read ahead of the wait.
    for defect in [1, 9, 3] {
        for check in cluster_findings(defect) {
            assert!(
                matches!(check, Check::Race | Check::Uninitialised),
                "{check:?}"
            );
        }
    }
    // A write behind a read by another block.
    for check in cluster_findings(10) {
        assert_eq!(check, Check::Race);
    }
}

#[test]
fn a_block_that_ends_while_its_memory_is_read_is_found() {
    let finding = cluster(2);
    assert_eq!(finding.check, Check::Ended);
    assert!(
        matches!(memory(&finding), Some(Memory::Shared { variable, extent: 256, .. }) if variable == "numbers")
    );
}

#[test]
fn wrong_use_of_clusters_is_found() {
    assert_eq!(cluster(4).check, Check::Collective);
    assert_eq!(cluster(6).check, Check::Collective);
    assert_eq!(cluster(7).check, Check::OutOfBounds);
    let finding = cluster(8);
    assert_eq!(
        (finding.check, finding.place.block[0] % 3),
        (Check::Uninitialised, 2)
    );
    // The block that skips the first barrier meets the others in it at its second, and they wait in vain at theirs;
    // what it reads until then has not been synchronised.
    let found = cluster_findings(5);
    assert!(
        found.iter().all(|check| matches!(
            check,
            Check::Race | Check::Uninitialised | Check::Divergence
        )),
        "{found:?}"
    );
}

#[test]
fn dynamic_shared_memory_has_the_bytes_of_the_launch() {
    let executor = Executor::new();
    let [x, y] = [executor.upload(&numbers(120)), executor.scratch::<f32>(3)];
    let args = [Arg::Input(x.view()), Arg::Output(y.view()), Arg::I32(40)];
    let mut launch = Launch {
        shared_bytes: 160,
        ..Launch::new([3, 1, 1], [32, 1, 1])
    };
    executor.launch("test_dynamic", launch, &args).unwrap();
    assert_eq!(y.download(), [780.0, 2380.0, 3980.0]);
    launch.shared_bytes = 156;
    let error = executor.launch("test_dynamic", launch, &args).unwrap_err();
    assert_eq!(
        error.finding().map(|finding| finding.check),
        Some(Check::OutOfBounds),
        "{error}"
    );
}

#[test]
fn wrong_launches_are_typed_errors() {
    let executor = Executor::new();
    let [x, y] = [executor.upload(&numbers(64)), executor.scratch::<f32>(64)];
    let good = [Arg::Input(x.view()), Arg::Output(y.view()), Arg::I32(0)];
    let error = |name, launch, args: &[Arg]| executor.launch(name, launch, args).unwrap_err();
    assert!(matches!(
        error("test_nothing", launch(64), &good),
        Error::UnknownKernel(_)
    ));
    assert!(matches!(
        error("test_offset", launch(64), &good[1..]),
        Error::ArgumentCount {
            expected: 3,
            found: 2,
            ..
        }
    ));
    let swapped = [good[1], good[0], good[2]];
    assert!(matches!(
        error("test_offset", launch(64), &swapped),
        Error::ArgumentType { index: 0, .. }
    ));
    let wide = [good[0], good[1], Arg::I64(0)];
    assert!(matches!(
        error("test_offset", launch(64), &wide),
        Error::ArgumentType { index: 2, .. }
    ));
    let beyond = View {
        bytes: 257,
        ..x.view()
    };
    let foreign = [Arg::Input(beyond), good[1], good[2]];
    assert!(matches!(
        error("test_offset", launch(64), &foreign),
        Error::ForeignView { index: 0, .. }
    ));
    assert!(matches!(
        error("test_offset", launch(96), &good),
        Error::Shape { what: "block", .. }
    ));
    assert!(matches!(
        error("test_offset", in_clusters(5), &good),
        Error::Shape {
            what: "cluster",
            ..
        }
    ));
    let empty = Launch::new([0, 1, 1], [64, 1, 1]);
    assert!(matches!(
        error("test_offset", empty, &good),
        Error::Shape { what: "grid", .. }
    ));
    drop(x);
    assert!(matches!(
        error("test_offset", launch(64), &good),
        Error::ForeignView { index: 0, .. }
    ));
    assert!(kernels().contains(&"layer_norm_reduce".to_owned()));
}
