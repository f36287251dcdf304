//! Random batches.
#![allow(dead_code)] // each test binary uses a part

use dtmem::backend::Backend;
use dtmem::batch::{PackedBatch, Trajectory};
use dtmem::model::{ActionSpace, Capacity, Content, Family, Model, ObservationSpace, Spaces};
use dtmem::spaces::Numbers;
use dtmem_reference::dropout::philox;

/// Uniform integers below `limit`, a pure function of the arguments.
pub fn draw(seed: u32, index: usize, limit: usize) -> usize {
    philox([index as u32, seed, 0, 0], [7, 11])[0] as usize % limit
}

pub fn grid() -> Spaces {
    let observation = ObservationSpace::codes([3, 2, 2], [4, 3]);
    Spaces::of(observation, ActionSpace::Discrete(5), 9)
}

pub fn symbols() -> Spaces {
    let observation = ObservationSpace::codes([2], [6, 4]);
    Spaces::of(observation, ActionSpace::Discrete(5), 9)
}

/// Three families: other observations, another number of actions, and no sequence of the second in
/// some shards.
pub fn several() -> Spaces {
    let mut spaces = symbols();
    spaces.include(grid().families.remove(0), 9);
    let observation = ObservationSpace::codes([3], [3, 7, 2]);
    let action = ActionSpace::Discrete(9);
    spaces.include(
        Family {
            observation,
            action,
        },
        9,
    );
    spaces
}

/// Real numbers in and out.
pub fn vectors() -> Spaces {
    Spaces::of(ObservationSpace::reals([3]), ActionSpace::Continuous(2), 9)
}

/// Images, of 2 patches with an edge that has to be filled up, and discrete actions.
pub fn images() -> Spaces {
    let observation = ObservationSpace::pixels([5, 14, 2]);
    Spaces::of(observation, ActionSpace::Discrete(4), 9)
}

/// Every kind of observations and actions.
pub fn all_kinds() -> Spaces {
    let mut spaces = vectors();
    spaces.include(symbols().families.remove(0), 9);
    spaces.include(images().families.remove(0), 9);
    spaces
}

/// Random trajectories of the given lengths.
pub struct Data {
    pub lengths: Vec<usize>,
    pub families: Vec<usize>,
    pub observations: Vec<Numbers>,
    pub actions: Vec<Numbers>,
    pub returns: Vec<Vec<f32>>,
    pub pairs: Vec<Vec<(u32, u32)>>,
}

impl Data {
    pub fn new(spaces: &Spaces, lengths: &[usize], seed: u32) -> Self {
        // The first families have more sequences than the last ones, and each has one at least.
        let count = spaces.families.len();
        let families: Vec<usize> = (0..lengths.len())
            .map(|sequence| (count + sequence).saturating_sub(lengths.len()))
            .collect();
        let of_sequence = |sequence: usize| &spaces.families[families[sequence]];
        let of = |sequence: usize, salt: u32| seed * 100 + sequence as u32 * 10 + salt;
        let sequences = || lengths.iter().copied().enumerate();
        Self {
            lengths: lengths.to_vec(),
            observations: sequences()
                .map(|(sequence, steps)| {
                    let space = &of_sequence(sequence).observation;
                    let len = steps * space.fields();
                    let code = |index: usize| match &space.content {
                        Content::Codes(codes) => {
                            let count = codes[index % codes.len()];
                            draw(of(sequence, 1), index, count) as u8
                        }
                        _ => draw(of(sequence, 1), index, 256) as u8,
                    };
                    match space.content {
                        Content::Reals => reals(of(sequence, 1), len),
                        _ => Numbers::Bytes((0..len).map(code).collect()),
                    }
                })
                .collect(),
            actions: sequences()
                .map(|(sequence, steps)| {
                    let draw = |index, count| draw(of(sequence, 2), index, count) as u8;
                    match of_sequence(sequence).action {
                        ActionSpace::Discrete(count) => {
                            Numbers::Bytes((0..steps).map(|index| draw(index, count)).collect())
                        }
                        ActionSpace::Continuous(size) => reals(of(sequence, 2), steps * size),
                    }
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
            families,
        }
    }

    pub fn pack<B: Backend>(&self, model: &Model<B>) -> PackedBatch {
        let mut packer = model.packer();
        for sequence in 0..self.lengths.len() {
            packer
                .push_trajectory(Trajectory {
                    family: self.families[sequence],
                    observations: self.observations[sequence].all(),
                    actions: self.actions[sequence].all(),
                    returns: &self.returns[sequence],
                    pairs: &self.pairs[sequence],
                    annotated: sequence != 1,
                })
                .expect("a valid trajectory");
        }
        packer.batch().clone()
    }
}

/// Numbers between −1 and 1.
fn reals(seed: u32, len: usize) -> Numbers {
    let number = |index| draw(seed, index, 2001) as f32 / 1000.0 - 1.0;
    Numbers::Reals((0..len).map(number).collect())
}

/// That of a batch, of whichever family its observations may be.
pub fn capacity(batch: &PackedBatch) -> Capacity {
    Capacity {
        observations: vec![batch.observation_tokens.len(); batch.families.len()],
        ..Capacity::of(batch)
    }
}
