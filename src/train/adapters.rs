//! Adapters in files, apart from their base: tensors and settings in the form that PEFT reads and
//! writes, and beside them what dtmem needs to know.

use std::path::Path;

use safetensors::tensor::SafeTensors;
use serde::{Deserialize, Serialize};

use super::Error;
use super::checkpoint::{
    self, ModelHeader, VERSION, check_version, floats, parse, to_bytes, write,
};
use super::config::{Config, DataConfig, EvaluationConfig, TaskConfig, validate_adapter};
use super::run::Folder;
use crate::backend::{Backend, Cpu};
use crate::model::{
    AdapterConfig, AdapterTarget, AdapterWeights, Model, ModelConfig, NamedTensor, TRAINED_ADAPTER,
};
use crate::spaces::{Family, Spaces};
use crate::tasks::write_beside;

/// What PEFT puts before the names of the base's modules.
const PREFIX: &str = "base_model.model.";

/// What `adapter_model.safetensors` says about its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterHeader {
    /// Version of the file format.
    pub version: u32,
    /// [`fingerprint`] of the base.
    pub base: String,
    /// Optimiser steps behind the adapter.
    pub step: u64,
    /// The return that the model is asked for in each task of the run, not scaled.
    pub target_returns: Vec<f64>,
    /// Families of these tasks that the base does not have: the adapter brings them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub families: Vec<Family>,
    /// The run.
    pub config: Config,
}

impl AdapterHeader {
    /// The header of an adapter of a base after `step` steps, with the families that it brings.
    pub fn new(
        config: &Config,
        base: &str,
        families: &[Family],
        target_returns: &[f64],
        step: u64,
    ) -> Self {
        Self {
            version: VERSION,
            base: base.to_owned(),
            step,
            target_returns: target_returns.to_vec(),
            families: families.to_vec(),
            config: config.clone(),
        }
    }

    /// What the base is with this adapter in use, of these `spaces`: a model for the adapter's tasks,
    /// which come first, and the base's. Of a task that the base had held out, and the adapter was
    /// trained on, there is only the adapter's.
    pub fn on(&self, base: &ModelHeader, spaces: &Spaces) -> ModelHeader {
        let mut tasks = self.config.task_list();
        let mut targets = self.target_returns.clone();
        let of_base = base.config.task_list().into_iter();
        for (task, &target) in of_base.zip(&base.target_returns) {
            let again = |own: &TaskConfig| own.task.is_some() && own.task == task.task;
            if !task.is_held_out() || !tasks.iter().any(again) {
                tasks.push(task);
                targets.push(target);
            }
        }
        let config = Config {
            finetune: None,
            model: base.config.model.clone(),
            task: None,
            data: DataConfig::default(),
            tasks,
            evaluation: EvaluationConfig {
                target_return: None,
                ..self.config.evaluation.clone()
            },
            ..self.config.clone()
        };
        ModelHeader::new(&config, spaces, &targets, base.step + self.step)
    }
}

/// `adapter_config.json`, as PEFT's `LoraConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    task_type: Option<String>,
    inference_mode: bool,
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    target_modules: Vec<AdapterTarget>,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default = "PeftConfig::no_bias")]
    bias: String,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    /// What the adapter has for itself: the families that it brings.
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
}

impl PeftConfig {
    const TYPE: &'static str = "LORA";

    fn no_bias() -> String {
        "none".to_owned()
    }

    fn new(adapter: &AdapterConfig, base: Option<&Path>, modules: Option<Vec<String>>) -> Self {
        Self {
            peft_type: Self::TYPE.to_owned(),
            base_model_name_or_path: base.map(|path| path.display().to_string()),
            task_type: None,
            inference_mode: true,
            r: adapter.rank,
            lora_alpha: adapter.alpha,
            lora_dropout: adapter.dropout,
            target_modules: adapter.targets.clone(),
            fan_in_fan_out: false,
            bias: Self::no_bias(),
            use_rslora: false,
            use_dora: false,
            modules_to_save: modules,
        }
    }

