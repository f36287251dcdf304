//! Whether the values of a configuration can be used.

use super::{
    Config, ConfigError, DataConfig, EvaluationConfig, OptimiserKind, Result, Supervise,
    TaskConfig, TrainConfig,
};
use crate::batch::TokenLayout;
use crate::model::{AdapterConfig, AttentionSpan, FrontEnd, ModelConfig};
use crate::spaces::{Family, Spaces};
use crate::train::finetune::Method;

impl Config {
    /// Checks every value that does not depend on the data.
    pub fn validate(&self) -> Result<()> {
        whole("seed", self.seed, 0, MOST_SEED)?;
        self.validate_tasks()?;
        validate_model(&self.model)?;
        self.validate_loss()?;
        let method = self.finetune.as_ref().map(|finetune| finetune.method);
        if (method == Some(Method::Lora)) != self.model.adapter.is_some() {
            return Err(ConfigError::value(
                "model.adapter",
                match self.model.adapter {
                    Some(_) => "an adapter",
                    None => "nothing",
                },
                "an adapter with `dtmem finetune --method lora`, and only there: all else is frozen",
            ));
        }
        let share = self.finetune.as_ref().map_or(1.0, |from| from.share);
        if !(share > 0.0 && share <= 1.0) {
            let expected = "above 0, at most 1";
            return Err(ConfigError::value("finetune.share", share, expected));
        }
        self.train.validate()?;
        self.evaluation.validate()
    }

    fn validate_tasks(&self) -> Result<()> {
        if self.tasks.is_empty() {
            let [task] = &self.task_list()[..] else {
                return Ok(());
            };
            return task.validate("");
        }
        for (key, is_set) in [
            ("task", self.task.is_some()),
            ("data", self.data != DataConfig::default()),
            (
                "evaluation.target_return",
                self.evaluation.target_return.is_some(),
            ),
        ] {
            if is_set {
                return Err(ConfigError::value(
                    key,
                    "a value beside [[tasks]]",
                    "one in each of [[tasks]], which have tables `task` and `data` and a \
                     `target_return` of their own",
                ));
            }
        }
        for (index, task) in self.tasks.iter().enumerate() {
            task.validate(&format!("tasks.{index}"))?;
        }
        if self.tasks.iter().all(TaskConfig::is_held_out) {
            return Err(ConfigError::value(
                "tasks",
                "a share of 0 in each",
                "at least one that is trained on",
            ));
        }
        Ok(())
    }

    fn validate_loss(&self) -> Result<()> {
        let (loss, model) = (&self.loss, &self.model);
        real("loss.lambda", loss.lambda, 0.0, 1e9)?;
        if loss.lambda == 0.0 {
            return Ok(());
        }
        if !(1..=model.layers).contains(&loss.layer) {
            return Err(ConfigError::value(
                "loss.layer",
                loss.layer,
                format!("1 to model.layers = {}", model.layers),
            ));
        }
        let ascending = loss.heads.is_sorted_by(|a, b| a < b);
        let inside = loss.heads.iter().all(|h| (1..=model.heads).contains(h));
        if loss.heads.is_empty() || !ascending || !inside {
            return Err(ConfigError::value(
                "loss.heads",
                format!("{:?}", loss.heads),
                format!(
                    "at least one head, ascending, each 1 to model.heads = {}",
                    model.heads
                ),
            ));
        }
        let by_segment = model.attention == AttentionSpan::Segment;
        match loss.supervise {
            Supervise::Attention if by_segment => Err(ConfigError::value(
                "loss.lambda",
                loss.lambda,
                "0 with model.attention = \"segment\", because pairs cross segments; or \
                 model.attention = \"episode\", or loss.supervise = \"memory\"",
            )),
            Supervise::Memory if model.memory.is_none() || model.segment_steps == 0 => {
                Err(ConfigError::value(
                    "loss.supervise",
                    "memory",
                    "\"attention\", or a memory that is written more than once an episode: \
                     [model.memory] and model.segment_steps",
                ))
            }
            _ => Ok(()),
        }
    }
}

impl TaskConfig {
    /// `key` is where it stands.
    fn validate(&self, key: &str) -> Result<()> {
        match &self.task {
            Some(task) => task.validate().map_err(|error| {
                let key = join(key, &format!("task.{}", error.argument));
                ConfigError::value(key, error.found, error.expected)
            })?,
            None if self.data.file.is_none() => {
                return Err(ConfigError::value(
                    join(key, "task"),
                    "nothing",
                    "a table [task] with a `name`, or demonstrations of your own in `data.file`",
                ));
            }
            None => {}
        }
        real(&join(key, "share"), self.share, 0.0, 1e6)?;
        if self
            .label
            .as_deref()
            .is_some_and(|label| label.trim().is_empty())
        {
            return Err(ConfigError::value(
                join(key, "label"),
                "nothing",
                "a name, or no label",
            ));
        }
        self.data.validate(&join(key, "data"))?;
        match self.target_return {
            Some(target) => real(&join(key, "target_return"), target, -1e9, 1e9),
            None => Ok(()),
        }
    }
}

