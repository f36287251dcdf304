//! Adaptation at toy size: what each method trains, adapters in files, merging, forgetting, the
//! commands.

#![cfg(feature = "trainer")]

mod toy;

use std::path::Path;
use std::sync::OnceLock;

use dtmem::backend::Cpu;
use dtmem::model::{AdapterTarget, Model};
use dtmem::train::adapters::{adapter_from_bytes, apply_adapter, load_adapter, merge_adapter};
use dtmem::train::checkpoint::load_model;
use dtmem::train::config::{Config, ConfigError};
use dtmem::train::run::{Folder, Outcome, Start, Summary};
use proptest::prelude::*;
use tempfile::TempDir;
use toy::{MANY, RECALL, config, dtmem, finish, run, text};

/// Another task for a model of [`RECALL`]: no table [model] at all.
const OTHER: &str = r#"
seed = 5
[task]
name = "recall"
steps = 5
pairs = 3
[data]
episodes = 40
[loss]
lambda = 0
[train]
steps = 7
batch_tokens = 100
learning_rate = 1e-2
optimiser = "adamw"
weight_decay = 1e-2
checkpoint_every = 3
[evaluation]
episodes = 6
"#;

/// A finished run of [`RECALL`].
fn base() -> &'static Path {
    static RUN: OnceLock<TempDir> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        finish(&config(RECALL, &[]), folder.path(), Start::Fresh);
        folder
    })
    .path()
}

/// [`OTHER`] on a base, as the command reads it.
fn try_adapt(base: &Path, method: &str, overrides: &[&str]) -> Result<Config, ConfigError> {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("other.toml");
    std::fs::write(&file, OTHER).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
    let finetune = toml::Table::from_iter([
        ("base".to_owned(), base.display().to_string().into()),
        ("method".to_owned(), method.into()),
    ]);
    Config::load_finetune(&file, &overrides, finetune)
}

fn adapt(method: &str, overrides: &[&str]) -> Config {
    try_adapt(base(), method, overrides).unwrap()
}

/// A finished adapter of rank 2 on two projections.
fn adapter() -> &'static Path {
    static RUN: OnceLock<TempDir> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        let config = adapt(
            "lora",
            &[
                "model.adapter.rank=2",
                "model.adapter.targets=[\"value\", \"address_query\"]",
            ],
        );
        finish(&config, folder.path(), Start::Fresh);
        folder
    })
    .path()
}

fn model_of(folder: &Path) -> Model<Cpu<f32>> {
    let model = load_model(&Folder::new(folder).model(), Cpu::new());
    model.unwrap().0
}

/// The bits of each parameter by its name.
fn bits(model: &Model<Cpu<f32>>) -> Vec<(String, Vec<u32>)> {
    let values = model.values().unwrap();
    let bits = |range: std::ops::Range<usize>| values[range].iter().map(|v| v.to_bits()).collect();
    let parameters = model.parameters().iter();
    parameters
        .map(|parameter| (parameter.name.clone(), bits(parameter.span.range())))
        .collect()
}

