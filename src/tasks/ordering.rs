//! Ordering: of two objects, name the one that was shown first (SPEC section 7).

use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};
use serde::{Deserialize, Serialize};

use super::grid::{Cell, EMPTY, FORWARD, LEFT, Object, RIGHT, VIEW};
use super::{Environment, Outcome, TaskError, validate_length};

/// Number of objects, each shown once before the choices.
pub const OBJECTS: usize = 18;

/// Everything that is random in an episode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OrderingLayout {
    /// The order in which the 18 objects are shown.
    pub permutation: Vec<Object>,
    /// The choices, left and right. The last one of a full episode (the choice after its end) is only seen in the
    /// final observation; a recorded episode that ended early has fewer.
    pub choices: Vec<(Object, Object)>,
}

impl OrderingLayout {
    /// Draws an order and `length` + 1 choices, each of two distinct objects.
    pub fn random(length: usize, rng: &mut impl RngExt) -> Self {
        let mut permutation: Vec<Object> = Object::all().collect();
        permutation.shuffle(rng);
        let choices = (0..=length).filter_map(|_| {
            let [left, right] = permutation.sample_array(rng)?;
            Some((left, right))
        });
        Self {
            choices: choices.collect(),
            permutation,
        }
    }

    fn validate(&self, length: usize) -> Result<(), TaskError> {
        validate_length(length)?;
        let mut sorted = self.permutation.clone();
        sorted.sort();
        if !sorted.into_iter().eq(Object::all()) {
            return Err(TaskError::new(
                "layout.permutation",
                "other objects",
                "each of the 18 objects once",
            ));
        }
        if self.choices.len() > length + 1 {
            let found = format!("{} choices", self.choices.len());
            return Err(TaskError::new(
                "layout.choices",
                found,
                format!("at most {}", length + 1),
            ));
        }
        for (left, right) in &self.choices {
            left.validate("layout.choices")?;
            right.validate("layout.choices")?;
            if left == right {
                return Err(TaskError::new(
                    "layout.choices",
                    format!("{left:?} twice"),
                    "two distinct objects",
                ));
            }
        }
        Ok(())
    }
}

/// The step limit: 18 + L.
pub fn max_steps(length: usize) -> usize {
    OBJECTS + length
}

/// The environment.
#[derive(Clone, Debug)]
pub struct Ordering {
    layout: OrderingLayout,
    length: usize,
    steps: usize,
}

impl Ordering {
    /// Starts an episode of `length` choices with this layout. If the layout holds fewer choices, running out of them
    /// ends the episode as a failed time-out.
    ///
    /// # Errors
    /// A length out of range, an order that is no permutation, more than `length` + 1 choices, a choice between equal
    /// or unknown objects.
    pub fn new(length: usize, layout: OrderingLayout) -> Result<Self, TaskError> {
        layout.validate(length)?;
        Ok(Self {
            layout,
            length,
            steps: 0,
        })
    }

    /// The choice on show, if the showing is over.
    fn choice(&self) -> Option<(Object, Object)> {
        self.layout
            .choices
            .get(self.steps.checked_sub(OBJECTS)?)
            .copied()
    }

    /// When an object was shown.
    fn shown(&self, object: Object) -> usize {
        self.layout
            .permutation
            .iter()
            .position(|&shown| shown == object)
            .unwrap_or(OBJECTS)
    }
}

impl Environment for Ordering {
    fn observe(&self, codes: &mut [u8]) {
        let (cells, _) = codes.as_chunks_mut::<3>();
        cells.fill(EMPTY);
        // Without walls, at (3, 6) and facing north, view and world coordinates are the same.
        let mut place = |x: usize, cell: Cell| {
            if let Some(code) = cells.get_mut(x * VIEW + 3) {
                *code = cell;
            }
        };
        match (self.layout.permutation.get(self.steps), self.choice()) {
            (Some(object), _) => place(3, object.cell()),
            (None, Some((left, right))) => {
                place(2, left.cell());
                place(4, right.cell());
            }
            (None, None) => {}
        }
    }

    fn step(&mut self, action: usize) -> Outcome {
        let choosing = self.steps >= OBJECTS;
        if choosing && self.choice().is_none() {
            return Outcome {
                reward: 0.0,
                terminated: false,
                truncated: true,
                success: false,
            };
        }
        let right = !choosing || action == self.expert();
        self.steps += 1;
        let over = self.steps >= max_steps(self.length);
        match (right, over) {
            (false, truncated) => Outcome {
                reward: -1.0,
                terminated: true,
                truncated,
                success: false,
            },
            // The last choice, if right, ends the episode before the step limit does.
            (true, over) => Outcome {
                reward: if over { 1.0 } else { 0.0 },
                terminated: over,
                truncated: false,
                success: over,
            },
        }
    }

    fn expert(&self) -> usize {
        match self.choice() {
            None => FORWARD,
            Some((left, right)) if self.shown(left) < self.shown(right) => LEFT,
            Some(_) => RIGHT,
        }
    }

    fn recalls(&self, steps: &mut Vec<u32>) {
        if let Some((left, right)) = self.choice() {
            steps.extend([left, right].map(|object| self.shown(object) as u32));
        }
        steps.push(self.steps as u32);
    }
}
