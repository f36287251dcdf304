//! Copies by a tensor's map: what is right arrives in every order, and what a person would plant is found.

mod common;

use common::{assert_defect_is_found, in_every_order};
use dtmem_host::{Arg, Boxes, Buffer, Check, Error, Executor, Launch, TensorMap};

const ROWS: usize = 70;
const COLUMNS: usize = 40;
/// From row to row, in elements.
const STRIDE: usize = 44;
const BOX: [usize; 2] = [16, 32];
const TILES: usize = 6;

fn boxes(x: &Buffer<f32>) -> Boxes {
    Boxes {
        address: x.view().address,
        element: 4,
        columns: COLUMNS as u64,
        rows: ROWS as u64,
        stride: 4 * STRIDE as u64,
        box_columns: BOX[1] as u32,
        box_rows: BOX[0] as u32,
    }
}

fn numbers() -> Vec<f32> {
    let inside = |at: usize| at % STRIDE < COLUMNS;
    let number = |at| if inside(at) { at as f32 } else { f32::NAN };
    (0..ROWS * STRIDE).map(number).collect()
}

fn launch(executor: &Executor, x: &Buffer<f32>, defect: i32) -> dtmem_host::Result<Vec<f32>> {
    let y = executor.scratch(TILES * BOX[0] * BOX[1]);
    let args = [
        Arg::Map(TensorMap::new(boxes(x))?),
        Arg::Output(y.view()),
        Arg::I32(TILES as i32),
        Arg::I32(defect),
    ];
    executor.launch("test_tensor", Launch::new([1, 1, 1], [64, 1, 1]), &args)?;
    Ok(y.download())
}

#[track_caller]
fn assert_found(defect: &str, checks: &[Check]) {
    assert_defect_is_found(
        include_str!("kernels/tensor.cu"),
        defect,
        checks,
        |executor, defect| launch(executor, &executor.upload(&numbers()), defect),
    );
}

#[test]
fn boxes_arrive_with_zeros_outside_of_the_matrix() {
    let x = numbers();
    let y = in_every_order(|executor| {
        launch(executor, &executor.upload(&x), 0).unwrap_or_else(|error| panic!("{error}"))
    });
    for (at, &y) in y.iter().enumerate() {
        let (tile, row, column) = (at / 512, at / 32 % 16, at % 32);
        let row = (tile * 16 + row).checked_sub(3);
        let column = (tile % 2 * 32 + column).checked_sub(8);
        let expected = match (row, column) {
            (Some(row @ 0..ROWS), Some(column @ 0..COLUMNS)) => x[row * STRIDE + column],
            _ => 0.0,
        };
        assert_eq!(
            y,
            1.0 + expected,
            "tile {tile}, row {row:?}, column {column:?}"
        );
    }
}

#[test]
fn wrong_use_of_a_ring_of_boxes_is_found() {
    assert_found(
        "kNoWait",
        &[Check::Pending, Check::Uninitialised, Check::Race],
    );
    assert_found(
        "kNoWaitForRelease",
        &[Check::Pending, Check::Race, Check::Collective],
    );
    assert_found("kNoSyncwarp", &[Check::Race]);
    assert_found(
        "kReleasesTwice",
        &[Check::Race, Check::Pending, Check::Divergence],
    );
    assert_found("kMisplaced", &[Check::Misaligned]);
    assert_found("kTooFewBytes", &[Check::Collective]);
    assert_found("kNoMap", &[Check::Collective]);
    assert_found("kEndsEarly", &[Check::Unawaited, Check::Divergence]);
    assert_found("kWritesEarly", &[Check::Pending]);
}

#[test]
fn what_a_box_reads_is_checked_as_any_other_read() {
    let executor = Executor::new();
    let unwritten = executor.scratch::<f32>(ROWS * STRIDE);
    let finding = launch(&executor, &unwritten, 0).expect_err("nothing was written to it");
    let finding = finding.finding().expect("a finding");
    assert_eq!(finding.check, Check::Uninitialised, "{finding}");

    // The last row has no gap behind it, and the matrix is not longer than its memory.
    let exact = executor.upload(&numbers()[..ROWS * STRIDE - (STRIDE - COLUMNS)]);
    launch(&executor, &exact, 0).unwrap_or_else(|error| panic!("{error}"));
    let short = executor.upload(&numbers()[..ROWS * STRIDE - (STRIDE - COLUMNS) - 1]);
    let refused = launch(&executor, &short, 0);
    assert!(
        matches!(refused, Err(Error::ForeignView { index: 0, .. })),
        "{refused:?}"
    );
}

#[test]
fn maps_that_no_gpu_would_take_are_refused() {
    let executor = Executor::new();
    let x = executor.upload(&numbers());
    let good = boxes(&x);
    let refused = |what: &str, boxes: Boxes| match TensorMap::new(boxes) {
        Err(Error::Map { what: found, .. }) => assert_eq!(found, what),
        other => panic!("{what}: {other:?}"),
    };
    let words = TensorMap::new(good).expect("it is right").words();
    assert_eq!(
        TensorMap::from_words(words).map(|map| map.words()),
        Some(words)
    );
    assert_eq!(TensorMap::from_words([1; 16]), None);
    let address = good.address;
    refused(
        "address",
        Boxes {
            address: address + 8,
            ..good
        },
    );
    refused("address", Boxes { address: 0, ..good });
    refused("element", Boxes { element: 3, ..good });
    refused("columns", Boxes { columns: 0, ..good });
    refused(
        "rows",
        Boxes {
            rows: (1 << 32) + 1,
            ..good
        },
    );
    refused(
        "stride",
        Boxes {
            stride: good.stride + 8,
            ..good
        },
    );
    refused(
        "stride",
        Boxes {
            stride: 1 << 40,
            ..good
        },
    );
    refused(
        "box_columns",
        Boxes {
            box_columns: 64,
            ..good
        },
    );
    refused(
        "box_rows",
        Boxes {
            box_rows: 257,
            ..good
        },
    );

    let args = [
        Arg::Input(x.view()),
        Arg::Output(x.view()),
        Arg::I32(1),
        Arg::I32(0),
    ];
    let launched = executor.launch("test_tensor", Launch::new([1, 1, 1], [64, 1, 1]), &args);
    let message = launched.expect_err("a pointer is no map").to_string();
    assert!(message.contains("a tensor's map"), "{message}");
}