fn bytes(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn each_method_changes_what_it_names_and_not_a_bit_of_the_rest() {
    let before = bits(&model_of(base()));
    let base_file = bytes(base(), "model.safetensors");
    for method in ["full", "memory", "scratch", "lora", "none"] {
        let folder = TempDir::new().unwrap();
        let summary = finish(&adapt(method, &[]), folder.path(), Start::Fresh);
        let model = folder.path().join("model.safetensors").exists();
        let adapter = folder.path().join("adapter_model.safetensors").exists();
        let trained = match method {
            "lora" | "none" => {
                assert_eq!((model, adapter), (false, method == "lora"));
                // Five projections in two layers, each with A [8, 8] and B [8, 8].
                usize::from(method == "lora") * 2 * 5 * 2 * 8 * 8
            }
            _ => {
                assert_eq!((model, adapter), (true, false));
                let after = bits(&model_of(folder.path()));
                let mut count = 0;
                for ((name, before), (other, after)) in before.iter().zip(&after) {
                    assert_eq!(name, other);
                    let trained = method != "memory" || name.contains(".memory.");
                    assert_eq!(before != after, trained, "{method}: {name}");
                    count += usize::from(trained) * before.len();
                }
                count
            }
        };
        assert_eq!(summary.trained_parameters, trained, "{method}");
        assert_eq!(summary.steps, if method == "none" { 0 } else { 7 });
        assert_eq!(bytes(base(), "model.safetensors"), base_file);
        check_forgetting(&summary, method);
        let results = std::fs::read_to_string(folder.path().join("summary.json")).unwrap();
        assert_eq!(results, serde_json::to_string(&summary).unwrap() + "\n");
    }
}

fn check_forgetting(summary: &Summary, method: &str) {
    let adaptation = summary.adaptation.as_ref().unwrap();
    assert_eq!(adaptation.method.to_string(), method);
    let [task] = adaptation.base_tasks.as_slice() else {
        panic!("{adaptation:?}");
    };
    assert!(task.task.contains("recall") && task.task.contains("steps=6"));
    let own = finish_of_base();
    assert_eq!(task.before.success_rate, own, "as the base's run found it");
    assert!((0.0..=1.0).contains(&task.after.success_rate));
    if method == "none" {
        assert_eq!(task.before, task.after);
    }
}

/// Success of the base on its task.
fn finish_of_base() -> f64 {
    let results: serde_json::Value =
        serde_json::from_slice(&bytes(base(), "summary.json")).unwrap();
    results["success_rate"].as_f64().unwrap()
}

#[test]
fn a_stopped_adaptation_resumes_to_the_bits_of_never_stopping() {
    for (method, file) in [
        ("lora", "adapter_model.safetensors"),
        ("memory", "model.safetensors"),
    ] {
        let config = adapt(method, &["model.adapter.dropout=0.2"]);
        let straight = TempDir::new().unwrap();
        finish(&config, straight.path(), Start::Fresh);
        for stop in [1, 3, 5] {
            let folder = TempDir::new().unwrap();
            let stopped = run(&config, folder.path(), Start::Fresh, Some(stop)).unwrap();
            assert_eq!(stopped, Outcome::Stopped { step: stop });
            finish(&config, folder.path(), Start::Resume);
            assert!(bytes(folder.path(), file) == bytes(straight.path(), file));
        }
    }
}

#[test]
fn a_base_that_was_replaced_meanwhile_is_noticed() {
    let folder = TempDir::new().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    finish(&config(RECALL, &[]), &base, Start::Fresh);
    let adaptation = try_adapt(&base, "lora", &[]).unwrap();
    run(&adaptation, &out, Start::Fresh, Some(2)).unwrap();
    finish(&config(RECALL, &["seed=9"]), &base, Start::Overwrite);
    let error = run(&adaptation, &out, Start::Resume, None).unwrap_err();
    assert!(error.to_string().contains("--overwrite"), "{error}");
}

/// A family that the base does not have: other symbols, and more actions.
const NEW_FAMILY: &str = "task.kind=delayed";

/// A finished adapter on [`NEW_FAMILY`].
fn new_family() -> &'static Path {
    static RUN: OnceLock<TempDir> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        let config = adapt("lora", &[NEW_FAMILY, "model.adapter.rank=2"]);
        finish(&config, folder.path(), Start::Fresh);
        folder
    })
    .path()
}

#[test]
fn an_adaptation_does_not_take_the_place_of_its_base() {
    let folder = TempDir::new().unwrap();
    let own = folder.path().join("base");
    std::fs::create_dir(&own).unwrap();
    std::fs::copy(Folder::new(base()).model(), Folder::new(&own).model()).unwrap();
    let config = try_adapt(&own, "lora", &[]).unwrap();
    let before = bytes(&own, "model.safetensors");
    let same = folder.path().join("base/../base");
    let error = run(&config, &same, Start::Overwrite, None).unwrap_err();
    assert!(error.to_string().contains("--out DIR"), "{error}");
    assert_eq!(bytes(&own, "model.safetensors"), before);
}

