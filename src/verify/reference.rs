//! The reference as a backend, and what it says about how well a case is conditioned.

use dtmem_reference::activation::{self, Activation};
use dtmem_reference::attention::{Attention, Mask, Supervision};
use dtmem_reference::content_memory::{ContentMemory, Gradients, Inputs};
use dtmem_reference::lora_linear::{self, Adapter, Projection, ProjectionGradients};
use dtmem_reference::{Error, Scalar, cross_entropy, layer_norm};
use ndarray::{Array, Array1, Array2, Array3, Axis, Dimension, Ix3};

use super::Dtype;
use super::backends::{Backend, BackendName, RunError, Tensors};
use super::file::Case;
use super::operations::{AttentionParams, MaskName, Operation};

/// The reference; bf16 and f16 are storage types, computed in f32.
pub(super) struct Reference;

impl Backend for Reference {
    fn name(&self) -> BackendName {
        BackendName::Reference
    }

    /// In f64 it is what the file was compared with.
    fn stores(&self, dtype: Dtype) -> bool {
        dtype != Dtype::F64
    }

    fn run(&self, case: &Case, dtype: Dtype) -> Result<Tensors, RunError> {
        let mut tensors = match dtype {
            Dtype::F64 => case.run::<f64>()?,
            Dtype::F32 | Dtype::Bf16 | Dtype::F16 => case.run::<f32>()?,
        };
        for tensor in tensors.values_mut() {
            tensor.mapv_inplace(|x| dtype.round(x));
        }
        Ok(tensors)
    }
}

/// Collects results under their names in a file.
#[derive(Default)]
pub(super) struct Results(Tensors);

impl Results {
    /// All of them.
    pub fn tensors(self) -> Tensors {
        self.0
    }

    /// One output.
    pub fn output<T: Scalar, D: Dimension>(&mut self, name: &str, x: Array<T, D>) {
        self.0.insert(
            format!("output.{name}"),
            x.mapv(<T as Scalar>::to_f64).into_dyn(),
        );
    }

    /// The gradient of one input.
    pub fn gradient<T: Scalar, D: Dimension>(&mut self, name: &str, x: Array<T, D>) {
        self.0.insert(
            format!("grad_input.{name}"),
            x.mapv(<T as Scalar>::to_f64).into_dyn(),
        );
    }
}

impl Case {
    /// The reference in type `T`: all outputs and, if the case has output gradients, all gradients.
    pub fn run<T: Scalar>(&self) -> Result<Tensors, Error> {
        let mut results = Results::default();
        match &self.operation {
            Operation::Attention(params) => self.attention::<T>(params, &mut results),
            Operation::ContentMemory(memory) => self.content_memory::<T>(memory, &mut results),
            Operation::Linear { scaling } => self.linear::<T>(*scaling, &mut results),
            Operation::LayerNorm { epsilon } => self.layer_norm::<T>(*epsilon, &mut results),
            Operation::Activation(function) => self.activation::<T>(*function, &mut results),
            Operation::CrossEntropy => self.cross_entropy::<T>(&mut results),
        }?;
        Ok(results.tensors())
    }

    /// Calls `run` with the attention that the case describes.
    pub fn with_attention<R, E: From<Error>>(
        &self,
        params: &AttentionParams,
        run: impl FnOnce(&Attention) -> Result<R, E>,
    ) -> Result<R, E> {
        let cu_seqlens_q = self.integers("cu_seqlens").unwrap_or_default();
        let tokens = self.real::<f64, Ix3>("q")?.len_of(Axis(0));
        let no_pairs = vec![0; tokens + 1];
        let annotated: Vec<u8> = match self.integers("annotated") {
            None => vec![1; cu_seqlens_q.len().saturating_sub(1)],
            Some(flags) => flags
                .iter()
                .map(|&flag| {
                    u8::try_from(flag).map_err(|_| Error::value("annotated", flag, "0 or 1"))
                })
                .collect::<Result<_, _>>()?,
        };
        let supervision = Supervision {
            heads: &params.supervised_heads,
            pair_offsets: self.integers("pair_offsets").unwrap_or(&no_pairs),
            pair_keys: self.integers("pair_keys").unwrap_or_default(),
            annotated: &annotated,
            denominator: params.denominator,
        };
        run(&Attention {
            cu_seqlens_q,
            cu_seqlens_k: self.integers("cu_seqlens_k").unwrap_or(cu_seqlens_q),
            scale: params.scale,
            mask: match params.mask {
                MaskName::None => Mask::None,
                MaskName::Causal => Mask::Causal,
                MaskName::SlidingWindow => Mask::SlidingWindow {
                    window: params.window,
                },
                MaskName::GroupedCausal => Mask::GroupedCausal {
                    groups: self.integers("groups").unwrap_or_default(),
                },
            },
            supervision: (!supervision.heads.is_empty()).then_some(supervision),
        })
    }

