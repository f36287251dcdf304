//! The native tasks against episodes recorded from LTMB's environments, and against their own definition.
//!
//! `$DTMEM_TRACES` may name a trace file or a folder of them; they are replayed as well.

#![cfg(feature = "trainer")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dtmem::spaces::Content;
use dtmem::tasks::counting::{Counting, CountingLayout, Room};
use dtmem::tasks::grid::Object;
use dtmem::tasks::hallway::{Hallway, HallwayLayout};
use dtmem::tasks::ordering::{Ordering, OrderingLayout};
use dtmem::tasks::recall::{CUES, KEYS};
use dtmem::tasks::{Environment, MAX_LENGTH, RecallKind, Split, Task, play_expert};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde::Deserialize;
use serde_json::{Value, json};

/// One recorded episode.
#[derive(Deserialize)]
struct Trace {
    task: String,
    params: Parameters,
    max_steps: usize,
    expert: bool,
    layout: Value,
    steps: Vec<Step>,
    final_obs: Vec<u8>,
    success: bool,
    /// [recalling token, recalled token]; token 2t is the observation of step t.
    pairs: Option<Vec<(u32, u32)>>,
}

#[derive(Deserialize)]
struct Parameters {
    length: usize,
}

#[derive(Deserialize)]
struct Step {
    obs: Vec<u8>,
    action: usize,
    reward: f64,
    terminated: bool,
    truncated: bool,
}

impl Trace {
    fn task(&self) -> Task {
        serde_json::from_value(json!({"name": self.task, "length": self.params.length})).unwrap()
    }

    fn environment(&self) -> Box<dyn Environment> {
        let layout = self.layout.clone();
        let length = self.params.length;
        match self.task.as_str() {
            "hallway" => {
                let layout: HallwayLayout = serde_json::from_value(layout).unwrap();
                assert_eq!(layout.hallways.len(), length);
                Box::new(Hallway::new(&layout).unwrap())
            }
            "counting" => {
                let layout: CountingLayout = serde_json::from_value(layout).unwrap();
                Box::new(Counting::new(length, layout).unwrap())
            }
            "ordering" => {
                let layout: OrderingLayout = serde_json::from_value(layout).unwrap();
                Box::new(Ordering::new(length, layout).unwrap())
            }
            other => panic!("unknown task {other}"),
        }
    }
}

fn see(environment: &dyn Environment) -> Vec<u8> {
    let mut codes = vec![255; 147];
    environment.observe(&mut codes);
    codes
}

/// Replays an episode; panics with the first difference.
fn replay(trace: &Trace, name: &str) {
    assert_eq!(
        trace.task().max_steps(),
        trace.max_steps,
        "{name}: step limit"
    );
    let mut environment = trace.environment();
    let mut success = false;
    for (t, step) in trace.steps.iter().enumerate() {
        assert_eq!(
            see(environment.as_ref()),
            step.obs,
            "{name}: observation {t}"
        );
        if trace.expert {
            assert_eq!(
                environment.expert(),
                step.action,
                "{name}: the expert's action {t}"
            );
        }
        let outcome = environment.step(step.action);
        assert_eq!(
            outcome.reward.to_bits(),
            step.reward.to_bits(),
            "{name}: reward {t}"
        );
        assert_eq!(
            outcome.terminated, step.terminated,
            "{name}: terminated {t}"
        );
        assert_eq!(outcome.truncated, step.truncated, "{name}: truncated {t}");
        success = outcome.success;
    }
    assert_eq!(success, trace.success, "{name}: success");
    assert_eq!(
        see(environment.as_ref()),
        trace.final_obs,
        "{name}: final observation"
    );

    assert_eq!(
        trace.pairs.is_some(),
        trace.expert,
        "{name}: pairs come with the expert"
    );
    if let Some(pairs) = &trace.pairs {
        let episode = play_expert(trace.environment().as_mut(), 147, trace.max_steps);
        assert_eq!(episode.actions.len(), trace.steps.len(), "{name}: length");
        let ours: BTreeSet<(u32, u32)> = episode
            .pairs
            .iter()
            .map(|&(from, to)| (2 * from, 2 * to))
            .collect();
        assert_eq!(ours.len(), episode.pairs.len(), "{name}: each pair once");
        assert_eq!(ours, pairs.iter().copied().collect(), "{name}: pairs");
        assert!(episode.success, "{name}: the expert succeeds");
    }
}