#[test]
fn a_new_family_is_trained_and_not_a_bit_of_the_base() {
    let (before, base_file) = (bits(&model_of(base())), bytes(base(), "model.safetensors"));
    // Embeddings of two codes and of actions with their biases, and a head.
    let of_family = (35 + 2) * 8 + 8 + 19 * 8 + 8 + 8 * 19 + 19;
    for method in ["lora", "memory", "full", "scratch"] {
        let folder = TempDir::new().unwrap();
        let summary = finish(&adapt(method, &[NEW_FAMILY]), folder.path(), Start::Fresh);
        check_forgetting(&summary, method);
        assert_eq!(bytes(base(), "model.safetensors"), base_file);
        let model = match method {
            "lora" => {
                let mut model = model_of(base());
                let (_, header) = apply_adapter(&Folder::new(folder.path()), &mut model).unwrap();
                assert_eq!(header.families.len(), 1);
                model
            }
            _ => model_of(folder.path()),
        };
        assert_eq!(model.spaces().families.len(), 2);
        let after = bits(&model);
        let mut count = 0;
        for (name, after) in &after {
            let old = before.iter().find(|(other, _)| other == name);
            let trained = match method {
                "lora" => old.is_none(),
                "memory" => old.is_none() || name.contains(".memory."),
                _ => true,
            };
            let of_known = ["observation.", "action.", "head."];
            match old {
                Some((_, before)) if !trained => assert_eq!(before, after, "{method}: {name}"),
                // No demonstration is of the base's family.
                Some(_) if of_known.iter().any(|start| name.starts_with(start)) => {}
                Some((_, before)) => assert_ne!(before, after, "{method}: {name}"),
                None => {}
            }
            count += usize::from(trained) * after.len();
        }
        assert_eq!(summary.trained_parameters, count, "{method}");
        let new = after
            .iter()
            .filter(|(name, _)| name.starts_with("families.1."));
        assert_eq!(new.map(|(_, bits)| bits.len()).sum::<usize>(), of_family);
    }
}

#[test]
fn a_new_family_is_saved_with_its_adapter_and_resumes_to_the_same_bits() {
    let config = adapt("lora", &[NEW_FAMILY, "model.adapter.rank=2"]);
    let folder = TempDir::new().unwrap();
    run(&config, folder.path(), Start::Fresh, Some(3)).unwrap();
    finish(&config, folder.path(), Start::Resume);
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        assert!(bytes(folder.path(), name) == bytes(new_family(), name));
    }
    let numbers = bytes(new_family(), "adapter_model.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(&numbers).unwrap();
    let head = tensors.tensor("base_model.model.families.1.head.weight");
    assert_eq!(head.unwrap().shape(), [19, 8]);
    let settings = text(&bytes(new_family(), "adapter_config.json"));
    let settings: serde_json::Value = serde_json::from_str(&settings).unwrap();
    assert_eq!(
        settings["modules_to_save"],
        serde_json::json!(["families.1"])
    );
    // Only what is trained is in the state: the base has the rest.
    let state = bytes(folder.path(), "train_state.safetensors");
    let state = safetensors::SafeTensors::deserialize(&state).unwrap();
    let trained = state.tensor("first_moment").unwrap().shape().to_vec();
    assert_eq!(state.tensor("parameters").unwrap().shape(), trained);
    assert!(trained[0] < model_of(base()).parameter_count());
}

#[test]
fn a_merged_model_knows_the_tasks_of_base_and_adapter() {
    let folder = TempDir::new().unwrap();
    let out = Folder::new(folder.path());
    merge_adapter(&Folder::new(base()), &Folder::new(new_family()), &out, true).unwrap();
    let (model, header) = load_model(&out.model(), Cpu::new()).unwrap();
    assert_eq!(model.spaces().families.len(), 2);
    let tasks = header.config.task_list();
    let labels = tasks.iter().map(|task| task.label.as_deref().unwrap());
    assert!(labels.eq(["recall", "recall-2"]));
    let tasks = tasks
        .iter()
        .map(|task| task.task.as_ref().unwrap().to_string());
    let tasks: Vec<String> = tasks.collect();
    assert!(tasks[0].contains("delayed") && tasks[1].contains("associative"));
    assert_eq!(Config::load(&out.config(), &[]).unwrap(), header.config);
}

