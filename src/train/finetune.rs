//! Adaptation of a trained model, the base, to another task: what is taken from the base, what is
//! trained, and what the base's own tasks lose by it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use tracing::info;

use super::Error;
use super::adapters::fingerprint;
use super::checkpoint::{self, ModelHeader, StateHeader};
use super::config::{self, ConfigError, join};
use super::evaluate::{Evaluation, TaskResult};
use super::run::Folder;
use crate::backend::{Backend, Cpu};
use crate::model::{Model, TrainedPart};
use crate::spaces::{Family, Spaces};

/// How a base is adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Low-rank adapters on the memory's projections; the base stays as it is.
    #[default]
    Lora,
    /// All weights of the base.
    Full,
    /// The weights of the base's memory layers.
    Memory,
    /// All weights, newly initialised: only the base's architecture is used.
    Scratch,
    /// Nothing is trained: the base is evaluated.
    None,
}

impl Method {
    const ALL: [(&'static str, Self); 5] = [
        ("lora", Self::Lora),
        ("full", Self::Full),
        ("memory", Self::Memory),
        ("scratch", Self::Scratch),
        ("none", Self::None),
    ];

    /// The parameters that it trains.
    pub fn part(self) -> TrainedPart {
        match self {
            Self::Lora => TrainedPart::Adapter,
            Self::Full | Self::Scratch => TrainedPart::All,
            Self::Memory => TrainedPart::Memory,
            Self::None => TrainedPart::Nothing,
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|(name, _)| *name == word);
        found.map(|(_, method)| method).ok_or_else(|| {
            let names = Self::ALL.map(|(name, _)| name).join(", ");
            format!("`{word}` is no method, expected one of {names}")
        })
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let found = Self::ALL.into_iter().find(|(_, method)| method == self);
        f.write_str(found.map_or("", |(name, _)| name))
    }
}

/// The table `[finetune]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Output folder of the run whose model is adapted.
    pub base: PathBuf,
    /// What is trained.
    #[serde(default)]
    pub method: Method,
    /// Share of the demonstrations that are learnt from: the first ones, at least one.
    #[serde(default = "FinetuneConfig::whole")]
    pub share: f64,
}

impl FinetuneConfig {
    fn whole() -> f64 {
        1.0
    }

    /// Refuses an output folder that is the base's own: what is written there would take the base's place.
    pub(super) fn check_apart_from(&self, folder: &Path) -> config::Result<()> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if real(&self.base) != real(folder) {
            return Ok(());
        }
        let found = format!("the output folder {}", folder.display());
        let expected = "another one: choose it with --out DIR";
        Err(ConfigError::value("finetune.base", found, expected))
    }
}

/// Settings of a model that say how it is trained, not what it is: they may differ from the base's.
const OF_TRAINING: [&str; 3] = [
    "model.dropout",
    "model.observation_gain",
    "model.memory.strength_bias",
];

/// Takes what the configuration leaves open from the base: the model, the memory loss and, where
/// both have one task, the scale of returns. A table without `[finetune]` stays as it is.
///
/// # Errors
/// A base that cannot be read, a model that contradicts the base's, a method that the base has no
/// parameters for.
pub fn complete(table: &mut Table) -> config::Result<()> {
    let finetune = table.get("finetune").cloned();
    // One that is malformed is named when the whole configuration is read.
    let Some(Ok(finetune)) = finetune.map(FinetuneConfig::deserialize) else {
        return Ok(());
    };
    let header = base_header(&finetune.base)?;
    let model = &header.config.model;
    if model.memory.is_none() && matches!(finetune.method, Method::Lora | Method::Memory) {
        return Err(ConfigError::value(
            "finetune.method",
            finetune.method,
            format!(
                "full, scratch or none: the base in {} has no memory",
                finetune.base.display()
            ),
        ));
    }
    let base = Table::try_from(model)
        .map_err(|error| ConfigError::value("finetune.base", error, "a model"))?;
    let mut given = sub_table(table, "model");
    match finetune.method {
        Method::Lora => {
            given
                .entry("adapter")
                .or_insert_with(|| Value::Table(Table::new()));
        }
        _ => {
            given.remove("adapter");
        }
    }
    settle("model", &mut given, &base)?;
    table.insert("model".to_owned(), Value::Table(given));
    if !table.contains_key("loss") {
        let loss = Value::try_from(&header.config.loss)
            .map_err(|error| ConfigError::value("finetune.base", error, "a memory loss"))?;
        table.insert("loss".to_owned(), loss);
    }
    if header.config.tasks.is_empty() && !table.contains_key("tasks") {
        let mut data = sub_table(table, "data");
        data.entry("return_scale")
            .or_insert(Value::Float(header.config.data.return_scale));
        table.insert("data".to_owned(), Value::Table(data));
    }
    Ok(())
}

