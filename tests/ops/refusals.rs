//! What launchers refuse, whatever the operation.

use dtmem::ops::{Error, Gpu, Launcher as _, activation, gpu};
use dtmem_reference::activation::Activation;

use crate::common::{assert_refused, target, tensor};
use crate::machines::{host, on_gpu};

const SHAPE: activation::Shape = activation::Shape { elements: 8 };

/// Tensors that lie nowhere.
fn nowhere() -> activation::Forward<'static, f32> {
    activation::Forward {
        activation: Activation::Relu,
        x: tensor(0x10000, 8),
        y: target(0x20000, 8),
    }
}

#[test]
fn memory_of_another_executor_is_refused() {
    let tensors = nowhere();
    let launch = SHAPE.plan_forward(&tensors).unwrap();
    let error = host(0).launch(&launch).unwrap_err();
    assert!(matches!(error, Error::Launch { .. }), "{error}");
    assert!(
        error.to_string().contains("activation_forward_f32"),
        "{error}"
    );
}

#[test]
fn memory_of_the_host_is_refused_by_a_gpu() {
    on_gpu(|device| {
        let tensors = nowhere();
        let error = device.launch(&SHAPE.plan_forward(&tensors).unwrap());
        assert!(matches!(error, Err(Error::ForeignMemory { .. })));
    });
}

#[test]
fn a_machine_without_driver_or_gpu_gives_an_error_and_not_a_panic() {
    match gpu::count() {
        Ok(count) => match Gpu::new(count) {
            Err(Error::NoGpu { ordinal, count }) => assert_eq!(ordinal, count),
            other => panic!("{other:?}"),
        },
        Err(Error::NoDriver { .. }) => {
            assert_refused(Gpu::new(0), &["no NVIDIA driver", "libcuda"])
        }
        Err(other) => panic!("{other}"),
    }
}