fn replay_file(path: &Path) -> usize {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let traces: Vec<Trace> =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    for (number, trace) in traces.iter().enumerate() {
        replay(trace, &format!("{} #{number}", path.display()));
    }
    traces.len()
}

/// The trace files of a folder, or the one file.
fn trace_files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.into()];
    }
    let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "json")
    });
    files.sort();
    files
}

#[test]
fn recorded_episodes_are_reproduced_cell_for_cell() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ltmb");
    let episodes: usize = trace_files(&folder)
        .iter()
        .map(|file| replay_file(file))
        .sum();
    assert_eq!(episodes, 33 + 41 + 40);
}

#[test]
fn traces_named_by_the_environment_are_reproduced() {
    if let Some(path) = std::env::var_os("DTMEM_TRACES") {
        let files = trace_files(Path::new(&path));
        let episodes: usize = files.iter().map(|file| replay_file(file)).sum();
        assert!(episodes > 0, "DTMEM_TRACES names no episode");
        println!("replayed {episodes} episodes of {} files", files.len());
    }
}

/// A task of each kind, short enough to play often.
fn short_tasks() -> [Task; 5] {
    [
        Task::Hallway { length: 3 },
        Task::Counting {
            length: 6,
            test_frequency: 0.4,
            empty_frequency: 0.2,
        },
        Task::Ordering { length: 5 },
        Task::Recall {
            kind: RecallKind::Delayed,
            pairs: 1,
            steps: 7,
        },
        Task::Recall {
            kind: RecallKind::Associative,
            pairs: 4,
            steps: 9,
        },
    ]
}

#[test]
fn the_expert_succeeds_within_the_limit_and_stays_within_the_declared_codes() {
    for task in short_tasks() {
        let space = task.observation_space();
        let Content::Codes(cardinalities) = &space.content else {
            panic!("codes");
        };
        for number in 0..200 {
            let episode = task.demonstrate(Split::Demonstration, 1, number).unwrap();
            let steps = episode.actions.len();
            assert!(episode.success, "{task} #{number}");
            assert!(steps <= task.max_steps());
            assert_eq!(episode.rewards.len(), steps);
            assert_eq!(episode.observations.len(), steps * space.fields());
            assert!(
                episode
                    .actions
                    .iter()
                    .all(|&action| usize::from(action) < task.actions())
            );
            for (index, &code) in episode.observations.iter().enumerate() {
                assert!(usize::from(code) < cardinalities[index % cardinalities.len()]);
            }
            assert!(episode.pairs.is_sorted_by(|one, next| one < next));
            assert!(
                episode
                    .pairs
                    .iter()
                    .all(|&(from, to)| to <= from && (from as usize) < steps)
            );
        }
    }
}

#[test]
fn an_episode_depends_on_split_seed_and_number_and_on_nothing_else() {
    for task in short_tasks() {
        let play = |split, seed, number| task.demonstrate(split, seed, number).unwrap();
        let episode = play(Split::Evaluation, 5, 9);
        assert_eq!(episode, play(Split::Evaluation, 5, 9));
        // One episode of a small task may be like another by chance; ten are not.
        let ten = |split, seed, first: u64| -> Vec<_> {
            (first..first + 10).map(|n| play(split, seed, n)).collect()
        };
        assert_ne!(
            ten(Split::Evaluation, 5, 0),
            ten(Split::Demonstration, 5, 0)
        );
        assert_ne!(ten(Split::Evaluation, 5, 0), ten(Split::Evaluation, 6, 0));
        assert_ne!(ten(Split::Evaluation, 5, 0), ten(Split::Evaluation, 5, 10));
    }
}