/// A copy of a table within a table; what is no table is named when the whole is read.
fn sub_table(table: &Table, key: &str) -> Table {
    let found = table.get(key).and_then(Value::as_table);
    found.cloned().unwrap_or_default()
}

/// Fills `given` up from `base`, whose values it must not contradict.
fn settle(path: &str, given: &mut Table, base: &Table) -> config::Result<()> {
    let expected = "what the base has: leave the key out, or choose another base";
    for (key, value) in base {
        let path = join(path, key);
        match (given.get_mut(key), value) {
            (None, value) => {
                given.insert(key.clone(), value.clone());
            }
            (Some(Value::Table(given)), Value::Table(base)) => settle(&path, given, base)?,
            (Some(found), value) if found != value && !OF_TRAINING.contains(&path.as_str()) => {
                let expected = format!("{value}, {expected}");
                return Err(ConfigError::value(path, &*found, expected));
            }
            _ => {}
        }
    }
    // Optional tables that the base does not have; other keys that it lacks do not exist.
    match given.get("memory") {
        Some(found) if !base.contains_key("memory") => {
            let expected = format!("none, {expected}");
            Err(ConfigError::value(join(path, "memory"), found, expected))
        }
        _ => Ok(()),
    }
}

fn base_header(base: &Path) -> config::Result<ModelHeader> {
    let unfit = |error: &dyn fmt::Display| {
        let expected = "the output folder of a run with a model (model.safetensors)";
        ConfigError::value("finetune.base", error, expected)
    };
    let path = Folder::new(base).model();
    let bytes =
        std::fs::read(&path).map_err(|error| unfit(&format!("{}: {error}", path.display())))?;
    checkpoint::model_header(&path, &bytes).map_err(|error| unfit(&error))
}

/// The base of an adaptation, in memory.
#[derive(Debug)]
pub struct Base {
    finetune: FinetuneConfig,
    header: ModelHeader,
    model: Model<Cpu<f32>>,
    fingerprint: String,
}

impl Base {
    /// Reads it.
    pub fn load(finetune: &FinetuneConfig) -> Result<Self, Error> {
        let path = Folder::new(&finetune.base).model();
        let (model, header) = checkpoint::load_model(&path, Cpu::new())?;
        Ok(Self {
            finetune: finetune.clone(),
            header,
            fingerprint: fingerprint(&model)?,
            model,
        })
    }

    /// How it is adapted.
    pub fn method(&self) -> Method {
        self.finetune.method
    }

    /// What its model file says.
    pub fn header(&self) -> &ModelHeader {
        &self.header
    }

    /// What tells it apart from other bases.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Whether it can be adapted to what the data asks for. Families that it does not have are new,
    /// and trained.
    ///
    /// # Errors
    /// Longer episodes, new families where nothing is trained.
    pub fn check_spaces(&self, asked: &Spaces) -> config::Result<()> {
        let own = &self.header.spaces;
        let unfit = |found: String, expected: String| {
            let expected = format!("{expected} the base in {}", self.path().display());
            Err(ConfigError::value("task", found, expected))
        };
        let mut families = asked.families.iter();
        if self.method() == Method::None
            && let Some(family) = families.find(|one| own.position(one).is_none())
        {
            let known: Vec<String> = own.families.iter().map(Family::to_string).collect();
            let expected = "or a method that trains an action head for it: known to";
            return unfit(
                family.to_string(),
                format!("{}; {expected}", known.join(", or ")),
            );
        }
        if asked.steps > own.steps {
            let expected = format!("at most {} steps, as has", own.steps);
            return unfit(format!("episodes of {} steps", asked.steps), expected);
        }
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.finetune.base
    }

