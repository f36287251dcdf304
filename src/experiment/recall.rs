//! What a memory keeps: known patterns are written and read back, before and after training.

use super::grid::{Base, Grid, Measure};
use super::{Experiment, Size};

pub(super) const RECALL: Experiment = Experiment {
    name: "recall",
    about: "patterns written into the memory alone and read back, before and after training (CPU)",
    takes: ["1 minute", "hours, on a CPU"],
    grid,
};

/// Shares of the patterns that are recalled.
const MEASURES: &[Measure] = &[
    Measure::share("before", "before training"),
    Measure::share("after", "after training"),
    Measure::share("oldest", "written first, after training"),
    Measure::share("newest", "written last, after training"),
];

fn grid(size: Size) -> Grid {
    let (common, seeds): (&[&str], u64) = match size {
        Size::Quick => (&["train.steps=1500"], 3),
        Size::Full => {
            let set: &[&str] = &[
                "patterns=64",
                "width=128",
                "memory.slots=256",
                "train.steps=2000",
                "train.batch=32",
                "episodes=500",
            ];
            (set, 5)
        }
    };
    // The default, and each setting alone changed from it.
    let varied: [(&'static str, &str, &[&str]); 4] = match size {
        Size::Quick => [
            ("patterns", "patterns", &["4", "16", "32"]),
            ("slots", "memory.slots", &["4", "16", "256"]),
            ("width", "width", &["16", "32", "128"]),
            ("patterns written at once", "segment", &["1", "16"]),
        ],
        Size::Full => [
            ("patterns", "patterns", &["16", "64", "256", "1024"]),
            ("slots", "memory.slots", &["16", "64", "1290", "1800"]),
            ("width", "width", &["32", "64", "256", "512"]),
            ("patterns written at once", "segment", &["1", "16", "64"]),
        ],
    };
    let mut grid = Grid::new(MEASURES, seeds);
    for (group, key, values) in varied {
        for value in values {
            let (name, set) = (format!("{key} {value}"), format!("{key}={value}"));
            grid.cell(group, name, Base::Memory, &[common, &[&set]].concat());
        }
    }
    for setting in [
        "strength=softmax",
        "erase=paper",
        "addressing=dot",
        "top_k=4",
        "order=write_then_read",
    ] {
        let (name, set) = (setting.replace('=', " "), format!("memory.{setting}"));
        grid.cell("form", name, Base::Memory, &[common, &[&set]].concat());
    }
    grid
}
