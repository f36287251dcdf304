//! What a device reaches at most.

use serde::Serialize;

use super::Result;
use super::place::Place;
use super::runs::random;
use crate::backend::{Buffers, In, Kind, Linear, LinearOps, Out, Span};

/// What a device reaches in this run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes per second of a large copy, read and written.
    pub bytes_per_s: f64,
    /// Operations per second of a large product of matrices.
    pub operations_per_s: f64,
}

/// The ceilings of a device.
pub(super) fn ceilings<P: Place>(place: &P, backend: &P::Backend) -> Result<Ceilings> {
    const RUNS: usize = 5;
    let best = |run: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        run()?;
        let mut seconds = (0..RUNS).map(|_| place.seconds(backend, run));
        seconds.try_fold(f64::INFINITY, |best, seconds| Ok(best.min(seconds?)))
    };
    let [len, rows] = P::LARGE;
    let from = random(backend, Kind::Activation, len, 1.0)?;
    let mut to = backend.buffer(len, Kind::Activation)?;
    let copy = best(&mut || Ok(backend.copy(&from, &mut to, 0, len)?))?;
    drop((from, to));
    let weight = random(backend, Kind::Parameter, rows * rows, 0.05)?;
    let x = random(backend, Kind::Activation, rows * rows, 1.0)?;
    let mut y = backend.buffer(rows * rows, Kind::Activation)?;
    let mut adapted = backend.buffer(0, Kind::Activation)?;
    let map = Linear {
        weight: Span {
            offset: 0,
            len: rows * rows,
        },
        bias: None,
        inputs: rows,
        outputs: rows,
        transposed: false,
        trainable: true,
        adapters: Vec::new(),
    };
    let product = best(&mut || {
        let (x, y) = (In::rows(&x, rows), Out::rows(&mut y, rows));
        Ok(backend.linear(rows, &map, &weight, x, &mut adapted, None, y)?)
    })?;
    Ok(Ceilings {
        bytes_per_s: 2.0 * P::ELEMENT_BYTES * len as f64 / copy,
        operations_per_s: 2.0 * (rows as f64).powi(3) / product,
    })
}