#[test]
fn adapters_are_files_as_peft_names_them() {
    let numbers = bytes(adapter(), "adapter_model.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(&numbers).unwrap();
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    let mut expected = Vec::new();
    for layer in 0..2 {
        for target in ["address_query", "value"] {
            for factor in ["A", "B"] {
                let module = format!("blocks.{layer}.memory.{target}");
                expected.push(format!("base_model.model.{module}.lora_{factor}.weight"));
            }
        }
    }
    assert_eq!(names, expected);
    let a = tensors.tensor(&expected[0]).unwrap();
    let b = tensors.tensor(&expected[1]).unwrap();
    assert_eq!((a.shape(), b.shape()), (&[2, 8][..], &[8, 2][..]));
    let settings: serde_json::Value =
        serde_json::from_slice(&bytes(adapter(), "adapter_config.json")).unwrap();
    for (key, value) in [
        ("peft_type", serde_json::json!("LORA")),
        ("r", 2.into()),
        ("lora_alpha", 16.0.into()),
        ("lora_dropout", 0.0.into()),
        (
            "target_modules",
            serde_json::json!(["value", "address_query"]),
        ),
        ("bias", "none".into()),
        ("fan_in_fan_out", false.into()),
        (
            "base_model_name_or_path",
            base().display().to_string().into(),
        ),
    ] {
        assert_eq!(settings[key], value, "{key}");
    }
    let (weights, header) = load_adapter(&Folder::new(adapter()), &model_of(base())).unwrap();
    assert_eq!(
        weights.config.targets,
        [AdapterTarget::Value, AdapterTarget::AddressQuery]
    );
    assert_eq!(header.step, 7);
    assert!(
        weights
            .tensors
            .iter()
            .all(|tensor| tensor.values.iter().any(|v| *v != 0.0))
    );
}

#[test]
fn an_adapter_for_another_base_is_refused() {
    let folder = TempDir::new().unwrap();
    finish(&config(RECALL, &["seed=1"]), folder.path(), Start::Fresh);
    let other = model_of(folder.path());
    let error = load_adapter(&Folder::new(adapter()), &other).unwrap_err();
    let error = error.to_string();
    for part in [
        "adapter_model.safetensors",
        "fingerprint",
        &base().display().to_string(),
    ] {
        assert!(error.contains(part), "{part} is missing in: {error}");
    }
    // One bit is enough.
    let mut same = model_of(base());
    let mut values = same.values().unwrap();
    values[0] = f32::from_bits(values[0].to_bits() ^ 1);
    same.set_values(&values).unwrap();
    assert!(load_adapter(&Folder::new(adapter()), &same).is_err());
}

#[test]
fn adapters_of_another_kind_are_refused_by_name() {
    let numbers = bytes(adapter(), "adapter_model.safetensors");
    let settings = text(&bytes(adapter(), "adapter_config.json"));
    let model = model_of(base());
    for (from, to, part) in [
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"none\"", "\"all\"", "bias"),
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
        ("\"r\": 2", "\"r\": 3", "tensor"),
        ("\"r\": 2", "\"r\": 99", "model.adapter.rank"),
        ("\"value\"", "\"q_proj\"", "q_proj"),
        ("\"value\",", "", "number of tensors"),
        ("null\n}", "[\"families.1\"]\n}", "modules_to_save"),
        ("{", "", "adapter_config.json"),
    ] {
        assert!(settings.contains(from), "{from}: {settings}");
        let other = settings.replacen(from, to, 1);
        let paths = [Path::new("adapter_config.json"), Path::new("numbers")];
        let error = adapter_from_bytes((paths[0], other.as_bytes()), (paths[1], &numbers), &model);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(part), "{to}: {error}");
    }
}

#[test]
fn a_merged_folder_gives_the_logits_of_base_and_adapter() {
    let folder = TempDir::new().unwrap();
    let (base, adapter) = (Folder::new(base()), Folder::new(adapter()));
    merge_adapter(&base, &adapter, &Folder::new(folder.path()), true).unwrap();
    let merged = model_of(folder.path());
    let mut model = model_of(base.path());
    let (weights, _) = load_adapter(&adapter, &model).unwrap();
    model.add_adapter("x", &weights).unwrap();
    let again = load_adapter(&adapter, &model).unwrap().0;
    assert_eq!(again, weights, "it is still the same base");
    let mut packer = model.packer();
    for seed in 0..8_u8 {
        let steps = 3 + usize::from(seed % 3);
        let code = |index: usize, limit: usize| ((index * 7 + usize::from(seed) * 5) % limit) as u8;
        let codes = |len: usize, limit| (0..len).map(|index| code(index, limit)).collect();
        let (observations, actions): (Vec<u8>, Vec<u8>) = (codes(2 * steps, 17), codes(steps, 16));
        let trajectory = dtmem::batch::Trajectory {
            family: 0,
            observations: (&observations).into(),
            actions: (&actions).into(),
            returns: &vec![1.0; steps],
            pairs: &[],
            annotated: false,
        };
        packer.push_trajectory(trajectory).unwrap();
    }
    let without = model.logits(packer.batch()).unwrap();
    model.use_adapter(Some("x")).unwrap();
    let with = model.logits(packer.batch()).unwrap();
    let folded = merged.logits(packer.batch()).unwrap();
    let distance = |a: &[f32], b: &[f32]| {
        let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let norm: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
        (sum / norm).sqrt()
    };
    assert!(
        distance(&folded, &with) <= 2e-5,
        "{}",
        distance(&folded, &with)
    );
    assert!(distance(&without, &with) > 1e-3);
}

