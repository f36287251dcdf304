//! What stands in a page, without a browser.

use super::*;

#[test]
fn the_page_says_what_the_model_computes() {
    for (text, layers, heads) in [(HALLWAY, 2, 2), (RECALL, 2, 2)] {
        for seed in 0..4 {
            let made = make(text, &[], seed);
            let shown = made.show(seed);
            let page = data(&shown.html);
            let steps = page["steps"].as_array().unwrap();
            assert_eq!(steps.len(), shown.episode.steps());

            // The model once more, over the finished episode.
            let mut packer = made.model.packer();
            packer
                .push_trajectory(dtmem::batch::Trajectory {
                    family: 0,
                    observations: (&shown.episode.observations).into(),
                    actions: (&shown.episode.actions).into(),
                    returns: &shown.episode.returns,
                    pairs: &[],
                    annotated: false,
                })
                .unwrap();
            let logits = made.model.logits(packer.batch()).unwrap();
            for (logits, step) in logits.chunks(made.played.task.actions()).zip(steps) {
                let exponentials: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
                let sum: f64 = exponentials.iter().sum();
                let probabilities = numbers(&step["probabilities"]);
                for (exponential, shown) in exponentials.iter().zip(&probabilities) {
                    let error = (exponential / sum - shown).abs();
                    assert!(error < 1e-4, "{error}");
                }
                let taken = step["action"].as_u64().unwrap() as usize;
                assert!(probabilities.iter().all(|p| *p <= probabilities[taken]));
            }

            let tokens = packer.batch().tokens();
            let maps = page["attention"].as_array().unwrap();
            assert_eq!(maps.len(), layers * heads);
            for (index, map) in maps.iter().enumerate() {
                let (layer, head) = (index / heads, index % heads);
                assert_eq!(map["layer"].as_u64(), Some(layer as u64 + 1));
                let read = decode(map["map"].as_str().unwrap(), (tokens, tokens)).unwrap();
                let wanted = made
                    .model
                    .attention_map(packer.batch(), layer, head)
                    .unwrap();
                for (read, wanted) in read.rows().into_iter().zip(wanted.rows()) {
                    assert!((wanted.sum() - 1.0).abs() < 1e-5);
                    assert!((read.sum() - 1.0).abs() < 1e-2);
                    assert!(read.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-3));
                }
                let taught = text == HALLWAY && (layer, head) == (1, 0);
                assert_eq!(map["taught"].as_bool(), Some(taught));
            }
        }
    }
}

#[test]
fn the_page_shows_what_the_memory_does() {
    let made = make(RECALL, &[], 3);
    let shown = made.show(2);
    let page = data(&shown.html);
    assert_eq!(numbers(&page["segments"]), [0.0, 9.0, 18.0, 27.0, 30.0]);
    let layers = page["memory"].as_array().unwrap();
    assert_eq!(layers.len(), shown.trace.memory.len());
    for (layer, wanted) in layers.iter().zip(&shown.trace.memory) {
        let (recall, start) = wanted.recall(&shown.trace.segments);
        let start = start.insert_axis(ndarray::Axis(0));
        for (name, wanted) in [
            ("address", &wanted.address),
            ("written", &wanted.written),
            ("keep", &wanted.keep),
            ("recall", &recall),
            ("start", &start),
        ] {
            let read = decode(layer[name].as_str().unwrap(), wanted.dim()).unwrap();
            let error = (&read - wanted).iter().fold(0.0_f64, |e, x| e.max(x.abs()));
            assert!(error < 1e-3, "{name}: {error}");
        }
        // A slot keeps what no token of the segment has erased.
        let rows = wanted.written.slice(s![9..18, ..]);
        for (slot, keep) in wanted.keep.row(1).iter().enumerate() {
            let left: f64 = rows
                .column(slot)
                .iter()
                .map(|erased| 1.0 - erased)
                .product();
            assert!((left - keep).abs() < 1e-5);
        }
    }
}

#[test]
fn episodes_are_those_of_the_evaluation() {
    for text in [HALLWAY, RECALL] {
        let made = make(text, &[], 1);
        let conditions = made.conditions(12);
        let stop = AtomicBool::new(false);
        let result = evaluate(&made.model, &made.played.task, &conditions, &stop, |_| {});
        let played: Vec<Episode> = (0..12).map(|number| made.play(number)).collect();
        let result = result.unwrap().unwrap();
        let successes = played.iter().filter(|episode| episode.success).count();
        assert_eq!(successes as u64, result.successes);
        let returns: f64 = played.iter().flat_map(|episode| &episode.rewards).sum();
        assert!((returns / 12.0 - result.mean_return).abs() < 1e-9);
        let told = |episode: &Episode| f64::from(episode.returns[0]) * conditions.return_scale;
        assert!(played.iter().all(|e| (told(e) - 1.0).abs() < 1e-6));
    }
}

