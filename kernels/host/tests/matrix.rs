//! Matrix instructions and the loads that feed them, against plain products.

mod common;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, in_every_order, upload,
};
use dtmem_host::{Arg, Check, Executor, Launch};
use half::{bf16, f16};
use proptest::prelude::*;

fn check_product<T: Storage>(name: &str, m: usize, n: usize, k: usize, tolerance: f64, seed: u64) {
    let mut random = Random(seed);
    let (a, b) = (random.array::<T, _>((m, k)), random.array::<T, _>((k, n)));
    let before = random.array::<f32, _>((m, n));
    let c = in_every_order(|executor| {
        let [a, b] = [&a, &b].map(|x| upload::<T, _>(executor, x));
        let c = upload::<f32, _>(executor, &before);
        let launch = Launch::new([n as u32 / 8, m as u32 / 16, 1], [32, 1, 1]);
        let args = [
            Arg::Input(a.view()),
            Arg::Input(b.view()),
            Arg::Output(c.view()),
            Arg::I32(n as i32),
            Arg::I32(k as i32),
        ];
        executor
            .launch(name, launch, &args)
            .unwrap_or_else(|error| panic!("{error}"));
        c.download()
    });
    assert_close("c", &c, &(a.dot(&b) + before), tolerance);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn products_are_those_of_the_rounded_operands(m in 1..4_usize, n in 1..5_usize, k in 1..5_usize, seed: u64) {
        check_product::<bf16>("test_product_bf16", 16 * m, 8 * n, 16 * k, 2e-6, seed);
        check_product::<f16>("test_product_f16", 16 * m, 8 * n, 16 * k, 2e-6, seed);
        // Rounding to 10 bits of mantissa happens inside of the kernel.
        check_product::<f32>("test_product_tf32", 16 * m, 8 * n, 8 * k, 2e-3, seed);
    }
}

#[test]
fn ldmatrix_hands_out_rows_or_columns() {
    let numbers: Vec<f16> = (0..256).map(|i| f16::from_f32(i as f32)).collect();
    let executor = Executor::new();
    let x = executor.upload(&numbers);
    let [plain, transposed] = [5, 4].map(|n| executor.scratch::<u32>(n * 32));
    let args = [
        Arg::Input(x.view()),
        Arg::Output(plain.view()),
        Arg::Output(transposed.view()),
    ];
    executor
        .launch("test_ldmatrix", Launch::new([1, 1, 1], [32, 1, 1]), &args)
        .unwrap_or_else(|error| panic!("{error}"));
    let element = |matrix: usize, row: usize, column: usize| {
        u32::from(numbers[matrix * 64 + row * 8 + column].to_bits())
    };
    for (at, (&plain, &transposed)) in plain
        .download()
        .iter()
        .zip(&transposed.download())
        .enumerate()
    {
        let (matrix, lane) = (at / 32, at % 32);
        let (major, minor) = (lane / 4, lane % 4 * 2);
        assert_eq!(
            plain,
            element(matrix, major, minor) | element(matrix, major, minor + 1) << 16
        );
        assert_eq!(
            transposed,
            element(matrix, minor, major) | element(matrix, minor + 1, major) << 16
        );
    }
    assert_eq!(plain.download()[..32], plain.download()[128..]);
}

#[test]
fn part_of_a_warp_cannot_multiply() {
    let executor = Executor::new();
    let [a, b] = [128, 64].map(|n| executor.upload(&vec![0_f32; n]));
    let c = executor.upload(&[0_f32; 128]);
    let args = [
        Arg::Input(a.view()),
        Arg::Input(b.view()),
        Arg::Output(c.view()),
        Arg::I32(8),
        Arg::I32(8),
    ];
    let error = executor
        .launch(
            "test_product_tf32",
            Launch::new([1, 1, 1], [16, 1, 1]),
            &args,
        )
        .unwrap_err();
    assert_eq!(
        error.finding().map(|finding| finding.check),
        Some(Check::Collective),
        "{error}"
    );
}