#[test]
fn the_architecture_comes_from_the_base() {
    let own = config(RECALL, &[]).model;
    for method in ["full", "lora"] {
        let config = adapt(method, &["model.width=8", "model.dropout=0.3"]);
        let mut model = config.model.clone();
        assert_eq!(model.adapter.is_some(), method == "lora");
        assert_eq!(model.dropout, 0.3, "a setting of training");
        (model.adapter, model.dropout) = (None, own.dropout);
        assert_eq!(model, own);
    }
    // And so does the memory loss, where none is given.
    let loss = adapt("lora", &["loss="]).loss;
    assert_eq!(loss, config(RECALL, &[]).loss);
    assert_eq!(adapt("lora", &["loss.heads=[2]"]).loss.heads, [2]);
    // The resolved configuration reads back as itself.
    let folder = TempDir::new().unwrap();
    let resolved = adapt("lora", &[]);
    let file = folder.path().join("config.toml");
    std::fs::write(&file, resolved.to_toml().unwrap()).unwrap();
    assert_eq!(Config::load(&file, &[]).unwrap(), resolved);
}

#[test]
fn what_contradicts_the_base_is_named() {
    let folder = TempDir::new().unwrap();
    let plain = config(RECALL, &["model.memory="]);
    finish(&plain, folder.path(), Start::Fresh);
    for (base, method, overrides, key, expected) in [
        (
            base(),
            "full",
            "model.width=16",
            "`model.width`: found 16",
            "expected 8",
        ),
        (
            base(),
            "lora",
            "model.memory.slots=5",
            "`model.memory.slots`",
            "expected 4",
        ),
        (
            base(),
            "lora",
            "model.memory.top_k=1",
            "`model.memory.top_k`",
            "expected 0",
        ),
        (base(), "lora", "model.wdith=1", "`wdith`", "`width`"),
        (
            folder.path(),
            "full",
            "model.memory.slots=4",
            "`model.memory`",
            "none",
        ),
        (
            folder.path(),
            "lora",
            "seed=1",
            "`finetune.method`",
            "no memory",
        ),
        (
            folder.path(),
            "memory",
            "seed=1",
            "`finetune.method`",
            "no memory",
        ),
        (
            Path::new("nowhere"),
            "full",
            "seed=1",
            "`finetune.base`",
            "nowhere",
        ),
    ] {
        let error = try_adapt(base, method, &[overrides])
            .unwrap_err()
            .to_string();
        assert!(error.contains(key) && error.contains(expected), "{error}");
    }
    // What only the data tells.
    let out = folder.path().join("out");
    for (method, set, parts) in [
        (
            "full",
            "task.steps=99",
            ["`task`", "episodes of 100 steps", "at most 7 steps"],
        ),
        ("none", NEW_FAMILY, ["`task`", "19 actions", "17 actions"]),
    ] {
        let error = run(&adapt(method, &[set]), &out, Start::Overwrite, None).unwrap_err();
        for part in parts {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    }
    assert!(
        adapt("memory", &["model.adapter.rank=3"])
            .model
            .adapter
            .is_none()
    );
    adapt(
        "full",
        &["model.memory.strength_bias=-2", "model.observation_gain=1"],
    );
}

#[test]
fn a_base_of_several_tasks_adapts_to_its_families_and_reports_each_task() {
    let folder = TempDir::new().unwrap();
    let base = folder.path().join("base");
    finish(&config(MANY, &[]), &base, Start::Fresh);
    let longer = ["task.steps=40", "train.batch_tokens=300"];
    let hallway = [
        "task.name=hallway",
        "task.steps=",
        "task.pairs=",
        "task.length=1",
        "train.batch_tokens=300",
    ];
    for (method, overrides) in [("lora", &longer[..]), ("full", &hallway)] {
        let config = try_adapt(&base, method, overrides).unwrap();
        let out = folder.path().join(method);
        let adaptation = finish(&config, &out, Start::Fresh).adaptation.unwrap();
        // Not the one that was held out.
        let labels = adaptation.base_tasks.iter().map(|task| task.label.as_str());
        assert!(labels.eq(["recall", "hallway"]));
    }
    let model = model_of(&folder.path().join("full"));
    assert_eq!(model.spaces(), model_of(&base).spaces());
}

#[test]
fn a_share_is_the_first_demonstrations_and_at_least_one() {
    for (share, episodes) in [("1", 40), ("0.05", 2), ("0.3", 12), ("0.0001", 1)] {
        let config = adapt("full", &[&format!("finetune.share={share}")]);
        assert_eq!(config.shared(config.data.generated_episodes()), episodes);
    }
    // Batches of more tokens than there are left become smaller.
    let folder = TempDir::new().unwrap();
    let config = adapt("full", &["finetune.share=0.05", "train.batch_tokens=700"]);
    let summary = finish(&config, folder.path(), Start::Fresh);
    // Two episodes of 6 steps of 3 tokens in each of 7 steps.
    let line = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line.lines().last().unwrap()).unwrap();
    assert_eq!((summary.steps, line["tokens"].as_u64()), (7, Some(7 * 36)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_adapters_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        of_numbers: bool,
        with_family: bool,
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let names = ["adapter_config.json", "adapter_model.safetensors"];
        let folder = if with_family { new_family() } else { adapter() };
        let mut files = names.map(|name| bytes(folder, name));
        let damaged = &mut files[usize::from(of_numbers)];
        for (place, byte) in edits {
            let place = place.index(damaged.len());
            damaged[place] = byte;
        }
        if let Some(cut) = cut {
            damaged.truncate(cut.index(damaged.len()));
        }
        let [settings, numbers] = &files;
        let paths = names.map(Path::new);
        if let Err(error) =
            adapter_from_bytes((paths[0], settings), (paths[1], numbers), &model_of(base()))
        {
            prop_assert!(error.to_string().len() > 10);
        }
    }
}

#[test]
fn commands_adapt_evaluate_and_merge() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("base.toml"), RECALL).unwrap();
    std::fs::write(folder.path().join("other.toml"), OTHER).unwrap();
    let json = |arguments: &[&str]| -> serde_json::Value {
        let output = dtmem(folder.path(), arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let refused = |arguments: &[&str], part: &str| {
        let output = dtmem(folder.path(), arguments);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(part), "{part} is missing in: {error}");
    };
    json(&["train", "base.toml"]);
    let on = ["finetune", "other.toml", "--base", "runs/base"];
    let adapted = json(
        &[
            &on[..],
            &["--share", "0.5", "--set", "model.adapter.rank=2"],
        ]
        .concat(),
    );
    assert_eq!(adapted["adaptation"]["method"], "lora");
    assert_eq!(adapted["adaptation"]["share"], 0.5);
    assert_eq!(adapted["trained_parameters"], 2 * 5 * 2 * 2 * 8);
    let adapter = ["--adapter", "runs/other-lora"];
    let evaluated = json(&[&["eval", "runs/base"], &adapter[..]].concat());
    for key in [
        "task",
        "success_rate",
        "episodes",
        "trained_parameters",
        "adaptation",
    ] {
        assert_eq!(evaluated[key], adapted[key], "{key}");
    }
    let merge = [
        &["merge", "runs/base"],
        &adapter[..],
        &["--out", "runs/merged"],
    ]
    .concat();
    let output = dtmem(folder.path(), &merge);
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{}",
        text(&output.stderr)
    );
    let merged = json(&["eval", "runs/merged"]);
    assert_eq!(merged["tasks"][0]["success_rate"], adapted["success_rate"]);
    let after = &adapted["adaptation"]["base_tasks"][0]["after"]["success_rate"];
    assert_eq!(merged["tasks"][1]["success_rate"], *after);
    let output = dtmem(
        folder.path(),
        &[&["inspect", "runs/base"], &adapter[..]].concat(),
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    let page = text(&bytes(folder.path(), "runs/other-lora/episode-0.html"));
    assert!(page.contains("runs/base with runs/other-lora"));
    assert_eq!(
        merged["parameters"],
        json(&["eval", "runs/base"])["parameters"]
    );

    refused(&merge, "--overwrite");
    refused(&on, "--resume");
    refused(&["eval", "runs/other-lora"], "--adapter runs/other-lora");
    refused(&["finetune", "other.toml"], "--base");
    refused(
        &[&on[..], &["--method", "magic"]].concat(),
        "lora, full, memory",
    );
    refused(
        &["finetune", "other.toml", "--base", "x"],
        "x/model.safetensors",
    );
    refused(
        &["merge", "runs/base", "--adapter", "x", "--out", "y"],
        "x/adapter_config.json",
    );
}
