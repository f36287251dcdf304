//! The views between cudarc's and `cust`'s memory, and what `cust` does without a driver.

use cust::memory::{CopyDestination as _, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use cust::{CudaFlags, error::CudaError};
use dtmem::interop::cust::{OnCust, view, view_mut};
use dtmem::ops::{Error, Gpu, activation};
use dtmem_reference::activation::Activation;

/// The first GPU, or nothing and a word about it where there is none.
fn gpu() -> Option<Gpu> {
    match Gpu::new(0) {
        Ok(gpu) => Some(gpu),
        Err(reason @ (Error::NoDriver { .. } | Error::NoGpu { .. })) => {
            println!("skipped: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn without_a_driver_cust_has_an_error_that_can_be_printed() {
    if let Err(Error::NoDriver { .. }) = dtmem::ops::gpu::require_driver() {
        let error = cust::init(CudaFlags::empty()).unwrap_err();
        assert_eq!(error, CudaError::SharedObjectInitFailed);
        assert!(error.to_string().contains("no NVIDIA driver"), "{error}");
    }
}

#[test]
fn operations_run_on_the_memory_and_the_stream_of_cust() {
    let Some(gpu) = gpu() else { return };
    let _context = cust::quick_init().unwrap();
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None).unwrap();
    let x = DeviceBuffer::from_slice(&[-1.0_f32, 2.0, -3.0, 4.0, 5.0]).unwrap();
    let mut y = DeviceBuffer::from_slice(&[f32::NAN; 5]).unwrap();
    let on = OnCust::new(&gpu, &stream).unwrap();
    let tensors = activation::Forward {
        activation: Activation::Relu,
        x: on.input(&x).unwrap(),
        y: on.output(&mut y).unwrap(),
    };
    let shape = activation::Shape { elements: 5 };
    shape.forward::<f32>(&on, tensors).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(y.as_host_vec().unwrap(), [0.0, 2.0, 0.0, 4.0, 5.0]);
}

#[test]
fn cust_reads_and_writes_the_memory_of_cudarc() {
    let Some(gpu) = gpu() else { return };
    let _context = cust::quick_init().unwrap();
    let stream = gpu.context().new_stream().unwrap();
    let mut numbers = stream.clone_htod(&[1.0_f32, 2.0, 3.0]).unwrap();
    stream.synchronize().unwrap();
    let mut found = [0.0_f32; 3];
    view(&numbers, &stream).copy_to(&mut found).unwrap();
    assert_eq!(found, [1.0, 2.0, 3.0]);
    view_mut(&mut numbers, &stream)
        .copy_from(&[4.0_f32, 5.0, 6.0])
        .unwrap();
    assert_eq!(stream.clone_dtoh(&numbers).unwrap(), [4.0, 5.0, 6.0]);
}
