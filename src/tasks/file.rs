//! The file format of demonstrations (docs/demonstrations.md).

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::iter;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::{Demonstrations, EpisodeView, Invalid, Task};
use crate::spaces::{ActionSpace, Content, Family, Numbers, ObservationSpace, Values};

/// The metadata entry that holds the [`Header`] as JSON. One entry only, because the order of several is not fixed and
/// the same demonstrations shall give the same bytes.
const HEADER: &str = "dtmem";
const VERSION: u32 = 1;

const TENSORS: [&str; 7] = [
    "actions",
    "annotated",
    "episode_offsets",
    "observations",
    "pair_offsets",
    "pairs",
    "rewards",
];

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    /// Of codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    observation_cardinalities: Option<Vec<usize>>,
    /// Of discrete actions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    action_count: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    task: Option<Task>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
}

/// Why a demonstration file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DemonstrationError {
    /// The file system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Not a complete safetensors file.
    #[error(
        "{}: contents: found {source}, expected a whole safetensors file, as `dtmem demos` writes it \
         (docs/demonstrations.md)", path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: SafeTensorError,
    },
    /// A tensor or an entry that cannot be right.
    #[error("{}: {source}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Invalid,
    },
}

/// Writes a file whole or not at all: into `PATH.tmp`, then renamed.
///
/// # Errors
/// What the file system says; an old file at `path` is then still there.
pub fn write_beside(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    let written = write();
    if written.is_err() {
        // The first error is the one worth reporting.
        let _ = fs::remove_file(&beside);
    }
    written
}

impl Demonstrations {
    /// Writes the set to a file, whole or not at all.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, path: &Path) -> Result<(), DemonstrationError> {
        let bytes = self
            .to_bytes()
            .map_err(|source| DemonstrationError::Format {
                path: path.into(),
                source,
            })?;
        write_beside(path, &bytes).map_err(|source| DemonstrationError::Io {
            action: "write it",
            path: path.into(),
            source,
        })
    }

    /// Reads a set from a file and checks every value of it.
    ///
    /// # Errors
    /// A file that cannot be read, is cut off or damaged, or holds what [`Demonstrations::push`] does not accept.
    pub fn load(path: &Path) -> Result<Self, DemonstrationError> {
        let bytes = fs::read(path).map_err(|source| DemonstrationError::Io {
            action: "read it",
            path: path.into(),
            source,
        })?;
        let format = |source| DemonstrationError::Format {
            path: path.into(),
            source,
        };
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(format)?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get(HEADER));
        read(header, &tensors).map_err(|source| DemonstrationError::Invalid {
            path: path.into(),
            source,
        })
    }

    fn to_bytes(&self) -> Result<Vec<u8>, SafeTensorError> {
        let header = Header {
            version: VERSION,
            observation_cardinalities: match &self.space().content {
                Content::Codes(cardinalities) => Some(cardinalities.clone()),
                Content::Pixels | Content::Reals => None,
            },
            action_count: match self.family().action {
                ActionSpace::Discrete(count) => Some(count),
                ActionSpace::Continuous(_) => None,
            },
            task: self.task.clone(),
            seed: self.seed,
        };
        let header = HashMap::from([(HEADER.to_owned(), serde_json::to_string(&header)?)]);

        let observation_shape = iter::once(self.steps())
            .chain(self.space().shape.iter().copied())
            .collect();
        let action_shape = match self.family().action {
            ActionSpace::Discrete(_) => vec![self.steps()],
            ActionSpace::Continuous(size) => vec![self.steps(), size],
        };
        let (observation_type, observations) = stored(self.all_observations());
        let (action_type, actions) = stored(self.all_actions());
        let rewards = reals_to_bytes(self.all_rewards());
        let offsets = |offsets: &[usize]| -> Vec<u8> {
            offsets
                .iter()
                .flat_map(|&offset| (offset as i64).to_le_bytes())
                .collect()
        };
        let (episode_offsets, pair_offsets) =
            (offsets(self.offsets()), offsets(self.pair_offsets()));
        let pairs: Vec<u8> = self
            .all_pairs()
            .iter()
            .flat_map(|&(from, to)| [from, to])
            .flat_map(u32::to_le_bytes)
            .collect();
        let annotated: Vec<u8> = self
            .episodes()
            .map(|episode| u8::from(episode.annotated))
            .collect();

        let (steps, episodes, pair_count) = (self.steps(), self.len(), self.all_pairs().len());
        let tensors = [
            (
                "observations",
                TensorView::new(observation_type, observation_shape, &observations)?,
            ),
            (
                "actions",
                TensorView::new(action_type, action_shape, &actions)?,
            ),
            (
                "rewards",
                TensorView::new(Dtype::F32, vec![steps], &rewards)?,
            ),
            (
                "episode_offsets",
                TensorView::new(Dtype::I64, vec![episodes + 1], &episode_offsets)?,
            ),
            (
                "pairs",
                TensorView::new(Dtype::I32, vec![pair_count, 2], &pairs)?,
            ),
            (
                "pair_offsets",
                TensorView::new(Dtype::I64, vec![episodes + 1], &pair_offsets)?,
            ),
            (
                "annotated",
                TensorView::new(Dtype::U8, vec![episodes], &annotated)?,
            ),
        ];
        safetensors::serialize(tensors, Some(header))
    }
}