    /// The adapter, if it is of a kind that there is here, and has these modules for itself.
    fn adapter(
        self,
        path: &Path,
        model: &ModelConfig,
        modules: Option<Vec<String>>,
    ) -> Result<AdapterConfig, Error> {
        for (key, found, expected) in [
            ("peft_type", self.peft_type.as_str(), Self::TYPE),
            ("bias", &self.bias, "none"),
        ] {
            if found != expected {
                return Err(Error::file(path, format!("`{key}`"), found, expected));
            }
        }
        for (key, found) in [
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("use_rslora", self.use_rslora),
            ("use_dora", self.use_dora),
        ] {
            if found {
                return Err(Error::file(path, format!("`{key}`"), found, "false"));
            }
        }
        if self.modules_to_save != modules {
            let [found, expected] = [&self.modules_to_save, &modules].map(|x| format!("{x:?}"));
            return Err(Error::file(path, "`modules_to_save`", found, expected));
        }
        let adapter = AdapterConfig {
            rank: self.r,
            alpha: self.lora_alpha,
            dropout: self.lora_dropout,
            targets: self.target_modules,
        };
        validate_adapter(model, &adapter)?;
        Ok(adapter)
    }
}

/// What PEFT calls modules to save: the families that an adapter brings to a base.
fn modules<B: Backend>(base: &Model<B>, families: &[Family]) -> Option<Vec<String>> {
    let numbers = (base.own_families()..).take(families.len());
    let names: Vec<String> = numbers.map(|number| format!("families.{number}")).collect();
    Some(names).filter(|names| !names.is_empty())
}

/// A number that tells bases apart: FNV-1a, 128 bits, of the names, shapes and values of all
/// parameters but those of adapters.
///
/// # Errors
/// Those of reading the values.
pub fn fingerprint<B: Backend<Element = f32>>(model: &Model<B>) -> Result<String, Error> {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let values = model.values()?;
    let mut hash = OFFSET;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u128::from(*byte)).wrapping_mul(PRIME);
        }
    };
    for parameter in model.own_parameters() {
        add(format!("{} {:?} ", parameter.name, parameter.shape).as_bytes());
        let values = values.get(parameter.span.range()).unwrap_or_default();
        add(&to_bytes(values));
    }
    Ok(format!("{hash:032x}"))
}

/// Writes the adapter that a model has trained.
pub fn save_adapter<B: Backend<Element = f32>>(
    folder: &Folder,
    model: &Model<B>,
    header: &AdapterHeader,
) -> Result<(), Error> {
    let adapter = model.adapter(TRAINED_ADAPTER)?;
    let tensors: Vec<_> = adapter
        .tensors
        .iter()
        .map(|tensor| {
            let name = format!("{PREFIX}{}", tensor.name);
            (name, tensor.shape.clone(), to_bytes(&tensor.values))
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), shape.clone(), bytes.as_slice()));
    let base = header
        .config
        .finetune
        .as_ref()
        .map(|from| from.base.as_path());
    let path = folder.adapter_config();
    let modules = modules(model, &adapter.families);
    let settings = serde_json::to_string_pretty(&PeftConfig::new(&adapter.config, base, modules))
        .map_err(|error| Error::file(&path, "contents", error, "what JSON can hold"))?;
    write_beside(&path, (settings + "\n").as_bytes()).map_err(Error::io("write it", &path))?;
    write(&folder.adapter(), views, header)
}

/// Reads an adapter that [`save_adapter`] wrote for this base; every value is checked.
///
/// # Errors
/// Files that are missing or damaged, an adapter of another kind or for another base.
pub fn load_adapter<B: Backend<Element = f32>>(
    folder: &Folder,
    base: &Model<B>,
) -> Result<(AdapterWeights<f32>, AdapterHeader), Error> {
    let (settings, numbers) = (folder.adapter_config(), folder.adapter());
    adapter_from_bytes(
        (&settings, &checkpoint::read(&settings)?),
        (&numbers, &checkpoint::read(&numbers)?),
        base,
    )
}