impl DataConfig {
    /// `key` is where it stands.
    fn validate(&self, key: &str) -> Result<()> {
        if let Some(episodes) = self.episodes {
            whole(&join(key, "episodes"), episodes as u64, 1, 100_000_000)?;
        }
        real(&join(key, "annotated"), self.annotated, 0.0, 1.0)?;
        self.annotation_noise.validate().map_err(|error| {
            let key = join(key, &format!("annotation_noise.{}", error.argument));
            ConfigError::value(key, error.found, error.expected)
        })?;
        if let Some(validation) = self.validation {
            probability(&join(key, "validation"), validation)?;
        }
        positive(&join(key, "return_scale"), self.return_scale)
    }
}

/// The largest seed that TOML can hold.
const MOST_SEED: u64 = i64::MAX as u64;

/// Far above anything trainable, low enough that sizes computed from it do not overflow.
const MOST_PARAMETERS: f64 = 4e9;

fn whole(key: &str, value: u64, least: u64, most: u64) -> Result<()> {
    if !(least..=most).contains(&value) {
        return Err(ConfigError::value(key, value, format!("{least} to {most}")));
    }
    Ok(())
}

fn real(key: &str, value: f64, least: f64, most: f64) -> Result<()> {
    if !(least..=most).contains(&value) {
        return Err(ConfigError::value(
            key,
            value,
            format!("a number from {least} to {most}"),
        ));
    }
    Ok(())
}

fn probability(key: &str, value: f64) -> Result<()> {
    if !(0.0..1.0).contains(&value) {
        return Err(ConfigError::value(key, value, "at least 0 and below 1"));
    }
    Ok(())
}

fn positive(key: &str, value: f64) -> Result<()> {
    if !(value > 0.0 && value.is_finite()) {
        return Err(ConfigError::value(key, value, "a finite number above 0"));
    }
    Ok(())
}

/// Checks a model's sizes, by their keys.
pub fn validate_model(model: &ModelConfig) -> Result<()> {
    whole("model.width", model.width as u64, 1, 1 << 16)?;
    whole("model.layers", model.layers as u64, 1, 1 << 10)?;
    whole("model.heads", model.heads as u64, 1, 1 << 16)?;
    whole("model.feed_forward", model.feed_forward as u64, 1, 1 << 20)?;
    whole(
        "model.segment_steps",
        model.segment_steps as u64,
        0,
        1 << 30,
    )?;
    if !model.width.is_multiple_of(model.heads) {
        let below = (1..=model.heads)
            .rev()
            .find(|heads| model.width.is_multiple_of(*heads))
            .unwrap_or(1);
        return Err(ConfigError::value(
            "model.heads",
            model.heads,
            format!(
                "a divisor of model.width = {}, such as {below}",
                model.width
            ),
        ));
    }
    probability("model.dropout", model.dropout)?;
    real(
        "model.observation_gain",
        model.observation_gain,
        0.0,
        1000.0,
    )?;
    if let Some(memory) = &model.memory {
        whole("model.memory.slots", memory.slots as u64, 1, 1 << 20)?;
        whole(
            "model.memory.top_k",
            memory.top_k as u64,
            0,
            memory.slots as u64,
        )?;
        real(
            "model.memory.strength_bias",
            memory.strength_bias,
            -100.0,
            100.0,
        )?;
    }
    if let Some(adapter) = &model.adapter {
        if model.memory.is_none() {
            return Err(ConfigError::value(
                "model.adapter",
                "adapters without a memory",
                "a table [model.memory] as well: adapters stand on the memory's projections",
            ));
        }
        validate_adapter(model, adapter)?;
    }
    let parameters = least_parameters(model, None);
    if parameters > MOST_PARAMETERS {
        return Err(ConfigError::value(
            "model",
            format!("at least {parameters:.1e} parameters"),
            format!("at most {MOST_PARAMETERS:.1e}: lower width, layers, feed_forward or slots"),
        ));
    }
    Ok(())
}

