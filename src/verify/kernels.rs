//! The kernels as a backend: the operations of [`crate::ops`] on a device, a GPU or the host executor.

use dtmem_reference::activation::Activation;
use dtmem_reference::attention::{Attention, Mask};
use dtmem_reference::content_memory::{Addressing, ContentMemory, Strength};
use ndarray::{Array, Array1, Array2, Array3, Dimension, IntoDimension, Ix3};

use super::Dtype;
use super::backends::{Backend, BackendName, RunError, Tensors};
use super::file::Case;
use super::operations::{AttentionParams, Operation};
use super::reference::Results;
use crate::backend::gpu::{Compute, Device, Element, Factor, Product};
use crate::ops::{
    Input, Output, activation, attention, content_memory, cross_entropy, layer_norm, lora_linear,
};
use half::{bf16, f16};

/// The kernels on a device. They store f32, bf16 and f16, and add up in f32.
pub(super) struct Kernels<D> {
    /// On the command line.
    pub name: BackendName,
    /// Who runs them.
    pub device: D,
}

impl<D: Device> Backend for Kernels<D> {
    fn name(&self) -> BackendName {
        self.name
    }

    fn stores(&self, dtype: Dtype) -> bool {
        dtype != Dtype::F64
    }

    fn run(&self, case: &Case, dtype: Dtype) -> Result<Tensors, RunError> {
        let on = On {
            device: &self.device,
            case,
        };
        match dtype {
            Dtype::F64 => Err(RunError::missing("kernels for f64")),
            Dtype::F32 => on.run::<f32>(),
            Dtype::Bf16 => on.run::<bf16>(),
            Dtype::F16 => on.run::<f16>(),
        }
    }
}

/// A case on a device. All memory lives as long as the run.
struct On<'a, D> {
    device: &'a D,
    case: &'a Case,
}

