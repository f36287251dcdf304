//! Counting: leave each test room by the door that tells whether its object was seen an even number of times
//! (SPEC section 7).

use std::iter;

use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::grid::{
    BLUE, EAST, EMPTY, FORWARD, GREEN, NORTH, Object, RED, TOGGLE, WALL, WEST, World, closed_door,
    turn,
};
use super::{Environment, Outcome, TaskError, validate_frequency, validate_length};

const SIDE: i32 = 5;
/// Where a normal room may hold objects, as (x, y).
const CELLS: [(i32, i32); 6] = [(1, 1), (3, 1), (1, 2), (3, 2), (1, 3), (3, 3)];
const GREEN_DOOR: (i32, i32) = (1, 0);
const BLUE_DOOR: (i32, i32) = (2, 0);
const RED_DOOR: (i32, i32) = (3, 0);

/// A room.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Room {
    /// A room whose objects are counted.
    Normal {
        /// The objects at (1,1), (3,1), (1,2), (3,2), (1,3), (3,3).
        cells: [Option<Object>; 6],
    },
    /// A room that asks whether the count of its object is even (green door) or odd (red door).
    Test {
        /// The object asked for; it is not counted.
        object: Object,
    },
}

impl Room {
    /// How many objects equal to `object` the room adds to the count.
    fn count(&self, object: Object) -> usize {
        match self {
            Self::Normal { cells } => cells.iter().filter(|&&cell| cell == Some(object)).count(),
            Self::Test { .. } => 0,
        }
    }
}

/// Everything that is random in an episode: its rooms, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CountingLayout {
    /// The rooms. A recorded episode that ended early has fewer than the task's length.
    pub rooms: Vec<Room>,
}

impl CountingLayout {
    /// Draws `length` ≥ 1 rooms. The first is normal; each further one is a test room with probability
    /// `test_frequency`. A cell of a normal room stays empty with probability `empty_frequency`.
    pub fn random(
        length: usize,
        test_frequency: f64,
        empty_frequency: f64,
        rng: &mut impl RngExt,
    ) -> Self {
        let rooms = (0..length).map(|room| {
            if room > 0 && rng.random_bool(test_frequency) {
                Room::Test {
                    object: Object::random(rng),
                }
            } else {
                let mut cell = || (!rng.random_bool(empty_frequency)).then(|| Object::random(rng));
                Room::Normal {
                    cells: std::array::from_fn(|_| cell()),
                }
            }
        });
        Self {
            rooms: rooms.collect(),
        }
    }

    fn validate(&self, length: usize) -> Result<(), TaskError> {
        validate_length(length)?;
        if self.rooms.is_empty() || self.rooms.len() > length {
            let found = format!("{} rooms", self.rooms.len());
            return Err(TaskError::new(
                "layout.rooms",
                found,
                format!("1 to {length}"),
            ));
        }
        for room in &self.rooms {
            match room {
                Room::Normal { cells } => {
                    cells
                        .iter()
                        .flatten()
                        .try_for_each(|object| object.validate("layout.rooms.cells"))?;
                }
                Room::Test { object } => object.validate("layout.rooms.object")?,
            }
        }
        Ok(())
    }
}

/// The step limit: 7L.
pub fn max_steps(length: usize) -> usize {
    7 * length
}

/// Success of the best policy without memory: it takes the green door in every test room.
///
/// After n normal rooms the count of an object is binomial with 6n draws of probability q = (1 − empty)/18, so it is
/// odd with probability (1 − (1 − 2q)^6n)/2. Approximate, and a little low: test rooms are taken to ask independently
/// of each other. For 20 rooms this gives 0.059, where 400 000 drawn episodes give 0.063.
pub fn chance(length: usize, test_frequency: f64, empty_frequency: f64) -> f64 {
    let keep_parity = (1.0 - (1.0 - empty_frequency) / 9.0).powi(6);
    // alive[n]: probability of being alive after n normal rooms.
    let mut alive = vec![0.0, 1.0];
    for _ in 1..length {
        let mut next = vec![0.0; alive.len() + 1];
        let mut parity = 1.0;
        for (rooms, probability) in alive.into_iter().enumerate() {
            next[rooms] += test_frequency * (1.0 + parity) / 2.0 * probability;
            next[rooms + 1] += (1.0 - test_frequency) * probability;
            parity *= keep_parity;
        }
        alive = next;
    }
    alive.into_iter().sum()
}

