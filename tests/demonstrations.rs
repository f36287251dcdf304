//! Demonstrations: generated the same whatever the threads, kept in files that are checked value by value.

#![cfg(feature = "trainer")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use dtmem::spaces::{ActionSpace, Family, Numbers, ObservationSpace};
use dtmem::tasks::{DemonstrationError, Demonstrations, EpisodeView, Split, Task};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

fn hallway(episodes: usize, share: f64) -> Demonstrations {
    Demonstrations::generate(&Task::Hallway { length: 2 }, episodes, 7, share, |_| {}).unwrap()
}

/// A small set of a user's own: two fields, three actions, episodes of 3 and 2 steps.
fn own() -> Demonstrations {
    let mut set = Demonstrations::new(Family {
        observation: ObservationSpace::codes([2], [4, 9]),
        action: ActionSpace::Discrete(3),
    })
    .unwrap();
    set.push(EpisodeView {
        observations: (&[0_u8, 8, 3, 0, 1, 1]).into(),
        actions: (&[0_u8, 2, 1]).into(),
        rewards: &[0.0, -1.0, 0.5],
        pairs: &[(2, 0), (1, 1), (2, 0)],
        annotated: true,
    })
    .unwrap();
    let second = EpisodeView {
        observations: (&[2_u8, 2, 1, 7]).into(),
        actions: (&[1_u8, 1]).into(),
        rewards: &[0.0, 1.0],
        pairs: &[],
        annotated: false,
    };
    set.push(second).unwrap();
    set
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("demos.safetensors")
    }

    /// Writes these bytes and loads them.
    fn load(&self, bytes: &[u8]) -> Result<Demonstrations, DemonstrationError> {
        fs::write(self.file(), bytes).unwrap();
        Demonstrations::load(&self.file())
    }
}

fn bytes_of(set: &Demonstrations) -> Vec<u8> {
    let folder = Folder::new();
    set.save(&folder.file()).unwrap();
    fs::read(folder.file()).unwrap()
}

#[test]
fn demonstrations_are_the_same_whatever_the_number_of_threads() {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        bytes_of(&pool.install(|| hallway(600, 0.5)))
    };
    let one = with(1);
    assert_eq!(one, with(2));
    assert_eq!(one, with(5));
}

#[test]
fn generation_reports_progress_up_to_the_last_episode() {
    let mut reports = Vec::new();
    let task = Task::Ordering { length: 3 };
    Demonstrations::generate(&task, 700, 0, 1.0, |done| reports.push(done)).unwrap();
    assert!(reports.len() > 1 && reports.is_sorted());
    assert_eq!(reports.last(), Some(&700));
}

#[test]
fn a_generated_set_holds_the_experts_episodes_in_order() {
    let task = Task::Counting {
        length: 4,
        test_frequency: 0.5,
        empty_frequency: 0.1,
    };
    let set = Demonstrations::generate(&task, 300, 9, 1.0, |_| {}).unwrap();
    assert_eq!((set.len(), set.is_empty()), (300, false));
    assert_eq!(
        (set.family(), set.taken().map(|taken| taken.len())),
        (&task.family(), Some(7))
    );
    for (number, episode) in set.episodes().enumerate() {
        let played = task
            .demonstrate(Split::Demonstration, 9, number as u64)
            .unwrap();
        assert_eq!(episode, EpisodeView::from(&played));
    }
    assert_eq!(
        set.steps(),
        set.episodes().map(|episode| episode.steps()).sum::<usize>()
    );
    assert_eq!(
        set.longest(),
        set.episodes().map(|episode| episode.steps()).max().unwrap()
    );
    assert_eq!(set.episode(300), None);
}

