use dtmem::ops::{Arg, activation};
use dtmem_reference::activation::Activation;
use half::{bf16, f16};
use ndarray::Array2;
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_close, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const ACTIVATIONS: [Activation; 4] = [
    Activation::Relu,
    Activation::Gelu,
    Activation::Tanh,
    Activation::OnePlus,
];

fn check_activation<T: Number>(machine: &impl Machine, elements: usize, seed: u64) {
    let shape = activation::Shape { elements };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for activation in ACTIVATIONS {
        let [x, dy] = [(); 2].map(|()| draw::<T, _>(&mut random, (1, elements)));
        let mut y = Array2::from_elem(x.dim(), f64::NAN);
        dtmem_reference::activation::forward(activation, x.view(), y.view_mut()).unwrap();

        let mut memory = machine.numbers::<T, _>(&x);
        let in_place = machine.output(&mut memory);
        let forward = activation::Forward {
            activation,
            x: in_place.as_input(),
            y: in_place,
        };
        shape.forward(machine, forward).unwrap();
        let name = format!("{activation:?}");
        assert_close(&name, &machine.download(&memory), &y, T::TOLERANCE);

        let y = y.map(|&y| T::round(y).widen());
        let kept = machine.numbers::<T, _>(match activation {
            Activation::Relu | Activation::Tanh => &y,
            Activation::Gelu | Activation::OnePlus => &x,
        });
        let mut memory = machine.numbers::<T, _>(&dy);
        let backward = activation::Backward {
            activation,
            kept: machine.input(&kept),
            dy: machine.output(&mut memory),
        };
        shape.backward(machine, backward).unwrap();
        let mut dx = dy;
        dtmem_reference::activation::backward_in_place(
            activation,
            x.view(),
            y.view(),
            dx.view_mut(),
        )
        .unwrap();
        assert_close(&name, &machine.download(&memory), &dx, T::TOLERANCE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn activations_on_the_host_agree_with_the_reference(
        elements in prop_oneof![0..20_usize, 1020..1030_usize, 2000..3000_usize],
        seed: u64,
    ) {
        check_activation::<f32>(&host(seed), elements, seed);
        check_activation::<bf16>(&host(seed), elements, seed);
        check_activation::<f16>(&host(seed), elements, seed);
    }
}

#[test]
fn activations_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for elements in [1, 7, 1024, 100_003] {
            check_activation::<f32>(device, elements, 1);
            check_activation::<bf16>(device, elements, 2);
            check_activation::<f16>(device, elements, 3);
        }
    });
}

#[test]
fn the_plan_of_an_activation_covers_all_elements() {
    let tensors = activation::Forward::<f16> {
        activation: Activation::Tanh,
        x: tensor(0x10000, 2049),
        y: target(0x20000, 2049),
    };
    let launch = activation::Shape { elements: 2049 }
        .plan_forward(&tensors)
        .unwrap();
    assert_eq!(
        (launch.kernel(), launch.grid(), launch.block()),
        ("activation_forward_f16", [2, 1, 1], [256, 1, 1])
    );
    assert_eq!(
        (launch.args()[0], launch.args()[3]),
        (Arg::I32(2), Arg::I64(2049))
    );
}

#[test]
fn more_elements_than_a_grid_covers_are_refused() {
    let shape = activation::Shape {
        elements: usize::MAX,
    };
    assert_refused(
        shape.validate::<f32>(),
        &["elements is 18446744073709551615"],
    );
}

#[test]
fn misaligned_vectors_are_refused() {
    let tensors = activation::Backward::<f32> {
        activation: Activation::Gelu,
        kept: tensor(0x10004, 8),
        dy: target(0x20000, 8),
    };
    assert_refused(
        activation::Shape { elements: 8 }.plan_backward(&tensors),
        &["kept begins at address 0x10004", "16 bytes"],
    );
}
