//! Operations that come again and again are recorded once.

use super::device::Device;
use crate::backend::BackendError;
use crate::ops;

/// A sequence of operations that comes again and again.
#[derive(Debug)]
pub struct Repeated<D: Device> {
    /// Of the batches that it is for.
    shape: Option<u64>,
    recording: Option<D::Recording>,
}

impl<D: Device> Default for Repeated<D> {
    fn default() -> Self {
        Self {
            shape: None,
            recording: None,
        }
    }
}

impl<D: Device> Repeated<D> {
    /// The first batch of a shape is computed as it comes, which also loads kernels and lets scratch
    /// memory grow; the second is recorded.
    pub(super) fn repeat<E: From<BackendError>>(
        &mut self,
        device: &D,
        shape: u64,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        if self.shape != Some(shape) {
            *self = Self {
                shape: Some(shape),
                recording: None,
            };
            return work();
        }
        if self.recording.is_none() {
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
            self.recording = Some(recorded.map_err(BackendError::from)?);
        }
        match &self.recording {
            Some(recording) => Ok(device.replay(recording).map_err(BackendError::from)?),
            None => Ok(()),
        }
    }
}