#[test]
fn conversions_round_to_the_nearest_even() {
    let mut random = Random(11);
    let mut numbers: Vec<f32> = (0..20_000)
        .map(|_| f32::from_bits(random.bits() as u32))
        .collect();
    // Numbers of each type, those beside them, and what is half way between two.
    for bits in (0..=u16::MAX).step_by(7) {
        for exact in [
            bf16::from_bits(bits).to_f32(),
            f16::from_bits(bits).to_f32(),
        ] {
            for offset in [0_i32, 1, -1, 0x1000, 0x1001, 0xfff, 0x8000, 0x8001, 0x7fff] {
                numbers.push(f32::from_bits(exact.to_bits().wrapping_add_signed(offset)));
            }
        }
    }
    let n = numbers.len();
    let executor = Executor::new();
    let x = executor.upload(&numbers);
    let narrowed = executor.scratch::<u16>(2 * n);
    let widened = executor.scratch::<f32>(2 * n);
    let [packed, tf32] = [2 * n, n].map(|n| executor.scratch::<u32>(n));
    let args = [
        Arg::Input(x.view()),
        Arg::Output(narrowed.view()),
        Arg::Output(widened.view()),
        Arg::Output(packed.view()),
        Arg::Output(tf32.view()),
        Arg::I32(n as i32),
    ];
    let launch = Launch::new([n.div_ceil(32) as u32, 1, 1], [32, 1, 1]);
    executor
        .launch("test_conversions", launch, &args)
        .unwrap_or_else(|error| panic!("{error}"));
    let (narrowed, widened) = (narrowed.download(), widened.download());
    let (packed, tf32) = (packed.download(), tf32.download());
    for (i, &x) in numbers.iter().enumerate() {
        let (b, h) = (bf16::from_f32(x), f16::from_f32(x));
        if x.is_nan() {
            assert_eq!((narrowed[i], narrowed[n + i]), (0x7fff, 0x7fff));
            assert!(widened[i].is_nan() && widened[n + i].is_nan());
            continue;
        }
        assert_eq!(
            (narrowed[i], narrowed[n + i]),
            (b.to_bits(), h.to_bits()),
            "{x:e}"
        );
        assert_eq!(
            (widened[i], widened[n + i]),
            (b.to_f32(), h.to_f32()),
            "{x:e}"
        );
        assert_eq!(packed[i], u32::from(b.to_bits()) | 0x3f80_0000);
        assert_eq!(packed[n + i], 0x3c00 | u32::from(h.to_bits()) << 16);
        let found = f32::from_bits(tf32[i]);
        let near = ((found - x) / x).abs() <= 1.0 / 2048.0;
        assert!(
            near || found == x || x.is_subnormal() || x.abs() > 3.4e38,
            "{x:e}: {found:e}"
        );
        assert_eq!(tf32[i] & 0x1fff, 0);
    }
}

#[test]
fn every_barrier_and_wait_is_needed() {
    let source = include_str!("kernels/matrix.cu");
    let file = "kernels/host/tests/kernels/matrix.cu";
    assert_every_barrier_is_needed(file, source, |executor| {
        let ab = executor.upload(&[f16::ONE; 512]);
        let c = executor.upload(&[0_f32; 128]);
        let one = Launch::new([1, 1, 1], [32, 1, 1]);
        let [plain, transposed] = [5, 4].map(|n| executor.scratch::<u32>(n * 32));
        executor.launch(
            "test_ldmatrix",
            one,
            &[
                Arg::Input(ab.slice(0..256)),
                Arg::Output(plain.view()),
                Arg::Output(transposed.view()),
            ],
        )?;
        executor.launch(
            "test_product_f16",
            one,
            &[
                Arg::Input(ab.view()),
                Arg::Input(ab.slice(0..256)),
                Arg::Output(c.view()),
                Arg::I32(8),
                Arg::I32(32),
            ],
        )
    });
}
