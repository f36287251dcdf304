//! Adapters of a model: any number of them beside one base, of which one or none is in use.

use std::collections::HashMap;

use dtmem_reference::Scalar;
use dtmem_reference::lora_linear::{self, merge};
use ndarray::{Array2, ArrayView2};

use super::config::{AdapterConfig, ModelConfig, TrainedPart};
use super::network::{FamilyNetwork, Network};
use super::{Model, ModelError, Parameter, Parameters, validate_adapter};
use crate::backend::{Backend, Kind};
use crate::spaces::Family;

/// Name of the adapter of [`ModelConfig::adapter`], the one that is trained.
pub const TRAINED_ADAPTER: &str = "default";
/// What stands in the names of parameters that an adapter has for itself, as PEFT has it.
pub(super) const MODULES_TO_SAVE: &str = "modules_to_save";

/// What is trained, and which adapters there are.
#[derive(Debug, Clone)]
pub(super) struct Adaptation {
    pub trained: TrainedPart,
    /// Number of families of the model itself.
    pub families: usize,
    /// How many of them are frozen with the rest; those after them are new, and trained.
    known: usize,
    /// The trained adapter first, if there is one.
    pub kept: Vec<KeptAdapter>,
    /// Which of them takes part in the computation.
    pub used: Option<usize>,
    /// Whether the first one is the model's own.
    own: bool,
}

/// An adapter among those of a model.
#[derive(Debug, Clone)]
pub(super) struct KeptAdapter {
    pub name: String,
    pub config: AdapterConfig,
    /// Families that the model itself does not have.
    pub families: Vec<Family>,
}

/// A or B of an adapter.
#[derive(Debug, Clone, Copy)]
pub(super) enum Factor {
    A,
    B,
}

impl Adaptation {
    /// The configured adapter and no other, in use where it is what is trained; for a model of
    /// `known` families and `new` ones, which are the adapter's own then.
    pub fn new(
        trained: TrainedPart,
        adapter: Option<&AdapterConfig>,
        known: usize,
        new: &[Family],
    ) -> Self {
        let of_adapter = trained == TrainedPart::Adapter;
        let own = adapter.map(|config| KeptAdapter {
            name: TRAINED_ADAPTER.to_owned(),
            config: config.clone(),
            families: if of_adapter { new } else { &[] }.to_vec(),
        });
        Self {
            trained,
            families: known + if of_adapter { 0 } else { new.len() },
            known,
            used: (own.is_some() && of_adapter).then_some(0),
            own: own.is_some(),
            kept: own.into_iter().collect(),
        }
    }

    /// Whether the model's own family of this number is trained.
    pub fn trains_family(&self, number: usize) -> bool {
        match self.trained {
            TrainedPart::All => true,
            TrainedPart::Memory => number >= self.known,
            TrainedPart::Adapter | TrainedPart::Nothing => false,
        }
    }

    /// Whether the adapter of this index is trained.
    pub fn trains(&self, index: usize) -> bool {
        self.trained == TrainedPart::Adapter && self.own && index == 0
    }

    /// Dropout on the input of the adapter in use.
    pub fn dropout(&self) -> f64 {
        let used = self.used.and_then(|index| self.kept.get(index));
        used.map_or(0.0, |adapter| adapter.config.dropout)
    }

    /// Training goes through an adapter that is trained, or through none.
    pub fn check_trained(&self) -> Result<(), ModelError> {
        match self.used {
            Some(index) if !self.trains(index) => Err(ModelError::setting(
                "adapter",
                format!("`{}`, which is frozen, in use", self.kept[index].name),
                "none, or the one that is trained: see `Model::use_adapter`",
            )),
            _ => Ok(()),
        }
    }

    fn index(&self, name: &str) -> Result<usize, ModelError> {
        let mut kept = self.kept.iter();
        kept.position(|adapter| adapter.name == name)
            .ok_or_else(|| {
                let names: Vec<&str> = self.kept.iter().map(|kept| kept.name.as_str()).collect();
                let expected = match names.as_slice() {
                    [] => "none: no adapter was added".to_owned(),
                    names => format!("one of {}", names.join(", ")),
                };
                ModelError::setting("adapter", name, expected)
            })
    }
}