/// A seed shall mean the same episodes after an update of the random generator's crate.
#[test]
fn the_draws_of_a_seed_stay_what_they_were() {
    let digests = short_tasks().map(|task| {
        let codes = (0..20).flat_map(|number| {
            task.demonstrate(Split::Demonstration, 3, number)
                .unwrap()
                .observations
        });
        codes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, code| {
            (hash ^ u64::from(code)).wrapping_mul(0x0100_0000_01b3)
        })
    });
    let expected = [
        13_496_499_901_891_273_465,
        8_411_444_428_632_836_850,
        17_207_944_831_586_580_041,
        14_818_100_155_249_504_809,
        16_653_501_601_247_441_360,
    ];
    assert_eq!(digests, expected);
}

/// Every count is within five standard deviations of an equal share.
fn assert_uniform(counts: &[usize], what: &str) {
    let total: usize = counts.iter().sum();
    let share = 1.0 / counts.len() as f64;
    let mean = total as f64 * share;
    let deviation = (mean * (1.0 - share)).sqrt();
    assert!(
        counts
            .iter()
            .all(|&count| (count as f64 - mean).abs() < 5.0 * deviation),
        "{what}: {counts:?}"
    );
}

fn object_index(object: Object) -> usize {
    Object::all().position(|other| other == object).unwrap()
}

#[test]
fn hallway_draws_targets_doors_and_places_uniformly() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (mut targets, mut others, mut doors, mut places) = ([0; 18], [0; 18], [0; 6], [0; 8]);
    for _ in 0..4000 {
        let layout = HallwayLayout::random(4, &mut rng);
        targets[object_index(layout.target)] += 1;
        places[2 * layout.h_star + usize::from(layout.side)] += 1;
        for branch in &layout.hallways {
            doors[usize::from(branch.upper_door)] += 1;
            doors[usize::from(branch.lower_door)] += 1;
            for object in [branch.upper_object, branch.lower_object] {
                if object != layout.target {
                    others[object_index(object)] += 1;
                }
            }
        }
        Hallway::new(&layout).unwrap();
    }
    assert_uniform(&targets, "targets");
    assert_uniform(&others, "other objects");
    assert_uniform(&doors, "doors");
    assert_uniform(&places, "places");
}

#[test]
fn counting_draws_rooms_cells_and_objects_as_often_as_told() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let (mut tests, mut empty, mut objects) = ([0; 2], [0; 2], [0; 18]);
    for _ in 0..2000 {
        let rooms = CountingLayout::random(11, 0.3, 0.1, &mut rng).rooms;
        assert!(matches!(rooms[0], Room::Normal { .. }));
        for (index, room) in rooms.iter().enumerate() {
            tests[usize::from(matches!(room, Room::Test { .. }))] += usize::from(index > 0);
            match room {
                Room::Test { object } => objects[object_index(*object)] += 1,
                Room::Normal { cells } => {
                    for cell in cells {
                        empty[usize::from(cell.is_none())] += 1;
                        if let Some(object) = cell {
                            objects[object_index(*object)] += 1;
                        }
                    }
                }
            }
        }
    }
    let share = |counts: [usize; 2]| counts[1] as f64 / (counts[0] + counts[1]) as f64;
    assert!((share(tests) - 0.3).abs() < 0.02, "test rooms: {tests:?}");
    assert!((share(empty) - 0.1).abs() < 0.01, "empty cells: {empty:?}");
    assert_uniform(&objects, "objects");
}

#[test]
fn ordering_draws_every_order_and_distinct_choices() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let (mut firsts, mut lefts, mut rights, mut earlier) = ([0; 18], [0; 18], [0; 18], [0; 2]);
    for _ in 0..2000 {
        let layout = OrderingLayout::random(4, &mut rng);
        assert_eq!(layout.choices.len(), 5);
        firsts[object_index(layout.permutation[0])] += 1;
        for &(left, right) in &layout.choices {
            assert_ne!(left, right);
            lefts[object_index(left)] += 1;
            rights[object_index(right)] += 1;
            let shown = |object| layout.permutation.iter().position(|&shown| shown == object);
            earlier[usize::from(shown(left) < shown(right))] += 1;
        }
        Ordering::new(4, layout).unwrap();
    }
    assert_uniform(&firsts, "first objects");
    assert_uniform(&lefts, "left objects");
    assert_uniform(&rights, "right objects");
    assert_uniform(&earlier, "answers");
}

