//! `verify::run` on the fixtures, on fixtures made wrong, and on files that are no fixtures.
#![cfg(feature = "trainer")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use dtmem::verify::{self, BackendName, Choice, Dtype, VerifyError};
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as Stored, TensorView};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/ops")
        .join(format!("{name}.safetensors"))
}

fn all_fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ops");
    let entries = std::fs::read_dir(folder).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// A fixture that can be taken apart.
#[derive(Clone)]
struct Parts {
    op: String,
    params: Value,
    tensors: BTreeMap<String, (Stored, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn new(op: &str, params: Value) -> Self {
        let (op, tensors) = (op.to_owned(), BTreeMap::new());
        Self {
            op,
            params,
            tensors,
        }
    }

    fn open(name: &str) -> Self {
        let bytes = std::fs::read(fixture(name)).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let part = |(name, tensor): (String, TensorView)| {
            (
                name,
                (
                    tensor.dtype(),
                    tensor.shape().to_vec(),
                    tensor.data().to_vec(),
                ),
            )
        };
        Self {
            op: metadata["op"].clone(),
            params: serde_json::from_str(&metadata["params"]).unwrap(),
            tensors: tensors.into_iter().map(part).collect(),
        }
    }

    fn reals(mut self, name: &str, shape: &[usize], values: &[f64]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors
            .insert(name.to_owned(), (Stored::F64, shape.to_vec(), bytes));
        self
    }

    fn integers(mut self, name: &str, values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors
            .insert(name.to_owned(), (Stored::I32, vec![values.len()], bytes));
        self
    }

    fn without(mut self, prefix: &str) -> Self {
        self.tensors.retain(|name, _| !name.starts_with(prefix));
        self
    }

    fn param(mut self, name: &str, value: Value) -> Self {
        self.params[name] = value;
        self
    }

    fn values(&self, name: &str) -> Vec<f64> {
        let (stored, _, bytes) = &self.tensors[name];
        assert_eq!(*stored, Stored::F64);
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|&x| f64::from_le_bytes(x))
            .collect()
    }

    /// Replaces the numbers of a tensor.
    fn change(self, name: &str, change: impl FnOnce(&mut [f64])) -> Self {
        let shape = self.tensors[name].1.clone();
        let mut values = self.values(name);
        change(&mut values);
        self.reals(name, &shape, &values)
    }