#[test]
fn a_share_of_the_episodes_keeps_its_annotation_and_nothing_else_changes() {
    let full = hallway(1000, 1.0);
    for (share, count) in [(1.0, 1000), (0.5, 500), (0.29, 290), (0.001, 1), (0.0, 0)] {
        let set = hallway(1000, share);
        let kept = set.episodes().filter(|episode| episode.annotated).count();
        assert_eq!(kept, count, "share {share}");
        for (episode, whole) in set.episodes().zip(full.episodes()) {
            let pairs = if episode.annotated { whole.pairs } else { &[] };
            assert_eq!(
                episode,
                EpisodeView {
                    annotated: episode.annotated,
                    pairs,
                    ..whole
                }
            );
        }
    }
    let generate =
        |share| Demonstrations::generate(&Task::Hallway { length: 2 }, 3, 0, share, |_| {});
    assert_eq!(generate(1.5).unwrap_err().argument, "annotated");
    assert_eq!(generate(f64::NAN).unwrap_err().argument, "annotated");
}

#[test]
fn impossible_requests_are_refused() {
    let generate = |length, episodes| {
        Demonstrations::generate(&Task::Hallway { length }, episodes, 0, 1.0, |_| {})
            .unwrap_err()
            .argument
    };
    assert_eq!(generate(0, 5), "length");
    assert_eq!(generate(2, 0), "episodes");
}

#[test]
fn what_is_saved_is_what_is_loaded() {
    let folder = Folder::new();
    let recall = serde_json::from_value(json!({"name": "recall", "steps": 6})).unwrap();
    let recall = Demonstrations::generate(&recall, 20, 1, 1.0, |_| {}).unwrap();
    for set in [hallway(30, 0.4), recall, own()] {
        set.save(&folder.file()).unwrap();
        assert_eq!(Demonstrations::load(&folder.file()).unwrap(), set);
    }
    let names: Vec<_> = fs::read_dir(folder.0.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["demos.safetensors"], "nothing is left beside it");
}

#[test]
fn pairs_are_kept_sorted_and_each_once() {
    assert_eq!(own().episode(0).unwrap().pairs, [(1, 1), (2, 0)]);
}

#[test]
fn the_summary_tells_what_is_in_the_set() {
    let summary = own().summary();
    for part in [
        "episodes      2",
        "steps         5",
        "action 1      3 (60.0 %)",
        "1 (50.00 %)",
        "not told",
    ] {
        assert!(summary.contains(part), "{part:?} in\n{summary}");
    }
    assert!(
        hallway(3, 1.0)
            .summary()
            .contains("hallway,length=2, seed 7")
    );
}

/// Sets of real numbers and of images: 3 and 2 steps.
fn own_kinds() -> [Demonstrations; 2] {
    let fill = |set: &mut Demonstrations, observations: &Numbers, actions: &Numbers| {
        let Family {
            observation,
            action,
        } = set.family().clone();
        let mut first = 0;
        for steps in [3, 2] {
            let rows = |width: usize| first * width..(first + steps) * width;
            set.push(EpisodeView {
                observations: observations.all().part(rows(observation.fields())),
                actions: actions.all().part(rows(action.fields())),
                rewards: &[0.5, -1.0, 0.0][..steps],
                pairs: &[(1, 0)],
                annotated: true,
            })
            .unwrap();
            first += steps;
        }
    };
    let mut vectors = Demonstrations::new(Family {
        observation: ObservationSpace::reals([2]),
        action: ActionSpace::Continuous(3),
    })
    .unwrap();
    let reals = |len| Numbers::Reals((0..len).map(|index| index as f32 / 4.0 - 1.0).collect());
    fill(&mut vectors, &reals(10), &reals(15));
    let mut images = Demonstrations::new(Family {
        observation: ObservationSpace::pixels([2, 3, 1]),
        action: ActionSpace::Discrete(4),
    })
    .unwrap();
    let pixels = Numbers::Bytes((0..30).map(|index| index * 8).collect());
    fill(&mut images, &pixels, &Numbers::Bytes(vec![0, 3, 1, 2, 0]));
    [vectors, images]
}