    /// Copies its parameters into a model that has all of them, by name; others, such as an
    /// adapter's, stay as they are.
    ///
    /// # Errors
    /// A parameter of another shape, or none of the name.
    pub fn start<B: Backend<Element = f32>>(&self, model: &mut Model<B>) -> Result<(), Error> {
        let (from, mut values) = (self.model.values()?, model.values()?);
        for own in self.model.parameters() {
            let mut parameters = model.parameters().iter();
            let place = parameters.find(|other| other.name == own.name && other.shape == own.shape);
            let place = place.and_then(|place| values.get_mut(place.span.range()));
            let Some((place, source)) = place.zip(from.get(own.span.range())) else {
                let expected = "a model of the same architecture";
                let what = format!("parameter `{}`", own.name);
                let found = format!("{:?}", own.shape);
                return Err(Error::file(self.path(), what, found, expected));
            };
            place.copy_from_slice(source);
        }
        Ok(model.set_values(&values)?)
    }

    /// Whether a run that is resumed began on it: not so if the base was replaced meanwhile.
    ///
    /// # Errors
    /// Another fingerprint.
    pub fn check_same(&self, state: &StateHeader) -> Result<(), Error> {
        match &state.base {
            Some(base) if *base == self.fingerprint => Ok(()),
            began => Err(Error::file(
                self.path(),
                "the base",
                format!("one with the fingerprint {}", self.fingerprint),
                format!(
                    "the one that this run began on, with the fingerprint {}: start anew with \
                     --overwrite",
                    began.as_deref().unwrap_or("of none")
                ),
            )),
        }
    }

    /// What a run on it says beside its success, from the results of [`ModelHeader::trained_tasks`].
    pub fn adaptation(&self, before: &[TaskResult], after: &[TaskResult]) -> Adaptation {
        Adaptation::new(&self.finetune, before, after)
    }
}

/// A success rate and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Share of the episodes that ended in success.
    pub success_rate: f64,
    /// Its 95 % interval.
    pub interval: [f64; 2],
}

impl From<&Evaluation> for Rate {
    fn from(evaluation: &Evaluation) -> Self {
        Self {
            success_rate: evaluation.success_rate(),
            interval: evaluation.interval(),
        }
    }
}

/// What became of a task of the base.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forgetting {
    /// Its name among the base's tasks.
    pub label: String,
    /// The task with its parameters.
    pub task: String,
    /// Of the base.
    pub before: Rate,
    /// After the adaptation.
    pub after: Rate,
}

/// What an adapted model's result says beside its success.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Adaptation {
    /// What was trained.
    pub method: Method,
    /// Share of the demonstrations.
    pub share: f64,
    /// The base's folder.
    pub base: PathBuf,
    /// The base's own tasks.
    pub base_tasks: Vec<Forgetting>,
}

impl Adaptation {
    /// The result of a run, which is logged; what the base and what the adapted model did in the
    /// base's tasks.
    pub fn new(finetune: &FinetuneConfig, before: &[TaskResult], after: &[TaskResult]) -> Self {
        let forgetting = |(before, after): (&TaskResult, &TaskResult)| {
            let (label, task) = (before.label.clone(), before.task.to_string());
            let rates = [before, after].map(|result| Rate::from(&result.evaluation));
            info!(
                "the base's task {label} ({task}): success rate {:.1} % before, {:.1} % after",
                100.0 * rates[0].success_rate,
                100.0 * rates[1].success_rate
            );
            let [before, after] = rates;
            Forgetting {
                label,
                task,
                before,
                after,
            }
        };
        Self {
            method: finetune.method,
            share: finetune.share,
            base: finetune.base.clone(),
            base_tasks: before.iter().zip(after).map(forgetting).collect(),
        }
    }
}
