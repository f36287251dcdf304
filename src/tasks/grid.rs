//! The grid world that Hallway and Counting share: cells, the agent's moves and its 7×7 view (SPEC section 7).

use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::TaskError;

/// A cell code: (type, colour, state).
pub type Cell = [u8; 3];

/// Cells along each side of the view: an observation is 7 × 7 × 3 codes, indexed `[vx][vy][channel]`.
pub const VIEW: usize = 7;
/// Number of codes of each channel: types, colours, door states.
pub const CARDINALITIES: [usize; 3] = [11, 6, 3];
/// Number of actions of every grid task.
pub const ACTIONS: usize = 7;

/// Turn left.
pub const LEFT: usize = 0;
/// Turn right.
pub const RIGHT: usize = 1;
/// Move to the cell ahead, where it is free.
pub const FORWARD: usize = 2;
/// Pick up; the grid tasks treat it as [`TOGGLE`].
pub const PICK_UP: usize = 3;
/// Toggle the cell ahead.
pub const TOGGLE: usize = 5;

/// Directions, in the order of a right turn.
pub const EAST: u8 = 0;
/// Towards larger y.
pub const SOUTH: u8 = 1;
/// Towards smaller x.
pub const WEST: u8 = 2;
/// Towards smaller y.
pub const NORTH: u8 = 3;

/// Nothing.
pub const EMPTY: Cell = [1, 0, 0];
/// A (grey) wall.
pub const WALL: Cell = [2, 5, 0];
/// Type code of a door.
pub const DOOR: u8 = 4;
/// Type code of a box, the only object that toggling removes.
pub const BOX: u8 = 7;

/// The types an object can have: key, ball, box.
pub const OBJECT_TYPES: [u8; 3] = [5, 6, 7];
/// Number of colours: red, green, blue, purple, yellow, grey.
pub const COLOURS: u8 = 6;
/// Colour code of a red thing.
pub const RED: u8 = 0;
/// Colour code of a green thing.
pub const GREEN: u8 = 1;
/// Colour code of a blue thing.
pub const BLUE: u8 = 2;

const OPEN: u8 = 0;
const CLOSED: u8 = 1;

/// A closed door.
pub fn closed_door(colour: u8) -> Cell {
    [DOOR, colour, CLOSED]
}

/// A key, ball or box of some colour; in JSON `[type, colour]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Object(pub u8, pub u8);

impl Object {
    /// Every object: 3 types × 6 colours.
    pub fn all() -> impl Iterator<Item = Self> {
        OBJECT_TYPES
            .into_iter()
            .flat_map(|kind| (0..COLOURS).map(move |colour| Self(kind, colour)))
    }

    /// An object of uniform type and colour.
    pub fn random(rng: &mut impl RngExt) -> Self {
        let kind = OBJECT_TYPES[rng.random_range(0..OBJECT_TYPES.len())];
        Self(kind, rng.random_range(0..COLOURS))
    }

    /// Its cell code.
    pub fn cell(self) -> Cell {
        [self.0, self.1, 0]
    }

    pub(super) fn validate(self, argument: &'static str) -> Result<(), TaskError> {
        if !OBJECT_TYPES.contains(&self.0) {
            return Err(TaskError::new(
                argument,
                format!("object type {}", self.0),
                "5 (key), 6 (ball) or 7 (box)",
            ));
        }
        validate_colour(self.1, argument)
    }
}

pub(super) fn validate_colour(colour: u8, argument: &'static str) -> Result<(), TaskError> {
    if colour >= COLOURS {
        return Err(TaskError::new(
            argument,
            format!("colour {colour}"),
            "0 to 5",
        ));
    }
    Ok(())
}

/// The turn that brings `direction` nearer to `wanted`.
pub(super) fn turn(direction: u8, wanted: u8) -> usize {
    if (direction + 3) % 4 == wanted {
        LEFT
    } else {
        RIGHT
    }
}

/// A walled grid with an agent. Only a band of whole rows is stored; every other row is empty between its border walls.
#[derive(Clone, Debug)]
pub(super) struct World {
    width: i32,
    height: i32,
    first_row: i32,
    cells: Vec<Cell>,
    pub position: (i32, i32),
    pub direction: u8,
}

