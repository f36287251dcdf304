//! Parameters: named parts of one flat arena, and how each is initialised.

use dtmem_reference::Scalar;
use dtmem_reference::dropout::philox;

use crate::backend::Span;

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// Every element the same.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform between −x and x.
    Uniform(f64),
}

/// One named parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Its name, e.g. `blocks.0.attention.qkv.weight`.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Where it stands in the arena.
    pub span: Span,
    /// Whether weight decay applies: on matrices, not on biases, norms and the initial memory.
    pub decay: bool,
    /// Whether training changes it.
    pub trainable: bool,
    /// How it starts.
    pub start: Start,
}

impl Parameter {
    /// Initial value of element `index` of the `number`th parameter of a model: a pure function,
    /// from the counter-based generator.
    fn initial<T: Scalar>(&self, seed: u64, number: u32, index: usize) -> T {
        let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
        let [a, b, ..] = philox(
            [index as u32, number, u32::MAX, (index as u64 >> 32) as u32],
            [seed as u32, (seed >> 32) as u32],
        );
        T::from_f64(match self.start {
            Start::Constant(x) => x,
            Start::Uniform(bound) => bound * (2.0 * unit(a) - 1.0),
            Start::Normal(deviation) => {
                let radius = (-2.0 * unit(a).ln()).sqrt();
                deviation * radius * (std::f64::consts::TAU * unit(b)).cos()
            }
        })
    }
}

/// Every parameter begins at a multiple of so many numbers: 16 bytes in the narrowest type. What lies
/// between two of them is 0 and stays so.
const ALIGNMENT: usize = 8;

/// All parameters of a model.
///
/// Arena order: trained with decay, trained without, frozen; so that the optimiser needs one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    list: Vec<Parameter>,
    /// Trained, with decay.
    pub decayed: Span,
    /// Trained, without decay.
    pub plain: Span,
    len: usize,
}

impl Parameters {
    /// Lays out what `declare` declares. It is run twice: to learn the sizes, and with the spans.
    pub fn plan<N>(declare: impl Fn(&mut Declare) -> N) -> (Self, N) {
        let mut sizes = Declare::default();
        declare(&mut sizes);
        let groups = sizes.used;
        let mut declared = Declare {
            start: [0, groups[0], groups[0] + groups[1]],
            ..Declare::default()
        };
        let network = declare(&mut declared);
        let span = |group: usize| Span {
            offset: declared.start[group],
            len: groups[group],
        };
        let parameters = Self {
            decayed: span(0),
            plain: span(1),
            len: groups.iter().sum(),
            list: declared.list,
        };
        (parameters, network)
    }

    /// The parameters in the order of their declaration.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// Length of the arena.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Length of the part of the arena that training changes: its start.
    pub fn trained(&self) -> usize {
        self.decayed.len + self.plain.len
    }

    /// Whether training changes what stands at this place.
    pub fn trains(&self, span: Span) -> bool {
        span.offset < self.trained()
    }

    /// Number of parameters, or of those that training changes.
    pub fn count(&self, trained_only: bool) -> usize {
        let counted = |parameter: &&Parameter| parameter.trainable || !trained_only;
        let lens = self
            .list
            .iter()
            .filter(counted)
            .map(|parameter| parameter.span.len);
        lens.sum()
    }

    /// Initial values of the whole arena.
    pub fn initial<T: Scalar>(&self, seed: u64) -> Vec<T> {
        let mut values = vec![T::zero(); self.len];
        for (number, parameter) in self.list.iter().enumerate() {
            for (index, value) in values[parameter.span.range()].iter_mut().enumerate() {
                *value = parameter.initial(seed, number as u32, index);
            }
        }
        values
    }
}

/// Takes the declarations of a model's parameters.
#[derive(Debug, Default)]
pub struct Declare {
    list: Vec<Parameter>,
    /// First index of each group in the arena.
    start: [usize; 3],
    /// Elements declared so far in each group.
    used: [usize; 3],
    prefix: Vec<String>,
    frozen: bool,
}

impl Declare {
    /// Declares what `inner` declares under a prefix of the name.
    pub fn within<R>(&mut self, prefix: impl ToString, inner: impl FnOnce(&mut Self) -> R) -> R {
        self.prefix.push(prefix.to_string());
        let result = inner(self);
        self.prefix.pop();
        result
    }

    /// From here on, parameters are frozen (or not).
    pub fn freeze(&mut self, frozen: bool) {
        self.frozen = frozen;
    }

    /// Whether parameters declared now are trained.
    pub fn trainable(&self) -> bool {
        !self.frozen
    }

    /// A parameter to which weight decay applies.
    pub fn weight(&mut self, name: &str, shape: &[usize], start: Start) -> Span {
        self.declare(name, shape, start, true)
    }

    /// A parameter without weight decay.
    pub fn plain(&mut self, name: &str, shape: &[usize], start: Start) -> Span {
        self.declare(name, shape, start, false)
    }

    fn declare(&mut self, name: &str, shape: &[usize], start: Start, decay: bool) -> Span {
        let group = match (self.frozen, decay) {
            (true, _) => 2,
            (false, true) => 0,
            (false, false) => 1,
        };
        let span = Span {
            offset: self.start[group] + self.used[group],
            len: shape.iter().product(),
        };
        self.used[group] += span.len.next_multiple_of(ALIGNMENT);
        let mut path = self.prefix.join(".");
        if !path.is_empty() {
            path.push('.');
        }
        self.list.push(Parameter {
            name: path + name,
            shape: shape.to_vec(),
            span,
            decay,
            trainable: !self.frozen,
            start,
        });
        span
    }
}
