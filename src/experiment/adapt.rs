//! Ways to adapt a trained model to another task, and what it forgets by it.

use super::grid::{Grid, Measure, shipped};
use super::{Experiment, Size};

pub(super) const ADAPT: Experiment = Experiment {
    name: "adapt",
    about: "LoRA's rank, alpha and dropout against full, memory-only, scratch and none; forgetting",
    takes: ["3 minutes", "hours"],
    grid,
};

const MEASURES: &[Measure] = &[
    Measure::share("success_rate", "success rate"),
    Measure::share("base_before", "on the base's task, before"),
    Measure::share("base_after", "on the base's task, after"),
    Measure::count("trained_parameters", "trained parameters"),
];

fn grid(size: Size) -> Grid {
    let mut grid = Grid::new(MEASURES, 3);
    // The full size is a wider and deeper base, and all of its training.
    let (of_base, common): (&[&str], &[&str]) = match size {
        Size::Quick => (&["train.steps=1000"], &[]),
        Size::Full => (
            &[
                "model.width=512",
                "model.layers=4",
                "model.heads=8",
                "model.feed_forward=2048",
                "model.memory.slots=1290",
                "train.steps=20000",
                "train.learning_rate=1e-4",
                "train.warmup_steps=1000",
            ],
            &["train.steps=4000", "train.learning_rate=1e-4"],
        ),
    };
    let shares: &[&str] = match size {
        Size::Quick => &["0.01", "0.1"],
        Size::Full => &["0.01", "0.05", "0.1", "0.2"],
    };
    let base = "base";
    grid.cell("base", base, shipped!("recall-quick.toml"), of_base);
    let mut add = |group, name: String, set: &[&str]| {
        let set = [common, set].concat();
        grid.adapted(group, name, shipped!("recall-adapt.toml"), base, &set);
    };
    add("not adapted", "none".to_owned(), &["finetune.method=none"]);
    for method in ["lora", "memory", "full", "scratch"] {
        for share in shares {
            let (method_set, share_set) = (
                format!("finetune.method={method}"),
                format!("finetune.share={share}"),
            );
            let name = format!("{method}, share {share}");
            add(
                "method and share of the data",
                name,
                &[&method_set, &share_set],
            );
        }
    }
    for (setting, value) in [
        ("rank", "2"),
        ("rank", "32"),
        ("alpha", "4"),
        ("alpha", "64"),
        ("dropout", "0.2"),
    ] {
        let set = format!("model.adapter.{setting}={value}");
        let set = ["finetune.method=lora", "finetune.share=0.1", &set];
        let group = "lora, share 0.1 (rank 8, alpha 16, dropout 0)";
        add(group, format!("{setting} {value}"), &set);
    }
    grid
}