    fn attention<T: Scalar>(
        &self,
        params: &AttentionParams,
        results: &mut Results,
    ) -> Result<(), Error> {
        let (q, k, v): (Array3<T>, Array3<T>, Array3<T>) =
            (self.real("q")?, self.real("k")?, self.real("v")?);
        let (tokens, heads, _) = q.dim();
        let (mut out, mut lse) = (Array3::zeros(q.dim()), Array2::zeros((tokens, heads)));
        let scratch = &mut Vec::new();
        self.with_attention(params, |attention| {
            let (out, lse_view) = (out.view_mut(), lse.view_mut());
            let loss = attention.forward(q.view(), k.view(), v.view(), out, lse_view, scratch)?;
            results.output("memory_loss", Array1::from_elem(1, loss));
            if !self.has_gradients() {
                return Ok(());
            }
            let grad_out = self.grad_output("out", q.dim())?;
            let grad_loss: Array1<f64> = self.grad_output("memory_loss", 1)?;
            let mut dq = Array3::zeros(q.dim());
            let (mut dk, mut dv) = (Array3::zeros(k.dim()), Array3::zeros(k.dim()));
            attention.backward(
                q.view(),
                k.view(),
                v.view(),
                lse.view(),
                grad_out.view(),
                grad_loss.sum(),
                dq.view_mut(),
                dk.view_mut(),
                dv.view_mut(),
                scratch,
            )?;
            results.gradient("q", dq);
            results.gradient("k", dk);
            results.gradient("v", dv);
            Ok(())
        })?;
        results.output("out", out);
        results.output("lse", lse);
        Ok(())
    }