impl<D: Device> On<'_, D> {
    fn run<T: Compute>(&self) -> Result<Tensors, RunError> {
        let mut results = Results::default();
        match &self.case.operation {
            Operation::Attention(params) => self.case.with_attention(params, |attention| {
                self.attention::<T>(params, attention, &mut results)
            })?,
            Operation::ContentMemory(memory) => self.content_memory::<T>(memory, &mut results)?,
            Operation::LayerNorm { epsilon } => self.layer_norm::<T>(*epsilon, &mut results)?,
            Operation::Activation(function) => self.activation::<T>(*function, &mut results)?,
            Operation::Linear { scaling } => self.linear::<T>(*scaling, &mut results)?,
            Operation::CrossEntropy => self.cross_entropy::<T>(&mut results)?,
        }
        Ok(results.tensors())
    }

    fn layer_norm<T: Compute>(&self, epsilon: f64, results: &mut Results) -> Result<(), RunError> {
        let x: Array2<f64> = self.case.real("x")?;
        let [weight, bias]: [Array1<f64>; 2] = [self.case.real("weight")?, self.case.real("bias")?];
        let (rows, width) = x.dim();
        let shape = layer_norm::Shape { rows, width };
        let [x_memory, weight_memory, bias_memory] = [
            self.upload::<T>(&x)?,
            self.upload::<T>(&weight)?,
            self.upload::<T>(&bias)?,
        ];
        let mut y = self.device.allocate::<T>(x.len())?;
        let [mut mean, mut rstd] = [self.device.allocate(rows)?, self.device.allocate(rows)?];
        let forward = layer_norm::Forward {
            x: self.input(&x_memory, x.len())?,
            residual: None,
            weight: self.input(&weight_memory, width)?,
            bias: self.input(&bias_memory, width)?,
            y: self.output(&mut y, x.len())?,
            mean: self.output(&mut mean, rows)?,
            rstd: self.output(&mut rstd, rows)?,
            epsilon: epsilon as f32,
        };
        shape.forward(self.device, forward)?;
        results.output("y", self.download(&y, x.dim())?);
        if !self.case.has_gradients() {
            return Ok(());
        }

        let dy = self.upload::<T>(&self.case.grad_output::<f64, _>("y", x.dim())?)?;
        let mut ds = self.device.allocate::<T>(x.len())?;
        let [mut dweight, mut dbias] = [self.zeros(width)?, self.zeros(width)?];
        let mut workspace = self.device.allocate(shape.workspace()?)?;
        let backward = layer_norm::Backward {
            s: self.input(&x_memory, x.len())?,
            weight: self.input(&weight_memory, width)?,
            mean: self.input(&mean, rows)?,
            rstd: self.input(&rstd, rows)?,
            dy: self.input(&dy, x.len())?,
            dsum: None,
            ds: self.output(&mut ds, x.len())?,
            summand: None,
            dweight: self.output(&mut dweight, width)?,
            dbias: self.output(&mut dbias, width)?,
            workspace: self.output(&mut workspace, shape.workspace()?)?,
        };
        shape.backward(self.device, backward)?;
        results.gradient("x", self.download(&ds, x.dim())?);
        results.gradient("weight", self.download(&dweight, width)?);
        results.gradient("bias", self.download(&dbias, width)?);
        Ok(())
    }

    fn activation<T: Compute>(
        &self,
        activation: Activation,
        results: &mut Results,
    ) -> Result<(), RunError> {
        let x: Array2<f64> = self.case.real("x")?;
        let shape = activation::Shape { elements: x.len() };
        let x_memory = self.upload::<T>(&x)?;
        let mut y = self.device.allocate::<T>(x.len())?;
        let forward = activation::Forward {
            activation,
            x: self.input(&x_memory, x.len())?,
            y: self.output(&mut y, x.len())?,
        };
        shape.forward(self.device, forward)?;
        results.output("y", self.download(&y, x.dim())?);
        if !self.case.has_gradients() {
            return Ok(());
        }

        let mut dy = self.upload::<T>(&self.case.grad_output::<f64, _>("y", x.dim())?)?;
        let kept = match activation {
            Activation::Relu | Activation::Tanh => &y,
            Activation::Gelu | Activation::OnePlus => &x_memory,
        };
        let backward = activation::Backward {
            activation,
            kept: self.input(kept, x.len())?,
            dy: self.output(&mut dy, x.len())?,
        };
        shape.backward(self.device, backward)?;
        results.gradient("x", self.download(&dy, x.dim())?);
        Ok(())
    }

    fn cross_entropy<T: Compute>(&self, results: &mut Results) -> Result<(), RunError> {
        let logits: Array2<f64> = self.case.real("logits")?;
        let targets = self.case.integers("targets").unwrap_or_default();
        let (rows, classes) = logits.dim();
        let grad: Array1<f64> = self.case.grad_output("loss", 1)?;
        let mean = 1.0 / rows.max(1) as f64;
        let shape = cross_entropy::Shape { rows, classes };
        shape.validate_targets(targets)?;
        let [logits_memory, mut dlogits] = [
            self.upload::<T>(&logits)?,
            self.device.allocate::<T>(logits.len())?,
        ];
        let targets = self.send(targets)?;
        let scale = self.send(&[(grad.sum() * mean) as f32])?;
        let mut metrics = self.device.allocate(2)?;
        let mut workspace = self.device.allocate(shape.workspace()?)?;
        let tensors = cross_entropy::Tensors {
            logits: self.input(&logits_memory, logits.len())?,
            targets: self.input(&targets, rows)?,
            scale: self.input(&scale, 1)?,
            dlogits: self.output(&mut dlogits, logits.len())?,
            metrics: self.output(&mut metrics, 2)?,
            workspace: self.output(&mut workspace, shape.workspace()?)?,
        };
        shape.loss_and_gradient(self.device, tensors)?;
        let sums: Array1<f64> = self.download::<f32, _>(&metrics, 2)?;
        results.output("loss", Array1::from_elem(1, sums[0] * mean));
        if self.case.has_gradients() {
            results.gradient("logits", self.download(&dlogits, logits.dim())?);
        }
        Ok(())
    }

    fn attention<T: Compute>(
        &self,
        params: &AttentionParams,
        on_host: &Attention<'_>,
        results: &mut Results,
    ) -> Result<(), RunError> {
        let [q, k, v]: [Array3<f64>; 3] = [
            self.case.real("q")?,
            self.case.real("k")?,
            self.case.real("v")?,
        ];
        let ((queries, heads, width), (keys, key_heads, _)) = (q.dim(), k.dim());
        let shape = attention::Shape {
            sequences: on_host.cu_seqlens_q.len().saturating_sub(1),
            queries,
            keys,
            heads,
            key_heads,
            width,
            mask: match on_host.mask {
                Mask::None => attention::Mask::None,
                Mask::Causal => attention::Mask::Causal,
                Mask::SlidingWindow { window } => attention::Mask::SlidingWindow { window },
                Mask::GroupedCausal { .. } => attention::Mask::GroupedCausal,
            },
        };
        shape.validate_pack(on_host)?;
        let (wide, narrow) = (heads * width, key_heads * width);
        let [q_memory, k_memory, v_memory] = [
            self.upload::<T>(&q)?,
            self.upload::<T>(&k)?,
            self.upload::<T>(&v)?,
        ];
        let [cu_seqlens_q, cu_seqlens_k] = [
            self.send(on_host.cu_seqlens_q)?,
            self.send(on_host.cu_seqlens_k)?,
        ];
        let groups = match on_host.mask {
            Mask::GroupedCausal { groups } => Some(self.send(groups)?),
            _ => None,
        };
        let pack = || -> Result<_, RunError> {
            let offsets = shape.sequences + 1;
            Ok(attention::Pack {
                cu_seqlens_q: self.input(&cu_seqlens_q, offsets)?,
                cu_seqlens_k: self.input(&cu_seqlens_k, offsets)?,
                groups: match &groups {
                    Some(groups) => Some(self.input(groups, keys)?),
                    None => None,
                },
            })
        };

        // Without supervised heads these stay empty.
        let supervised = on_host.supervision.is_some();
        let (pair_offsets, pair_keys, annotated) = match on_host.supervision {
            Some(x) => (x.pair_offsets, x.pair_keys, x.annotated),
            None => Default::default(),
        };
        let pairs = pair_keys.len();
        let [pair_offsets, pair_keys] = [self.send(pair_offsets)?, self.send(pair_keys)?];
        let annotated = self.send(annotated)?;
        let slots = self.send(&shape.slots(&params.supervised_heads))?;
        let supervision = || -> Result<_, RunError> {
            Ok(attention::Supervision {
                heads: params.supervised_heads.len(),
                slots: self.input(&slots, heads)?,
                annotated: self.input(&annotated, shape.sequences)?,
                pair_offsets: self.input(&pair_offsets, queries + 1)?,
                pair_keys: self.input(&pair_keys, pairs)?,
            })
        };
        let rows = queries * params.supervised_heads.len();
        let [mut sum, mut loss, mut factor] = [self.zeros(1)?, self.zeros(1)?, self.zeros(1)?];
        let mut peak = self.device.allocate(rows)?;
        let [mut shift, mut at_peak, mut row_loss] = [
            self.device.allocate(rows)?,
            self.device.allocate(rows)?,
            self.device.allocate(rows)?,
        ];
        let mut out = self.device.allocate::<T>(q.len())?;
        let mut lse = self.device.allocate(queries * heads)?;
        let forward = attention::Forward {
            q: self.input(&q_memory, q.len())?.rows(wide),
            k: self.input(&k_memory, k.len())?.rows(narrow),
            v: self.input(&v_memory, v.len())?.rows(narrow),
            pack: pack()?,
            scale: params.scale as f32,
            out: self.output(&mut out, q.len())?.rows(wide),
            lse: self.output(&mut lse, queries * heads)?,
            memory_loss: match supervised {
                false => None,
                true => Some(attention::MemoryLoss {
                    supervision: supervision()?,
                    denominator: params.denominator,
                    sum: self.output(&mut sum, 1)?,
                    loss: self.output(&mut loss, 1)?,
                    factor: self.output(&mut factor, 1)?,
                    peak: self.output(&mut peak, rows)?,
                    shift: self.output(&mut shift, rows)?,
                    at_peak: self.output(&mut at_peak, rows)?,
                    row_loss: self.output(&mut row_loss, rows)?,
                }),
            },
        };
        shape.forward(self.device, forward)?;
        results.output("out", self.download(&out, q.dim())?);
        results.output("lse", self.download(&lse, (queries, heads))?);
        results.output("memory_loss", self.download(&loss, 1)?);
        if !self.case.has_gradients() {
            return Ok(());
        }

        let grad_out = self.upload::<T>(&self.case.grad_output::<f64, _>("out", q.dim())?)?;
        let grad_loss: Array1<f64> = self.case.grad_output("memory_loss", 1)?;
        let grad_loss = self.upload::<f32>(&grad_loss)?;
        let [mut dq, mut dk, mut dv] = [
            self.device.allocate::<T>(q.len())?,
            self.device.allocate::<T>(k.len())?,
            self.device.allocate::<T>(v.len())?,
        ];
        let mut workspace = self.device.allocate(shape.workspace()?)?;
        let backward = attention::Backward {
            q: self.input(&q_memory, q.len())?.rows(wide),
            k: self.input(&k_memory, k.len())?.rows(narrow),
            v: self.input(&v_memory, v.len())?.rows(narrow),
            pack: pack()?,
            scale: params.scale as f32,
            out: self.input(&out, q.len())?.rows(wide),
            lse: self.input(&lse, queries * heads)?,
            grad_out: self.input(&grad_out, q.len())?.rows(wide),
            memory_loss: match supervised {
                false => None,
                true => Some(attention::MemoryLossGradient {
                    supervision: supervision()?,
                    grad_loss: self.input(&grad_loss, 1)?,
                    factor: self.input(&factor, 1)?,
                    peak: self.input(&peak, rows)?,
                    shift: self.input(&shift, rows)?,
                    at_peak: self.input(&at_peak, rows)?,
                }),
            },
            dq: self.output(&mut dq, q.len())?.rows(wide),
            dk: self.output(&mut dk, k.len())?.rows(narrow),
            dv: self.output(&mut dv, v.len())?.rows(narrow),
            workspace: self.output(&mut workspace, shape.workspace()?)?,
        };
        shape.backward(self.device, backward)?;
        results.gradient("q", self.download(&dq, q.dim())?);
        results.gradient("k", self.download(&dk, k.dim())?);
        results.gradient("v", self.download(&dv, v.dim())?);
        Ok(())
    }

    fn content_memory<T: Compute>(
        &self,
        variant: &ContentMemory,
        results: &mut Results,
    ) -> Result<(), RunError> {
        let memory: Array3<f64> = self.case.real("memory")?;
        let [address_key, strength_key, value]: [Array3<f64>; 3] = [
            self.case.real("address_key")?,
            self.case.real("strength_key")?,
            self.case.real("value")?,
        ];
        let key_strength: Option<Array2<f64>> = self.case.optional("key_strength")?;
        let bias: Option<Array1<f64>> = self.case.optional("strength_bias")?;
        let ((sequences, slots, width), (_, longest, _)) = (memory.dim(), value.dim());
        let tokens = sequences * longest;
        let shape = content_memory::Shape {
            sequences,
            tokens,
            longest,
            slots,
            key_width: width,
            width,
            variant: *variant,
        };
        let offsets: Vec<_> = (0..=sequences).map(|b| (b * longest) as i32).collect();
        shape.validate_offsets(&offsets)?;

        let memory_memory = self.upload::<T>(&memory)?;
        let [address_key, strength_key, value_memory] = [
            self.upload::<T>(&address_key)?,
            self.upload::<T>(&strength_key)?,
            self.upload::<T>(&value)?,
        ];
        let key_strength = key_strength.map(|x| self.upload::<T>(&x)).transpose()?;
        let bias = bias.map(|x| self.upload::<f32>(&x)).transpose()?;
        let cu_seqlens = self.send(&offsets)?;
        let inputs = || -> Result<_, RunError> {
            let rows = |memory| Ok::<_, RunError>(self.input(memory, value.len())?.rows(width));
            Ok(content_memory::Inputs {
                memory: self.input(&memory_memory, memory.len())?,
                address_key: rows(&address_key)?,
                strength_key: rows(&strength_key)?,
                value: rows(&value_memory)?,
                key_strength: match &key_strength {
                    Some(x) => Some(self.input(x, tokens)?),
                    None => None,
                },
                strength_bias: match &bias {
                    Some(x) => Some(self.input(x, 1)?),
                    None => None,
                },
                cu_seqlens: self.input(&cu_seqlens, sequences + 1)?,
            })
        };
        let mut next = self.device.allocate::<T>(memory.len())?;
        let mut read = self.device.allocate::<T>(value.len())?;
        let size = shape.forward_workspace::<T>()?;
        let mut workspace = self.device.allocate(size)?;
        let forward = content_memory::Forward {
            inputs: inputs()?,
            memory_next: self.output(&mut next, memory.len())?,
            read: self.output(&mut read, value.len())?,
            workspace: self.output(&mut workspace, size)?,
        };
        shape.forward(self.device, forward)?;
        results.output("memory_next", self.download(&next, memory.dim())?);
        results.output("read", self.download(&read, value.dim())?);
        if !self.case.has_gradients() {
            return Ok(());
        }

        let grad_next: Array<f64, Ix3> = self.case.grad_output("memory_next", memory.dim())?;
        let grad_read: Array<f64, Ix3> = self.case.grad_output("read", value.dim())?;
        let [grad_next, grad_read] = [self.upload::<T>(&grad_next)?, self.upload::<T>(&grad_read)?];
        let mut d_memory = self.device.allocate::<T>(memory.len())?;
        let [mut d_address_key, mut d_strength_key, mut d_value] = [
            self.device.allocate::<T>(value.len())?,
            self.device.allocate::<T>(value.len())?,
            self.device.allocate::<T>(value.len())?,
        ];
        let mut d_key_strength = self.device.allocate::<T>(tokens)?;
        let mut d_bias = self.zeros(1)?;
        let size = shape.backward_workspace()?;
        let mut workspace = self.device.allocate(size)?;
        let backward = content_memory::Backward {
            inputs: inputs()?,
            grad_memory_next: self.input(&grad_next, memory.len())?,
            grad_read: self.input(&grad_read, value.len())?,
            d_memory: self.output(&mut d_memory, memory.len())?,
            d_address_key: self.output(&mut d_address_key, value.len())?.rows(width),
            d_strength_key: self.output(&mut d_strength_key, value.len())?.rows(width),
            d_value: self.output(&mut d_value, value.len())?.rows(width),
            d_key_strength: match variant.addressing {
                Addressing::Cosine => Some(self.output(&mut d_key_strength, tokens)?),
                Addressing::Dot => None,
            },
            d_strength_bias: match variant.strength {
                Strength::Sigmoid => Some(self.output(&mut d_bias, 1)?),
                Strength::Softmax => None,
            },
            workspace: self.output(&mut workspace, size)?,
        };
        shape.backward(self.device, backward)?;
        results.gradient("memory", self.download(&d_memory, memory.dim())?);
        results.gradient("address_key", self.download(&d_address_key, value.dim())?);
        results.gradient("strength_key", self.download(&d_strength_key, value.dim())?);
        results.gradient("value", self.download(&d_value, value.dim())?);
        if variant.addressing == Addressing::Cosine {
            let of_tokens = (sequences, longest);
            results.gradient("key_strength", self.download(&d_key_strength, of_tokens)?);
        }
        if variant.strength == Strength::Sigmoid {
            results.gradient("strength_bias", self.download(&d_bias, 1)?);
        }
        Ok(())
    }

    /// A linear map, with an adapter if it has a scaling. Gradients of weight and bias are products of matrices.
    fn linear<T: Compute>(
        &self,
        scaling: Option<f64>,
        results: &mut Results,
    ) -> Result<(), RunError> {
        let x: Array2<f64> = self.case.real("x")?;
        let weight: Array2<f64> = self.case.real("weight")?;
        let bias: Option<Array1<f64>> = self.case.optional("bias")?;
        let ((rows, inputs), outputs) = (x.dim(), weight.nrows());
        // One adapter or none.
        let (mut adapters, mut factors, mut factor_memories) = (vec![], vec![], vec![]);
        if let Some(scaling) = scaling {
            let [a, b]: [Array2<f64>; 2] = [self.case.real("lora_a")?, self.case.real("lora_b")?];
            adapters.push(lora_linear::Adapter {
                output: 0,
                outputs,
                rank: a.nrows(),
                scaling: scaling as f32,
            });
            factor_memories.push([self.upload::<T>(&a)?, self.upload::<T>(&b)?]);
            factors.push([a, b]);
        }
        let shape = lora_linear::Shape {
            rows,
            inputs,
            outputs,
            transposed: false,
            adapters: &adapters,
            tasks: None,
        };
        let (x_memory, weight_memory) = (self.upload::<T>(&x)?, self.upload::<T>(&weight)?);
        let bias_memory = bias.as_ref().map(|x| self.upload::<T>(x)).transpose()?;
        let factor_inputs = || -> Result<Vec<_>, RunError> {
            let pairs = factor_memories.iter().zip(&factors);
            pairs
                .map(|([a_memory, b_memory], [a, b])| {
                    Ok(lora_linear::Factors {
                        a: self.input(a_memory, a.len())?,
                        b: self.input(b_memory, b.len())?,
                    })
                })
                .collect()
        };
        let kept_len = rows * shape.ranks();
        let mut kept = self.device.allocate::<T>(kept_len)?;
        let mut y = self.device.allocate::<T>(rows * outputs)?;
        let forward = lora_linear::Forward {
            x: self.input(&x_memory, x.len())?.rows(inputs),
            weight: self.input(&weight_memory, weight.len())?,
            bias: match &bias_memory {
                Some(bias) => Some(self.input(bias, outputs)?),
                None => None,
            },
            factors: &factor_inputs()?,
            groups: None,
            dropout: None,
            y: self.output(&mut y, rows * outputs)?.rows(outputs),
            accumulate: false,
            kept: self.output(&mut kept, kept_len)?,
        };
        shape.forward(self.device, forward)?;
        results.output("y", self.download(&y, (rows, outputs))?);
        for (adapter, factors) in adapters.iter().zip(factor_inputs()?) {
            let mut merged = self.device.allocate::<T>(weight.len())?;
            let merge = lora_linear::Merge {
                rows: outputs,
                columns: inputs,
                rank: adapter.rank,
            };
            let merging = lora_linear::Merging {
                weight: self.input(&weight_memory, weight.len())?.rows(inputs),
                a: factors.a,
                b: factors.b,
                scaling: adapter.scaling,
                merged: self.output(&mut merged, weight.len())?.rows(inputs),
            };
            merge.run(self.device, merging)?;
            results.output("merged_weight", self.download(&merged, weight.dim())?);
        }
        if !self.case.has_gradients() {
            return Ok(());
        }

        let dy = self.upload::<T>(&self.case.grad_output::<f64, _>("y", (rows, outputs))?)?;
        let mut dx = self.device.allocate::<T>(x.len())?;
        let mut gradient_memories = vec![];
        for [a, b] in &factors {
            gradient_memories.push([self.zeros(a.len())?, self.zeros(b.len())?]);
        }
        let gradients = gradient_memories
            .iter_mut()
            .zip(&factors)
            .map(|([a_memory, b_memory], [a, b])| {
                Ok(lora_linear::FactorGradients {
                    a: self.output(a_memory, a.len())?,
                    b: self.output(b_memory, b.len())?,
                })
            })
            .collect::<Result<Vec<_>, RunError>>()?;
        let mut kept_gradient = self.device.allocate::<T>(kept_len)?;
        let size = shape.workspace::<T>()?;
        let mut workspace = self.device.allocate(size)?;
        let backward = lora_linear::Backward {
            x: self.input(&x_memory, x.len())?.rows(inputs),
            weight: self.input(&weight_memory, weight.len())?,
            factors: &factor_inputs()?,
            groups: None,
            dropout: None,
            kept: self.input(&kept, kept_len)?,
            dy: self.input(&dy, rows * outputs)?.rows(outputs),
            dx: Some(self.output(&mut dx, x.len())?.rows(inputs)),
            accumulate: false,
            gradients: &gradients,
            kept_gradient: self.output(&mut kept_gradient, kept_len)?,
            workspace: self.output(&mut workspace, size)?,
        };
        shape.backward(self.device, backward)?;
        drop(gradients);
        results.gradient("x", self.download(&dx, x.dim())?);
        for ([a_memory, b_memory], [a, b]) in gradient_memories.iter().zip(&factors) {
            results.gradient("lora_a", self.download(a_memory, a.dim())?);
            results.gradient("lora_b", self.download(b_memory, b.dim())?);
        }

        let ones = self.upload::<T>(&Array1::ones(rows))?;
        for (name, of, columns) in [("weight", &x_memory, inputs), ("bias", &ones, 1)] {
            // dyᵀ·x, and dyᵀ·1.
            let mut gradient = self.device.allocate::<f32>(outputs * columns)?;
            self.device.multiply(Product {
                rows: outputs,
                columns,
                inner: rows,
                a: Factor {
                    elements: self.input(&dy, rows * outputs)?,
                    stride: outputs,
                    transposed: true,
                },
                b: Factor {
                    elements: self.input(of, rows * columns)?,
                    stride: columns,
                    transposed: false,
                },
                bias: None,
                c: self.output(&mut gradient, outputs * columns)?,
                stride: columns,
                accumulate: false,
            })?;
            match name {
                "bias" => results.gradient(name, self.download(&gradient, outputs)?),
                _ => results.gradient(name, self.download(&gradient, weight.dim())?),
            }
        }
        Ok(())
    }

    fn send<T: Element>(&self, content: &[T]) -> Result<D::Memory<T>, RunError> {
        let mut memory = self.device.allocate(content.len())?;
        self.device.upload(content, &mut memory, 0)?;
        Ok(memory)
    }

    /// The numbers of the case are those of `T` already.
    fn upload<T: Compute>(&self, x: &Array<f64, impl Dimension>) -> Result<D::Memory<T>, RunError> {
        self.send(&x.iter().map(|&x| T::narrow(x as f32)).collect::<Vec<_>>())
    }

    fn zeros(&self, len: usize) -> Result<D::Memory<f32>, RunError> {
        self.send(&vec![0.0; len])
    }

    fn download<T: Compute, Sh: IntoDimension>(
        &self,
        memory: &D::Memory<T>,
        shape: Sh,
    ) -> Result<Array<f64, Sh::Dim>, RunError> {
        let mut x = Array::from_elem(shape, T::default());
        if let Some(content) = x.as_slice_mut() {
            self.device.download(memory, 0, content)?;
        }
        Ok(x.mapv(|x| f64::from(x.widen())))
    }

    fn input<'m, T: Element>(
        &'m self,
        memory: &'m D::Memory<T>,
        len: usize,
    ) -> Result<Input<'m, T>, RunError> {
        Ok(self.device.input(memory, 0..len)?)
    }

    fn output<'m, T: Element>(
        &'m self,
        memory: &'m mut D::Memory<T>,
        len: usize,
    ) -> Result<Output<'m, T>, RunError> {
        Ok(self.device.output(memory, 0..len)?)
    }
}
