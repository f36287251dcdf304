//! Reads fixture files and checks them against what their operation takes.

use std::collections::BTreeMap;
use std::path::Path;

use dtmem_reference::{Error, Scalar};
use half::{bf16, f16};
use ndarray::{Array, ArrayD, Dimension, IntoDimension, IxDyn};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as Stored, TensorView};

use super::operations::{Kind, Operation};
use super::params::Params;
use super::{Dtype, VerifyError};

/// The most numbers that a tensor or an intermediate result may have: a few bytes of header must
/// not ask for all memory.
const LARGEST: usize = 1 << 26;

/// What is wrong with a part of a file.
#[derive(Debug)]
pub(super) struct Problem {
    what: String,
    found: String,
    expected: String,
}

impl Problem {
    pub fn new(what: impl ToString, found: impl ToString, expected: impl ToString) -> Self {
        Self {
            what: what.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    pub fn in_file(self, file: &Path) -> VerifyError {
        VerifyError::Content {
            file: file.to_owned(),
            what: self.what,
            found: self.found,
            expected: self.expected,
        }
    }
}

/// What an operation refuses is a tensor or parameter of the file.
impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let place = |argument| match argument {
            "cu_seqlens_q" => "`cu_seqlens`".to_owned(),
            "supervision.heads" => "`supervised_heads`".to_owned(),
            other => format!("`{other}`"),
        };
        match error {
            Error::Shape {
                argument,
                found,
                expected,
            } => Self::new(
                place(argument),
                format!("of shape {found:?}"),
                format!("{expected:?}"),
            ),
            Error::Value {
                argument,
                found,
                expected,
            } => Self::new(place(argument), found, expected),
        }
    }
}

/// An operation and what it is given.
#[derive(Debug, Clone)]
pub(super) struct Case {
    /// The operation and its parameters.
    pub operation: Operation,
    reals: BTreeMap<&'static str, ArrayD<f64>>,
    integers: BTreeMap<&'static str, Vec<i32>>,
    grad_outputs: BTreeMap<&'static str, ArrayD<f64>>,
}

impl Case {
    /// A real input, if the file has it. `D` is the rank that the signature of the operation says.
    pub fn optional<T: Scalar, D: Dimension>(
        &self,
        name: &'static str,
    ) -> Result<Option<Array<T, D>>, Error> {
        self.reals.get(name).map(|x| narrow(name, x)).transpose()
    }

    /// A real input that the signature of the operation asks for.
    pub fn real<T: Scalar, D: Dimension>(&self, name: &'static str) -> Result<Array<T, D>, Error> {
        let missing = || Error::value(name, "missing", "a tensor");
        self.optional(name)?.ok_or_else(missing)
    }

    /// An integer input, flat, if the file has it.
    pub fn integers(&self, name: &str) -> Option<&[i32]> {
        self.integers.get(name).map(Vec::as_slice)
    }

    /// Whether any gradient is defined.
    pub fn has_gradients(&self) -> bool {
        !self.grad_outputs.is_empty()
    }

    /// The gradient of an output; one that the file does not have is zero.
    pub fn grad_output<T: Scalar, Sh: IntoDimension>(
        &self,
        name: &'static str,
        shape: Sh,
    ) -> Result<Array<T, Sh::Dim>, Error> {
        match self.grad_outputs.get(name) {
            Some(x) => narrow(name, x),
            None => Ok(Array::zeros(shape.into_dimension())),
        }
    }

    /// The same case with inputs and output gradients rounded to a type.
    pub fn rounded(&self, dtype: Dtype) -> Self {
        let mut case = self.clone();
        for x in case
            .reals
            .values_mut()
            .chain(case.grad_outputs.values_mut())
        {
            x.mapv_inplace(|x| dtype.round(x));
        }
        case
    }

    /// Each tensor that does not fit its type, and how many of its entries do not.
    pub fn overflows(&self) -> Vec<(String, String)> {
        let inputs = self
            .reals
            .iter()
            .map(|(name, x)| (format!("input.{name}"), x));
        let gradients = self.grad_outputs.iter();
        let gradients = gradients.map(|(name, x)| (format!("grad_output.{name}"), x));
        inputs
            .chain(gradients)
            .map(|(name, x)| (name, x.iter().filter(|x| x.is_infinite()).count(), x.len()))
            .filter(|(_, overflowed, _)| *overflowed > 0)
            .map(|(name, overflowed, all)| (name, format!("{overflowed} of {all} overflowed")))
            .collect()
    }
}

fn narrow<T: Scalar, D: Dimension>(
    name: &'static str,
    x: &ArrayD<f64>,
) -> Result<Array<T, D>, Error> {
    let of_rank = x.mapv(T::from_f64).into_dimensionality();
    of_rank.map_err(|_| Error::value(name, format!("of rank {}", x.ndim()), "another rank"))
}

/// An output or gradient that the file holds.
#[derive(Debug)]
pub(super) struct Recorded {
    /// `output.NAME` or `grad_input.NAME`.
    pub name: String,
    /// The type that it is stored in.
    pub dtype: Dtype,
    /// Its numbers.
    pub values: ArrayD<f64>,
}

