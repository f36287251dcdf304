//! The forms of DT-Mem's memory: each setting alone is changed from the default.

use super::grid::{Grid, OF_TRAINING, shipped};
use super::{Experiment, Size};

pub(super) const SLOTS: Experiment = Experiment {
    name: "slots",
    about: "memory size, addressing, top_k, strength, erase, order, memory off (associative recall)",
    takes: ["6 minutes", "hours"],
    grid,
};

fn grid(size: Size) -> Grid {
    let base = shipped!("recall-quick.toml");
    // With the memory loss, few steps show which forms learn slowly; the full size is a wider model
    // that has to keep twice the pairs for three times as long.
    let common: &[&str] = match size {
        Size::Quick => &["loss.supervise=memory", "loss.lambda=10", "train.steps=600"],
        Size::Full => &[
            "loss.supervise=memory",
            "loss.lambda=10",
            "task.pairs=8",
            "task.steps=40",
            "model.width=512",
            "model.layers=4",
            "model.heads=8",
            "model.feed_forward=2048",
            "model.memory.slots=1290",
            "train.steps=20000",
            "train.batch_tokens=11808",
            "train.learning_rate=1e-4",
            "train.warmup_steps=1000",
        ],
    };
    let sizes: &[&str] = match size {
        Size::Quick => &["4", "16", "32", "128"],
        Size::Full => &["16", "256", "1290", "1800"],
    };
    let mut grid = Grid::new(OF_TRAINING, 3);
    let mut add = |group, name: &str, set: &[&str]| {
        grid.cell(group, name, base, &[common, set].concat());
    };
    for slots in sizes {
        let set = format!("model.memory.slots={slots}");
        add("slots", &format!("{slots} slots"), &[&set]);
    }
    for (group, setting, value) in [
        ("addressing", "addressing", "dot"),
        ("nearest slots only", "top_k", "1"),
        ("nearest slots only", "top_k", "4"),
        ("strength", "strength", "softmax"),
        ("erase", "erase", "paper"),
        ("order", "order", "write_then_read"),
    ] {
        let set = format!("model.memory.{setting}={value}");
        add(group, &format!("{setting} {value}"), &[&set]);
    }
    add(
        "no memory",
        "memory off",
        &["model.memory=", "loss.lambda=0"],
    );
    grid
}