#[test]
fn the_chance_of_counting_is_that_of_always_taking_the_green_door() {
    let even = |layout: &CountingLayout| {
        let mut counts = [0; 18];
        layout.rooms.iter().all(|room| match room {
            Room::Normal { cells } => {
                cells
                    .iter()
                    .flatten()
                    .for_each(|&object| counts[object_index(object)] += 1);
                true
            }
            Room::Test { object } => counts[object_index(*object)] % 2 == 0,
        })
    };
    for (length, episodes) in [(1, 10), (2, 20_000), (6, 20_000), (20, 40_000)] {
        let mut rng = ChaCha8Rng::seed_from_u64(length as u64);
        let won = (0..episodes)
            .filter(|_| even(&CountingLayout::random(length, 0.3, 0.1, &mut rng)))
            .count();
        let task = Task::Counting {
            length,
            test_frequency: 0.3,
            empty_frequency: 0.1,
        };
        let measured = won as f64 / f64::from(episodes);
        assert!(
            (task.chance() - measured).abs() < 0.015,
            "{length} rooms: {} against {measured}",
            task.chance()
        );
    }
}

#[test]
fn recall_asks_for_what_exactly_one_earlier_step_said() {
    for (kind, pairs, steps) in [
        (RecallKind::Delayed, 0, 1),
        (RecallKind::Delayed, 9, 20),
        (RecallKind::Associative, 1, 1),
        (RecallKind::Associative, 16, 16),
        (RecallKind::Associative, 5, 12),
    ] {
        let task = Task::Recall { kind, pairs, steps };
        for number in 0..100 {
            let episode = task.demonstrate(Split::Evaluation, 2, number).unwrap();
            let shown: Vec<[u8; 2]> = episode.observations.as_chunks().0.to_vec();
            assert_eq!(shown.len(), steps + 1);
            let [query, marker] = shown[steps];
            assert_eq!(usize::from(marker), kind.cardinalities()[1] - 1);
            let answer = episode.actions[steps];
            assert!(
                episode.actions[..steps]
                    .iter()
                    .all(|&action| usize::from(action) == task.actions() - 1)
            );

            // A context step with a value is a pair, a symbol among the cues a cue; all others are distractors.
            let said: Vec<usize> = match kind {
                RecallKind::Delayed => (0..steps)
                    .filter(|&t| usize::from(shown[t][0]) <= CUES)
                    .collect(),
                RecallKind::Associative => (0..steps).filter(|&t| shown[t][1] > 0).collect(),
            };
            let source = match kind {
                RecallKind::Delayed => {
                    assert_eq!((said.as_slice(), query), ([0].as_slice(), 0));
                    assert_eq!(shown[0], [answer + 1, 0]);
                    0
                }
                RecallKind::Associative => {
                    let keys: BTreeSet<u8> = said.iter().map(|&t| shown[t][0]).collect();
                    assert_eq!((keys.len(), said.len()), (pairs, pairs), "distinct keys");
                    assert!(
                        keys.iter()
                            .all(|&key| (1..=KEYS).contains(&usize::from(key)))
                    );
                    let source = said.into_iter().find(|&t| shown[t][0] == query).unwrap();
                    assert_eq!(shown[source][1], answer + 1);
                    source
                }
            };
            assert_eq!(episode.pairs, [(steps as u32, source as u32)]);
            assert_eq!(episode.rewards.iter().sum::<f32>(), 1.0);
        }
    }
}

#[test]
fn recall_accepts_any_action_before_the_query_and_one_answer_at_it() {
    for kind in [RecallKind::Delayed, RecallKind::Associative] {
        let task = Task::Recall {
            kind,
            pairs: 2,
            steps: 5,
        };
        let answer = usize::from(
            *task
                .demonstrate(Split::Evaluation, 4, 0)
                .unwrap()
                .actions
                .last()
                .unwrap(),
        );
        for action in 0..task.actions() {
            let mut environment = task.reset(Split::Evaluation, 4, 0).unwrap();
            for _ in 0..5 {
                let outcome = environment.step(action);
                assert!(!outcome.over() && outcome.reward == 0.0 && !outcome.success);
            }
            let outcome = environment.step(action);
            assert!(outcome.terminated && !outcome.truncated);
            assert_eq!(outcome.success, action == answer);
            assert_eq!(outcome.reward, f64::from(u8::from(action == answer)));
        }
    }
}

