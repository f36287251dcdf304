//! What a configuration accepts, and what it says about what it does not.

#![cfg(feature = "trainer")]

use std::path::Path;

use dtmem::backend::Cpu;
use dtmem::model::{AttentionSpan, Model, ModelConfig, Spaces, SupervisedPart};
use dtmem::train::config::{Config, ConfigError};
use proptest::prelude::*;

const SMALL: &str = r#"
[task]
name = "hallway"
length = 2
[model]
width = 8
heads = 2
[train]
steps = 10
"#;

fn parse(overrides: &[&str]) -> Result<Config, ConfigError> {
    let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
    Config::parse("small.toml", SMALL, &overrides)
}

fn message(overrides: &[&str]) -> String {
    parse(overrides).unwrap_err().to_string()
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_shipped_configuration_is_accepted() {
    let mut found = 0;
    for entry in std::fs::read_dir(repository().join("configs")).unwrap() {
        Config::load(&entry.unwrap().path(), &[]).unwrap();
        found += 1;
    }
    assert!(found >= 10, "{found} configurations");
}

/// Number of parameters of a configuration's model.
fn parameters(config: &Config) -> usize {
    let task = config.task.as_ref().unwrap();
    let spaces = Spaces {
        families: vec![task.family()],
        steps: task.max_steps(),
    };
    let model = Model::new(Cpu::<f32>::new(), config.model.clone(), spaces, None);
    model.unwrap().parameter_count()
}

#[test]
fn controls_differ_from_the_original_in_nothing_but_the_model() {
    let load = |name: &str| {
        let file = repository().join(format!("configs/recall-{name}.toml"));
        Config::load(&file, &[]).unwrap()
    };
    let original = load("quick");
    let controls = ["no-memory", "width-matched", "top-k", "transformer"].map(load);
    for control in &controls {
        assert_ne!(control.model, original.model);
        let same = Config {
            model: original.model.clone(),
            ..control.clone()
        };
        assert_eq!(same, original);
    }
    let [no_memory, matched, top_k, transformer] = controls.map(|control| control.model);
    let original_model = original.model.clone();
    let without = ModelConfig {
        memory: None,
        ..original_model.clone()
    };
    assert_eq!(no_memory, without);
    let of_width = ModelConfig {
        width: matched.width,
        heads: matched.heads,
        feed_forward: matched.feed_forward,
        ..without.clone()
    };
    assert_eq!(matched, of_width);
    let memory = top_k.memory.as_ref().map(|memory| memory.top_k);
    assert!(memory.is_some_and(|k| k > 0));
    assert_eq!(transformer.attention, AttentionSpan::Episode);
    assert_eq!(transformer.memory, None);
    let count = |model| {
        let control = Config {
            model,
            ..original.clone()
        };
        parameters(&control) as f64
    };
    let ratio = count(matched) / count(original_model);
    assert!((ratio - 1.0).abs() <= 0.02, "{ratio}");
    assert!(count(without) < 0.9 * count(original.model.clone()));
}

#[test]
fn unknown_key_is_named_with_its_table_and_the_nearest_one() {
    for (text, key, table, nearest) in [
        ("sede = 1", "sede", "the top level", "`seed`"),
        ("[trian]", "trian", "the top level", "`train`"),
        (
            "[train]\nbatch_token = 1",
            "batch_token",
            "[train]",
            "`batch_tokens`",
        ),
        ("[model]\nwdith = 1", "wdith", "[model]", "`width`"),
        (
            "[model.memory]\nslot = 1",
            "slot",
            "[model.memory]",
            "`slots`",
        ),
        ("[loss]\nlamda = 1", "lamda", "[loss]", "`lambda`"),
        (
            "[task]\nname = \"hallway\"\nlenght = 1",
            "lenght",
            "[task]",
            "`length`",
        ),
    ] {
        let error = Config::parse("mine.toml", text, &[])
            .unwrap_err()
            .to_string();
        for part in ["mine.toml", &format!("`{key}` in {table}"), nearest] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }
}

#[test]
fn unknown_key_of_an_override_names_the_argument() {
    let error = message(&["train.stepz=3"]);
    for part in ["--set train.stepz=3", "`stepz` in [train]", "`steps`"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_key_like_no_other_is_not_taken_for_one() {
    let error = message(&["train.lr=3"]);
    assert!(!error.contains("did you mean"), "{error}");
    assert!(
        error.contains("valid keys: ") && error.contains("learning_rate"),
        "{error}"
    );
}

#[test]
fn wrong_types_and_missing_keys_are_named() {
    for (argument, parts) in [
        (
            "train.steps=many",
            [
                "train.steps",
                "found string \"many\", expected a whole number",
            ],
        ),
        ("train.clip=much", ["train.clip", "expected a number"]),
        ("model.width=-1", ["model.width", "-1"]),
        ("model.width=1.5", ["model.width", "1.5"]),
        ("model=1.5", ["`model`", "expected a table"]),
        ("model.block=postln", ["model.block", "expected `post_ln`"]),
        ("loss.heads=1", ["loss.heads", "expected a list"]),
        ("task.name=hall", ["task", "hallway"]),
        ("task.name=", ["task", "name"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed.x=1", ["--set seed.x=1", "seed"]),
        ("seed", ["--set seed", "key=value"]),
        ("a..b=1", ["--set a..b=1", "a..b"]),
        ("=1", ["--set =1", "key"]),
    ] {
        let mut overrides = vec!["seed=1"];
        overrides.push(argument);
        let error = message(&overrides);
        for part in parts {
            assert!(
                error.contains(part),
                "{argument}: {part} is missing in: {error}"
            );
        }
    }
}

#[test]
fn text_that_is_not_toml_is_told_with_its_place() {
    let error = Config::parse("mine.toml", "a = = 1", &[])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("mine.toml") && error.contains("line 1"),
        "{error}"
    );
}

#[test]
fn overrides_take_toml_values_bare_strings_and_nothing() {
    let config = parse(&[
        "model.block=pre_ln",
        "train.schedule=\"cosine\"",
        "loss.heads=[1, 2]",
        "loss.lambda=3",
        "model.memory.slots=5",
        "evaluation.target_return=0.5",
        "model.heads=4",
        "model.heads=",
    ])
    .unwrap();
    assert_eq!(config.loss.heads, [1, 2]);
    assert_eq!(config.loss.lambda, 3.0);
    assert_eq!(config.model.memory.unwrap().slots, 5);
    assert_eq!(
        config.model.heads, 2,
        "an empty value brings the default back"
    );
    assert_eq!(config.evaluation.target_return, Some(0.5));
    let config = parse(&["model.memory.slots=5", "model.memory="]).unwrap();
    assert_eq!(config.model.memory, None);
}

#[test]
fn steps_and_epochs_replace_each_other_on_the_command_line_only() {
    let config = parse(&["train.epochs=3"]).unwrap();
    assert_eq!((config.train.steps, config.train.epochs), (None, Some(3)));
    let both = Config::parse("both.toml", &format!("{SMALL}epochs = 3"), &[]);
    assert!(both.unwrap_err().to_string().contains("train.steps"));
    assert!(message(&["train.steps="]).contains("train.steps"));
}

#[test]
fn values_out_of_range_are_named_with_what_was_expected() {
    for (overrides, key, expected) in [
        (
            vec!["model.heads=3"],
            "model.heads",
            "a divisor of model.width = 8, such as 2",
        ),
        (vec!["model.heads=0"], "model.heads", "1 to"),
        (vec!["model.width=100000000"], "model.width", "65536"),
        (
            vec!["model.width=65536", "model.layers=1000"],
            "model",
            "at most",
        ),
        (vec!["model.dropout=1"], "model.dropout", "below 1"),
        (vec!["model.dropout=nan"], "model.dropout", "below 1"),
        (vec!["model.memory.slots=0"], "model.memory.slots", "1 to"),
        (
            vec!["model.memory.slots=4", "model.memory.top_k=5"],
            "model.memory.top_k",
            "0 to 4",
        ),
        (
            vec!["model.adapter.rank=2"],
            "model.adapter",
            "[model.memory]",
        ),
        (
            vec!["model.adapter.rank=2", "model.memory.slots=4"],
            "model.adapter",
            "finetune --method lora",
        ),
        (
            vec!["model.memory.slots=4", "finetune.base=b"],
            "model.adapter",
            "finetune --method lora",
        ),
        (
            vec![
                "finetune.base=b",
                "finetune.method=full",
                "finetune.share=0",
            ],
            "finetune.share",
            "above 0",
        ),
        (
            vec![
                "model.memory.slots=4",
                "finetune.base=b",
                "model.adapter.targets=[\"value\", \"value\"]",
            ],
            "model.adapter.targets",
            "none twice",
        ),
        (vec!["loss.layer=5"], "loss.layer", "model.layers = 4"),
        (vec!["loss.layer=0"], "loss.layer", "model.layers = 4"),
        (vec!["loss.heads=[3]"], "loss.heads", "model.heads = 2"),
        (vec!["loss.heads=[2, 1]"], "loss.heads", "ascending"),
        (vec!["loss.heads=[]"], "loss.heads", "at least one"),
        (vec!["loss.lambda=-1"], "loss.lambda", "0"),
        (
            vec!["loss.supervise=memory"],
            "loss.supervise",
            "[model.memory]",
        ),
        (
            vec!["model.attention=segment", "model.segment_steps=2"],
            "loss.lambda",
            "pairs cross segments",
        ),
        (vec!["data.annotated=1.5"], "data.annotated", "0 to 1"),
        (vec!["data.episodes=0"], "data.episodes", "1 to"),
        (vec!["data.return_scale=0"], "data.return_scale", "above 0"),
        (vec!["task.length=0"], "task.length", "1 to"),
        (vec!["train.steps=0"], "train.steps", "1 to"),
        (vec!["train.epochs=0"], "train.epochs", "1 to"),
        (vec!["train.batch_tokens=0"], "train.batch_tokens", "1 to"),
        (
            vec!["train.learning_rate=0"],
            "train.learning_rate",
            "above 0",
        ),
        (
            vec!["train.learning_rate=inf"],
            "train.learning_rate",
            "above 0",
        ),
        (
            vec!["train.weight_decay=0.1"],
            "train.weight_decay",
            "adamw",
        ),
        (vec!["train.clip=-1"], "train.clip", "0"),
        (vec!["train.log_every=0"], "train.log_every", "1 to"),
        (
            vec!["train.checkpoint_every=0"],
            "train.checkpoint_every",
            "1 to",
        ),
        (vec!["evaluation.episodes=0"], "evaluation.episodes", "1 to"),
        (
            vec!["evaluation.every=4294967296"],
            "evaluation.every",
            "0 to",
        ),
        (vec!["task="], "task", "data.file"),
    ] {
        let error = message(&overrides);
        assert!(
            error.contains(&format!("`{key}`")) && error.contains(expected),
            "{overrides:?}: {error}"
        );
    }
}

#[test]
fn memory_loss_is_switched_off_by_lambda_zero_and_counts_from_one() {
    assert_eq!(
        parse(&["loss.lambda=0", "loss.layer=99"])
            .unwrap()
            .supervision(),
        None
    );
    let supervision = parse(&["loss.layer=4", "loss.heads=[1,2]"])
        .unwrap()
        .supervision()
        .unwrap();
    assert_eq!(supervision.layer, 3);
    assert_eq!(supervision.part, SupervisedPart::Heads(vec![0, 1]));
}

#[test]
fn resolved_configuration_reads_back_as_itself() {
    let config = parse(&[
        "model.memory.slots=3",
        "model.adapter.rank=2",
        "finetune.base=base",
        "evaluation.target_return=1",
    ])
    .unwrap();
    let text = config.to_toml().unwrap();
    assert_eq!(Config::parse("resolved", &text, &[]).unwrap(), config);
}

#[test]
fn what_does_not_change_the_model_is_no_difference() {
    let config = parse(&[]).unwrap();
    let same = parse(&[
        "train.log_every=7",
        "train.checkpoint_every=3",
        "evaluation.seed=5",
    ])
    .unwrap();
    assert_eq!(config.difference(&same).unwrap(), None);
    let other = parse(&["model.memory.slots=3"]).unwrap();
    let (key, mine, _) = config.difference(&other).unwrap().unwrap();
    assert_eq!((key.as_str(), mine.as_str()), ("model.memory", "nothing"));
    let other = parse(&["train.learning_rate=1"]).unwrap();
    assert_eq!(
        config.difference(&other).unwrap().unwrap().0,
        "train.learning_rate"
    );
}

/// Every key, so that a new one cannot be forgotten in the documentation.
#[test]
fn documentation_names_every_key() {
    let config = parse(&[
        "model.memory.slots=3",
        "model.adapter.rank=2",
        "finetune.base=base",
        "evaluation.target_return=1",
        "data.episodes=5",
        "data.file=x.safetensors",
    ])
    .unwrap();
    let text = std::fs::read_to_string(repository().join("docs/configuration.md")).unwrap();
    let mut table: toml::Table = toml::from_str(&config.to_toml().unwrap()).unwrap();
    table["train"]
        .as_table_mut()
        .unwrap()
        .insert("epochs".into(), 1.into());
    let mut tables = vec![("".to_owned(), table)];
    while let Some((name, table)) = tables.pop() {
        let section = text
            .split("\n## ")
            .find(|s| s.starts_with(&format!("`[{name}]`")));
        for (key, value) in table {
            match value {
                toml::Value::Table(inner) => {
                    let dot = if name.is_empty() { "" } else { "." };
                    tables.push((format!("{name}{dot}{key}"), inner));
                }
                _ if name.is_empty() => assert!(text.contains(&format!("| `{key}` |")), "{key}"),
                _ => assert!(
                    section.is_some_and(|s| s.contains(&format!("| `{key}` |"))),
                    "[{name}] {key}"
                ),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_configurations_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        overrides in prop::collection::vec("[a-z_.]{0,12}=?[-0-9a-z\\[\\]\"., ]{0,8}", 0..3),
    ) {
        let shipped = std::fs::read(repository().join("configs/recall-quick.toml")).unwrap();
        let mut bytes = shipped;
        for (place, byte) in edits {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Err(error) = Config::parse("mutated", &text, &overrides) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn mutated_values_are_accepted_or_named(
        key in prop::sample::select(vec![
            "seed", "task.length", "data.episodes", "data.annotated", "data.return_scale", "model.width",
            "model.layers", "model.heads", "model.feed_forward", "model.dropout", "model.segment_steps",
            "model.memory.slots", "model.memory.top_k", "loss.lambda", "loss.layer", "train.steps",
            "train.epochs", "train.batch_tokens", "train.learning_rate", "train.warmup_steps", "train.clip",
            "evaluation.episodes", "evaluation.target_return",
        ]),
        value in prop_oneof![
            any::<i64>().prop_map(|v| v.to_string()),
            any::<f64>().prop_map(|v| format!("{v:?}")),
            "[a-z]{0,5}",
        ],
    ) {
        match parse(&[&format!("{key}={value}")]) {
            Ok(config) => prop_assert!(config.to_toml().is_ok()),
            Err(error) => prop_assert!(error.to_string().contains(key.split('.').next_back().unwrap())
                || error.to_string().contains("`model`") || error.to_string().contains("`loss."), "{error}"),
        }
    }
}

const MANY: &str = r#"
[[tasks]]
task = { name = "recall", steps = 6, pairs = 2 }
[[tasks]]
share = 0.5
task = { name = "recall", kind = "delayed" }
[[tasks]]
data = { file = "some/walks.safetensors" }
[model]
width = 8
[loss]
lambda = 0
[train]
steps = 10
"#;

#[test]
fn tasks_are_a_list_each_with_a_name_of_its_own() {
    let labels = |config: &Config| -> Vec<String> {
        config
            .task_list()
            .into_iter()
            .filter_map(|task| task.label)
            .collect()
    };
    let many = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
        Config::parse("many.toml", MANY, &overrides)
    };
    let config = many(&[]).unwrap();
    assert_eq!(labels(&config), ["recall", "recall-2", "walks"]);
    assert_eq!(config.task_list()[1].share, 0.5);
    let again = Config::parse("again.toml", &config.to_toml().unwrap(), &[]).unwrap();
    assert_eq!(again, config);
    let config = many(&[
        "tasks.1.label=far",
        "tasks.1.task.steps=30",
        "tasks.2.share=0",
    ])
    .unwrap();
    assert_eq!(labels(&config), ["recall", "far", "walks"]);
    assert!(config.task_list()[2].is_held_out());
    assert_eq!(
        labels(&parse(&[]).unwrap()),
        ["hallway"],
        "[task] is a list of one"
    );
    for (overrides, parts) in [
        (&["task.name=hallway"][..], &["`task`", "[[tasks]]"][..]),
        (&["data.episodes=9"], &["`data`", "[[tasks]]"]),
        (
            &["evaluation.target_return=1"],
            &["evaluation.target_return", "target_return"],
        ),
        (&["tasks.0.share=-1"], &["tasks.0.share", "-1"]),
        (
            &["tasks.0.shares=1"],
            &["shares", "`share`", "--set tasks.0.shares=1"],
        ),
        (&["tasks.1.task.steps=0"], &["tasks.1.task.steps", "0"]),
        (&["tasks.3.share=1"], &["a list of 3", "`3`"]),
        (&["tasks.first.share=1"], &["a list of 3", "`first`"]),
        (&["tasks.2=1"], &["`tasks` is a list", "tasks.0.share"]),
        (&["tasks.2.data="], &["tasks.2.task", "nothing"]),
        (
            &["tasks.0.data.return_scale=0"],
            &["tasks.0.data.return_scale"],
        ),
        (
            &["tasks.0.share=0", "tasks.1.share=0", "tasks.2.share=0"],
            &["`tasks`", "at least one"],
        ),
    ] {
        let error = many(overrides).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }
}
