//! What a run leaves on disk. `train_state.safetensors` is the resumable truth in one file;
//! `model.safetensors` holds the parameters by name for everyone else.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Error;
use super::config::{Config, TaskConfig, least_parameters, validate_spaces};
use super::data::Position;
use crate::backend::{Backend, FIRST_LOSS_SCALE};
use crate::model::Model;
use crate::spaces::Spaces;
use crate::tasks::write_beside;

/// The metadata entry that holds a header as JSON: a single one, because the order of several is
/// not fixed and the same run shall write the same bytes.
const HEADER: &str = "dtmem";
pub(super) const VERSION: u32 = 2;
/// Longest episode of a model file.
const MOST_STEPS: usize = 1 << 17;

/// What `model.safetensors` says about its parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelHeader {
    /// Version of the file format.
    pub version: u32,
    /// Optimiser steps behind the parameters.
    pub step: u64,
    /// What the model observes and does.
    pub spaces: Spaces,
    /// The return it is asked for in each task of the run, not scaled.
    pub target_returns: Vec<f64>,
    /// The run.
    pub config: Config,
}

impl ModelHeader {
    /// The header of a run's parameters after `step` steps.
    pub fn new(config: &Config, spaces: &Spaces, target_returns: &[f64], step: u64) -> Self {
        Self {
            version: VERSION,
            step,
            spaces: spaces.clone(),
            target_returns: target_returns.to_vec(),
            config: config.clone(),
        }
    }

    /// The tasks that the model was trained on, and the return it is asked for in each.
    pub fn trained_tasks(&self) -> (Vec<TaskConfig>, Vec<f64>) {
        let tasks = self.config.task_list().into_iter();
        let with_returns = tasks.zip(self.target_returns.iter().copied());
        with_returns.filter(|(task, _)| !task.is_held_out()).unzip()
    }

    /// Checks everything before memory is allocated for it; `numbers` are in the file.
    fn validate(&self, path: &Path, numbers: usize) -> Result<(), Error> {
        check_version(path, self.version)?;
        self.config.validate()?;
        let spaces = &self.spaces;
        let invalid = |what: &str, found: String, expected: &str| {
            Err(Error::file(path, format!("`{what}`"), found, expected))
        };
        for (index, family) in spaces.families.iter().enumerate() {
            family.validate().map_err(|error| {
                let what = format!("`spaces.families.{index}`: {}{}", error.part, error.place);
                Error::file(path, what, error.found, error.expected)
            })?;
        }
        if !(1..=MOST_STEPS).contains(&spaces.steps) {
            let expected = format!("1 to {MOST_STEPS}");
            return invalid("spaces.steps", spaces.steps.to_string(), &expected);
        }
        let tasks = self.config.task_list();
        if self.target_returns.len() != tasks.len()
            || !self.target_returns.iter().all(|target| target.is_finite())
        {
            return invalid(
                "target_returns",
                format!("{:?}", self.target_returns),
                &format!("{} finite numbers, one for each task", tasks.len()),
            );
        }
        validate_spaces(&self.config.model, spaces)?;
        for task in tasks.iter().filter_map(|task| task.task.as_ref()) {
            let known = spaces.position(&task.family()).is_some();
            if !known || task.max_steps() > spaces.steps {
                return invalid(
                    "spaces",
                    format!("{spaces:?}"),
                    &format!("those of the task `{}`", task.name()),
                );
            }
        }
        let least = least_parameters(&self.config.model, Some(spaces));
        if least > numbers as f64 {
            return Err(Error::file(
                path,
                "parameters",
                format!("{numbers} numbers"),
                format!("at least {least}, which such a model has"),
            ));
        }
        Ok(())
    }
}

/// Writes a model's parameters by name.
pub fn save_model<B: Backend<Element = f32>>(
    path: &Path,
    model: &Model<B>,
    header: &ModelHeader,
) -> Result<(), Error> {
    let bytes: Vec<u8> = to_bytes(&model.values()?);
    let tensors = model.parameters().iter().map(|parameter| {
        let range = parameter.span.range();
        let data = bytes
            .get(range.start * 4..range.end * 4)
            .unwrap_or_default();
        (parameter.name.as_str(), parameter.shape.clone(), data)
    });
    write(path, tensors, header)
}