impl World {
    /// A grid of `width` × `height` cells with border walls, of which `rows` rows from `first_row` can be changed.
    pub fn new(width: i32, height: i32, first_row: i32, rows: i32) -> Self {
        let mut world = Self {
            width,
            height,
            first_row,
            cells: Vec::new(),
            position: (0, 0),
            direction: EAST,
        };
        let stored = (first_row..first_row + rows).flat_map(|y| (0..width).map(move |x| (x, y)));
        world.cells = stored.map(|(x, y)| world.background(x, y)).collect();
        world
    }

    fn background(&self, x: i32, y: i32) -> Cell {
        let inside = 0 < x && x < self.width - 1 && 0 < y && y < self.height - 1;
        if inside { EMPTY } else { WALL }
    }

    /// Position of a cell in `cells`, if its row is stored.
    fn index(&self, (x, y): (i32, i32)) -> Option<usize> {
        let row = usize::try_from(y - self.first_row).ok()?;
        let column = usize::try_from(x).ok().filter(|_| x < self.width)?;
        Some(row * self.width as usize + column).filter(|&index| index < self.cells.len())
    }

    /// The code of a cell; outside the grid there is wall.
    pub fn cell(&self, (x, y): (i32, i32)) -> Cell {
        self.index((x, y))
            .map_or_else(|| self.background(x, y), |index| self.cells[index])
    }

    /// Changes a cell of a stored row.
    pub fn set(&mut self, x: i32, y: i32, cell: Cell) {
        if let Some(index) = self.index((x, y)) {
            self.cells[index] = cell;
        }
    }

    fn ahead(&self) -> (i32, i32) {
        let (dx, dy) = step(self.direction);
        (self.position.0 + dx, self.position.1 + dy)
    }

    /// Whether the cell ahead is a closed door.
    pub fn faces_closed_door(&self) -> bool {
        let [kind, _, state] = self.cell(self.ahead());
        kind == DOOR && state == CLOSED
    }

    /// Carries out one action. Actions that mean nothing here change nothing.
    pub fn act(&mut self, action: usize) {
        let ahead = self.ahead();
        match action {
            LEFT => self.direction = (self.direction + 3) % 4,
            RIGHT => self.direction = (self.direction + 1) % 4,
            FORWARD => {
                let cell = self.cell(ahead);
                if cell == EMPTY || (cell[0] == DOOR && cell[2] == OPEN) {
                    self.position = ahead;
                }
            }
            PICK_UP | TOGGLE => match self.cell(ahead) {
                [DOOR, colour, CLOSED] => self.set(ahead.0, ahead.1, [DOOR, colour, OPEN]),
                [DOOR, colour, OPEN] => self.set(ahead.0, ahead.1, [DOOR, colour, CLOSED]),
                [BOX, ..] => self.set(ahead.0, ahead.1, EMPTY),
                _ => {}
            },
            _ => {}
        }
    }

    /// What the agent sees at view cell (vx, vy); it stands at (3, 6), looks towards vy = 0 and never sees itself.
    pub fn view(&self, vx: i32, vy: i32) -> Cell {
        if (vx, vy) == (3, 6) {
            return EMPTY;
        }
        let (dx, dy) = step(self.direction);
        let (forward, right) = (6 - vy, vx - 3);
        self.cell((
            self.position.0 + forward * dx - right * dy,
            self.position.1 + forward * dy + right * dx,
        ))
    }

    /// Writes the whole view, [7, 7, 3] codes.
    pub fn observe(&self, codes: &mut [u8]) {
        let cells = (0..VIEW as i32).flat_map(|vx| (0..VIEW as i32).map(move |vy| (vx, vy)));
        for (code, (vx, vy)) in codes.chunks_exact_mut(3).zip(cells) {
            code.copy_from_slice(&self.view(vx, vy));
        }
    }
}

fn step(direction: u8) -> (i32, i32) {
    match direction {
        EAST => (1, 0),
        SOUTH => (0, 1),
        WEST => (-1, 0),
        _ => (0, -1),
    }
}
