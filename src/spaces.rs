//! What is seen and done at a time step. Tasks, batches and models agree on it.

use std::fmt::{self, Display};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Most values of a code, and most actions to choose from.
const MOST_CODES: usize = 256;
/// Most numbers of an observation.
const MOST_NUMBERS: usize = 1 << 24;
/// Most numbers of an action.
const MOST_ACTION_NUMBERS: usize = 1 << 12;

/// What an observation looks like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObservationSpace {
    /// The axes, such as [7, 7, 3].
    pub shape: Vec<usize>,
    /// What stands there.
    pub content: Content,
}

/// What the numbers of an observation are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// Codes: for each index of the last axis, how many there are, such as [11, 6, 3].
    Codes(Vec<usize>),
    /// Brightness from 0 to 255, of an image [height, width, channels].
    Pixels,
    /// Real numbers.
    Reals,
}

impl ObservationSpace {
    /// Codes of these axes, with one cardinality for each index of the last one.
    pub fn codes(shape: impl Into<Vec<usize>>, cardinalities: impl Into<Vec<usize>>) -> Self {
        Self {
            shape: shape.into(),
            content: Content::Codes(cardinalities.into()),
        }
    }

    /// Real numbers of these axes.
    pub fn reals(shape: impl Into<Vec<usize>>) -> Self {
        Self {
            shape: shape.into(),
            content: Content::Reals,
        }
    }

    /// Images [height, width, channels].
    pub fn pixels(shape: [usize; 3]) -> Self {
        Self {
            shape: shape.into(),
            content: Content::Pixels,
        }
    }

    /// How images are cut into patches; none for other observations.
    pub fn patches(&self) -> Option<Patches> {
        match (&self.content, &self.shape[..]) {
            (Content::Pixels, &[height, width, channels]) => Some(Patches {
                height,
                width,
                channels,
            }),
            _ => None,
        }
    }

    /// Numbers of one observation.
    pub fn fields(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is a grid of cells of codes.
    pub fn is_grid(&self) -> bool {
        matches!(self.content, Content::Codes(_)) && self.shape.len() == 3
    }
}

impl Display for ObservationSpace {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.content {
            Content::Codes(codes) => write!(out, "{:?}, codes below {codes:?}", self.shape),
            Content::Pixels => write!(out, "{:?}, pixels", self.shape),
            Content::Reals => write!(out, "{:?}, real numbers", self.shape),
        }
    }
}

/// What can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionSpace {
    /// One of so many actions.
    Discrete(usize),
    /// So many real numbers at once.
    Continuous(usize),
}

impl ActionSpace {
    /// Numbers that a model gives for an action: logits, or the action itself.
    pub fn outputs(self) -> usize {
        match self {
            Self::Discrete(count) | Self::Continuous(count) => count,
        }
    }

    /// Numbers of one action.
    pub fn fields(self) -> usize {
        match self {
            Self::Discrete(_) => 1,
            Self::Continuous(count) => count,
        }
    }

    /// Whether it is one of several.
    pub fn is_discrete(self) -> bool {
        matches!(self, Self::Discrete(_))
    }
}

impl Display for ActionSpace {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Discrete(count) => write!(out, "{count} actions"),
            Self::Continuous(count) => write!(out, "actions of {count} real numbers"),
        }
    }
}

/// What tasks that observe and act in the same way have in common. They share a front end and an
/// action head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// What is seen.
    pub observation: ObservationSpace,
    /// What is done.
    pub action: ActionSpace,
}

impl Display for Family {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "observations {} and {}", self.observation, self.action)
    }
}

/// A family that no model can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{part}{place}: found {found}, expected {expected}")]
pub struct SpaceError {
    /// Which part of it.
    pub part: Part,
    /// Where in it: empty, or a clause such as ", index 3".
    pub place: String,
    /// What stands there.
    pub found: String,
    /// What should.
    pub expected: String,
}

/// A part of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The shape of its observations.
    Observations,
    /// The numbers of codes.
    Cardinalities,
    /// Its actions.
    Actions,
}