/// The environment.
#[derive(Clone, Debug)]
pub struct Counting {
    world: World,
    length: usize,
    rooms: Vec<Room>,
    /// The step at which each room was entered, the current room last.
    entered: Vec<u32>,
    steps: u32,
    right_door: (i32, i32),
}

impl Counting {
    /// Starts an episode of `length` rooms with this layout. If the layout holds fewer rooms, leaving the last of them
    /// ends the episode as a failed time-out.
    ///
    /// # Errors
    /// A length out of range, no rooms or more than `length`, an unknown object code.
    pub fn new(length: usize, layout: CountingLayout) -> Result<Self, TaskError> {
        layout.validate(length)?;
        let mut counting = Self {
            world: World::new(SIDE, SIDE, 0, SIDE),
            length,
            rooms: layout.rooms,
            entered: Vec::new(),
            steps: 0,
            right_door: BLUE_DOOR,
        };
        counting.enter_next_room();
        Ok(counting)
    }

    /// Index of the current room.
    fn room(&self) -> usize {
        self.entered.len() - 1
    }

    /// Builds the next room around the agent; false if the layout has no more.
    fn enter_next_room(&mut self) -> bool {
        let (earlier, later) = self.rooms.split_at(self.entered.len());
        let Some(room) = later.first() else {
            return false;
        };
        let world = &mut self.world;
        (0..SIDE).for_each(|x| world.set(x, 0, WALL));
        (1..SIDE - 1).for_each(|y| (1..SIDE - 1).for_each(|x| world.set(x, y, EMPTY)));
        let mut place = |(x, y): (i32, i32), cell| world.set(x, y, cell);
        match room {
            Room::Normal { cells } => {
                place(BLUE_DOOR, closed_door(BLUE));
                for (position, object) in iter::zip(CELLS, cells) {
                    if let Some(object) = object {
                        place(position, object.cell());
                    }
                }
                self.right_door = BLUE_DOOR;
            }
            Room::Test { object } => {
                place(GREEN_DOOR, closed_door(GREEN));
                place(RED_DOOR, closed_door(RED));
                place((2, 1), object.cell());
                let count: usize = earlier.iter().map(|room| room.count(*object)).sum();
                self.right_door = if count.is_multiple_of(2) {
                    GREEN_DOOR
                } else {
                    RED_DOOR
                };
            }
        }
        self.world.position = (2, 3);
        self.world.direction = NORTH;
        self.entered.push(self.steps);
        true
    }
}

impl Environment for Counting {
    fn observe(&self, codes: &mut [u8]) {
        self.world.observe(codes);
    }

    fn step(&mut self, action: usize) -> Outcome {
        self.steps += 1;
        self.world.act(action);
        let truncated = self.steps as usize >= max_steps(self.length);
        if self.world.position.1 == 0 {
            let right = self.world.position == self.right_door;
            let last = self.room() + 1 == self.length;
            if !right || last {
                let reward = if right { 1.0 } else { 0.0 };
                return Outcome {
                    reward,
                    terminated: true,
                    truncated,
                    success: right,
                };
            }
            if !self.enter_next_room() {
                return Outcome {
                    reward: 0.0,
                    terminated: false,
                    truncated: true,
                    success: false,
                };
            }
        }
        // Running out of steps in the last room counts as success.
        let success = truncated && self.room() + 1 == self.length;
        Outcome {
            reward: if success { 1.0 } else { 0.0 },
            terminated: false,
            truncated,
            success,
        }
    }

    fn expert(&self) -> usize {
        let World {
            position: (x, _),
            direction,
            ..
        } = self.world;
        let wanted = match self.right_door.0 {
            door if door < x => WEST,
            door if door > x => EAST,
            _ => NORTH,
        };
        if direction != wanted {
            turn(direction, wanted)
        } else if self.world.faces_closed_door() {
            TOGGLE
        } else {
            FORWARD
        }
    }

    fn recalls(&self, steps: &mut Vec<u32>) {
        if let (Some(Room::Test { object }), Some(&now)) =
            (self.rooms.get(self.room()), self.entered.last())
            && now == self.steps
        {
            let seen =
                iter::zip(&self.rooms, &self.entered).filter(|(room, _)| room.count(*object) > 0);
            steps.extend(seen.map(|(_, &entered)| entered));
        }
        steps.push(self.steps);
    }
}

/// Checks the parameters of the draws.
pub(super) fn validate(
    length: usize,
    test_frequency: f64,
    empty_frequency: f64,
) -> Result<(), TaskError> {
    validate_length(length)?;
    validate_frequency("test_frequency", test_frequency)?;
    validate_frequency("empty_frequency", empty_frequency)
}