#[test]
fn the_expert_is_shown_only_on_its_own_way() {
    let made = make(HALLWAY, &[], 2);
    let seed = made.header.config.evaluation.seed;
    let mut left = 0;
    for number in 0..20 {
        let episode = made.play(number);
        let split = dtmem::tasks::Split::Evaluation;
        let own = made.played.task.demonstrate(split, seed, number).unwrap();
        for step in 0..episode.steps() {
            let on_the_way = episode.actions[..step]
                .iter()
                .zip(&own.actions)
                .all(|(taken, expert)| taken == expert);
            if let (true, Some(expert)) = (on_the_way, own.actions.get(step)) {
                assert_eq!(episode.expert[step], Some(*expert));
            }
        }
        let Some(step) = episode.left_at() else {
            continue;
        };
        left += 1;
        assert!(episode.differs(step));
        assert!(episode.expert[step + 1..].iter().all(Option::is_none));
        assert!(
            episode
                .pairs
                .iter()
                .all(|(query, _)| *query as usize <= step)
        );
    }
    assert!(left > 0, "an untrained model leaves the way");
}

#[test]
fn the_first_lines_name_the_step_and_what_it_recalled_there() {
    // Before the query every action is accepted: only the answer decides.
    let made = make(RECALL, &[], 0);
    let failed = made.request(0, Some(50)).unwrap();
    assert!(!failed.episode.success);
    assert_eq!(
        (failed.diagnosis.step, failed.episode.left_at()),
        (9, Some(9))
    );
    let source = failed.episode.recalled(9).next().unwrap();
    let verdict = &failed.diagnosis.verdict;
    assert!(
        verdict.starts_with("Failed after 10 steps, return 0."),
        "{verdict}"
    );
    assert!(
        verdict.contains("first left the expert’s way at step 9"),
        "{verdict}"
    );
    let reason = &failed.diagnosis.reasons[0];
    assert!(
        reason.contains(&format!("follows from step {source}.")),
        "{reason}"
    );
    let query = 3 * 9 + 1;
    let (recall, _) = failed.trace.memory[0].recall(&failed.trace.segments);
    let share: f64 = recall.slice(s![query, 3 * source..3 * source + 3]).sum();
    assert!(
        reason.contains(&format!("holds {share:.2} of what step {source} wrote")),
        "{reason} {share}"
    );
    let conclusion = failed.diagnosis.reasons.last().unwrap();
    assert!(conclusion.starts_with("So it "), "{conclusion}");
    assert!(failed.html.contains(verdict.as_str()));
}

#[test]
fn a_failure_is_looked_for_where_one_is_asked_for() {
    let made = make(RECALL, &[], 0);
    let success = |number| made.play(number).success;
    let succeeds = (0..).find(|&number| success(number)).unwrap();
    let fails = (succeeds..).find(|&number| !success(number)).unwrap();
    assert_eq!(made.request(succeeds, Some(1000)).unwrap().number, fails);
    let error = made.request(succeeds, Some(fails - succeeds)).unwrap_err();
    assert!(error.to_string().contains("leave --failed out"), "{error}");
}

#[test]
fn a_page_needs_nothing_else_and_its_data_cannot_end_it() {
    let shown = make(HALLWAY, &[], 0).show(0);
    for foreign in ["http:", "https:", "src=", "@import", "fetch("] {
        assert!(!shown.html.contains(foreign), "{foreign}");
    }
    assert_eq!(shown.html.matches("</script>").count(), 2);
    assert_eq!(data(&shown.html)["name"], "runs/toy <b>&\"");
}

#[test]
fn pages_of_long_episodes_stay_small() {
    // Untrained heads look everywhere, which is the most to write down.
    for (text, overrides) in [
        (HALLWAY, ["task.length=30", "model.layers=4"]),
        (RECALL, ["task.steps=600", "model.memory.slots=300"]),
    ] {
        let overrides: Vec<&str> = overrides
            .into_iter()
            .chain(["train.batch_tokens=3000"])
            .collect();
        let shown = make(text, &overrides, 0).show(0);
        assert!(shown.html.len() < 4_000_000, "{}", shown.html.len());
        assert!(shown.episode.steps() > 100);
    }
}