impl Display for Part {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Observations => "observations",
            Self::Cardinalities => "cardinalities",
            Self::Actions => "actions",
        })
    }
}

impl Family {
    /// Checks the sizes.
    ///
    /// # Errors
    /// An axis of length 0, a last axis without one cardinality for each of its indices, a
    /// cardinality or a number of actions outside 1 to 256.
    pub fn validate(&self) -> Result<(), SpaceError> {
        let error = |part, place: String, found: String, expected: String| {
            Err(SpaceError {
                part,
                place,
                found,
                expected,
            })
        };
        let ObservationSpace { shape, content } = &self.observation;
        let fields = shape
            .iter()
            .try_fold(1_usize, |product, &axis| product.checked_mul(axis));
        if shape.is_empty() || fields.is_none_or(|fields| !(1..=MOST_NUMBERS).contains(&fields)) {
            return error(
                Part::Observations,
                String::new(),
                format!("{shape:?} per step"),
                "one axis or more, none of them empty".to_owned(),
            );
        }
        match content {
            Content::Reals => {}
            Content::Pixels => {
                if shape.len() != 3 {
                    return error(
                        Part::Observations,
                        String::new(),
                        format!("{shape:?} per step"),
                        "[height, width, channels] for pixels".to_owned(),
                    );
                }
            }
            Content::Codes(codes) => {
                if shape.last() != Some(&codes.len()) {
                    return error(
                        Part::Cardinalities,
                        String::new(),
                        format!("{} cardinalities", codes.len()),
                        format!("one for each index of the last axis of {shape:?}"),
                    );
                }
                let unfit = |count: &usize| !(1..=MOST_CODES).contains(count);
                if let Some(index) = codes.iter().position(unfit) {
                    return error(
                        Part::Cardinalities,
                        format!(", index {index}"),
                        codes[index].to_string(),
                        format!("1 to {MOST_CODES}"),
                    );
                }
            }
        }
        let (count, most) = match self.action {
            ActionSpace::Discrete(count) => (count, MOST_CODES),
            ActionSpace::Continuous(count) => (count, MOST_ACTION_NUMBERS),
        };
        if !(1..=most).contains(&count) {
            return error(
                Part::Actions,
                String::new(),
                count.to_string(),
                format!("1 to {most}"),
            );
        }
        Ok(())
    }
}

/// What the tasks of a model ask of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spaces {
    /// Each has a front end and an action head of its own.
    pub families: Vec<Family>,
    /// Longest episode in time steps.
    pub steps: usize,
}

impl Spaces {
    /// Of one family.
    pub fn of(observation: ObservationSpace, action: ActionSpace, steps: usize) -> Self {
        Self {
            families: vec![Family {
                observation,
                action,
            }],
            steps,
        }
    }

    /// Which family it is, if there is such a one.
    pub fn position(&self, family: &Family) -> Option<usize> {
        self.families.iter().position(|known| known == family)
    }

    /// Has a family for episodes of so many steps: a known one, or one more, behind the others. Its
    /// number.
    pub fn include(&mut self, family: Family, steps: usize) -> usize {
        self.steps = self.steps.max(steps);
        self.position(&family).unwrap_or_else(|| {
            self.families.push(family);
            self.families.len() - 1
        })
    }
}

/// Numbers of observations or actions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Values<'a> {
    /// Codes, pixels, discrete actions.
    Bytes(&'a [u8]),
    /// Real numbers.
    Reals(&'a [f32]),
}

impl<'a> Values<'a> {
    /// How many.
    pub fn len(self) -> usize {
        match self {
            Self::Bytes(values) => values.len(),
            Self::Reals(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The bytes; none where these are real numbers.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Self::Bytes(values) => values,
            Self::Reals(_) => &[],
        }
    }

    /// The real numbers; none where these are bytes.
    pub fn reals(self) -> &'a [f32] {
        match self {
            Self::Bytes(_) => &[],
            Self::Reals(values) => values,
        }
    }

    /// Number `row` of rows of `width` numbers; empty where there is no such row.
    pub fn row(self, row: usize, width: usize) -> Self {
        self.part(row * width..(row + 1) * width)
    }

    /// Some of them; empty where they are not there.
    pub fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::Bytes(values) => Self::Bytes(values.get(range).unwrap_or_default()),
            Self::Reals(values) => Self::Reals(values.get(range).unwrap_or_default()),
        }
    }
}

