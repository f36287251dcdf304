//! What the tests of every kernel share: storage types, seeded numbers, and a run in every thread order.
#![allow(dead_code)] // each test binary uses its own part

use std::fmt::Debug;

use dtmem_host::{Buffer, Check, Element, Executor, Order, Result};
use half::{bf16, f16};
use ndarray::{Array, ArrayBase, Data, Dimension, IntoDimension};

/// A type that kernels store numbers in; the name is the end of the kernels' names.
pub trait Storage: Element + PartialEq + Debug {
    const NAME: &str;
    /// The relative error that SPEC section 9 allows.
    const TOLERANCE: f64;
    fn round(x: f64) -> Self;
    fn widen(self) -> f64;
    fn bits(self) -> u32;
}

impl Storage for f32 {
    const NAME: &str = "f32";
    const TOLERANCE: f64 = 2e-5;
    fn round(x: f64) -> Self {
        x as f32
    }
    fn widen(self) -> f64 {
        f64::from(self)
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Storage for bf16 {
    const NAME: &str = "bf16";
    const TOLERANCE: f64 = 1.5e-2;
    fn round(x: f64) -> Self {
        Self::from_f32(x as f32)
    }
    fn widen(self) -> f64 {
        self.to_f64()
    }
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Storage for f16 {
    const NAME: &str = "f16";
    const TOLERANCE: f64 = 1.5e-2;
    fn round(x: f64) -> Self {
        Self::from_f32(x as f32)
    }
    fn widen(self) -> f64 {
        self.to_f64()
    }
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// A small seeded generator (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn normal(&mut self) -> f64 {
        let mut uniform = || (self.bits() >> 11) as f64 / (1_u64 << 53) as f64;
        let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * uniform()).cos()
    }

    /// Standard normal numbers as `T` can hold them.
    pub fn array<T: Storage, Sh: IntoDimension>(&mut self, shape: Sh) -> Array<f64, Sh::Dim> {
        Array::from_shape_simple_fn(shape.into_dimension(), || T::round(self.normal()).widen())
    }
}

/// A buffer with these numbers, rounded to `T`.
pub fn upload<T: Storage, D: Dimension>(executor: &Executor, x: &Array<f64, D>) -> Buffer<T> {
    let content: Vec<T> = x.iter().map(|&x| T::round(x)).collect();
    executor.upload(&content)
}

/// Fails with the tensor's name when ‖x − reference‖₂/‖reference‖₂ is above the tolerance, or anything is NaN.
#[track_caller]
pub fn assert_close<T: Storage, S: Data<Elem = f64>, D: Dimension>(
    name: &str,
    x: &[T],
    reference: &ArrayBase<S, D>,
    tolerance: f64,
) {
    assert_near(name, x, reference, tolerance, 0.0);
}

/// As [`assert_close`], with an error relative to at least `scale`: the norm of what cancels in a
/// result that can be all but zero.
#[track_caller]
pub fn assert_near<T: Storage, S: Data<Elem = f64>, D: Dimension>(
    name: &str,
    x: &[T],
    reference: &ArrayBase<S, D>,
    tolerance: f64,
    scale: f64,
) {
    assert_eq!(x.len(), reference.len(), "{name}: length");
    let difference = norm(
        x.iter()
            .zip(reference)
            .map(|(&x, &reference)| x.widen() - reference),
    );
    let scale = scale.max(norm(reference.iter().copied()));
    let error = difference / if scale == 0.0 { 1.0 } else { scale };
    assert!(
        error <= tolerance,
        "{name}: relative error {error:e} above {tolerance:e}"
    );
}

/// ‖x‖₂
pub fn norm(x: impl IntoIterator<Item = f64>) -> f64 {
    x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Runs `f` under each thread order and fails unless all give the same bits; gives the result.
#[track_caller]
pub fn in_every_order<R: PartialEq + Debug>(mut f: impl FnMut(&Executor) -> R) -> R {
    let mut executor = Executor::new();
    let mut results = Order::ALL.map(|order| {
        executor.set_order(order);
        Some(f(&executor))
    });
    let first = results[0].take().expect("taken once");
    for (order, result) in Order::ALL.iter().zip(&results).skip(1) {
        assert!(
            result.as_ref() == Some(&first),
            "{order:?} gives other bits than Forward"
        );
    }
    first
}

/// Fails unless each thread order ends with one of these findings, at a line, when `run` is given the number of a defect
/// among those that its kernel's source lists.
#[track_caller]
pub fn assert_defect_is_found<R: Debug>(
    source: &str,
    defect: &str,
    checks: &[Check],
    run: impl Fn(&Executor, i32) -> Result<R>,
) {
    let list = source.split_once("enum Defect : int32_t {");
    let (list, _) = list.and_then(|(_, list)| list.split_once('}')).expect("it");
    let number = list.split(',').position(|name| name.trim() == defect);
    let number = number.unwrap_or_else(|| panic!("no {defect}")) as i32;
    let mut executor = Executor::new();
    for order in Order::ALL {
        executor.set_order(order);
        let error = run(&executor, number).expect_err(defect);
        let finding = error
            .finding()
            .unwrap_or_else(|| panic!("{defect}: {error}"));
        println!("{defect}: {finding}");
        assert!(
            checks.contains(&finding.check),
            "{defect}, {order:?}: {finding}"
        );
        assert!(finding.place.location.is_some(), "{finding}");
    }
}

/// Leaves out each line of a kernel file that has a barrier or a wait, one after another, and fails unless one of the
/// thread orders ends with a finding. `run` launches whatever uses them, and passes as the file is.
#[track_caller]
pub fn assert_every_barrier_is_needed(
    file: &str,
    source: &str,
    run: impl Fn(&Executor) -> Result<()>,
) {
    const WAITS: [&str; 12] = [
        "__syncthreads(",
        "__syncwarp(",
        "barrier_sync(",
        "barrier_arrive(", // also that of an mbarrier
        "cp_async_wait",
        "cluster_arrive(",
        "cluster_wait(",
        "fence_proxy_async(",
        "mbarrier_wait(",
        "bulk_wait_read",
        "wgmma_fence(",
        "wgmma_wait",
    ];
    let mut executor = Executor::new();
    run(&executor).unwrap_or_else(|error| panic!("as it is: {error}"));
    let mut lines = 0;
    for (number, line) in (1..).zip(source.lines()) {
        let code = line.split("//").next().unwrap_or_default();
        if !WAITS.iter().any(|wait| code.contains(wait)) {
            continue;
        }
        lines += 1;
        executor.omit(Some((file, number)));
        let found = Order::ALL.iter().any(|&order| {
            executor.set_order(order);
            run(&executor).is_err_and(|error| error.finding().is_some())
        });
        assert!(found, "{file}:{number} could be left out: {}", line.trim());
    }
    assert!(lines > 0, "{file} has no barriers");
}