impl KeptAdapter {
    /// Name of a factor below its projection: as PEFT has it, with the adapter's name inside.
    pub fn parameter(&self, factor: Factor) -> String {
        format!("lora_{factor:?}.{}.weight", self.name)
    }
}

/// Numbers with a name and a shape.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor<T> {
    /// Its name.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<T>,
}

/// An adapter apart from its base.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterWeights<T> {
    /// Rank, scale and targets.
    pub config: AdapterConfig,
    /// Families of its tasks that the base does not have.
    pub families: Vec<Family>,
    /// As [`Model::adapter_layout`] says.
    pub tensors: Vec<NamedTensor<T>>,
}

/// Modules of an adapter: `blocks.0.memory.value` and so on.
fn modules<'a>(
    config: &'a ModelConfig,
    adapter: &'a AdapterConfig,
) -> impl Iterator<Item = String> + 'a {
    (0..config.layers).flat_map(move |layer| {
        let path =
            move |target: &super::AdapterTarget| format!("blocks.{layer}.memory.{}", target.name());
        adapter.targets.iter().map(path)
    })
}

impl<B: Backend> Model<B> {
    /// The parameters that are no adapter's.
    pub fn own_parameters(&self) -> impl Iterator<Item = &Parameter> {
        let of_adapter = |parameter: &&Parameter| {
            let mut parts = parameter.name.split('.');
            parts.any(|part| ["lora_A", "lora_B", MODULES_TO_SAVE].contains(&part))
        };
        let parameters = self.parameters().iter();
        parameters.filter(move |parameter| !of_adapter(parameter))
    }

    /// Names and shapes of the tensors of such an adapter: A [rank, width] as
    /// `blocks.0.memory.value.lora_A.weight` and B [width, rank] as `….lora_B.weight`, for each target
    /// in each layer; then embeddings and head of each of the families that it brings, as the
    /// model's own families have them, counted on from those: `families.1.head.weight` and so on.
    pub fn adapter_layout(
        &self,
        adapter: &AdapterConfig,
        families: &[Family],
    ) -> Vec<(String, Vec<usize>)> {
        let (rank, width) = (adapter.rank, self.config.width);
        let factors = modules(&self.config, adapter).flat_map(|module| {
            [
                (format!("{module}.lora_A.weight"), vec![rank, width]),
                (format!("{module}.lora_B.weight"), vec![width, rank]),
            ]
        });
        let (of_families, _) = Parameters::plan(|declare| {
            for (family, number) in families.iter().zip(self.adaptation.families..) {
                FamilyNetwork::declare(declare, &self.config, family, number, None);
            }
        });
        let of_families = of_families.list().iter();
        factors
            .chain(of_families.map(|one| (one.name.clone(), one.shape.clone())))
            .collect()
    }

    /// Number of its families that are no adapter's: the first ones of [`Self::spaces`].
    pub fn own_families(&self) -> usize {
        self.adaptation.families
    }