impl<'a> From<&'a [u8]> for Values<'a> {
    fn from(values: &'a [u8]) -> Self {
        Self::Bytes(values)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Values<'a> {
    fn from(values: &'a [u8; N]) -> Self {
        Self::Bytes(values)
    }
}

impl<'a> From<&'a Vec<u8>> for Values<'a> {
    fn from(values: &'a Vec<u8>) -> Self {
        Self::Bytes(values)
    }
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::Reals(values)
    }
}

impl<'a, const N: usize> From<&'a [f32; N]> for Values<'a> {
    fn from(values: &'a [f32; N]) -> Self {
        Self::Reals(values)
    }
}

impl<'a> From<&'a Vec<f32>> for Values<'a> {
    fn from(values: &'a Vec<f32>) -> Self {
        Self::Reals(values)
    }
}

/// [`Values`] that are kept.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers {
    /// Codes, pixels, discrete actions.
    Bytes(Vec<u8>),
    /// Real numbers.
    Reals(Vec<f32>),
}

impl Numbers {
    /// None yet, of the kind that observations have.
    pub fn observations(space: &ObservationSpace) -> Self {
        match space.content {
            Content::Codes(_) | Content::Pixels => Self::Bytes(Vec::new()),
            Content::Reals => Self::Reals(Vec::new()),
        }
    }

    /// None yet, of the kind that actions have.
    pub fn actions(space: ActionSpace) -> Self {
        match space {
            ActionSpace::Discrete(_) => Self::Bytes(Vec::new()),
            ActionSpace::Continuous(_) => Self::Reals(Vec::new()),
        }
    }

    /// All of them.
    pub fn all(&self) -> Values<'_> {
        match self {
            Self::Bytes(values) => Values::Bytes(values),
            Self::Reals(values) => Values::Reals(values),
        }
    }

    /// Whether values are of this kind.
    pub fn is_kind_of(&self, values: Values) -> bool {
        matches!(
            (self, values),
            (Self::Bytes(_), Values::Bytes(_)) | (Self::Reals(_), Values::Reals(_))
        )
    }

    /// Appends values of this kind.
    pub fn extend(&mut self, values: Values) {
        match self {
            Self::Bytes(all) => all.extend_from_slice(values.bytes()),
            Self::Reals(all) => all.extend_from_slice(values.reals()),
        }
    }

    /// Back to none.
    pub fn clear(&mut self) {
        match self {
            Self::Bytes(all) => all.clear(),
            Self::Reals(all) => all.clear(),
        }
    }
}

/// Side of the square patches that an image is cut into, in pixels.
const PATCH: usize = 12;

/// How an image is cut into patches, which a linear map takes one by one. Patches at the right and
/// lower edge are filled up with 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patches {
    height: usize,
    width: usize,
    channels: usize,
}

impl Patches {
    /// How many there are.
    pub fn count(self) -> usize {
        self.height.div_ceil(PATCH) * self.width.div_ceil(PATCH)
    }

    /// Numbers of one.
    pub fn size(self) -> usize {
        PATCH * PATCH * self.channels
    }

    /// Appends the patches of an image [height, width, channels], row by row, each
    /// [12, 12, channels], with brightness from 0 to 1.
    pub fn cut(self, pixels: &[u8], to: &mut Vec<f32>) {
        let line = self.width * self.channels;
        for top in (0..self.height).step_by(PATCH) {
            for left in (0..line).step_by(PATCH * self.channels) {
                for y in top..top + PATCH {
                    for x in left..left + PATCH * self.channels {
                        let inside = y < self.height && x < line;
                        let pixel = inside.then(|| pixels.get(y * line + x)).flatten();
                        to.push(f32::from(pixel.copied().unwrap_or_default()) / 255.0);
                    }
                }
            }
        }
    }
}
