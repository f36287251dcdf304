//! What the memory carries beyond the segment that attention sees, and what is left without it.

use super::grid::{Base, Grid, OF_TRAINING, shipped};
use super::{Experiment, Size};

pub(super) const CARRY: Experiment = Experiment {
    name: "carry",
    about: "memory on and off where attention sees segments only (Recall of several lengths, Hallway)",
    takes: ["10 minutes", "an hour on two cores"],
    grid,
};

const RECALL: Base = shipped!("recall-quick.toml");
const HALLWAY: Base = shipped!("hallway-memory-quick.toml");

/// The attention-BCE on what the memory recalls.
const ON: [&str; 2] = ["loss.lambda=10", "loss.supervise=memory"];
const OFF: [&str; 2] = ["loss.lambda=0", "model.memory="];
/// The same model without a memory, where attention sees and is taught all of the episode.
const FULL_ATTENTION: [&str; 3] = [
    "model.memory=",
    "model.attention=episode",
    "loss.supervise=attention",
];

fn grid(size: Size) -> Grid {
    let mut grid = Grid::new(OF_TRAINING, 3);
    // Length of the episodes, numbers of slots, steps of training; a hallway's length and steps.
    let (delayed, associative, hallways): (&[Lengths], &[Lengths], &[[&str; 2]]) = match size {
        Size::Quick => (
            &[("30", &["16"], "600")],
            &[("24", &["32"], "1200")],
            &[["2", "3000"]],
        ),
        Size::Full => (
            &[("30", &["16", "64"], "1600"), ("62", &["16", "64"], "1600")],
            &[
                ("12", &["32"], "1600"),
                ("24", &["16", "32", "64"], "1600"),
                ("48", &["64"], "3600"),
            ],
            &[["2", "4500"], ["3", "4500"]],
        ),
    };
    // Tokens of one segment see the same slots, so two pairs of one segment often go to the same
    // slot: where there are several pairs, a segment is one step.
    for (kind, group, segment, lengths) in [
        ("delayed", "delayed recall", "4", delayed),
        (
            "associative",
            "associative recall, four pairs",
            "1",
            associative,
        ),
    ] {
        for &(length, slots, steps) in lengths {
            let settings = [
                format!("task.kind={kind}"),
                format!("task.steps={length}"),
                format!("model.segment_steps={segment}"),
                format!("train.steps={steps}"),
            ];
            let common: Vec<&str> = settings.iter().map(String::as_str).collect();
            for slots in slots {
                let set = format!("model.memory.slots={slots}");
                let set = [&common[..], &ON, &[&set]].concat();
                grid.cell(
                    group,
                    format!("{kind} {length} steps, {slots} slots"),
                    RECALL,
                    &set,
                );
            }
            let name = format!("{kind} {length} steps, memory off");
            grid.cell(group, name, RECALL, &[&common[..], &OFF].concat());
        }
    }
    for [length, steps] in hallways {
        let common = [
            format!("task.length={length}"),
            format!("train.steps={steps}"),
        ];
        let common: Vec<&str> = common.iter().map(String::as_str).collect();
        for (name, with) in [
            ("memory on", &[][..]),
            ("memory off", &OFF),
            ("no memory, attention to the episode", &FULL_ATTENTION),
        ] {
            let name = format!("Hallway({length}), {name}");
            grid.cell("Hallway", name, HALLWAY, &[&common[..], with].concat());
        }
    }
    grid
}

/// Length of an episode, numbers of slots, steps of training.
type Lengths = (&'static str, &'static [&'static str], &'static str);