/// As [`load_adapter`], from memory: `adapter_config.json` and `adapter_model.safetensors`, each
/// with the path that stands for it in errors.
pub fn adapter_from_bytes<B: Backend<Element = f32>>(
    (settings_path, settings): (&Path, &[u8]),
    (path, numbers): (&Path, &[u8]),
    base: &Model<B>,
) -> Result<(AdapterWeights<f32>, AdapterHeader), Error> {
    let (tensors, header): (SafeTensors, AdapterHeader) = parse(path, numbers)?;
    check_version(path, header.version)?;
    header.config.validate()?;
    let targets = &header.target_returns;
    let tasks = header.config.task_list().len();
    if targets.len() != tasks || !targets.iter().all(|target| target.is_finite()) {
        let expected = format!("{tasks} finite numbers, one for each task");
        return Err(Error::file(
            path,
            "`target_returns`",
            format!("{targets:?}"),
            expected,
        ));
    }
    let found = fingerprint(base)?;
    if found != header.base {
        return Err(Error::file(
            path,
            "the base",
            format!("a base with the fingerprint {found}"),
            format!(
                "the one that this adapter was trained on, {}, with the fingerprint {}",
                header
                    .config
                    .finetune
                    .as_ref()
                    .map_or("unnamed".to_owned(), |from| from.base.display().to_string()),
                header.base
            ),
        ));
    }
    let settings: PeftConfig = serde_json::from_slice(settings).map_err(|error| {
        let expected = "the settings of a LoRA adapter, as `dtmem finetune` writes them";
        Error::file(settings_path, "contents", error, expected)
    })?;
    for family in &header.families {
        family.validate().map_err(|error| {
            let what = format!("`families`: {}{}", error.part, error.place);
            Error::file(path, what, error.found, error.expected)
        })?;
    }
    let families = header.families.clone();
    let config = settings.adapter(settings_path, base.config(), modules(base, &families))?;
    let layout = base.adapter_layout(&config, &families);
    if tensors.len() != layout.len() {
        let expected = format!("{}, which such an adapter has", layout.len());
        return Err(Error::file(
            path,
            "number of tensors",
            tensors.len(),
            expected,
        ));
    }
    let tensors = layout
        .into_iter()
        .map(|(name, shape)| {
            let values = floats(path, &tensors, &format!("{PREFIX}{name}"), &shape)?;
            Ok(NamedTensor {
                name,
                shape,
                values,
            })
        })
        .collect::<Result<_, Error>>()?;
    let weights = AdapterWeights {
        config,
        families,
        tensors,
    };
    Ok((weights, header))
}

/// Reads an adapter of a model and puts it to use, under its folder's name.
///
/// # Errors
/// Those of [`load_adapter`].
pub fn apply_adapter<B: Backend<Element = f32>>(
    folder: &Folder,
    model: &mut Model<B>,
) -> Result<(AdapterWeights<f32>, AdapterHeader), Error> {
    let (weights, header) = load_adapter(folder, model)?;
    let name = folder.path().display().to_string();
    model.add_adapter(&name, &weights)?;
    model.use_adapter(Some(&name))?;
    Ok((weights, header))
}

/// Folds an adapter into its base: a model in a folder of its own, for the tasks of both.
///
/// # Errors
/// Those of reading both; a folder that holds a run, unless it is to be replaced.
pub fn merge_adapter(
    base: &Folder,
    adapter: &Folder,
    out: &Folder,
    overwrite: bool,
) -> Result<(), Error> {
    let (mut model, base) = checkpoint::load_model(&base.model(), Cpu::new())?;
    let (_, header) = apply_adapter(adapter, &mut model)?;
    let model = model.merge()?;
    let header = header.on(&base, model.spaces());
    out.prepare(overwrite)?;
    let file = out.config();
    write_beside(&file, header.config.to_toml()?.as_bytes())
        .map_err(Error::io("write it", &file))?;
    checkpoint::save_model(&out.model(), &model, &header)
}