fn reals_to_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// What stands in a file for these numbers.
fn stored(values: Values<'_>) -> (Dtype, Cow<'_, [u8]>) {
    match values {
        Values::Bytes(values) => (Dtype::U8, values.into()),
        Values::Reals(values) => (Dtype::F32, reals_to_bytes(values).into()),
    }
}

fn read(header: Option<&String>, tensors: &SafeTensors) -> Result<Demonstrations, Invalid> {
    let header = read_header(header)?;
    if let Some(unknown) = tensors
        .names()
        .into_iter()
        .find(|name| !TENSORS.contains(name))
    {
        return Err(Invalid::new(
            "file",
            "",
            format!("a tensor `{unknown}`"),
            format!("only {TENSORS:?}"),
        ));
    }

    let observations = required(tensors, "observations", "tensor `observations`")?;
    let [steps, shape @ ..] = observations.shape() else {
        return Err(Invalid::new(
            "tensor `observations`",
            "",
            "a scalar",
            "[steps, …]",
        ));
    };
    let actions = required(tensors, "actions", "tensor `actions`")?;
    let mut set = Demonstrations::new(Family {
        observation: observation_space(&observations, shape, header.observation_cardinalities)?,
        action: action_space(&actions, header.action_count)?,
    })?;
    if let Some(task) = &header.task {
        task.validate()
            .map_err(|error| Invalid::new("metadata `dtmem`", ", `task`", error, "a valid task"))?;
        let expected = task.family();
        if *set.family() != expected {
            return Err(Invalid::new(
                "metadata `dtmem`",
                "",
                set.family(),
                format!("{expected}, as {} has", task.name()),
            ));
        }
    }
    set.task = header.task;
    set.seed = header.seed;

    let steps = *steps;
    let converted;
    let actions = match set.family().action {
        ActionSpace::Discrete(count) => {
            let what = "tensor `actions`";
            expect_shape(&actions, what, &[steps])?;
            Numbers::Bytes(convert(&actions, what, &format!("below {count}"))?)
        }
        ActionSpace::Continuous(size) => {
            expect_shape(&actions, "tensor `actions`", &[steps, size])?;
            Numbers::Reals(reals(&actions, "tensor `actions`")?)
        }
    };
    let observations = match set.space().content {
        Content::Codes(_) | Content::Pixels => Values::Bytes(observations.data()),
        Content::Reals => {
            converted = reals(&observations, "tensor `observations`")?;
            Values::Reals(&converted)
        }
    };
    let rewards = required(tensors, "rewards", "tensor `rewards`")?;
    expect_shape(&rewards, "tensor `rewards`", &[steps])?;
    let rewards = reals(&rewards, "tensor `rewards`")?;

    let offsets = required(tensors, "episode_offsets", "tensor `episode_offsets`")?;
    let offsets = read_offsets(&offsets, "tensor `episode_offsets`", steps)?;
    let episodes = offsets.len() - 1;
    let (pairs, pair_offsets, known) =
        match (tensors.tensor("pairs"), tensors.tensor("pair_offsets")) {
            (Ok(pairs), Ok(pair_offsets)) => {
                let what = "tensor `pairs`";
                if pairs.shape().len() != 2 || pairs.shape()[1] != 2 {
                    return Err(Invalid::new(
                        what,
                        "",
                        format!("shape {:?}", pairs.shape()),
                        "[pairs, 2]",
                    ));
                }
                let flat: Vec<u32> = convert(&pairs, what, "a step of the episode")?;
                let pairs: Vec<(u32, u32)> = flat
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&[from, to]| (from, to))
                    .collect();
                let what = "tensor `pair_offsets`";
                expect_shape(&pair_offsets, what, &[episodes + 1])?;
                let pair_offsets = read_offsets(&pair_offsets, what, pairs.len())?;
                (pairs, pair_offsets, true)
            }
            (Err(_), Err(_)) => (Vec::new(), vec![0; episodes + 1], false),
            _ => {
                let found = "one of them alone";
                return Err(Invalid::new(
                    "tensors `pairs`, `pair_offsets`",
                    "",
                    found,
                    "both or neither",
                ));
            }
        };
    let annotated = match tensors.tensor("annotated") {
        Ok(annotated) => read_annotated(&annotated, episodes, known)?,
        Err(_) => vec![known; episodes],
    };

    let (fields, action_fields) = (set.space().fields(), set.family().action.fields());
    for (episode, annotated) in annotated.into_iter().enumerate() {
        let steps = offsets[episode]..offsets[episode + 1];
        set.push(EpisodeView {
            observations: observations.part(steps.start * fields..steps.end * fields),
            actions: actions
                .all()
                .part(steps.start * action_fields..steps.end * action_fields),
            rewards: &rewards[steps],
            pairs: &pairs[pair_offsets[episode]..pair_offsets[episode + 1]],
            annotated,
        })?;
    }
    Ok(set)
}

