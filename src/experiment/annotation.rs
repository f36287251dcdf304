//! How much annotation the memory loss needs, and how much of it may be wrong.

use super::grid::{Grid, OF_TRAINING, shipped};
use super::{Experiment, Size};

pub(super) const ANNOTATION: Experiment = Experiment {
    name: "annotation",
    about: "share of annotated demonstrations, and noise in the annotation (Hallway)",
    takes: ["8 minutes", "days"],
    grid,
};

fn grid(size: Size) -> Grid {
    let (base, steps): (_, &[&str]) = match size {
        Size::Quick => (shipped!("hallway-quick.toml"), &["train.steps=2500"]),
        Size::Full => (shipped!("hallway-paper.toml"), &[]),
    };
    let mut grid = Grid::new(OF_TRAINING, 3);
    for share in ["1", "0.1", "0.01", "0.001", "0"] {
        let set = format!("data.annotated={share}");
        let set = [steps, &[&set]].concat();
        grid.cell("share of annotated demonstrations", share, base, &set);
    }
    // What is expected to hurt least comes first.
    for (kind, share) in [("dropped", "0.5"), ("shifted", "0.5"), ("random", "0.5")] {
        let set = format!("data.annotation_noise.{kind}={share}");
        let (name, set) = (format!("{kind} {share}"), [steps, &[&set]].concat());
        grid.cell("share of wrong pairs", name, base, &set);
    }
    grid
}
