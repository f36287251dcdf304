//! activation.cu against the reference.

mod common;

use common::{Random, Storage, assert_near, in_every_order, norm, upload};
use dtmem_host::{Arg, Executor, Launch};
use dtmem_reference::activation::{self, Activation};
use half::{bf16, f16};
use ndarray::{Array1, Axis};
use proptest::prelude::*;

const THREADS: usize = 256;
const VECTOR_BYTES: usize = 16;

/// In the order of activation.cu.
const FUNCTIONS: [Activation; 4] = [
    Activation::Relu,
    Activation::Gelu,
    Activation::Tanh,
    Activation::OnePlus,
];

fn launch<T: Storage>(executor: &Executor, kernel: &str, n: usize, args: &[Arg]) {
    let blocks = n.div_ceil(THREADS * VECTOR_BYTES / size_of::<T>());
    let launch = Launch::new([blocks as u32, 1, 1], [THREADS as u32, 1, 1]);
    executor
        .launch(&format!("activation_{kernel}_{}", T::NAME), launch, args)
        .unwrap_or_else(|error| panic!("{error}"));
}

fn check<T: Storage>(n: usize, in_place: bool, seed: u64) {
    let mut random = Random(seed);
    let [x, dy] = [(); 2]
        .map(|()| random.array::<T, _>(n) * 4.0)
        .map(|x| x.map(|&x| T::round(x).widen()));
    for (index, function) in (0..).zip(FUNCTIONS) {
        let mut y = Array1::from_elem(n, f64::NAN);
        let row = Axis(0);
        activation::forward(
            function,
            x.view().insert_axis(row),
            y.view_mut().insert_axis(row),
        )
        .unwrap();
        let kept = match function {
            Activation::Relu | Activation::Tanh => y.map(|&y| T::round(y).widen()),
            Activation::Gelu | Activation::OnePlus => x.clone(),
        };
        let mut dx = dy.clone();
        let kept_row = kept.view().insert_axis(row);
        activation::backward_in_place(function, kept_row, kept_row, dx.view_mut().insert_axis(row))
            .unwrap();

        let (found_y, found_dx) = in_every_order(|executor| {
            let input = upload::<T, _>(executor, &x);
            let output = if in_place {
                None
            } else {
                Some(executor.scratch::<T>(n))
            };
            let output = output.as_ref().unwrap_or(&input);
            let args = [
                Arg::I32(index),
                Arg::Input(input.view()),
                Arg::Output(output.view()),
                Arg::I64(n as i64),
            ];
            launch::<T>(executor, "forward", n, &args);
            let [kept, gradient] = [&kept, &dy].map(|x| upload::<T, _>(executor, x));
            let args = [
                Arg::I32(index),
                Arg::Input(kept.view()),
                Arg::Output(gradient.view()),
                Arg::I64(n as i64),
            ];
            launch::<T>(executor, "backward", n, &args);
            (output.download(), gradient.download())
        });
        // Far from zero the functions and slopes are differences of nearly equal numbers.
        let [x_norm, dy_norm] = [&x, &dy].map(|x| norm(x.iter().copied()));
        assert_near(
            &format!("{function:?}, y"),
            &found_y,
            &y,
            T::TOLERANCE,
            x_norm,
        );
        assert_near(
            &format!("{function:?}, dx"),
            &found_dx,
            &dx,
            T::TOLERANCE,
            dy_norm,
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn functions_and_derivatives_agree_with_the_reference(
        n in prop_oneof![1..20_usize, 2040..2060_usize, 1..3000_usize], in_place: bool, seed: u64,
    ) {
        check::<f32>(n, in_place, seed);
        check::<bf16>(n, in_place, seed);
        check::<f16>(n, in_place, seed);
    }
}