/// Checks an adapter of a model, by its keys.
pub fn validate_adapter(model: &ModelConfig, adapter: &AdapterConfig) -> Result<()> {
    whole(
        "model.adapter.rank",
        adapter.rank as u64,
        1,
        model.width as u64,
    )?;
    positive("model.adapter.alpha", adapter.alpha)?;
    probability("model.adapter.dropout", adapter.dropout)?;
    if !adapter.has_targets() {
        let names: Vec<&str> = adapter.targets.iter().map(|target| target.name()).collect();
        return Err(ConfigError::value(
            "model.adapter.targets",
            format!("{names:?}"),
            "at least one projection, none twice",
        ));
    }
    Ok(())
}

/// A lower bound of a model's number of parameters: the maps of the blocks and, if the spaces are
/// known, of the observations and the learned positions. Computed before anything is allocated.
pub fn least_parameters(model: &ModelConfig, spaces: Option<&Spaces>) -> f64 {
    let width = model.width as f64;
    let memory = model
        .memory
        .as_ref()
        .map_or(0.0, |memory| 5.0 * width * width + memory.slots as f64);
    let adapter = model
        .adapter
        .as_ref()
        .map_or(0.0, |adapter| adapter.rank as f64 * width);
    let block = 4.0 * width * width + 2.0 * width * model.feed_forward as f64 + memory + adapter;
    let outside = spaces.map_or(0.0, |spaces| {
        let cells_of = |family: &Family| -> f64 {
            let axes = family.observation.shape.iter().rev().skip(1);
            axes.map(|&axis| axis as f64).product()
        };
        let cells: f64 = spaces.families.iter().map(cells_of).sum();
        let positions = match model.layout {
            TokenLayout::ObsAction => 0.0,
            TokenLayout::ReturnObsAction => spaces.steps as f64,
        };
        (cells + positions) * width
    });
    model.layers as f64 * block + outside
}

/// Checks a model against what it observes and does.
pub fn validate_spaces(model: &ModelConfig, spaces: &Spaces) -> Result<()> {
    let of_grids = spaces.families.iter().any(|f| f.observation.is_grid());
    if model.front_end == FrontEnd::Convolution && !of_grids {
        let shapes = spaces.families.iter().map(|f| &f.observation.shape);
        return Err(ConfigError::value(
            "model.front_end",
            "\"convolution\"",
            format!(
                "\"linear\": observations have the shape {:?}, which is no grid of cells",
                shapes.collect::<Vec<_>>()
            ),
        ));
    }
    Ok(())
}

impl TrainConfig {
    fn validate(&self) -> Result<()> {
        match (self.steps, self.epochs) {
            (Some(steps), None) => whole("train.steps", steps, 1, u64::from(u32::MAX))?,
            (None, Some(epochs)) => whole("train.epochs", epochs, 1, 1_000_000)?,
            (steps, _) => {
                return Err(ConfigError::value(
                    "train.steps",
                    if steps.is_some() {
                        "`train.epochs` as well"
                    } else {
                        "neither it nor `train.epochs`"
                    },
                    "one of the two: remove or add one",
                ));
            }
        }
        whole(
            "train.batch_tokens",
            self.batch_tokens as u64,
            1,
            MOST_BATCH_TOKENS,
        )?;
        whole("train.shards", self.shards as u64, 1, MOST_SHARDS)?;
        positive("train.learning_rate", self.learning_rate)?;
        whole(
            "train.warmup_steps",
            self.warmup_steps,
            0,
            u64::from(u32::MAX),
        )?;
        real("train.weight_decay", self.weight_decay, 0.0, 1e3)?;
        if self.optimiser == OptimiserKind::Adam && self.weight_decay > 0.0 {
            return Err(ConfigError::value(
                "train.weight_decay",
                self.weight_decay,
                "0 with optimiser = \"adam\", or optimiser = \"adamw\"",
            ));
        }
        real("train.clip", self.clip, 0.0, 1e9)?;
        whole("train.log_every", self.log_every, 1, u64::from(u32::MAX))?;
        whole(
            "train.checkpoint_every",
            self.checkpoint_every,
            1,
            u64::from(u32::MAX),
        )
    }
}

/// More shards than any CPU has cores.
const MOST_SHARDS: u64 = 1024;

/// Most tokens of a batch.
const MOST_BATCH_TOKENS: u64 = 1 << 24;

impl EvaluationConfig {
    fn validate(&self) -> Result<()> {
        whole("evaluation.episodes", self.episodes, 1, 10_000_000)?;
        whole("evaluation.seed", self.seed, 0, MOST_SEED)?;
        whole("evaluation.every", self.every, 0, u64::from(u32::MAX))?;
        match self.target_return {
            Some(target) => real("evaluation.target_return", target, -1e9, 1e9),
            None => Ok(()),
        }
    }
}

pub(in crate::train) fn join(table: &str, key: &str) -> String {
    if table.is_empty() {
        key.to_owned()
    } else {
        format!("{table}.{key}")
    }
}
