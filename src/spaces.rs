//! What is seen and done at a time step. Tasks, batches and models agree on it.

use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Most values of a code, and most actions to choose from.
const MOST_CODES: usize = 256;
/// Most numbers of an observation or of an action.
const MOST_NUMBERS: usize = 1 << 24;

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
}

impl ObservationSpace {
    /// Codes of these axes, with one cardinality for each index of the last one.
    pub fn codes(shape: impl Into<Vec<usize>>, cardinalities: impl Into<Vec<usize>>) -> Self {
        Self {
            shape: shape.into(),
            content: Content::Codes(cardinalities.into()),
        }
    }

    /// Numbers of one observation.
    pub fn fields(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is a grid of cells of codes.
    pub fn is_grid(&self) -> bool {
        let Content::Codes(_) = self.content;
        self.shape.len() == 3
    }
}

impl Display for ObservationSpace {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.content {
            Content::Codes(codes) => write!(out, "{:?}, codes below {codes:?}", self.shape),
        }
    }
}

/// What can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionSpace {
    /// One of so many actions.
    Discrete(usize),
}

impl ActionSpace {
    /// Numbers that a model gives for an action: logits.
    pub fn outputs(self) -> usize {
        match self {
            Self::Discrete(count) => count,
        }
    }
}

impl Display for ActionSpace {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Discrete(count) => write!(out, "{count} actions"),
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
        let ActionSpace::Discrete(count) = self.action;
        if !(1..=MOST_CODES).contains(&count) {
            return error(
                Part::Actions,
                String::new(),
                count.to_string(),
                format!("1 to {MOST_CODES}"),
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
