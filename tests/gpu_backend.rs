//! The GPU backend on the host executor, and on a GPU where there is one.

use dtmem::backend::gpu::{Compute, CudaDevice, Device, Factor, HostDevice, Multiply, Product};
use dtmem::ops::Error;
use half::{bf16, f16};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

/// Runs the checks on the first GPU, or says past the test's captured output that they were skipped.
fn on_gpu(check: impl FnOnce(CudaDevice)) {
    use std::io::Write as _;
    match CudaDevice::new(0, Multiply::Exact) {
        Ok(device) => check(device),
        Err(reason @ (Error::NoDriver { .. } | Error::NoGpu { .. } | Error::NoBlas)) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: a GPU check: {reason}");
        }
        Err(other) => panic!("{other}"),
    }
}

/// Rows of `columns` random numbers, `stride` apart, with NaN between them.
fn draw<T: Compute>(rows: usize, columns: usize, stride: usize, random: &mut ChaCha8Rng) -> Vec<T> {
    let len = if rows == 0 {
        0
    } else {
        (rows - 1) * stride + columns
    };
    (0..len)
        .map(|index| match index % stride < columns {
            true => T::narrow(random.random_range(-1.0..1.0)),
            false => T::narrow(f32::NAN),
        })
        .collect()
}

fn check_product<T: Compute, U: Compute>(
    device: &impl Device,
    [rows, columns, inner]: [usize; 3],
    transposed: [bool; 2],
    (with_bias, accumulate): (bool, bool),
    seed: u64,
) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut factor = |rows: usize, columns: usize, transposed: bool| {
        let (rows, columns) = if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        let stride = (columns + 3).next_multiple_of(8);
        (draw::<T>(rows, columns, stride, &mut random), stride)
    };
    let (a, a_stride) = factor(rows, inner, transposed[0]);
    let (b, b_stride) = factor(inner, columns, transposed[1]);
    let bias = draw::<U>(1, columns, columns, &mut random);
    let stride = (columns + 1).next_multiple_of(8);
    let before = draw::<U>(rows, columns, stride, &mut random);
    let at = |x: &[T], stride: usize, transposed: bool, i: usize, j: usize| {
        let index = if transposed {
            j * stride + i
        } else {
            i * stride + j
        };
        f64::from(x[index].widen())
    };

    let upload = |x: &[T]| {
        let mut memory = device.allocate::<T>(x.len()).unwrap();
        device.upload(x, &mut memory, 0).unwrap();
        memory
    };
    let [a_memory, b_memory] = [upload(&a), upload(&b)];
    let mut bias_memory = device.allocate::<U>(columns).unwrap();
    device.upload(&bias, &mut bias_memory, 0).unwrap();
    let mut c_memory = device.allocate::<U>(before.len()).unwrap();
    device.upload(&before, &mut c_memory, 0).unwrap();
    let product = Product {
        rows,
        columns,
        inner,
        a: Factor {
            elements: device.input(&a_memory, 0..a.len()).unwrap(),
            stride: a_stride,
            transposed: transposed[0],
        },
        b: Factor {
            elements: device.input(&b_memory, 0..b.len()).unwrap(),
            stride: b_stride,
            transposed: transposed[1],
        },
        bias: with_bias.then(|| device.input(&bias_memory, 0..columns).unwrap()),
        c: device.output(&mut c_memory, 0..before.len()).unwrap(),
        stride,
        accumulate,
    };
    device.multiply(product).unwrap();
    let mut after = vec![U::default(); before.len()];
    device.download(&c_memory, 0, &mut after).unwrap();

    let (mut error, mut norm) = (0.0, 0.0);
    for (index, (after, before)) in after.iter().zip(&before).enumerate() {
        let (i, j) = (index / stride, index % stride);
        if j >= columns {
            assert!(after.widen().is_nan(), "written between the rows");
            continue;
        }
        let mut expected = 0.0;
        for k in 0..inner {
            expected +=
                at(&a, a_stride, transposed[0], i, k) * at(&b, b_stride, transposed[1], k, j);
        }
        if with_bias {
            expected += f64::from(bias[j].widen());
        }
        if accumulate {
            expected += f64::from(before.widen());
        }
        error += (f64::from(after.widen()) - expected).powi(2);
        norm += expected.powi(2);
    }
    let limit = if size_of::<U>() == 4 { 2e-5 } else { 1.5e-2 };
    assert!(error.sqrt() <= limit * norm.sqrt(), "{error} of {norm}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]
    #[test]
    fn products_on_the_host_device_are_right(
        sizes in [0..9usize, 1..20usize, 1..20usize],
        transposed in any::<[bool; 2]>(),
        bias in any::<bool>(),
        accumulate in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let device = HostDevice::default();
        let options = (bias && !accumulate, accumulate);
        check_product::<f32, f32>(&device, sizes, transposed, options, seed);
        check_product::<bf16, bf16>(&device, sizes, transposed, options, seed);
        check_product::<f16, f32>(&device, sizes, transposed, options, seed);
    }
}

#[test]
fn products_on_a_gpu_are_right() {
    on_gpu(|device| {
        for (seed, sizes) in [[1, 7, 512], [300, 1536, 512], [512, 7, 1000], [64, 512, 1]]
            .into_iter()
            .enumerate()
        {
            for transposed in [[false, false], [false, true], [true, false], [true, true]] {
                for options in [(false, false), (true, false), (false, true)] {
                    let seed = seed as u64;
                    check_product::<f32, f32>(&device, sizes, transposed, options, seed);
                    check_product::<bf16, bf16>(&device, sizes, transposed, options, seed);
                    check_product::<bf16, f32>(&device, sizes, transposed, options, seed);
                    check_product::<f16, f16>(&device, sizes, transposed, options, seed);
                }
            }
        }
    });
}
