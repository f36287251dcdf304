//! Bulk copies, their barriers and the fence of the asynchronous proxy: what is right passes in every order, and what a
//! person would plant is found.

mod common;

use common::{assert_defect_is_found, in_every_order};
use dtmem_host::{Arg, Check, Executor, Launch};

const NUMBERS: usize = 768;

fn numbers() -> Vec<f32> {
    (0..NUMBERS).map(|i| i as f32).collect()
}

fn run(executor: &Executor, defect: i32) -> dtmem_host::Result<Vec<f32>> {
    let [x, y] = [executor.upload(&numbers()), executor.scratch(NUMBERS)];
    let args = [
        Arg::Input(x.view()),
        Arg::Output(y.view()),
        Arg::I32(defect),
    ];
    executor.launch("test_bulk", Launch::new([1, 1, 1], [64, 1, 1]), &args)?;
    Ok(y.download())
}

#[track_caller]
fn assert_found(defect: &str, checks: &[Check]) {
    assert_defect_is_found(include_str!("kernels/bulk.cu"), defect, checks, run);
}

#[test]
fn what_is_copied_in_bulk_arrives() {
    let y = in_every_order(|executor| run(executor, 0).unwrap_or_else(|error| panic!("{error}")));
    let expected: Vec<f32> = numbers().iter().map(|x| x + 1.0).collect();
    assert_eq!(y, expected);
}

#[test]
fn wrong_use_of_a_barrier_of_bytes_is_found() {
    assert_found("kNoFenceOfBarrier", &[Check::Unfenced]);
    assert_found("kNoBarrierOfThreads", &[Check::Race, Check::Uninitialised]);
    assert_found("kNoInit", &[Check::Uninitialised]);
    assert_found("kInitTwice", &[Check::Collective]);
    assert_found("kTooFewBytes", &[Check::Collective]);
    assert_found("kTooManyBytes", &[Check::Divergence]);
    assert_found("kNoArrival", &[Check::Divergence]);
    assert_found("kWritesBarrier", &[Check::InFlight]);
}

#[test]
fn a_bulk_copy_that_nobody_waited_for_is_found() {
    // By who comes first: the bytes are under way, not begun yet, or have been waited for by another warp alone.
    let early = [Check::Pending, Check::Uninitialised, Check::Race];
    assert_found("kNoWait", &early);
    // A wait for the phase before passes at once, or never if this one is over by then.
    assert_found(
        "kWrongParity",
        &[early.as_slice(), &[Check::Divergence]].concat(),
    );
    assert_found("kWaitOfOthers", &early);
    assert_found("kHalfAWarpWaits", &early);
    assert_found("kWritesWhatArrives", &[Check::Pending]);
    assert_found("kEndsEarly", &[Check::Unawaited]);
    assert_found("kNoWaitForRead", &[Check::Unawaited, Check::InFlight]);
    assert_found("kNoCommit", &[Check::Unawaited, Check::InFlight]);
    assert_found("kWritesWhatIsRead", &[Check::InFlight]);
}

#[test]
fn what_the_asynchronous_proxy_cannot_see_is_found() {
    assert_found("kNoFenceOfNumbers", &[Check::Unfenced]);
    assert_found("kFenceTooLate", &[Check::Unfenced]);
    assert_found("kNoBarrierOfNumbers", &[Check::Race]);
    assert_found("kLoadsOverNumbers", &[Check::Unfenced]);
}

#[test]
fn sizes_and_addresses_that_are_no_multiples_of_16_or_beyond_are_found() {
    assert_found("kOddBytes", &[Check::Misaligned]);
    assert_found("kSharedMisaligned", &[Check::Misaligned]);
    assert_found("kGlobalMisaligned", &[Check::Misaligned]);
    assert_found("kPastGlobal", &[Check::OutOfBounds]);
    assert_found("kPastShared", &[Check::OutOfBounds]);
}
