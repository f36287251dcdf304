//! Adapters of a model: any number of them beside one base, of which one or none is in use.

use std::collections::HashMap;

use dtmem_reference::Scalar;
use dtmem_reference::lora_linear::{self, merge};
use ndarray::{Array2, ArrayView2};

use super::config::{AdapterConfig, ModelConfig, TrainedPart};
use super::network::Network;
use super::{Model, ModelError, Parameter, Parameters, validate_adapter};
use crate::backend::{Backend, Kind};

/// Name of the adapter of [`ModelConfig::adapter`], the one that is trained.
pub const TRAINED_ADAPTER: &str = "default";

/// What is trained, and which adapters there are.
#[derive(Debug, Clone)]
pub(super) struct Adaptation {
    pub trained: TrainedPart,
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
}

/// A or B of an adapter.
#[derive(Debug, Clone, Copy)]
pub(super) enum Factor {
    A,
    B,
}

impl Adaptation {
    /// The configured adapter and no other; in use where it is what is trained.
    pub fn new(trained: TrainedPart, adapter: Option<&AdapterConfig>) -> Self {
        let own = adapter.map(|config| KeptAdapter {
            name: TRAINED_ADAPTER.to_owned(),
            config: config.clone(),
        });
        Self {
            trained,
            used: (own.is_some() && trained == TrainedPart::Adapter).then_some(0),
            own: own.is_some(),
            kept: own.into_iter().collect(),
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
    /// A [rank, width] as `blocks.0.memory.value.lora_A.weight` and B [width, rank] as
    /// `….lora_B.weight`, for each target in each layer.
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

impl<T> AdapterWeights<T> {
    /// Names and shapes of the tensors that such an adapter of such a model has.
    pub fn layout(model: &ModelConfig, adapter: &AdapterConfig) -> Vec<(String, [usize; 2])> {
        let (rank, width) = (adapter.rank, model.width);
        modules(model, adapter)
            .flat_map(|module| {
                [
                    (format!("{module}.lora_A.weight"), [rank, width]),
                    (format!("{module}.lora_B.weight"), [width, rank]),
                ]
            })
            .collect()
    }
}

impl<B: Backend> Model<B> {
    /// The parameters that are no adapter's.
    pub fn own_parameters(&self) -> impl Iterator<Item = &Parameter> {
        let of_adapter = |parameter: &&Parameter| {
            parameter.name.contains(".lora_A.") || parameter.name.contains(".lora_B.")
        };
        let parameters = self.parameters().iter();
        parameters.filter(move |parameter| !of_adapter(parameter))
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
    /// A name that is taken, settings that do not fit the model, tensors other than
    /// [`AdapterWeights::layout`] says.
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
        let kept = KeptAdapter {
            name: name.to_owned(),
            config: adapter.config.clone(),
        };
        let expected = AdapterWeights::<B::Element>::layout(&self.config, &adapter.config);
        let mut values = HashMap::with_capacity(expected.len());
        for (name, shape) in &expected {
            let mut tensors = adapter.tensors.iter();
            let found = tensors.find(|tensor| tensor.name == *name);
            let fits = found.filter(|tensor| {
                tensor.shape == shape && tensor.values.len() == shape[0] * shape[1]
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

    /// Computes with the adapter of this name from now on, or with the base alone. Nothing is
    /// copied. Make [`super::Training`] and [`super::Actor`] afterwards.
    ///
    /// # Errors
    /// No adapter of this name.
    pub fn use_adapter(&mut self, name: Option<&str>) -> Result<(), ModelError> {
        self.adaptation.used = name.map(|name| self.adaptation.index(name)).transpose()?;
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
        for (name, shape) in AdapterWeights::<B::Element>::layout(&self.config, &kept.config) {
            let values = self.parameter(&internal(&name, kept))?;
            let shape = shape.to_vec();
            tensors.push(NamedTensor {
                name,
                shape,
                values,
            });
        }
        Ok(AdapterWeights {
            config: kept.config.clone(),
            tensors,
        })
    }

    /// The model with the adapter in use folded into its weights, W' = W + s·B·A, and without any
    /// adapter. All of its parameters are trained.
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
        }
        let folded = folded
            .iter()
            .map(|(name, values)| (name.clone(), values.as_slice()))
            .collect();
        self.config.adapter = None;
        self.rearrange(Adaptation::new(TrainedPart::All, None), &folded)?;
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

/// The name inside of a model for a name of [`AdapterWeights::layout`].
fn internal(name: &str, adapter: &KeptAdapter) -> String {
    let module = |suffix| name.strip_suffix(suffix);
    match (module("lora_A.weight"), module("lora_B.weight")) {
        (Some(module), _) => format!("{module}{}", adapter.parameter(Factor::A)),
        (_, Some(module)) => format!("{module}{}", adapter.parameter(Factor::B)),
        _ => name.to_owned(),
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