/// One file.
#[derive(Debug)]
pub(super) struct Fixture {
    /// What was computed.
    pub case: Case,
    /// What came out, by the account of the file.
    pub recorded: Vec<Recorded>,
}

impl Fixture {
    /// Reads a file and checks it against what its operation takes.
    pub fn open(path: &Path) -> Result<Self, VerifyError> {
        let bytes = std::fs::read(path).map_err(|source| VerifyError::Read {
            file: path.to_owned(),
            source,
        })?;
        let format = |source| VerifyError::Format {
            file: path.to_owned(),
            source,
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let file = SafeTensors::deserialize(&bytes).map_err(format)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let word = |key: &str| metadata.get(key).map(String::as_str);
        Self::read(&file, word("op"), word("params")).map_err(|problem| problem.in_file(path))
    }

    fn read(
        file: &SafeTensors,
        operation: Option<&str>,
        params: Option<&str>,
    ) -> Result<Self, Problem> {
        let mut params = Params::read(params.unwrap_or("{}"))?;
        let operation = Operation::read(operation, &mut params)?;
        params.finish()?;
        let signature = operation.signature();
        let mut tensors: BTreeMap<String, TensorView> = file.tensors().into_iter().collect();
        let mut known = Vec::new();
        let mut sizes = Sizes::default();
        let mut take = |name: String, shape: &'static str, sizes: &mut Sizes| {
            let found = tensors.remove(&name);
            known.push(name.clone());
            if let Some(tensor) = &found {
                sizes.check(&name, tensor.shape(), shape)?;
            }
            Ok::<_, Problem>(found.map(|tensor| (name, tensor)))
        };

        let mut case = Case {
            operation,
            reals: BTreeMap::new(),
            integers: BTreeMap::new(),
            grad_outputs: BTreeMap::new(),
        };
        for input in &signature.inputs {
            let name = format!("input.{}", input.name);
            let Some((name, tensor)) = take(name.clone(), input.shape, &mut sizes)? else {
                if input.needed {
                    let expected = sizes.describe(input.shape);
                    return Err(Problem::new(quoted(&name), "missing", expected));
                }
                continue;
            };
            match input.kind {
                Kind::Real => {
                    let (_, values) = reals(&name, &tensor)?;
                    case.reals.insert(input.name, finite(&name, values)?);
                }
                Kind::Integer => {
                    case.integers.insert(input.name, integers(&name, &tensor)?);
                }
            }
        }
        for shape in signature.outputs.iter().map(|output| output.shape) {
            sizes.bound(shape)?;
        }
        sizes.bound(signature.scratch)?;

        let mut recorded = Vec::new();
        let mut record = |(name, tensor): (String, TensorView)| {
            let (dtype, values) = reals(&name, &tensor)?;
            recorded.push(Recorded {
                name,
                dtype,
                values,
            });
            Ok::<_, Problem>(())
        };
        for output in &signature.outputs {
            if let Some(found) = take(format!("output.{}", output.name), output.shape, &mut sizes)?
            {
                record(found)?;
            }
        }
        for output in signature
            .outputs
            .iter()
            .filter(|output| output.differentiable)
        {
            let name = format!("grad_output.{}", output.name);
            if let Some((name, tensor)) = take(name, output.shape, &mut sizes)? {
                let (_, values) = reals(&name, &tensor)?;
                case.grad_outputs
                    .insert(output.name, finite(&name, values)?);
            }
        }
        for input in signature
            .inputs
            .iter()
            .filter(|input| input.kind == Kind::Real)
        {
            let name = format!("grad_input.{}", input.name);
            let Some((name, tensor)) = take(name, input.shape, &mut sizes)? else {
                continue;
            };
            if !case.has_gradients() {
                let expected = "a grad_output tensor beside it";
                return Err(Problem::new(quoted(&name), "alone", expected));
            }
            if !case.reals.contains_key(input.name) {
                let expected = format!("`input.{}` beside it", input.name);
                return Err(Problem::new(quoted(&name), "alone", expected));
            }
            record((name, tensor))?;
        }

        if let Some(name) = tensors.keys().next() {
            let expected = format!("one of {}", known.join(", "));
            return Err(Problem::new(quoted(name), "unknown", expected));
        }
        if recorded.is_empty() {
            let expected = "at least one tensor `output.…` or `grad_input.…`";
            return Err(Problem::new("the file", "without results", expected));
        }
        Ok(Self { case, recorded })
    }
}

fn quoted(name: &str) -> String {
    format!("`{name}`")
}