/// Reads a model that [`save_model`] wrote, every value checked.
pub fn load_model<B: Backend<Element = f32>>(
    path: &Path,
    backend: B,
) -> Result<(Model<B>, ModelHeader), Error> {
    model_from_bytes(path, &read(path)?, backend)
}

/// The bytes of a file of a run.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

/// What a model file says beside its numbers.
pub fn model_header(path: &Path, bytes: &[u8]) -> Result<ModelHeader, Error> {
    let (_, header): (_, ModelHeader) = parse(path, bytes)?;
    header.validate(path, bytes.len() / 4)?;
    Ok(header)
}

/// As [`load_model`], from memory; `path` stands for it in errors.
pub fn model_from_bytes<B: Backend<Element = f32>>(
    path: &Path,
    bytes: &[u8],
    backend: B,
) -> Result<(Model<B>, ModelHeader), Error> {
    let (tensors, header): (_, ModelHeader) = parse(path, bytes)?;
    header.validate(path, bytes.len() / 4)?;
    let mut model = Model::new(
        backend,
        header.config.model.clone(),
        header.spaces.clone(),
        header.config.supervision(),
    )?;
    let mut values = model.values()?;
    for parameter in model.parameters() {
        let found = floats(path, &tensors, &parameter.name, &parameter.shape)?;
        if let Some(place) = values.get_mut(parameter.span.range()) {
            place.copy_from_slice(&found);
        }
    }
    let known = model.parameters();
    if let Some(name) = tensors
        .names()
        .into_iter()
        .find(|name| known.iter().all(|parameter| parameter.name != **name))
    {
        return Err(Error::file(
            path,
            format!("tensor `{name}`"),
            "a tensor that the model does not have",
            format!("only the model's {} tensors", known.len()),
        ));
    }
    model.set_values(&values)?;
    Ok((model, header))
}

/// What `train_state.safetensors` says beside its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateHeader {
    /// Version of the file format.
    pub version: u32,
    /// Optimiser steps done.
    pub step: u64,
    /// Where the next batch starts.
    pub position: Position,
    /// Tokens learnt from so far.
    pub tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// What losses are multiplied by for gradients in f16, and the steps without an overflow since
    /// that has changed.
    pub loss_scale: [f64; 2],
    /// What tells the base of an adaptation apart from others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The run.
    pub config: Config,
}

impl StateHeader {
    /// The start of a run, of an adaptation of this base.
    pub fn start(config: &Config, base: Option<&str>) -> Self {
        Self {
            version: VERSION,
            step: 0,
            position: Position::default(),
            tokens: 0,
            seconds: 0.0,
            loss_scale: FIRST_LOSS_SCALE,
            base: base.map(str::to_owned),
            config: config.clone(),
        }
    }
}

/// Everything that a run needs to go on.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Position and configuration.
    pub header: StateHeader,
    /// The trained part of the arena, its start; the rest is the base's.
    pub parameters: Vec<f32>,
    /// First moments of the optimiser.
    pub first_moment: Vec<f32>,
    /// Second moments of the optimiser.
    pub second_moment: Vec<f32>,
}

const STATE_TENSORS: [&str; 3] = ["parameters", "first_moment", "second_moment"];

/// Writes a run's state beside the old one and renames it.
pub fn save_state(path: &Path, state: &State) -> Result<(), Error> {
    let all = [&state.parameters, &state.first_moment, &state.second_moment];
    let bytes = all.map(|values| to_bytes(values));
    let tensors = STATE_TENSORS
        .iter()
        .zip(all)
        .zip(&bytes)
        .map(|((name, values), bytes)| (*name, vec![values.len()], bytes.as_slice()));
    write(path, tensors, &state.header)
}