    /// Calls `run` with the inputs of each sequence.
    fn each_sequence<T: Scalar>(
        &self,
        mut run: impl FnMut(usize, Inputs<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let memory: Array3<T> = self.real("memory")?;
        let [address_key, strength_key, value]: [Array3<T>; 3] = [
            self.real("address_key")?,
            self.real("strength_key")?,
            self.real("value")?,
        ];
        let key_strength: Option<Array2<T>> = self.optional("key_strength")?;
        let bias: Option<Array1<T>> = self.optional("strength_bias")?;
        for (b, memory) in memory.outer_iter().enumerate() {
            let inputs = Inputs {
                memory,
                address_key: address_key.index_axis(Axis(0), b),
                strength_key: strength_key.index_axis(Axis(0), b),
                value: value.index_axis(Axis(0), b),
                key_strength: key_strength.as_ref().map(|x| x.index_axis(Axis(0), b)),
                strength_bias: bias.as_ref().map_or(T::zero(), |bias| bias.sum()),
            };
            run(b, inputs)?;
        }
        Ok(())
    }

    fn content_memory<T: Scalar>(
        &self,
        memory: &ContentMemory,
        results: &mut Results,
    ) -> Result<(), Error> {
        let slots = self.real::<T, Ix3>("memory")?.raw_dim();
        let tokens = self.real::<T, Ix3>("value")?.raw_dim();
        let scratch = &mut Vec::new();
        let (mut next, mut read) = (Array3::zeros(slots), Array3::zeros(tokens));
        self.each_sequence(|b, inputs: Inputs<T>| {
            let next = next.index_axis_mut(Axis(0), b);
            memory.forward(inputs, next, read.index_axis_mut(Axis(0), b), scratch)
        })?;
        results.output("memory_next", next);
        results.output("read", read);
        if !self.has_gradients() {
            return Ok(());
        }

        let grad_next: Array3<T> = self.grad_output("memory_next", slots)?;
        let grad_read: Array3<T> = self.grad_output("read", tokens)?;
        let mut dmemory = Array3::zeros(slots);
        let mut dkeys = [0; 3].map(|_| Array3::<T>::zeros(tokens));
        let mut dkey_strength = Array2::zeros((tokens[0], tokens[1]));
        let mut dbias = T::zero();
        self.each_sequence(|b, inputs: Inputs<T>| {
            let [address_key, strength_key, value] =
                dkeys.each_mut().map(|x| x.index_axis_mut(Axis(0), b));
            let key_strength = inputs.key_strength.is_some();
            let mut dbias_here = T::zero();
            let gradients = Gradients {
                memory: dmemory.index_axis_mut(Axis(0), b),
                address_key,
                strength_key,
                value,
                key_strength: key_strength.then(|| dkey_strength.index_axis_mut(Axis(0), b)),
                strength_bias: &mut dbias_here,
            };
            let grad_next = grad_next.index_axis(Axis(0), b);
            let grad_read = grad_read.index_axis(Axis(0), b);
            memory.backward(inputs, grad_next, grad_read, gradients, scratch)?;
            dbias += dbias_here;
            Ok(())
        })?;
        results.gradient("memory", dmemory);
        for (name, x) in ["address_key", "strength_key", "value"]
            .into_iter()
            .zip(dkeys)
        {
            results.gradient(name, x);
        }
        results.gradient("key_strength", dkey_strength);
        results.gradient("strength_bias", Array1::from_elem(1, dbias));
        Ok(())
    }

    fn linear<T: Scalar>(&self, scaling: Option<f64>, results: &mut Results) -> Result<(), Error> {
        let (x, weight): (Array2<T>, Array2<T>) = (self.real("x")?, self.real("weight")?);
        let bias: Option<Array1<T>> = self.optional("bias")?;
        let lora: Option<(Array2<T>, Array2<T>, T)> = match scaling {
            Some(s) => Some((self.real("lora_a")?, self.real("lora_b")?, T::from_f64(s))),
            None => None,
        };
        let adapter = lora.as_ref().map(|(a, b, scaling)| Adapter {
            a: a.view(),
            b: b.view(),
            scaling: *scaling,
        });
        let projection = [Projection {
            weight: weight.view(),
            bias: bias.as_ref().map(|bias| bias.view()),
            adapter,
        }];

        let mut y = Array2::zeros((x.nrows(), weight.nrows()));
        let mut xa = Array2::zeros((x.nrows(), adapter.map_or(0, |adapter| adapter.a.nrows())));
        let (y_view, xa_view) = (y.view_mut(), xa.view_mut());
        lora_linear::forward(x.view(), &projection, &mut [xa_view], &mut [y_view])?;
        if let Some(adapter) = adapter {
            let mut merged = Array2::zeros(weight.dim());
            lora_linear::merge(weight.view(), adapter, merged.view_mut())?;
            results.output("merged_weight", merged);
        }
        if self.has_gradients() {
            let dy = self.grad_output("y", y.dim())?;
            let (mut dx, mut dweight) = (Array2::zeros(x.dim()), Array2::zeros(weight.dim()));
            let mut dbias = Array1::zeros(weight.nrows());
            let shapes = adapter.map(|adapter| (adapter.a.dim(), adapter.b.dim()));
            let mut dlora = shapes.map(|(a, b)| (Array2::zeros(a), Array2::zeros(b)));
            let gradients = ProjectionGradients {
                weight: Some(dweight.view_mut()),
                bias: bias.is_some().then(|| dbias.view_mut()),
                adapter: dlora
                    .as_mut()
                    .map(|(da, db)| (da.view_mut(), db.view_mut())),
            };
            lora_linear::backward(
                x.view(),
                &projection,
                &[xa.view()],
                &[dy.view()],
                &mut [Array2::zeros(xa.dim()).view_mut()],
                dx.view_mut(),
                &mut [gradients],
            )?;
            results.gradient("x", dx);
            results.gradient("weight", dweight);
            results.gradient("bias", dbias);
            if let Some((da, db)) = dlora {
                results.gradient("lora_a", da);
                results.gradient("lora_b", db);
            }
        }
        results.output("y", y);
        Ok(())
    }

    fn layer_norm<T: Scalar>(&self, epsilon: f64, results: &mut Results) -> Result<(), Error> {
        let x: Array2<T> = self.real("x")?;
        let (weight, bias): (Array1<T>, Array1<T>) = (self.real("weight")?, self.real("bias")?);
        let mut y = Array2::zeros(x.dim());
        let (mut mean, mut rstd) = (Array1::zeros(x.nrows()), Array1::zeros(x.nrows()));
        layer_norm::forward(
            x.view(),
            weight.view(),
            bias.view(),
            epsilon,
            y.view_mut(),
            mean.view_mut(),
            rstd.view_mut(),
        )?;
        results.output("y", y);
        if !self.has_gradients() {
            return Ok(());
        }

        let dy: Array2<T> = self.grad_output("y", x.dim())?;
        let mut dx = Array2::zeros(x.dim());
        let (mut dweight, mut dbias) = (Array1::zeros(weight.dim()), Array1::zeros(weight.dim()));
        layer_norm::backward(
            x.view(),
            weight.view(),
            mean.view(),
            rstd.view(),
            dy.view(),
            dx.view_mut(),
            dweight.view_mut(),
            dbias.view_mut(),
        )?;
        results.gradient("x", dx);
        results.gradient("weight", dweight);
        results.gradient("bias", dbias);
        Ok(())
    }

    fn activation<T: Scalar>(
        &self,
        function: Activation,
        results: &mut Results,
    ) -> Result<(), Error> {
        let x: Array2<T> = self.real("x")?;
        let mut y = Array2::zeros(x.dim());
        activation::forward(function, x.view(), y.view_mut())?;
        if self.has_gradients() {
            let mut dx = self.grad_output("y", x.dim())?;
            activation::backward_in_place(function, x.view(), y.view(), dx.view_mut())?;
            results.gradient("x", dx);
        }
        results.output("y", y);
        Ok(())
    }

    fn cross_entropy<T: Scalar>(&self, results: &mut Results) -> Result<(), Error> {
        let logits: Array2<T> = self.real("logits")?;
        let targets = self.integers("targets").unwrap_or_default();
        let rows = logits.nrows().max(1) as f64;
        let grad: Array1<f64> = self.grad_output("loss", 1)?;
        let mut dlogits = Array2::zeros(logits.dim());
        let scale = T::from_f64(grad.sum() / rows);
        let sums =
            cross_entropy::forward_backward(logits.view(), targets, scale, dlogits.view_mut())?;
        results.output("loss", Array1::from_elem(1, sums.loss / rows));
        if self.has_gradients() {
            results.gradient("logits", dlogits);
        }
        Ok(())
    }

    /// Whether a gradient goes through a saturated row: a supervised and annotated query that sees
    /// several keys and gives all but a thousandth to one of them. There the attention-BCE divides
    /// by 1 − A, of which f32 keeps few digits.
    pub fn saturated(&self) -> Result<bool, Error> {
        let Operation::Attention(params) = &self.operation else {
            return Ok(false);
        };
        let (q, k): (Array3<f64>, Array3<f64>) = (self.real("q")?, self.real("k")?);
        let (tokens, heads, _) = q.dim();
        self.with_attention(params, |attention| {
            let Some(supervision) = attention.supervision else {
                return Ok(false);
            };
            // log Σ_j exp(factor·S_ij): with factor 0 it counts the visible keys, and with factor 2
            // less twice that of factor 1 it is log Σ_j A_ij².
            let log_sum = |factor: f64| -> Result<Array2<f64>, Error> {
                let (mut out, mut lse) = (Array3::zeros(q.dim()), Array2::zeros((tokens, heads)));
                let scaled = Attention {
                    scale: factor * attention.scale,
                    ..*attention
                };
                let (out, lse_view) = (out.view_mut(), lse.view_mut());
                scaled.forward(q.view(), k.view(), k.view(), out, lse_view, &mut Vec::new())?;
                Ok(lse)
            };
            let (keys, once, twice) = (log_sum(0.0)?, log_sum(1.0)?, log_sum(2.0)?);
            let saturated = |row: [usize; 2]| {
                keys[row] > 0.5 && twice[row] - 2.0 * once[row] > (1.0_f64 - 2e-3).ln()
            };
            let sequences = attention.cu_seqlens_q.windows(2).zip(supervision.annotated);
            Ok(sequences
                .filter(|(_, annotated)| **annotated != 0)
                .any(|(ends, _)| {
                    (ends[0]..ends[1]).any(|i| {
                        let row = |&head: &usize| [i as usize, head];
                        supervision.heads.iter().map(row).any(saturated)
                    })
                }))
        })
    }

    /// The smallest gap between the last score that `top_k` keeps and the first that it drops, over
    /// all tokens. When it is as small as the rounding of the scores, a narrower type may rightly
    /// keep another slot, and every number after that is another.
    pub fn top_k_gap(&self) -> Result<Option<f64>, Error> {
        let Operation::ContentMemory(memory) = &self.operation else {
            return Ok(None);
        };
        let Some(kept) = memory.top_k else {
            return Ok(None);
        };
        let all = ContentMemory {
            top_k: None,
            ..*memory
        };
        let mut smallest = None;
        self.each_sequence(|_, inputs: Inputs<f64>| {
            let shape = (inputs.value.nrows(), inputs.memory.nrows());
            let (mut w, mut beta) = (Array2::zeros(shape), Array2::zeros(shape));
            all.address(inputs, w.view_mut(), beta.view_mut())?;
            for row in w.rows() {
                let mut w = row.to_vec();
                w.sort_by(|a, b| b.total_cmp(a));
                if let (Some(last), Some(first)) = (w.get(kept.wrapping_sub(1)), w.get(kept)) {
                    let gap = last.ln() - first.ln();
                    smallest = Some(smallest.map_or(gap, |s: f64| s.min(gap)));
                }
            }
            Ok(())
        })?;
        Ok(smallest)
    }
}