    /// Names of the adapters that it keeps.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        let kept = self.adaptation.kept.iter();
        kept.map(|adapter| adapter.name.as_str())
    }

    /// Keeps another adapter, under a name of its own; [`Self::use_adapter`] puts it to use. The
    /// arena grows: make [`super::Training`] and [`super::Actor`] afterwards.
    ///
    /// # Errors
    /// A name that is taken, settings that do not fit the model, families that it has already,
    /// tensors other than [`Self::adapter_layout`] says.
    pub fn add_adapter(
        &mut self,
        name: &str,
        adapter: &AdapterWeights<B::Element>,
    ) -> Result<(), ModelError> {
        if name.is_empty() || self.adapters().any(|kept| kept == name) {
            let found = format!("`{name}`");
            return Err(ModelError::setting("adapter", found, "a name of its own"));
        }
        validate_adapter(&self.config, &adapter.config)?;
        self.check_new(&adapter.families)?;
        let kept = KeptAdapter {
            name: name.to_owned(),
            config: adapter.config.clone(),
            families: adapter.families.clone(),
        };
        let expected = self.adapter_layout(&adapter.config, &adapter.families);
        let mut values = HashMap::with_capacity(expected.len());
        for (name, shape) in &expected {
            let mut tensors = adapter.tensors.iter();
            let found = tensors.find(|tensor| tensor.name == *name);
            let fits = found.filter(|tensor| {
                tensor.shape == *shape && tensor.values.len() == shape.iter().product::<usize>()
            });
            let Some(tensor) = fits else {
                let found = match found {
                    Some(tensor) => format!("`{name}` {:?}", tensor.shape),
                    None => format!("no `{name}`"),
                };
                let expected = format!("`{name}` {shape:?}");
                return Err(ModelError::setting("adapter.tensors", found, expected));
            };
            values.insert(internal(name, &kept), tensor.values.as_slice());
        }
        if adapter.tensors.len() != expected.len() {
            let found = adapter.tensors.len();
            return Err(ModelError::setting(
                "adapter.tensors",
                found,
                expected.len(),
            ));
        }
        let mut adaptation = self.adaptation.clone();
        adaptation.kept.push(kept);
        self.rearrange(adaptation, &values)
    }

    /// Families for an adapter to bring: valid, and none of the model's own or there twice.
    fn check_new(&self, families: &[Family]) -> Result<(), ModelError> {
        let own = &self.spaces.families[..self.adaptation.families];
        for (index, family) in families.iter().enumerate() {
            family.validate()?;
            if own.contains(family) || families[..index].contains(family) {
                let expected = "one that is not there yet";
                return Err(ModelError::setting("adapter.families", family, expected));
            }
        }
        Ok(())
    }

    /// Computes with the adapter of this name from now on, with its families behind the model's own,
    /// or with the base alone. Nothing is copied. Make [`super::Training`] and [`super::Actor`]
    /// afterwards.
    ///
    /// # Errors
    /// No adapter of this name.
    pub fn use_adapter(&mut self, name: Option<&str>) -> Result<(), ModelError> {
        self.adaptation.used = name.map(|name| self.adaptation.index(name)).transpose()?;
        let used = self
            .adaptation
            .used
            .map(|index| &self.adaptation.kept[index]);
        self.spaces.families.truncate(self.adaptation.families);
        let families = used.into_iter().flat_map(|kept| &kept.families);
        self.spaces.families.extend(families.cloned());
        (_, self.network) = self.plan(&self.adaptation);
        Ok(())
    }

    /// A copy of an adapter.
    ///
    /// # Errors
    /// No adapter of this name.
    pub fn adapter(&self, name: &str) -> Result<AdapterWeights<B::Element>, ModelError> {
        let kept = &self.adaptation.kept[self.adaptation.index(name)?];
        let mut tensors = Vec::new();
        for (name, shape) in self.adapter_layout(&kept.config, &kept.families) {
            let values = self.parameter(&internal(&name, kept))?;
            tensors.push(NamedTensor {
                name,
                shape,
                values,
            });
        }
        Ok(AdapterWeights {
            config: kept.config.clone(),
            families: kept.families.clone(),
            tensors,
        })
    }

    /// The model with the adapter in use folded into its weights, W' = W + s·B·A, with the families
    /// that it brings, and without any adapter. All of its parameters are trained.
    pub fn merge(mut self) -> Result<Self, ModelError> {
        let mut folded = HashMap::new();
        if let Some(index) = self.adaptation.used {
            let kept = &self.adaptation.kept[index];
            let (rank, width) = (kept.config.rank, self.config.width);
            for module in modules(&self.config, &kept.config) {
                let factor = |letter: &str| {
                    self.parameter(&internal(&format!("{module}.lora_{letter}.weight"), kept))
                };
                let weight = format!("{module}.weight");
                let (a, b, w) = (factor("A")?, factor("B")?, self.parameter(&weight)?);
                let adapter = lora_linear::Adapter {
                    a: matrix(&a, rank, width)?,
                    b: matrix(&b, width, rank)?,
                    scaling: B::Element::from_f64(kept.config.scaling()),
                };
                let mut merged = Array2::zeros((width, width));
                merge(matrix(&w, width, width)?, adapter, merged.view_mut())?;
                folded.insert(weight, merged.into_raw_vec_and_offset().0);
            }
            for (name, _) in self.adapter_layout(&kept.config, &kept.families) {
                if !is_factor(&name) {
                    let values = self.parameter(&internal(&name, kept))?;
                    folded.insert(name, values);
                }
            }
        }
        let folded = folded
            .iter()
            .map(|(name, values)| (name.clone(), values.as_slice()))
            .collect();
        self.config.adapter = None;
        let families = self.spaces.families.len();
        self.rearrange(
            Adaptation::new(TrainedPart::All, None, families, &[]),
            &folded,
        )?;
        Ok(self)
    }

    fn plan(&self, adaptation: &Adaptation) -> (Parameters, Network) {
        Parameters::plan(|declare| {
            let supervision = self.supervision.as_ref();
            Network::declare(declare, &self.config, &self.spaces, supervision, adaptation)
        })
    }

    /// Lays the arena out for other adapters. Values come from `fresh` by name, or else stay.
    fn rearrange(
        &mut self,
        adaptation: Adaptation,
        fresh: &HashMap<String, &[B::Element]>,
    ) -> Result<(), ModelError> {
        let before = self.values()?;
        let places: HashMap<&str, _> = self
            .parameters()
            .iter()
            .map(|parameter| (parameter.name.as_str(), parameter.span.range()))
            .collect();
        let (parameters, network) = self.plan(&adaptation);
        let mut values = vec![B::Element::default(); parameters.len()];
        for parameter in parameters.list() {
            let name = parameter.name.as_str();
            let old = || before.get(places.get(name)?.clone());
            let source = fresh.get(name).copied().or_else(old);
            let place = values.get_mut(parameter.span.range());
            if let (Some(place), Some(source)) = (place, source) {
                place.copy_from_slice(source);
            }
        }
        let mut buffer = self.backend.buffer(parameters.len(), Kind::Parameter)?;
        self.backend.upload(&values, &mut buffer, 0)?;
        self.values = buffer;
        self.parameters = parameters;
        self.network = network;
        self.adaptation = adaptation;
        Ok(())
    }

    /// The values of one parameter.
    fn parameter(&self, name: &str) -> Result<Vec<B::Element>, ModelError> {
        let mut parameters = self.parameters().iter();
        let parameter = parameters
            .find(|parameter| parameter.name == name)
            .ok_or_else(|| ModelError::setting("parameter", name, "one that the model has"))?;
        let mut values = vec![B::Element::default(); parameter.span.len];
        self.backend
            .download(&self.values, parameter.span.offset, &mut values)?;
        Ok(values)
    }
}

/// Whether a name of [`Model::adapter_layout`] is that of an A or B.
fn is_factor(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")
}

/// The name inside of a model for a name of [`Model::adapter_layout`].
fn internal(name: &str, adapter: &KeptAdapter) -> String {
    let module = |suffix| name.strip_suffix(suffix);
    match (module("lora_A.weight"), module("lora_B.weight")) {
        (Some(module), _) => format!("{module}{}", adapter.parameter(Factor::A)),
        (_, Some(module)) => format!("{module}{}", adapter.parameter(Factor::B)),
        _ => {
            // `families.N.` and the rest.
            let mut parts = name.splitn(3, '.');
            let mut part = || parts.next().unwrap_or_default();
            let [families, number, rest] = [part(), part(), part()];
            format!(
                "{families}.{number}.{MODULES_TO_SAVE}.{}.{rest}",
                adapter.name
            )
        }
    }
}

fn matrix<T: Scalar>(
    values: &[T],
    rows: usize,
    columns: usize,
) -> Result<ArrayView2<'_, T>, ModelError> {
    ArrayView2::from_shape((rows, columns), values).map_err(|_| ModelError::Values {
        found: values.len(),
        expected: rows * columns,
    })
}