/// Reads a state of `trained` parameters with their moments. `path` stands for it in errors.
pub fn state_from_bytes(path: &Path, bytes: &[u8], trained: usize) -> Result<State, Error> {
    let (tensors, header): (_, StateHeader) = parse(path, bytes)?;
    check_version(path, header.version)?;
    if !(header.seconds >= 0.0 && header.seconds.is_finite()) {
        return Err(Error::file(
            path,
            "`seconds`",
            header.seconds,
            "a finite number, not below 0",
        ));
    }
    let [scale, steps] = header.loss_scale;
    if !(scale >= 1.0 && scale.is_finite() && steps >= 0.0) {
        return Err(Error::file(
            path,
            "`loss_scale`",
            format!("{scale} for {steps} steps"),
            "a finite number of at least 1, and a number of steps",
        ));
    }
    let [name, first, second] = STATE_TENSORS;
    Ok(State {
        parameters: floats(path, &tensors, name, &[trained])?,
        first_moment: floats(path, &tensors, first, &[trained])?,
        second_moment: floats(path, &tensors, second, &[trained])?,
        header,
    })
}

/// The configuration of a state, without its numbers.
pub fn state_config(path: &Path, bytes: &[u8]) -> Result<Config, Error> {
    let (_, header): (_, StateHeader) = parse(path, bytes)?;
    Ok(header.config)
}

pub(super) fn check_version(path: &Path, version: u32) -> Result<(), Error> {
    if version != VERSION {
        return Err(Error::file(
            path,
            "`version`",
            version,
            format!("{VERSION}, the format of this program"),
        ));
    }
    Ok(())
}

pub(super) fn to_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

pub(super) fn write<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, Vec<usize>, &'a [u8])>,
    header: &impl Serialize,
) -> Result<(), Error> {
    let unfit = |error: &dyn std::fmt::Display| {
        Error::file(path, "contents", error, "what a safetensors file can hold")
    };
    let header = serde_json::to_string(header).map_err(|error| unfit(&error))?;
    let views: Result<Vec<_>, _> = tensors
        .map(|(name, shape, data)| Ok((name, TensorView::new(Dtype::F32, shape, data)?)))
        .collect();
    let views = views.map_err(|error: safetensors::SafeTensorError| unfit(&error))?;
    let metadata = HashMap::from([(HEADER.to_owned(), header)]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| unfit(&error))?;
    write_beside(path, &bytes).map_err(Error::io("write it", path))
}

pub(super) fn parse<'a, H: DeserializeOwned>(
    path: &Path,
    bytes: &'a [u8],
) -> Result<(SafeTensors<'a>, H), Error> {
    let damaged = |error| {
        Error::file(
            path,
            "contents",
            error,
            "a whole safetensors file, as `dtmem train` writes it",
        )
    };
    let tensors = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let header = metadata
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get(HEADER))
        .ok_or_else(|| {
            Error::file(
                path,
                format!("metadata entry `{HEADER}`"),
                "none",
                "the entry that `dtmem train` writes",
            )
        })?;
    let header = serde_json::from_str(header).map_err(|error| {
        Error::file(
            path,
            format!("metadata entry `{HEADER}`"),
            error,
            "the entry that `dtmem train` writes",
        )
    })?;
    Ok((tensors, header))
}

/// A tensor of finite f32 numbers.
pub(super) fn floats(
    path: &Path,
    tensors: &SafeTensors,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>, Error> {
    let error = |found: String, expected: &str| {
        Error::file(path, format!("tensor `{name}`"), found, expected)
    };
    let expected = format!("F32 {shape:?}, which this model has");
    let tensor = tensors
        .tensor(name)
        .map_err(|_| error("no such tensor".to_owned(), &expected))?;
    if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
        let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
        return Err(error(found, &expected));
    }
    let values: Vec<f32> = tensor
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();
    match values.iter().position(|value| !value.is_finite()) {
        Some(place) => Err(error(
            format!("{} at {place}", values[place]),
            "finite numbers",
        )),
        None => Ok(values),
    }
}