#[test]
fn a_task_is_written_by_its_name_with_the_papers_parameters_as_defaults() {
    let parse = |value: Value| serde_json::from_value::<Task>(value);
    let paper = [
        ("hallway", Task::Hallway { length: 30 }),
        (
            "counting",
            Task::Counting {
                length: 20,
                test_frequency: 0.3,
                empty_frequency: 0.1,
            },
        ),
        ("ordering", Task::Ordering { length: 50 }),
    ];
    for (name, task) in paper {
        assert_eq!(parse(json!({ "name": name })).unwrap(), task);
        assert_eq!(task.name(), name);
        assert_eq!(parse(serde_json::to_value(&task).unwrap()).unwrap(), task);
    }
    assert_eq!(
        parse(json!({"name": "hallway", "length": 2})).unwrap(),
        Task::Hallway { length: 2 }
    );
    let error = parse(json!({"name": "hallway", "lenght": 2}))
        .unwrap_err()
        .to_string();
    assert!(error.contains("lenght"), "{error}");
    let error = parse(json!({"name": "maze"})).unwrap_err().to_string();
    assert!(
        error.contains("maze") && error.contains("hallway"),
        "{error}"
    );
}

#[test]
fn a_task_is_read_from_the_text_it_prints() {
    for task in short_tasks() {
        assert_eq!(task.to_string().parse::<Task>().unwrap(), task);
    }
    assert_eq!(Task::Hallway { length: 2 }.to_string(), "hallway,length=2");
    assert_eq!(
        "ordering".parse::<Task>().unwrap(),
        Task::Ordering { length: 50 }
    );
    for (text, part) in [
        ("", "unknown variant"),
        ("maze", "maze"),
        ("hallway,2", "NAME,parameter=value"),
        ("hallway,lenght=2", "lenght"),
        ("hallway,length=two", "two"),
        ("hallway,length=0", "found 0"),
        ("recall,kind=sideways", "sideways"),
    ] {
        let error = text.parse::<Task>().unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let counting = |test_frequency, empty_frequency| Task::Counting {
        length: 3,
        test_frequency,
        empty_frequency,
    };
    let recall = |pairs, steps| Task::Recall {
        kind: RecallKind::Associative,
        pairs,
        steps,
    };
    for (task, argument) in [
        (Task::Hallway { length: 0 }, "length"),
        (Task::Hallway { length: usize::MAX }, "length"),
        (
            Task::Counting {
                length: MAX_LENGTH + 1,
                test_frequency: 0.3,
                empty_frequency: 0.1,
            },
            "length",
        ),
        (Task::Ordering { length: 0 }, "length"),
        (counting(-0.1, 0.1), "test_frequency"),
        (counting(0.3, f64::NAN), "empty_frequency"),
        (recall(0, 8), "pairs"),
        (recall(9, 8), "pairs"),
        (recall(17, 30), "pairs"),
        (recall(1, 0), "steps"),
    ] {
        assert_eq!(task.validate().unwrap_err().argument, argument, "{task}");
        assert!(task.reset(Split::Evaluation, 0, 0).is_err());
        assert!(task.demonstrate(Split::Evaluation, 0, 0).is_err());
    }
    for task in [
        Task::Hallway { length: MAX_LENGTH },
        counting(1.0, 0.0),
        counting(0.0, 1.0),
        recall(16, 16),
    ] {
        assert!(
            task.demonstrate(Split::Evaluation, 0, 0).unwrap().success,
            "{task}"
        );
    }
}

#[test]
fn impossible_layouts_are_refused() {
    let hallway = |change: &dyn Fn(&mut HallwayLayout)| {
        let mut layout = HallwayLayout::random(3, &mut ChaCha8Rng::seed_from_u64(1));
        change(&mut layout);
        Hallway::new(&layout).map(drop)
    };
    assert!(hallway(&|_| {}).is_ok());
    assert!(hallway(&|layout| layout.hallways.clear()).is_err());
    assert!(hallway(&|layout| layout.side = 1 - layout.side).is_err());
    assert!(hallway(&|layout| layout.side = 2).is_err());
    assert!(hallway(&|layout| layout.h_star = usize::MAX / 2).is_err());
    assert!(hallway(&|layout| layout.hallways[0].upper_door = 6).is_err());
    assert!(hallway(&|layout| layout.target = Object(4, 0)).is_err());
    assert!(
        hallway(&|layout| layout.hallways[(layout.h_star + 1) % 3].lower_object = layout.target)
            .is_err()
    );

    let counting = |length, change: &dyn Fn(&mut CountingLayout)| {
        let mut layout = CountingLayout::random(3, 0.5, 0.1, &mut ChaCha8Rng::seed_from_u64(1));
        change(&mut layout);
        Counting::new(length, layout).map(drop)
    };
    assert!(counting(3, &|_| {}).is_ok());
    assert!(counting(2, &|_| {}).is_err());
    assert!(counting(3, &|layout| layout.rooms.clear()).is_err());
    assert!(
        counting(3, &|layout| layout.rooms[2] = Room::Test {
            object: Object(5, 6)
        })
        .is_err()
    );
    assert!(
        counting(3, &|layout| layout.rooms[0] = Room::Normal {
            cells: [Some(Object(8, 0)); 6]
        })
        .is_err()
    );

    let ordering = |length, change: &dyn Fn(&mut OrderingLayout)| {
        let mut layout = OrderingLayout::random(3, &mut ChaCha8Rng::seed_from_u64(1));
        change(&mut layout);
        Ordering::new(length, layout).map(drop)
    };
    assert!(ordering(3, &|_| {}).is_ok());
    assert!(ordering(2, &|_| {}).is_err());
    assert!(ordering(3, &|layout| layout.permutation.truncate(17)).is_err());
    assert!(ordering(3, &|layout| layout.permutation[0] = layout.permutation[1]).is_err());
    assert!(ordering(3, &|layout| layout.choices[1].0 = layout.choices[1].1).is_err());
    assert!(ordering(3, &|layout| layout.choices[1].0 = Object(5, 6)).is_err());
}

#[test]
fn a_layout_that_runs_out_ends_the_episode_as_a_failure() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut counting = Counting::new(3, CountingLayout::random(1, 0.3, 0.1, &mut rng)).unwrap();
    let last = (0..4)
        .map(|_| counting.step(counting.expert()))
        .last()
        .unwrap();
    assert!(last.truncated && !last.terminated && !last.success);

    let layout = OrderingLayout {
        choices: Vec::new(),
        ..OrderingLayout::random(1, &mut rng)
    };
    let mut ordering = Ordering::new(1, layout).unwrap();
    let last = (0..19)
        .map(|_| ordering.step(ordering.expert()))
        .last()
        .unwrap();
    assert!(last.truncated && !last.terminated && !last.success);
}

proptest! {
    #[test]
    fn any_actions_lead_to_an_end_within_the_limit_and_never_to_a_panic(
        seed: u64,
        actions in proptest::collection::vec(0..9_usize, 100),
        codes in 0..160_usize,
    ) {
        for task in short_tasks() {
            let mut environment = task.reset(Split::Evaluation, seed, 0).unwrap();
            // Also with a buffer of the wrong size, and after the end.
            let mut seen = vec![0; codes];
            let mut end = None;
            for (step, &action) in actions.iter().enumerate() {
                environment.observe(&mut seen);
                environment.recalls(&mut Vec::new());
                environment.expert();
                let outcome = environment.step(action);
                prop_assert!(outcome.reward.is_finite());
                prop_assert!(outcome.over() || !outcome.success);
                if outcome.over() {
                    end = end.or(Some(step + 1));
                }
            }
            prop_assert!(end.is_some_and(|end| end <= task.max_steps()), "{task}: {end:?}");
        }
    }
}