/// What the observations are, by their type and by whether there are numbers of codes.
fn observation_space(
    tensor: &TensorView,
    shape: &[usize],
    cardinalities: Option<Vec<usize>>,
) -> Result<ObservationSpace, Invalid> {
    let what = "tensor `observations`";
    match (tensor.dtype(), cardinalities) {
        (Dtype::U8, Some(cardinalities)) => Ok(ObservationSpace::codes(shape, cardinalities)),
        (Dtype::U8, None) => match *shape {
            [height, width, channels] => Ok(ObservationSpace::pixels([height, width, channels])),
            _ => Err(Invalid::new(
                what,
                "",
                format!("U8 and {shape:?} per step, without `observation_cardinalities`"),
                "images [steps, height, width, channels], or `observation_cardinalities` for codes",
            )),
        },
        (Dtype::F32 | Dtype::F64, None) => Ok(ObservationSpace::reals(shape)),
        (Dtype::F32 | Dtype::F64, Some(_)) => Err(Invalid::new(
            what,
            "",
            format!("{}, with `observation_cardinalities`", tensor.dtype()),
            "U8 for codes, or no `observation_cardinalities` for real numbers",
        )),
        (other, _) => Err(Invalid::new(
            what,
            "",
            other,
            "U8 for codes and images, F32 or F64 for real numbers",
        )),
    }
}

/// What the actions are, by their type.
fn action_space(tensor: &TensorView, count: Option<usize>) -> Result<ActionSpace, Invalid> {
    let what = "tensor `actions`";
    match (tensor.dtype(), tensor.shape(), count) {
        (Dtype::F32 | Dtype::F64, &[_, size], None) => Ok(ActionSpace::Continuous(size)),
        (Dtype::F32 | Dtype::F64, shape, None) => Err(Invalid::new(
            what,
            "",
            format!("shape {shape:?}"),
            "[steps, numbers] for continuous actions",
        )),
        (other @ (Dtype::F32 | Dtype::F64), _, Some(_)) => Err(Invalid::new(
            what,
            "",
            format!("{other}, with `action_count`"),
            "whole numbers, or no `action_count` for continuous actions",
        )),
        (_, _, Some(count)) => Ok(ActionSpace::Discrete(count)),
        (other, _, None) => Err(Invalid::new(
            "metadata `dtmem`",
            ", `action_count`",
            format!("none, with actions of type {other}"),
            "a number for discrete actions; continuous ones are F32 or F64",
        )),
    }
}