#[test]
fn real_numbers_and_images_come_back_from_a_file_as_they_were() {
    let folder = Folder::new();
    for set in own_kinds() {
        let loaded = folder.load(&bytes_of(&set)).unwrap();
        assert_eq!(loaded, set);
        assert!(is_sound(&loaded));
    }
    let [vectors, _] = own_kinds();
    let summary = vectors.summary();
    for part in [
        "[2], real numbers",
        "action [2]",
        "-0.5000 min",
        "2.5000 max",
    ] {
        assert!(summary.contains(part), "{part:?} in {summary}");
    }
    let doubles: Vec<u8> = (0..10)
        .flat_map(|index| (f64::from(index) / 4.0 - 1.0).to_le_bytes())
        .collect();
    let wide = Parts::of(&vectors).set("observations", Dtype::F64, &[5, 2], doubles);
    assert_eq!(
        folder.load(&wide.bytes()).unwrap().episode(0),
        vectors.episode(0)
    );
}

#[test]
fn files_of_real_numbers_and_images_that_cannot_be_right_are_refused() {
    let folder = Folder::new();
    let [vectors, images] = own_kinds();
    let (vectors, images) = (Parts::of(&vectors), Parts::of(&images));
    let nan = |len: usize, at: usize| {
        let mut values = vec![0.0; len];
        values[at] = f32::NAN;
        f32s(&values)
    };
    for (parts, expected) in [
        (
            vectors
                .clone()
                .set("observations", Dtype::F32, &[5, 2], nan(10, 7)),
            &[
                "`observations`",
                "episode 1, step 0, number 1",
                "NaN",
                "finite",
            ][..],
        ),
        (
            vectors
                .clone()
                .set("actions", Dtype::F32, &[5, 3], nan(15, 5)),
            &["`actions`", "episode 0, step 1, number 2", "finite"],
        ),
        (
            vectors
                .clone()
                .set("actions", Dtype::F32, &[5], f32s(&[0.0; 5])),
            &["`actions`", "[5]", "[steps, numbers]"],
        ),
        (
            vectors
                .clone()
                .set("actions", Dtype::F32, &[4, 3], f32s(&[0.0; 12])),
            &["`actions`", "[4, 3]", "[5, 3]"],
        ),
        (
            vectors.clone().set("actions", Dtype::F32, &[5, 0], []),
            &["`action_count`", "found 0"],
        ),
        (
            vectors.clone().header("action_count", json!(3)),
            &["`actions`", "with `action_count`"],
        ),
        (
            vectors
                .clone()
                .header("observation_cardinalities", json!([4, 9])),
            &["`observations`", "with `observation_cardinalities`", "U8"],
        ),
        (
            vectors.clone().set("actions", Dtype::U8, &[5], [0; 5]),
            &["`action_count`", "none", "a number"],
        ),
        (
            images
                .clone()
                .set("observations", Dtype::U8, &[5, 6], [0; 30]),
            &["`observations`", "[6]", "[steps, height, width, channels]"],
        ),
        (
            images
                .clone()
                .set("observations", Dtype::U8, &[5, 0, 3, 1], []),
            &["`observations`", "[0, 3, 1]"],
        ),
        (
            images
                .clone()
                .set("actions", Dtype::U8, &[5], [0, 4, 0, 0, 0]),
            &["`actions`", "episode 0, step 1", "below 4"],
        ),
    ] {
        let message = folder.load(&parts.bytes()).unwrap_err().to_string();
        for part in expected {
            assert!(message.contains(part), "{part:?} in {message}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_written_leaves_the_old_one_and_says_which() {
    let folder = Folder::new();
    // A folder stands where the file should go: the last step, the renaming, fails.
    fs::create_dir(folder.file()).unwrap();
    fs::write(folder.file().join("kept"), "old").unwrap();
    let error = own().save(&folder.file()).unwrap_err();
    assert!(
        matches!(&error, DemonstrationError::Io { path, .. } if *path == folder.file()),
        "{error}"
    );
    assert_eq!(fs::read_dir(folder.0.path()).unwrap().count(), 1);
    assert_eq!(fs::read(folder.file().join("kept")).unwrap(), b"old");

    let missing = folder.0.path().join("missing/demos.safetensors");
    let error = own().save(&missing).unwrap_err().to_string();
    assert!(error.contains("missing/demos.safetensors"), "{error}");
    let error = Demonstrations::load(&missing).unwrap_err().to_string();
    assert!(error.contains("missing/demos.safetensors"), "{error}");
}

/// A file taken apart, to be changed and put together again.
#[derive(Clone)]
struct Parts {
    header: Option<String>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn of(set: &Demonstrations) -> Self {
        Self::split(&bytes_of(set))
    }

    fn split(bytes: &[u8]) -> Self {
        let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get("dtmem"))
            .cloned();
        let tensors = SafeTensors::deserialize(bytes).unwrap();
        let parts = tensors.iter().map(|(name, view)| {
            (
                name.to_owned(),
                view.dtype(),
                view.shape().to_vec(),
                view.data().to_vec(),
            )
        });
        Self {
            header,
            tensors: parts.collect(),
        }
    }

    fn set(
        mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        data: impl IntoIterator<Item = u8>,
    ) -> Self {
        self = self.without(name);
        self.tensors.push((
            name.to_owned(),
            dtype,
            shape.to_vec(),
            data.into_iter().collect(),
        ));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|(tensor, ..)| tensor != name);
        self
    }

    /// Changes one entry of the header; `null` removes it.
    fn header(mut self, key: &str, value: Value) -> Self {
        let mut header: Value = serde_json::from_str(&self.header.unwrap()).unwrap();
        let entries = header.as_object_mut().unwrap();
        if value.is_null() {
            entries.remove(key)
        } else {
            entries.insert(key.to_owned(), value)
        };
        self.header = Some(header.to_string());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, dtype, shape, data)| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let metadata = self
            .header
            .clone()
            .map(|header| HashMap::from([("dtmem".to_owned(), header)]));
        safetensors::serialize(views, metadata).unwrap()
    }
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn i32s(values: &[i32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

#[test]
fn a_users_file_may_use_wide_integers_and_leave_out_what_is_not_known() {
    let folder = Folder::new();
    let rewards: Vec<u8> = [0.0_f64, -1.0, 0.5, 0.0, 1.0]
        .into_iter()
        .flat_map(f64::to_le_bytes)
        .collect();
    let wide = Parts::of(&own())
        .set("actions", Dtype::I64, &[5], i64s(&[0, 2, 1, 1, 1]))
        .set("rewards", Dtype::F64, &[5], rewards)
        .set("episode_offsets", Dtype::I32, &[3], i32s(&[0, 3, 5]))
        .set("pairs", Dtype::I64, &[2, 2], i64s(&[2, 0, 1, 1]))
        .set("annotated", Dtype::BOOL, &[2], [1, 0]);
    assert_eq!(folder.load(&wide.bytes()).unwrap(), own());

    let all = folder
        .load(&Parts::of(&own()).without("annotated").bytes())
        .unwrap();
    assert!(all.episodes().all(|episode| episode.annotated));
    let none = Parts::of(&own())
        .without("annotated")
        .without("pairs")
        .without("pair_offsets");
    let none = folder.load(&none.bytes()).unwrap();
    assert!(
        none.episodes()
            .all(|episode| !episode.annotated && episode.pairs.is_empty())
    );
    let none = Parts::of(&own())
        .without("pairs")
        .without("pair_offsets")
        .set("annotated", Dtype::U8, &[2], [0, 0]);
    folder.load(&none.bytes()).unwrap();
}

#[test]
fn every_value_that_cannot_be_right_is_refused_with_file_place_found_and_expected() {
    let folder = Folder::new();
    let good = Parts::of(&own());
    folder.load(&good.bytes()).unwrap();
    let p = || good.clone();
    let no_header = Parts {
        header: None,
        ..p()
    };
    let bad_header = Parts {
        header: Some("{".to_owned()),
        ..p()
    };
    let recall = json!({"name": "recall", "kind": "delayed", "steps": 3});
    let cases: Vec<(Parts, &[&str])> = vec![
        (
            p().without("observations"),
            &["`observations`", "no such tensor"],
        ),
        (p().without("actions"), &["`actions`", "no such tensor"]),
        (p().without("rewards"), &["`rewards`", "no such tensor"]),
        (
            p().without("episode_offsets"),
            &["`episode_offsets`", "no such tensor"],
        ),
        (
            p().without("pairs"),
            &["`pairs`, `pair_offsets`", "both or neither"],
        ),
        (
            p().without("pair_offsets"),
            &["`pairs`, `pair_offsets`", "both or neither"],
        ),
        (
            p().set("anotated", Dtype::U8, &[2], [1, 0]),
            &["`anotated`", "annotated"],
        ),
        (
            p().set("observations", Dtype::I8, &[5, 2], [0; 10]),
            &["`observations`", "I8", "U8"],
        ),
        (
            p().set("observations", Dtype::U8, &[], [0]),
            &["`observations`", "scalar"],
        ),
        (
            p().set("observations", Dtype::U8, &[5], [0; 5]),
            &["`observations`", "one axis or more"],
        ),
        (
            p().set("observations", Dtype::U8, &[5, 0, 2], []),
            &["`observations`", "[0, 2]"],
        ),
        (
            p().set("observations", Dtype::U8, &[5, 3], [0; 15]),
            &["cardinalities", "2", "[3]"],
        ),
        (
            p().set("observations", Dtype::U8, &[4, 2], [0; 8]),
            &["`actions`", "[5]", "[4]"],
        ),
        (
            p().set(
                "observations",
                Dtype::U8,
                &[5, 2],
                [0, 0, 0, 0, 0, 0, 0, 9, 0, 0],
            ),
            &[
                "`observations`",
                "episode 1, step 0, code 1",
                "found 9",
                "below 9",
            ],
        ),
        (
            p().set("actions", Dtype::U8, &[5, 1], [0; 5]),
            &["`actions`", "[5, 1]", "[5]"],
        ),
        (
            p().set("actions", Dtype::F32, &[5], [0; 20]),
            &["`actions`", "F32"],
        ),
        (
            p().set("actions", Dtype::U8, &[5], [0, 0, 0, 0, 3]),
            &["`actions`", "episode 1, step 1", "3", "below 3"],
        ),
        (
            p().set("actions", Dtype::I64, &[5], i64s(&[0, 0, -1, 0, 0])),
            &["`actions`", "index 2", "-1", "below 3"],
        ),
        (
            p().set("actions", Dtype::I64, &[5], i64s(&[0, 256, 0, 0, 0])),
            &["`actions`", "index 1", "256", "below 3"],
        ),
        (
            p().set("rewards", Dtype::F32, &[4], f32s(&[0.0; 4])),
            &["`rewards`", "[4]", "[5]"],
        ),
        (
            p().set("rewards", Dtype::F16, &[5], [0; 10]),
            &["`rewards`", "F16", "F32"],
        ),
        (
            p().set(
                "rewards",
                Dtype::F32,
                &[5],
                f32s(&[0.0, f32::NAN, 0.0, 0.0, 0.0]),
            ),
            &["`rewards`", "episode 0, step 1", "NaN", "finite"],
        ),
        (
            p().set("rewards", Dtype::F64, &[5], [0x7f; 40]),
            &["`rewards`", "finite"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[1], i64s(&[0])),
            &["`episode_offsets`", "[1]"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[0], []),
            &["`episode_offsets`", "[0]"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[3, 1], i64s(&[0, 3, 5])),
            &["`episode_offsets`", "[3, 1]"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[3], i64s(&[1, 3, 5])),
            &["`episode_offsets`", "1 to 5", "0 to 5"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[3], i64s(&[0, 3, 4])),
            &["`episode_offsets`", "0 to 4", "0 to 5"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[3], i64s(&[0, 6, 5])),
            &["`episode_offsets`", "index 2", "5 after 6"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[3], i64s(&[0, -1, 5])),
            &["`episode_offsets`", "index 1", "-1"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[3], i64s(&[0, 5, 5])),
            &["`actions`", "episode 1", "0 steps"],
        ),
        (
            p().set("episode_offsets", Dtype::I64, &[3], i64s(&[0, i64::MAX, 5])),
            &["`episode_offsets`", "5 after"],
        ),
        (
            p().set("pairs", Dtype::I32, &[4], [0; 16]),
            &["`pairs`", "[4]", "[pairs, 2]"],
        ),
        (
            p().set("pairs", Dtype::I32, &[2, 2], i32s(&[1, 2, 0, 0])),
            &["`pairs`", "episode 0, pair 0", "(1, 2)"],
        ),
        (
            p().set("pairs", Dtype::I32, &[2, 2], i32s(&[0, 0, 3, 0])),
            &["`pairs`", "episode 0, pair 1", "(3, 0)", "< 3"],
        ),
        (
            p().set("pairs", Dtype::I32, &[2, 2], i32s(&[0, 0, 1, -1])),
            &["`pairs`", "index 3", "-1"],
        ),
        (
            p().set("pair_offsets", Dtype::I64, &[2], i64s(&[0, 2])),
            &["`pair_offsets`", "[2]", "[3]"],
        ),
        (
            p().set("pair_offsets", Dtype::I64, &[3], i64s(&[0, 2, 3])),
            &["`pair_offsets`", "0 to 2"],
        ),
        (
            p().set("pair_offsets", Dtype::I64, &[3], i64s(&[0, 1, 1])),
            &["`pair_offsets`", "0 to 1", "0 to 2"],
        ),
        (
            p().set("annotated", Dtype::U8, &[3], [1, 0, 0]),
            &["`annotated`", "[3]", "[2]"],
        ),
        (
            p().set("annotated", Dtype::U8, &[2], [1, 2]),
            &["`annotated`", "episode 1", "found 2", "0 or 1"],
        ),
        (
            p().without("pairs")
                .without("pair_offsets")
                .set("annotated", Dtype::U8, &[2], [0, 1]),
            &["`annotated`", "episode 1", "no pairs"],
        ),
        (no_header, &["`dtmem`", "nothing", "action_count"]),
        (bad_header, &["`dtmem`", "EOF"]),
        (
            p().header("version", json!(2)),
            &["`version`", "found 2", "expected 1"],
        ),
        (
            p().header("action_count", Value::Null),
            &["`dtmem`", "action_count"],
        ),
        (
            p().header("action_count", json!(0)),
            &["`action_count`", "found 0", "1 to 256"],
        ),
        (
            p().header("action_count", json!(257)),
            &["`action_count`", "found 257"],
        ),
        (p().header("action_count", json!(-1)), &["`dtmem`", "-1"]),
        (
            p().header("observation_cardinalities", json!([4])),
            &["cardinalities", "1", "[2]"],
        ),
        (
            p().header("observation_cardinalities", json!([4, 300])),
            &["cardinalities", "index 1", "300", "1 to 256"],
        ),
        (
            p().header("actions", json!(3)),
            &["`dtmem`", "unknown field `actions`"],
        ),
        (
            p().header("task", json!({"name": "maze"})),
            &["`dtmem`", "maze"],
        ),
        (
            p().header("task", json!({"name": "hallway", "length": 0})),
            &["`task`", "`length`", "found 0"],
        ),
        (
            p().header("task", recall),
            &["`dtmem`", "[4, 9]", "[35, 2]", "recall"],
        ),
    ];
    for (parts, expected) in cases {
        let error = folder
            .load(&parts.bytes())
            .expect_err(&format!("{expected:?}"));
        assert!(
            matches!(error, DemonstrationError::Invalid { .. }),
            "{error}"
        );
        let message = error.to_string();
        assert!(
            message.starts_with(&folder.file().display().to_string()),
            "{message}"
        );
        for part in expected {
            assert!(message.contains(part), "{part:?} in {message}");
        }
    }
}

#[test]
fn a_refused_episode_leaves_the_set_as_it_was() {
    let mut set = own();
    let bad = EpisodeView {
        observations: (&[0_u8, 0]).into(),
        actions: (&[0_u8]).into(),
        rewards: &[0.0],
        pairs: &[(0, 1)],
        annotated: true,
    };
    assert!(set.push(bad).is_err());
    assert!(
        set.push(EpisodeView {
            pairs: &[],
            rewards: &[],
            ..bad
        })
        .is_err()
    );
    assert!(
        set.push(EpisodeView {
            pairs: &[],
            observations: (&[0_u8; 3]).into(),
            ..bad
        })
        .is_err()
    );
    assert_eq!(set, own());
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let folder = Folder::new();
    let bytes = bytes_of(&own());
    for length in 0..bytes.len() {
        let error = folder.load(&bytes[..length]).unwrap_err();
        assert!(
            matches!(error, DemonstrationError::Format { .. }),
            "{length} bytes: {error}"
        );
    }
    folder.load(&[&bytes[..], &[0]].concat()).unwrap_err();
}

#[test]
fn a_header_length_beyond_the_file_is_refused_without_reserving_it() {
    let folder = Folder::new();
    let mut bytes = bytes_of(&own());
    for length in [
        u64::MAX,
        u64::MAX / 2,
        1 << 40,
        99_000_000,
        bytes.len() as u64,
    ] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        folder.load(&bytes).unwrap_err();
    }
}

fn is_sound(set: &Demonstrations) -> bool {
    set.episodes().all(|episode| {
        let steps = episode.steps();
        steps > 0
            && episode.rewards.len() == steps
            && episode.observations.len() == steps * set.space().fields()
            && episode
                .actions
                .bytes()
                .iter()
                .all(|&action| usize::from(action) < set.family().action.outputs())
            && episode.rewards.iter().all(|reward| reward.is_finite())
            && episode
                .pairs
                .iter()
                .all(|&(from, to)| to <= from && (from as usize) < steps)
            && !set.summary().is_empty()
    })
}

static OWN: LazyLock<Vec<u8>> = LazyLock::new(|| bytes_of(&own()));

proptest! {
    #[test]
    fn changed_bytes_give_an_error_or_a_sound_set(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let folder = Folder::new();
        let mut bytes = OWN.clone();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Ok(set) = folder.load(&bytes) {
            prop_assert!(is_sound(&set));
        }
    }

    #[test]
    fn changed_tensors_give_an_error_or_a_sound_set(
        which in 0..7_usize,
        dtype in prop::sample::select(vec![Dtype::U8, Dtype::BOOL, Dtype::I32, Dtype::I64, Dtype::F32, Dtype::F64, Dtype::BF16]),
        shape in proptest::collection::vec(0..6_usize, 0..4),
        values in proptest::collection::vec(-2..7_i64, 64),
        cut in any::<bool>(),
    ) {
        let folder = Folder::new();
        let mut parts = Parts::split(&OWN);
        let (_, old_dtype, old_shape, data) = &mut parts.tensors[which];
        // Either other values in the same shape, or another shape and type altogether.
        if cut {
            *old_dtype = dtype;
            *old_shape = shape;
        }
        let width = old_dtype.bitsize() / 8;
        let count: usize = old_shape.iter().product();
        *data = (0..count).flat_map(|index| values[index % values.len()].to_le_bytes()[..width].to_vec()).collect();
        if let Ok(set) = folder.load(&parts.bytes()) {
            prop_assert!(is_sound(&set));
        }
    }
}

#[test]
fn the_file_format_of_the_documentation_is_the_one_that_is_written() {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/demonstrations.md"))
            .unwrap();
    for (name, ..) in Parts::of(&own()).tensors {
        assert!(text.contains(&format!("| `{name}` |")), "{name}");
    }
    let header: Value = serde_json::from_str(&Parts::of(&hallway(1, 1.0)).header.unwrap()).unwrap();
    for key in header.as_object().unwrap().keys() {
        assert!(text.contains(&format!("| `{key}` |")), "{key}");
    }
}