    /// Stores the tensors of a prefix in another type.
    fn stored(mut self, prefix: &str, dtype: Stored) -> Self {
        for (stored, _, bytes) in self
            .tensors
            .iter_mut()
            .filter(|(name, (stored, ..))| name.starts_with(prefix) && *stored == Stored::F64)
            .map(|(_, tensor)| tensor)
        {
            let values = bytes.as_chunks().0.iter().map(|&x| f64::from_le_bytes(x));
            *bytes = match dtype {
                Stored::F32 => values.flat_map(|x| (x as f32).to_le_bytes()).collect(),
                Stored::F16 => values
                    .flat_map(|x| f16::from_f64(x).to_le_bytes())
                    .collect(),
                Stored::BF16 => values
                    .flat_map(|x| bf16::from_f64(x).to_le_bytes())
                    .collect(),
                other => panic!("{other}"),
            };
            *stored = dtype;
        }
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let metadata = [("op", self.op.clone()), ("params", self.params.to_string())];
        let metadata: HashMap<_, _> = metadata.map(|(key, x)| (key.to_owned(), x)).into();
        let tensors = self.tensors.iter().map(|(name, (dtype, shape, data))| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize(tensors, Some(metadata)).unwrap()
    }

    fn verify(&self, dtype: &str) -> Outcome {
        verify_bytes(&self.bytes(), dtype)
    }

    /// The message of a file that is refused.
    fn refusal(&self) -> String {
        match self.verify("f64").result {
            Err(error @ VerifyError::Content { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }
}

struct Outcome {
    result: Result<bool, VerifyError>,
    table: String,
}

impl Outcome {
    /// Asserts that all rows pass.
    #[track_caller]
    fn passes(&self) {
        assert!(
            matches!(self.result, Ok(true)),
            "{:?}\n{}",
            self.result,
            self.table
        );
        assert!(
            self.table.trim_end().ends_with(" passed, 0 failed"),
            "{}",
            self.table
        );
    }

    /// Asserts that some rows fail, and gives them.
    #[track_caller]
    fn failures(&self) -> Vec<&str> {
        assert!(
            matches!(self.result, Ok(false)),
            "{:?}\n{}",
            self.result,
            self.table
        );
        let rows: Vec<&str> = self
            .table
            .lines()
            .filter(|row| row.contains("FAIL"))
            .collect();
        let counts = self.table.lines().last().unwrap();
        assert!(
            counts.ends_with(&format!(" passed, {} failed", rows.len())),
            "{}",
            self.table
        );
        rows
    }
}

fn run(files: &[PathBuf], dtype: &str) -> Outcome {
    let mut table = Vec::new();
    let result = verify::run(files, Choice::All, dtype.parse().unwrap(), &mut table);
    let table = String::from_utf8(table).unwrap();
    Outcome { result, table }
}

fn verify_bytes(bytes: &[u8], dtype: &str) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("case.safetensors");
    std::fs::write(&file, bytes).unwrap();
    run(&[file], dtype)
}

const DTYPES: [&str; 5] = ["f64", "f32", "bf16", "f16", "all"];

/// One fixture of each operation.
const EACH: [&str; 5] = [
    "attention_bce_all",
    "memory_cosine_sigmoid_coupled_read_then_write",
    "memory_top_k",
    "lora_small",
    "layer_norm",
];

/// y = 2x, in every tensor that `linear` knows.
fn double(x: f64) -> Parts {
    Parts::new("linear", json!({}))
        .reals("input.x", &[1, 1], &[x])
        .reals("input.weight", &[1, 1], &[2.0])
        .reals("output.y", &[1, 1], &[2.0 * x])
}

#[test]
fn every_fixture_passes_in_every_type() {
    let files = all_fixtures();
    assert_eq!(files.len(), 24);
    let outcome = run(&files, "all");
    outcome.passes();
    for file in &files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let rows = |checked: &str, dtype: &str| {
            let words = [name, checked, dtype];
            let mut lines = outcome.table.lines();
            lines.any(|line| line.split_whitespace().take(3).eq(words))
        };
        assert!(rows("file", "f64"), "{name}");
        for dtype in ["f32", "bf16", "f16"] {
            assert!(rows("reference", dtype), "{name} {dtype}");
        }
    }
}

#[test]
fn one_wrong_entry_in_any_tensor_fails_under_every_type() {
    for name in EACH {
        let parts = Parts::open(name);
        let checked =
            |name: &&String| name.starts_with("output.") || name.starts_with("grad_input.");
        for (n, tensor) in parts.tensors.keys().filter(checked).enumerate() {
            let wrong = parts.clone().change(tensor, |values| {
                let norm = values.iter().map(|x| x * x).sum::<f64>().sqrt();
                let at = (7 * n) % values.len();
                values[at] += 1e-3 * norm;
            });
            let outcome = wrong.verify(DTYPES[n % DTYPES.len()]);
            let [row] = outcome.failures()[..] else {
                panic!("{}", outcome.table);
            };
            assert!(
                row.contains(tensor.as_str()) && row.contains("1.0e-3"),
                "{row}"
            );
        }
    }
}

#[test]
fn nan_and_infinity_fail_under_every_type() {
    for (dtype, wrong) in DTYPES
        .into_iter()
        .zip([f64::NAN, f64::INFINITY].into_iter().cycle())
    {
        let wrong = Parts::open("layer_norm").change("output.y", |y| y[3] = wrong);
        let outcome = wrong.verify(dtype);
        let [row] = outcome.failures()[..] else {
            panic!("{}", outcome.table);
        };
        assert!(row.contains("1 of 864") && row.contains("inf"), "{row}");
    }
}

#[test]
fn tensors_stored_in_a_narrower_type_are_held_to_its_limit() {
    for name in EACH {
        // The inputs too: what they lose in f32 is far below its limit.
        Parts::open(name)
            .stored("", Stored::F32)
            .verify("f64")
            .passes();
        for dtype in [Stored::BF16, Stored::F16] {
            let outputs = Parts::open(name).stored("output.", dtype);
            outputs.stored("grad_input.", dtype).verify("f64").passes();
        }
    }
    let moved = Parts::open("layer_norm").change("output.y", |y| {
        let norm = y.iter().map(|x| x * x).sum::<f64>().sqrt();
        y[0] += 3e-5 * norm;
    });
    moved
        .clone()
        .stored("", Stored::F32)
        .verify("f64")
        .failures();
    moved.stored("output.", Stored::F16).verify("f64").passes();
}

#[test]
fn outputs_alone_or_some_of_them_are_enough() {
    let outputs = Parts::open("attention_bce_partial").without("grad_");
    let outcome = outputs.verify("f32");
    outcome.passes();
    assert!(!outcome.table.contains("grad_input"));
    let few = Parts::open("attention_bce_partial").without("output.lse");
    let few = few.without("output.memory_loss").without("grad_input.v");
    let outcome = few.verify("f32");
    outcome.passes();
    assert!(outcome.table.contains("grad_input.q") && !outcome.table.contains("lse"));
}

#[test]
fn missing_pairs_are_none_and_missing_flags_are_all() {
    // The fixture supervises one head with no pair in two of its three sequences.
    let plain = Parts::open("attention_plain");
    plain.clone().without("input.pair_").verify("f32").passes();
    let annotated = plain.without("input.annotated").verify("f32");
    assert!(annotated.result.is_ok());
    let all = Parts::open("attention_bce_all");
    let flags = &all.tensors["input.annotated"].2;
    assert!(flags.iter().all(|&flag| flag == 1));
    all.without("input.annotated").verify("f32").passes();
}

#[test]
fn wide_integers_and_flags_of_any_type_are_read() {
    let mut parts = Parts::open("attention_bce_all");
    for name in ["input.cu_seqlens", "input.pair_offsets", "input.pair_keys"] {
        let (stored, _, bytes) = parts.tensors.get_mut(name).unwrap();
        let values = bytes
            .as_chunks()
            .0
            .iter()
            .map(|&x| i64::from(i32::from_le_bytes(x)));
        *bytes = values.flat_map(i64::to_le_bytes).collect();
        *stored = Stored::I64;
    }
    parts.tensors.get_mut("input.annotated").unwrap().0 = Stored::BOOL;
    parts.verify("f32").passes();
}

#[test]
fn what_an_operation_does_not_know_is_named() {
    let parts = || Parts::open("attention_bce_all");
    let expect = |parts: Parts, words: &[&str]| {
        let message = parts.refusal();
        assert!(message.contains("case.safetensors: "), "{message}");
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
    };
    let one = [1.0];
    expect(
        parts().reals("output.probabilities", &[1], &one),
        &[
            "`output.probabilities` is unknown",
            "output.out, output.lse, output.memory_loss",
        ],
    );
    expect(
        parts().reals("grad_output.lse", &[1], &one),
        &["`grad_output.lse` is unknown"],
    );
    expect(
        parts().reals("grad_input.cu_seqlens", &[1], &one),
        &["`grad_input.cu_seqlens`"],
    );
    expect(
        parts().without("input.k"),
        &["`input.k` is missing, expected [keys, key_heads, width = 32]"],
    );
    expect(
        parts().without("grad_output."),
        &["`grad_input.q` is alone", "grad_output"],
    );
    expect(
        parts().without("output.").without("grad_input."),
        &["the file is without results"],
    );
    expect(
        parts().integers("input.groups", &[0]),
        &["`input.groups` is unknown"],
    );
    expect(
        parts().param("mask", json!("grouped_causal")),
        &["`input.groups` is missing"],
    );
    expect(
        parts().param("mask", json!("diagonal")),
        &[
            "parameter `mask` is \"diagonal\"",
            "\"causal\" or \"none\" or \"sliding_window\" or \"grouped_causal\"",
        ],
    );
    expect(
        parts().param("mask", json!("sliding_window")),
        &["parameter `window` is missing"],
    );
    expect(
        parts().param("window", json!(3)),
        &["parameter `window` is unknown", "scale"],
    );
    expect(
        parts().param("scale", json!("large")),
        &["parameter `scale` is \"large\"", "number"],
    );
    expect(
        parts().param("scale", Value::Null),
        &["parameter `scale` is missing"],
    );
    expect(
        parts().param("supervised_heads", json!([0, -1])),
        &["supervised_heads", "[0,-1]"],
    );
    expect(
        parts().param("supervised_heads", json!([2])),
        &["`supervised_heads` is 2", "below 2"],
    );
    expect(
        Parts {
            op: "softmax".to_owned(),
            ..parts()
        },
        &["`op` is `softmax`", "layer_norm"],
    );
    expect(
        Parts {
            params: json!([1]),
            ..parts()
        },
        &["`params` is [1]", "JSON object"],
    );
    let memory = Parts::open("memory_dot_softmax_coupled_read_then_write");
    expect(
        memory.clone().reals("input.strength_bias", &[1], &one),
        &["`input.strength_bias` is unknown"],
    );
    expect(
        memory.clone().param("addressing", json!("cosine")),
        &["`input.key_strength` is missing"],
    );
    expect(memory.param("top_k", json!(0)), &["`top_k` is 0"]);
}

#[test]
fn what_does_not_fit_is_named() {
    let parts = || Parts::open("attention_bce_all");
    let expect = |parts: Parts, words: &[&str]| {
        let message = parts.refusal();
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
    };
    expect(
        parts().reals("input.v", &[1, 2, 32], &[0.0; 64]),
        &[
            "`input.v` is of shape [1, 2, 32]",
            "[keys = 33, key_heads = 2, width = 32]",
        ],
    );
    expect(
        parts().reals("input.v", &[64], &[0.0; 64]),
        &["`input.v` is of shape [64]"],
    );
    expect(
        parts().reals("output.memory_loss", &[2], &[0.0; 2]),
        &["of shape [2], expected [1]"],
    );
    expect(
        parts().reals("input.cu_seqlens", &[3], &[0.0; 3]),
        &["`input.cu_seqlens` is of type F64"],
    );
    expect(
        parts().integers("output.memory_loss", &[0]),
        &["of type I32", "BF16"],
    );
    expect(
        parts().integers("input.cu_seqlens", &[0, 40, 33]),
        &["`cu_seqlens`"],
    );
    expect(
        parts().integers("input.cu_seqlens", &[0, 20, 32]),
        &["`cu_seqlens` is 32", "33"],
    );
    expect(
        parts().integers("input.pair_keys", &[-1; 22]),
        &["`pair_keys`"],
    );
    expect(
        parts().integers("input.annotated", &[1, 300]),
        &["`annotated` is 300", "0 or 1"],
    );
    expect(
        parts().change("input.q", |q| q[5] = f64::NAN),
        &["`input.q` is NaN at entry 5"],
    );
    let heads = parts().reals("input.k", &[33, 0, 32], &[]);
    assert!(heads.verify("f64").result.is_err());
    // 2⁶² numbers in an empty tensor.
    let huge = Parts::new("linear", json!({}))
        .reals("input.x", &[1 << 31, 0], &[])
        .reals("input.weight", &[1 << 31, 0], &[])
        .reals("output.y", &[1, 1], &[0.0]);
    expect(huge, &["`input.x` is of shape [2147483648, 0]", "at most"]);
    let huge = Parts::new("linear", json!({}))
        .reals("input.x", &[1 << 20, 0], &[])
        .reals("input.weight", &[1 << 20, 0], &[])
        .reals("output.y", &[1, 1], &[0.0]);
    expect(
        huge,
        &[
            "an intermediate result is [tokens = 1048576, out = 1048576]",
            "at most",
        ],
    );
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let missing = run(&["no/such.safetensors".into()], "f64").result;
    assert!(matches!(missing, Err(VerifyError::Read { .. })));
    assert!(
        missing
            .unwrap_err()
            .to_string()
            .starts_with("no/such.safetensors: ")
    );
    let whole = std::fs::read(fixture("layer_norm")).unwrap();
    for end in [0, 4, 8, 100, whole.len() - 1] {
        let truncated = verify_bytes(&whole[..end], "f64").result;
        assert!(
            matches!(truncated, Err(VerifyError::Format { .. })),
            "{end}"
        );
    }
}

#[test]
fn the_rows_before_a_bad_file_are_written() {
    let outcome = run(
        &[fixture("layer_norm"), "no/such.safetensors".into()],
        "f64",
    );
    assert!(outcome.result.is_err());
    assert!(outcome.table.contains("layer_norm"));
}

#[test]
fn numbers_beyond_f16_fail_there_and_say_so() {
    let input = double(1e6);
    input.verify("f32").passes();
    input.verify("bf16").passes();
    let outcome = input.verify("f16");
    for row in outcome.failures() {
        assert!(
            row.contains("input.x") && row.contains("1 of 1 overflowed"),
            "{row}"
        );
    }
    let outcome = double(4e4).verify("f16");
    for row in outcome.failures() {
        assert!(
            row.contains("output.y") && row.contains("1 of 1 overflowed"),
            "{row}"
        );
    }
}

#[test]
fn gradients_below_f16_fail_there_and_say_so() {
    let small = double(1.0)
        .reals("grad_output.y", &[1, 1], &[1e-7])
        .reals("input.weight", &[1, 1], &[1e-3])
        .reals("output.y", &[1, 1], &[1e-3])
        .reals("grad_input.x", &[1, 1], &[1e-10]);
    small.verify("bf16").passes();
    let outcome = small.verify("f16");
    for row in outcome.failures() {
        assert!(
            row.contains("grad_input.x") && row.contains("1 of 1 underflowed"),
            "{row}"
        );
    }
}

#[test]
fn only_gradients_through_saturated_rows_get_the_wider_limit() {
    let limits = |parts: &Parts| -> Vec<String> {
        let table = parts.verify("f32").table;
        let wide = table.lines().filter(|row| row.contains("saturated rows"));
        wide.filter(|row| row.contains("1.0e-4  ok"))
            .map(|row| row.split_whitespace().nth(3).unwrap().to_owned())
            .collect()
    };
    let sharp = Parts::open("attention_bce_all").param("scale", json!(50.0));
    assert_eq!(limits(&sharp), ["grad_input.q", "grad_input.k"]);
    let unsupervised = sharp.clone().param("supervised_heads", json!([]));
    assert!(limits(&unsupervised).is_empty());
    assert!(limits(&sharp.integers("input.annotated", &[0, 0])).is_empty());
    // Rows of one key have A = 1 and are not saturated.
    let single = Parts::open("attention_bce_all");
    let single = single
        .param("mask", json!("sliding_window"))
        .param("window", json!(1));
    let single = single.without("input.pair_");
    assert!(limits(&single).is_empty());
}

#[test]
fn a_near_tie_of_top_k_is_pointed_out_where_it_matters() {
    let tie = |second: f64| {
        Parts::new(
            "content_memory",
            json!({"addressing": "dot", "strength": "softmax", "erase": "coupled",
                   "order": "read_then_write", "top_k": 1, "scale": 1.0, "epsilon": 1e-6}),
        )
        .reals("input.memory", &[1, 2, 1], &[1.0, second])
        .reals("input.address_key", &[1, 1, 1], &[1.0])
        .reals("input.strength_key", &[1, 1, 1], &[0.0])
        .reals("input.value", &[1, 1, 1], &[0.0])
        .reals("output.read", &[1, 1, 1], &[5.0])
        .stored("output.", Stored::F32)
        .verify("f64")
        .table
    };
    assert!(tie(1.0 + 1e-7).contains("top_k: scores 1e-7 apart"));
    assert!(!tie(1.1).contains("top_k"));
}

#[test]
fn small_operations_pass_too() {
    let e = std::f64::consts::E;
    double(1.5).verify("all").passes();
    let with_bias = double(1.5).reals("input.bias", &[1], &[-1.0]);
    with_bias
        .reals("output.y", &[1, 1], &[2.0])
        .verify("all")
        .passes();
    for (op, y) in [
        ("relu", 0.5),
        ("tanh", 0.5_f64.tanh()),
        ("gelu", 0.345_731_230_636_767_2),
    ] {
        let parts = Parts::new(op, json!({})).reals("input.x", &[1, 2], &[0.5, 0.0]);
        parts
            .reals("output.y", &[1, 2], &[y, 0.0])
            .verify("all")
            .passes();
    }
    Parts::new("cross_entropy", json!({}))
        .reals("input.logits", &[2, 2], &[0.0, 0.0, 0.0, 1.0])
        .integers("input.targets", &[0, 1])
        .reals(
            "output.loss",
            &[1],
            &[(2.0_f64.ln() + (1.0 + 1.0 / e).ln()) / 2.0],
        )
        .reals("grad_output.loss", &[1], &[4.0])
        .reals(
            "grad_input.logits",
            &[2, 2],
            &[-1.0, 1.0, 2.0 / (1.0 + e), -2.0 / (1.0 + e)],
        )
        .verify("all")
        .passes();
}

#[test]
fn a_map_of_no_tokens_has_gradients_of_zero() {
    let (none, matrix) = (&[0, 4][..], &[4, 4][..]);
    let ones = [1.0; 16];
    Parts::new("lora_linear", json!({"scaling": 1.0}))
        .reals("input.x", none, &[])
        .reals("input.weight", matrix, &ones)
        .reals("input.lora_a", &[1, 4], &ones[..4])
        .reals("input.lora_b", &[4, 1], &ones[..4])
        .reals("output.y", none, &[])
        .reals("output.merged_weight", matrix, &[2.0; 16])
        .reals("grad_output.y", none, &[])
        .reals("grad_input.weight", matrix, &[0.0; 16])
        .reals("grad_input.lora_a", &[1, 4], &[0.0; 4])
        .verify("all")
        .passes();
}

#[test]
fn masks_and_grouped_queries_pass_where_one_case_covers_two() {
    // Two tokens that score 0 everywhere: out is the mean of the visible values.
    let attention = |params: Value, out: [f64; 2], keys: f64| {
        let mut all = json!({"scale": 1.0});
        all.as_object_mut()
            .unwrap()
            .extend(params.as_object().unwrap().clone());
        let lse = [(keys - 1.0).max(1.0).ln(), keys.ln()];
        Parts::new("attention", all)
            .reals("input.q", &[2, 1, 1], &[0.0, 0.0])
            .reals("input.k", &[2, 1, 1], &[1.0, 2.0])
            .reals("input.v", &[2, 1, 1], &[4.0, 8.0])
            .integers("input.cu_seqlens", &[0, 2])
            .reals("output.out", &[2, 1, 1], &out)
            .reals("output.lse", &[2, 1], &lse)
    };
    attention(json!({"mask": "causal"}), [4.0, 6.0], 2.0)
        .verify("all")
        .passes();
    let window = json!({"mask": "sliding_window", "window": 1});
    attention(window, [4.0, 8.0], 1.0).verify("all").passes();
    let groups = attention(json!({"mask": "grouped_causal"}), [4.0, 6.0], 2.0);
    groups
        .integers("input.groups", &[0, 1])
        .verify("all")
        .passes();
    let none = attention(json!({"mask": "none"}), [6.0, 6.0], 2.0);
    none.without("output.lse").verify("all").passes();
    // One query head more than key heads, and only the last query of the sequence.
    let last = attention(json!({"mask": "causal"}), [0.0; 2], 2.0).without("output.lse");
    last.reals("input.q", &[1, 2, 1], &[0.0; 2])
        .integers("input.cu_seqlens", &[0, 1])
        .integers("input.cu_seqlens_k", &[0, 2])
        .reals("output.out", &[1, 2, 1], &[6.0, 6.0])
        .verify("all")
        .passes();
}

#[test]
fn choices_are_written_as_they_are_read() {
    for word in DTYPES {
        assert_eq!(
            word.parse::<verify::DtypeChoice>().unwrap().to_string(),
            word
        );
    }
    for word in ["reference", "host", "cuda", "all"] {
        assert_eq!(
            word.parse::<verify::BackendChoice>().unwrap().to_string(),
            word
        );
    }
    let error = "f8".parse::<verify::DtypeChoice>().unwrap_err().to_string();
    assert_eq!(
        error,
        "`f8` is no type, expected f64, f32, bf16, f16 or all"
    );
}

/// The rows of all fixtures in all types, and whether all of them passed; nothing where there is no such backend here.
fn verify_all(backend: BackendName) -> Option<(bool, String)> {
    let files = all_fixtures();
    let mut table = Vec::new();
    match verify::run(&files, Choice::One(backend), Choice::All, &mut table) {
        Ok(passed) => Some((passed, String::from_utf8(table).unwrap())),
        Err(error @ VerifyError::Unavailable { .. }) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_kernels_agree_with_all_fixtures_in_all_types() {
    for backend in [BackendName::Host, BackendName::Cuda] {
        let Some((passed, table)) = verify_all(backend) else {
            continue;
        };
        assert!(passed, "{table}");
        for dtype in ["f32", "bf16", "f16"] {
            let rows = table.lines().filter(|row| {
                row.contains(&format!(" {backend} ")) && row.contains(&format!(" {dtype} "))
            });
            assert!(rows.count() > 100, "{backend} {dtype}: {table}");
        }
    }
}

#[test]
fn a_backend_that_the_build_or_the_machine_lacks_is_an_error_that_says_what_is_missing() {
    for (backend, here, missing) in [
        (BackendName::Host, cfg!(feature = "host"), "`host`"),
        (BackendName::Cuda, false, "no "),
    ] {
        let files = [fixture("layer_norm")];
        let dtype = Choice::One(Dtype::F32);
        match verify::run(&files, Choice::One(backend), dtype, &mut Vec::new()) {
            Ok(_) if here || backend == BackendName::Cuda => {}
            other => {
                let message = other.unwrap_err().to_string();
                assert!(message.contains(missing), "{message}");
            }
        }
    }
}

/// Values that a damaged header may hold.
fn any_json() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(|x| json!(x)),
        (0_u64..100).prop_map(|x| json!(x)),
        any::<f64>().prop_map(|x| json!(x)),
        "[a-z_]{0,8}".prop_map(|x| json!(x)),
        prop::collection::vec(0_u64..5, 0..4).prop_map(|x| json!(x)),
        prop::sample::select(vec!["F64", "F32", "I32", "U8", "I64", "BF16", "F8_E4M3"])
            .prop_map(|x| json!(x)),
    ]
}

/// Every value in a tree, depth first.
fn leaves(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Array(items) => items.iter_mut().flat_map(leaves).collect(),
        Value::Object(items) => items.values_mut().flat_map(leaves).collect(),
        leaf => vec![leaf],
    }
}

/// A file with another header in front of the same data.
fn with_header(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    change(&mut header);
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn mutated_bytes_never_panic(
        name in prop::sample::select(EACH.to_vec()),
        changes in prop::collection::vec((0.0..1.0_f64, any::<u8>()), 1..6),
        in_header in any::<bool>(),
        end in prop_oneof![3 => Just(1.0), 1 => 0.0..1.0_f64],
    ) {
        let mut bytes = Parts::open(name).bytes();
        let reach = if in_header { bytes.len().min(2000) } else { bytes.len() };
        for (at, byte) in changes {
            bytes[(at * reach as f64) as usize] = byte;
        }
        bytes.truncate((end * bytes.len() as f64) as usize);
        let _ = verify_bytes(&bytes, "all").result;
    }

    #[test]
    fn mutated_headers_never_panic(
        name in prop::sample::select(EACH.to_vec()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
    ) {
        let bytes = with_header(&Parts::open(name).bytes(), |header| {
            for (at, value) in changes {
                let mut leaves = leaves(header);
                let leaf = at.index(leaves.len());
                *leaves.swap_remove(leaf) = value;
            }
        });
        let _ = verify_bytes(&bytes, "all").result;
    }

    #[test]
    fn mutated_parameters_never_panic(
        name in prop::sample::select(EACH.to_vec()),
        at in any::<prop::sample::Index>(),
        value in any_json(),
    ) {
        let mut parts = Parts::open(name);
        let mut leaves = leaves(&mut parts.params);
        let leaf = at.index(leaves.len());
        *leaves.swap_remove(leaf) = value;
        let _ = parts.verify("all").result;
    }

    #[test]
    fn mutated_integers_never_panic(
        tensor in prop::sample::select(vec!["cu_seqlens", "pair_offsets", "pair_keys", "annotated"]),
        at in any::<prop::sample::Index>(),
        value in prop_oneof![any::<i32>(), -2..40_i32],
    ) {
        let mut parts = Parts::open("attention_bce_all");
        let (stored, _, bytes) = &parts.tensors[&format!("input.{tensor}")];
        let mut values: Vec<i32> = match stored {
            Stored::U8 => bytes.iter().map(|&x| x.into()).collect(),
            _ => bytes.as_chunks().0.iter().map(|&x| i32::from_le_bytes(x)).collect(),
        };
        let at = at.index(values.len());
        values[at] = value;
        parts = parts.integers(&format!("input.{tensor}"), &values);
        let _ = parts.verify("all").result;
    }
}
