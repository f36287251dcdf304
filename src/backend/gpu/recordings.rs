//! Operations that come again and again are recorded once for each shape of batches.

use super::device::Device;
use crate::backend::BackendError;
use crate::ops;

/// Shapes whose recordings are kept. Batches of one training differ in the columns of what they
/// recall, of which there are powers of two.
const MOST: usize = 8;

/// A sequence of operations that comes again and again.
#[derive(Debug)]
pub struct Repeated<D: Device> {
    /// Shapes, the last one used last, and what was recorded when it came for the second time.
    shapes: Vec<(u64, Option<D::Recording>)>,
}

impl<D: Device> Default for Repeated<D> {
    fn default() -> Self {
        Self { shapes: Vec::new() }
    }
}

impl<D: Device> Repeated<D> {
    /// The first batch of a shape is computed as it comes, which also loads kernels and lets scratch
    /// memory grow; the second is recorded.
    pub(super) fn repeat<E: From<BackendError>>(
        &mut self,
        device: &D,
        shape: u64,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(place) = self.shapes.iter().position(|(known, _)| *known == shape) else {
            if self.shapes.len() == MOST {
                self.shapes.remove(0);
            }
            self.shapes.push((shape, None));
            return work();
        };
        self.shapes[place..].rotate_left(1);
        let last = self.shapes.len() - 1;
        let (_, recording) = &mut self.shapes[last];
        if recording.is_none() {
            let mut failure = None;
            let recorded = device.record(|| {
                work().map_err(|error| {
                    failure = Some(error);
                    ops::Error::NoGraph
                })
            });
            if let Some(failure) = failure {
                return Err(failure);
            }
            *recording = Some(recorded.map_err(BackendError::from)?);
        }
        match recording {
            Some(recording) => Ok(device.replay(recording).map_err(BackendError::from)?),
            None => Ok(()),
        }
    }
}