#[test]
fn an_episode_that_is_too_long_is_refused() {
    let made = make(RECALL, &["task.steps=2000", "train.batch_tokens=7000"], 0);
    let error = made.request(0, None).unwrap_err();
    assert!(matches!(error, Error::TooLong { tokens: 6003 }), "{error}");
}

#[test]
fn another_task_is_played_if_it_fits() {
    let Made { header, .. } = make(HALLWAY, &[], 0);
    let own = task(&header, Some("hallway")).unwrap();
    assert_eq!(task(&header, None).unwrap(), own);
    let shorter = task(&header, Some("hallway,length=1")).unwrap();
    assert_eq!(shorter.task, Task::Hallway { length: 1 });
    assert_eq!(shorter.target_return, own.target_return);
    for (name, message) in [
        ("hallway,length=9", "up to 33 steps"),
        ("recall", "made for observations [7, 7, 3]"),
        ("hall", "expected NAME"),
    ] {
        let error = task(&header, Some(name)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let mut header = header;
    header.config.task = None;
    let error = task(&header, None).unwrap_err().to_string();
    assert!(error.contains("--task hallway,length=2"), "{error}");
    assert!(task(&header, Some("hallway,length=2")).is_ok());
}

#[test]
fn a_model_of_several_tasks_plays_the_one_that_is_named() {
    let (start, _) = RECALL.split_once("[task]").unwrap();
    let (_, rest) = RECALL.split_once("[model]").unwrap();
    let tasks = r#"
        [[tasks]]
        label = "short"
        target_return = 0.5
        [tasks.task]
        name = "recall"
        steps = 5
        pairs = 2
        [[tasks]]
        [tasks.task]
        name = "hallway"
        length = 1
        [tasks.data]
        return_scale = 4.0
    "#;
    let mut made = make(&format!("{start}{tasks}[model]{rest}"), &[], 0);
    assert_eq!(made.played.label, "short");
    made.header.target_returns = vec![0.5, 1.0];
    made.played = task(&made.header, Some("hallway")).unwrap();
    assert_eq!((made.played.family, made.played.return_scale), (1, 4.0));
    let page = data(&made.show(0).html);
    assert_eq!(page["task"], "hallway,length=1");
    assert_eq!(page["frames"]["kind"], "grid");
    assert_eq!(page["steps"][0]["told"], 0.25);
    assert_eq!(page["actions"].as_array().unwrap().len(), 7);
}

#[test]
fn the_command_writes_a_page_and_says_what_it_found() {
    let folder = TempDir::new().unwrap();
    make(RECALL, &[], 0).save(folder.path());
    let run = folder.path().to_str().unwrap();
    let done = dtmem(&[run, "--seed", "7", "--device", "cpu"]);
    assert!(done.status.success(), "{done:?}");
    let html = std::fs::read_to_string(folder.path().join("episode-7.html")).unwrap();
    let page = data(&html);
    assert_eq!(
        (page["episode"].as_u64(), page["name"].as_str()),
        (Some(7), Some(run))
    );
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(
        said.starts_with(page["verdict"].as_str().unwrap()),
        "{said}"
    );

    let other = folder.path().join("other.html");
    let done = dtmem(&[
        run,
        "--failed",
        "--out",
        other.to_str().unwrap(),
        "--device",
        "cpu",
    ]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(
        data(&std::fs::read_to_string(other).unwrap())["success"],
        false
    );
}

#[test]
fn a_folder_without_a_model_is_named() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().to_str().unwrap();
    let refused = |message: &str| {
        let done = dtmem(&[run, "--device", "cpu"]);
        let error = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(2));
        assert!(error.contains(run) && error.contains(message), "{error}");
    };
    refused("expected the output folder of `dtmem train`");
    let model = Folder::new(folder.path()).model();
    std::fs::write(&model, b"something else").unwrap();
    refused("expected a whole safetensors file");
    let nothing: [(&str, safetensors::tensor::TensorView); 0] = [];
    std::fs::write(&model, safetensors::serialize(nothing, None).unwrap()).unwrap();
    refused("metadata entry `dtmem`");
    std::fs::remove_file(&model).unwrap();
    std::fs::remove_dir(folder.path()).unwrap();
    refused("no model in this folder");
}

#[test]
fn a_map_reads_as_it_was_written() {
    let map = Array2::from_shape_fn((5, 7), |(r, c)| (r * 7 + c) as f64 / 34.0);
    let read = decode(&encode(map.view(), 0.0), (5, 7)).unwrap();
    assert!((read - map).iter().all(|error| error.abs() < 5e-4));
}
