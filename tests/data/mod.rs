//! Random batches.
#![allow(dead_code)] // each test binary uses a part

use dtmem::backend::Backend;
use dtmem::batch::{PackedBatch, Trajectory};
use dtmem::model::{Capacity, Model, Spaces};
use dtmem_reference::dropout::philox;

/// Uniform integers below `limit`, a pure function of the arguments.
pub fn draw(seed: u32, index: usize, limit: usize) -> usize {
    philox([index as u32, seed, 0, 0], [7, 11])[0] as usize % limit
}

pub fn grid() -> Spaces {
    Spaces {
        observation: vec![3, 2, 2],
        cardinalities: vec![4, 3],
        actions: 5,
        steps: 9,
    }
}

pub fn symbols() -> Spaces {
    Spaces {
        observation: vec![2],
        cardinalities: vec![6, 4],
        ..grid()
    }
}

/// Random trajectories of the given lengths.
pub struct Data {
    pub lengths: Vec<usize>,
    pub observations: Vec<Vec<u8>>,
    pub actions: Vec<Vec<u8>>,
    pub returns: Vec<Vec<f32>>,
    pub pairs: Vec<Vec<(u32, u32)>>,
}

impl Data {
    pub fn new(spaces: &Spaces, lengths: &[usize], seed: u32) -> Self {
        let fields: usize = spaces.observation.iter().product();
        let of = |sequence: usize, salt: u32| seed * 100 + sequence as u32 * 10 + salt;
        let sequences = || lengths.iter().copied().enumerate();
        Self {
            lengths: lengths.to_vec(),
            observations: sequences()
                .map(|(sequence, steps)| {
                    (0..steps * fields)
                        .map(|index| {
                            let field = index % spaces.cardinalities.len();
                            draw(of(sequence, 1), index, spaces.cardinalities[field]) as u8
                        })
                        .collect()
                })
                .collect(),
            actions: sequences()
                .map(|(sequence, steps)| {
                    (0..steps)
                        .map(|index| draw(of(sequence, 2), index, spaces.actions) as u8)
                        .collect()
                })
                .collect(),
            returns: sequences()
                .map(|(sequence, steps)| {
                    (0..steps)
                        .map(|index| draw(of(sequence, 3), index, 100) as f32 / 50.0)
                        .collect()
                })
                .collect(),
            pairs: sequences()
                .map(|(_, steps)| {
                    let steps = steps as u32;
                    (0..steps)
                        .flat_map(|step| {
                            (step > 2)
                                .then_some((step, 1))
                                .into_iter()
                                .chain([(step, step)])
                        })
                        .collect()
                })
                .collect(),
        }
    }

    pub fn pack<B: Backend>(&self, model: &Model<B>) -> PackedBatch {
        let mut packer = model.packer();
        for sequence in 0..self.lengths.len() {
            packer
                .push_trajectory(Trajectory {
                    observations: &self.observations[sequence],
                    actions: &self.actions[sequence],
                    returns: &self.returns[sequence],
                    pairs: &self.pairs[sequence],
                    annotated: sequence != 1,
                })
                .expect("a valid trajectory");
        }
        packer.batch().clone()
    }
}

pub fn capacity(batch: &PackedBatch) -> Capacity {
    Capacity {
        tokens: batch.tokens(),
        observations: batch.observation_tokens.len(),
        sequences: batch.sequences(),
        segments: batch.segments(),
    }
}