/// The sizes behind the names in the shapes of a signature, each set by the first tensor that has
/// it. A shape is words: a name, a name and `+1`, or a number.
#[derive(Default)]
struct Sizes(BTreeMap<&'static str, usize>);

impl Sizes {
    fn check(&mut self, tensor: &str, found: &[usize], shape: &'static str) -> Result<(), Problem> {
        let wrong = |sizes: &Self| {
            let found = format!("of shape {found:?}");
            Err(Problem::new(quoted(tensor), found, sizes.describe(shape)))
        };
        if shape.split(' ').count() != found.len() {
            return wrong(self);
        }
        let volume = volume(found.iter().copied());
        if volume.is_none_or(|volume| volume > LARGEST) {
            let found = format!("of shape {found:?}");
            let expected = format!("at most {LARGEST} numbers");
            return Err(Problem::new(quoted(tensor), found, expected));
        }
        for (word, &size) in shape.split(' ').zip(found) {
            let (name, more) = parts(word);
            let Some(rest) = size.checked_sub(more) else {
                return wrong(self);
            };
            let expected = match name.parse() {
                Ok(number) => number,
                Err(_) => *self.0.entry(name).or_insert(rest),
            };
            if rest != expected {
                return wrong(self);
            }
        }
        Ok(())
    }

    /// A size, if it is a number or already known.
    fn get(&self, word: &str) -> Option<usize> {
        let (name, more) = parts(word);
        let known = name.parse().ok().or_else(|| self.0.get(name).copied());
        known.map(|size: usize| size.saturating_add(more))
    }

    /// Refuses what would take too much memory.
    fn bound(&self, shape: &'static str) -> Result<(), Problem> {
        let volume = volume(shape.split(' ').map(|word| self.get(word).unwrap_or(1)));
        if volume.is_none_or(|volume| volume > LARGEST) {
            let expected = format!("at most {LARGEST} numbers");
            return Err(Problem::new(
                "an intermediate result",
                self.describe(shape),
                expected,
            ));
        }
        Ok(())
    }

    fn describe(&self, shape: &'static str) -> String {
        let word = |word: &str| match self.get(word) {
            Some(size) if word.parse::<usize>().is_err() => format!("{word} = {size}"),
            _ => word.to_owned(),
        };
        format!(
            "[{}]",
            shape.split(' ').map(word).collect::<Vec<_>>().join(", ")
        )
    }
}

/// The name or number of a word, and what is added to it.
fn parts(word: &str) -> (&str, usize) {
    match word.strip_suffix("+1") {
        Some(name) => (name, 1),
        None => (word, 0),
    }
}

/// The number of entries, with an empty axis counted as one: an empty tensor must not hide a size.
fn volume(mut shape: impl Iterator<Item = usize>) -> Option<usize> {
    shape.try_fold(1_usize, |volume, size| volume.checked_mul(size.max(1)))
}

/// A tensor of floats, widened, and the type that it is stored in.
fn reals(name: &str, tensor: &TensorView) -> Result<(Dtype, ArrayD<f64>), Problem> {
    let data = tensor.data();
    let (dtype, values) = match tensor.dtype() {
        Stored::F64 => (Dtype::F64, entries(data, f64::from_le_bytes)),
        Stored::F32 => (Dtype::F32, entries(data, |x| f32::from_le_bytes(x).into())),
        Stored::F16 => (Dtype::F16, entries(data, |x| f16::from_le_bytes(x).into())),
        Stored::BF16 => (
            Dtype::Bf16,
            entries(data, |x| bf16::from_le_bytes(x).into()),
        ),
        other => {
            let expected = "F64, F32, F16 or BF16";
            return Err(Problem::new(
                quoted(name),
                format!("of type {other}"),
                expected,
            ));
        }
    };
    let array = ArrayD::from_shape_vec(IxDyn(tensor.shape()), values);
    let array = array.map_err(|e| Problem::new(quoted(name), e, "data that fill its shape"))?;
    Ok((dtype, array))
}

/// A tensor of integers or flags, flat.
fn integers(name: &str, tensor: &TensorView) -> Result<Vec<i32>, Problem> {
    let data = tensor.data();
    let values: Vec<i64> = match tensor.dtype() {
        Stored::I64 => entries(data, i64::from_le_bytes),
        Stored::I32 => entries(data, |x| i32::from_le_bytes(x).into()),
        Stored::U8 | Stored::BOOL => entries(data, |[x]| x.into()),
        other => {
            let expected = "I32, I64, U8 or BOOL";
            return Err(Problem::new(
                quoted(name),
                format!("of type {other}"),
                expected,
            ));
        }
    };
    let narrow =
        |x| i32::try_from(x).map_err(|_| Problem::new(quoted(name), x, "a 32-bit integer"));
    values.into_iter().map(narrow).collect()
}

/// Little-endian entries of N bytes.
fn entries<const N: usize, R>(data: &[u8], read: impl Fn([u8; N]) -> R) -> Vec<R> {
    data.as_chunks()
        .0
        .iter()
        .map(|&bytes| read(bytes))
        .collect()
}

/// Inputs are numbers: a NaN or infinity there would only say that everything else is NaN too.
fn finite(name: &str, values: ArrayD<f64>) -> Result<ArrayD<f64>, Problem> {
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let found = values.iter().nth(at).map_or(f64::NAN, |x| *x);
            let found = format!("{found} at entry {at}");
            Err(Problem::new(quoted(name), found, "finite numbers"))
        }
    }
}
