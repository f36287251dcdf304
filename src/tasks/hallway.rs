//! Hallway: find the hallway that holds the object shown at the start (SPEC section 7).

use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::grid::{
    COLOURS, DOOR, EAST, FORWARD, LEFT, NORTH, Object, RIGHT, SOUTH, TOGGLE, WALL, World,
    closed_door, turn, validate_colour,
};
use super::{Environment, Outcome, TaskError, validate_length};

/// One vertical hallway: a door and an object above the corridor, and below it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Branch {
    /// Colour of the upper door.
    pub upper_door: u8,
    /// Colour of the lower door.
    pub lower_door: u8,
    /// The object behind the upper door.
    pub upper_object: Object,
    /// The object behind the lower door.
    pub lower_object: Object,
}

/// Everything that is random in an episode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HallwayLayout {
    /// The object in the start room.
    pub target: Object,
    /// The hallways from left to right, as the finished grid has them.
    pub hallways: Vec<Branch>,
    /// The hallway that holds the target, from 0.
    pub h_star: usize,
    /// Where it holds it: 0 above, 1 below.
    pub side: u8,
}

impl HallwayLayout {
    /// Draws a layout with `length` ≥ 1 hallways.
    pub fn random(length: usize, rng: &mut impl RngExt) -> Self {
        let target = Object::random(rng);
        let mut hallways: Vec<Branch> = (0..length)
            .map(|_| Branch {
                upper_door: rng.random_range(0..COLOURS),
                lower_door: rng.random_range(0..COLOURS),
                upper_object: other_than(target, rng),
                lower_object: other_than(target, rng),
            })
            .collect();
        let h_star = rng.random_range(0..length.max(1));
        let side = rng.random_range(0..2);
        if let Some(branch) = hallways.get_mut(h_star) {
            *(if side == 0 {
                &mut branch.upper_object
            } else {
                &mut branch.lower_object
            }) = target;
        }
        Self {
            target,
            hallways,
            h_star,
            side,
        }
    }

    fn validate(&self) -> Result<(), TaskError> {
        validate_length(self.hallways.len())?;
        self.target.validate("layout.target")?;
        for branch in &self.hallways {
            validate_colour(branch.upper_door, "layout.hallways.upper_door")?;
            validate_colour(branch.lower_door, "layout.hallways.lower_door")?;
            branch
                .upper_object
                .validate("layout.hallways.upper_object")?;
            branch
                .lower_object
                .validate("layout.hallways.lower_object")?;
        }
        if self.side > 1 {
            return Err(TaskError::new("layout.side", self.side, "0 or 1"));
        }
        let objects = self
            .hallways
            .iter()
            .flat_map(|branch| [branch.upper_object, branch.lower_object]);
        let holding: Vec<usize> = objects
            .enumerate()
            .filter_map(|(place, object)| (object == self.target).then_some(place))
            .collect();
        if holding != [2 * self.h_star + usize::from(self.side)] {
            return Err(TaskError::new(
                "layout.hallways",
                format!("the target at the places {holding:?} (2·hallway + side)"),
                format!("only at hallway {}, side {}", self.h_star, self.side),
            ));
        }
        Ok(())
    }
}

/// A random object; one equal to the target gets another colour.
fn other_than(target: Object, rng: &mut impl RngExt) -> Object {
    let object = Object::random(rng);
    if object == target {
        return Object(
            object.0,
            (object.1 + rng.random_range(1..COLOURS)) % COLOURS,
        );
    }
    object
}

/// The step limit: 4L + 25.
pub fn max_steps(length: usize) -> usize {
    4 * length + 25
}

/// Column of hallway h.
fn column(hallway: usize) -> i32 {
    7 + 4 * hallway as i32
}

/// The environment.
#[derive(Clone, Debug)]
pub struct Hallway {
    world: World,
    steps: u32,
    max_steps: usize,
    target_door: (i32, i32),
    /// The direction in which the target's door is seen from the corridor.
    target_direction: u8,
}

impl Hallway {
    /// Starts an episode with this layout.
    ///
    /// # Errors
    /// An impossible layout: an unknown code, or a target that does not stand exactly where `h_star` and `side` say.
    pub fn new(layout: &HallwayLayout) -> Result<Self, TaskError> {
        layout.validate()?;
        let length = layout.hallways.len();
        let side = 4 * length as i32 + 5;
        let centre = side / 2;
        // Row offsets from the corridor: ±1 walls and doors, ±2 objects, ±3 the hallways' ends.
        let mut world = World::new(side, side, centre - 3, 7);
        for sign in [-1, 1] {
            (1..=4).for_each(|x| world.set(x, centre + 2 * sign, WALL));
            (4..=side - 3).for_each(|x| world.set(x, centre + sign, WALL));
            for (hallway, branch) in layout.hallways.iter().enumerate() {
                let x = column(hallway);
                let (door, object) = if sign < 0 {
                    (branch.upper_door, branch.upper_object)
                } else {
                    (branch.lower_door, branch.lower_object)
                };
                for wall in [x - 1, x + 1] {
                    world.set(wall, centre + 2 * sign, WALL);
                    world.set(wall, centre + 3 * sign, WALL);
                }
                world.set(x, centre + 3 * sign, WALL);
                world.set(x, centre + 2 * sign, object.cell());
                world.set(x, centre + sign, closed_door(door));
            }
        }
        world.set(1, centre - 1, layout.target.cell());
        world.position = (2, centre);
        world.direction = EAST;
        let (offset, target_direction) = if layout.side == 0 {
            (-1, NORTH)
        } else {
            (1, SOUTH)
        };
        Ok(Self {
            world,
            steps: 0,
            max_steps: max_steps(length),
            target_door: (column(layout.h_star), centre + offset),
            target_direction,
        })
    }
}

impl Environment for Hallway {
    fn observe(&self, codes: &mut [u8]) {
        self.world.observe(codes);
    }

    fn step(&mut self, action: usize) -> Outcome {
        self.steps += 1;
        self.world.act(action);
        let terminated = self.world.cell(self.world.position)[0] == DOOR;
        let success = self.world.position == self.target_door;
        let reward = if success {
            1.0 - 0.9 * (f64::from(self.steps) / self.max_steps as f64)
        } else {
            0.0
        };
        Outcome {
            reward,
            terminated,
            truncated: self.steps as usize >= self.max_steps,
            success,
        }
    }

    fn expert(&self) -> usize {
        match self.steps {
            0 => LEFT,
            1 => RIGHT,
            _ if self.world.position.0 < self.target_door.0 => FORWARD,
            _ if self.world.direction != self.target_direction => {
                turn(self.world.direction, self.target_direction)
            }
            _ if self.world.faces_closed_door() => TOGGLE,
            _ => FORWARD,
        }
    }

    fn recalls(&self, steps: &mut Vec<u32>) {
        let beside_door = [2, 4]
            .into_iter()
            .any(|vx| self.world.view(vx, 6)[0] == DOOR);
        if self.steps >= 2 && beside_door {
            steps.push(1);
        }
        steps.push(self.steps);
    }
}