fn read_header(header: Option<&String>) -> Result<Header, Invalid> {
    let what = "metadata `dtmem`";
    let expected = "a JSON object with `version` and, for codes and discrete actions, \
                    `observation_cardinalities` and `action_count`";
    let header = header.ok_or_else(|| Invalid::new(what, "", "nothing", expected))?;
    let header: Header =
        serde_json::from_str(header).map_err(|error| Invalid::new(what, "", error, expected))?;
    if header.version != VERSION {
        return Err(Invalid::new(
            what,
            ", `version`",
            header.version,
            format!("{VERSION}"),
        ));
    }
    Ok(header)
}

fn required<'a>(
    tensors: &SafeTensors<'a>,
    name: &str,
    what: &'static str,
) -> Result<TensorView<'a>, Invalid> {
    tensors
        .tensor(name)
        .map_err(|_| Invalid::new(what, "", "no such tensor", "one"))
}

fn expect_shape(
    tensor: &TensorView,
    what: &'static str,
    expected: &[usize],
) -> Result<(), Invalid> {
    if tensor.shape() != expected {
        return Err(Invalid::new(
            what,
            "",
            format!("shape {:?}", tensor.shape()),
            format!("{expected:?}"),
        ));
    }
    Ok(())
}

/// The integers of a tensor, whatever their width.
fn integers(tensor: &TensorView, what: &'static str) -> Result<Vec<i64>, Invalid> {
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::U8 | Dtype::BOOL => Ok(data.iter().copied().map(i64::from).collect()),
        Dtype::I32 => Ok(data
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i32::from_le_bytes(*bytes).into())
            .collect()),
        Dtype::I64 => Ok(data
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .collect()),
        other => Err(Invalid::new(what, "", other, "U8, I32 or I64")),
    }
}

/// The integers of a tensor, which all have to fit in a `T`.
fn convert<T: TryFrom<i64>>(
    tensor: &TensorView,
    what: &'static str,
    expected: &str,
) -> Result<Vec<T>, Invalid> {
    let convert = |(index, value)| {
        T::try_from(value)
            .map_err(|_| Invalid::new(what, format!(", index {index}"), value, expected))
    };
    integers(tensor, what)?
        .into_iter()
        .enumerate()
        .map(convert)
        .collect()
}

/// The real numbers of a tensor, whatever their width.
fn reals(tensor: &TensorView, what: &'static str) -> Result<Vec<f32>, Invalid> {
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => Ok(data
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect()),
        Dtype::F64 => Ok(data
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f64::from_le_bytes(*bytes) as f32)
            .collect()),
        other => Err(Invalid::new(what, "", other, "F32 or F64")),
    }
}

/// Offsets into `total` items: at least two, from 0 to `total`, never falling. (That episodes are not empty is for
/// [`Demonstrations::push`] to say.)
fn read_offsets(
    tensor: &TensorView,
    what: &'static str,
    total: usize,
) -> Result<Vec<usize>, Invalid> {
    if !matches!(tensor.shape(), [entries] if *entries >= 2) {
        return Err(Invalid::new(
            what,
            "",
            format!("shape {:?}", tensor.shape()),
            "[episodes + 1], with an episode",
        ));
    }
    let offsets: Vec<usize> = convert(tensor, what, &format!("0 to {total}"))?;
    if let Some(index) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        let found = format!("{} after {}", offsets[index + 1], offsets[index]);
        return Err(Invalid::new(
            what,
            format!(", index {}", index + 1),
            found,
            "offsets that never fall",
        ));
    }
    let (first, last) = (offsets[0], offsets[offsets.len() - 1]);
    if (first, last) != (0, total) {
        return Err(Invalid::new(
            what,
            "",
            format!("{first} to {last}"),
            format!("0 to {total}"),
        ));
    }
    Ok(offsets)
}

fn read_annotated(tensor: &TensorView, episodes: usize, known: bool) -> Result<Vec<bool>, Invalid> {
    let what = "tensor `annotated`";
    expect_shape(tensor, what, &[episodes])?;
    let flag = |(episode, flag)| match flag {
        0 => Ok(false),
        1 if known => Ok(true),
        1 => Err(Invalid::new(
            what,
            format!(", episode {episode}"),
            1,
            "0, for there are no pairs",
        )),
        other => Err(Invalid::new(
            what,
            format!(", episode {episode}"),
            other,
            "0 or 1",
        )),
    };
    integers(tensor, what)?
        .into_iter()
        .enumerate()
        .map(flag)
        .collect()
}
