//! What the memory loss supervises, and how much it weighs.

use super::grid::{Base, Grid, OF_TRAINING, shipped};
use super::{Experiment, Size};

pub(super) const SUPERVISION: Experiment = Experiment {
    name: "supervision",
    about: "which layer and heads the memory loss teaches, or the memory; its weight λ (Hallway)",
    takes: ["10 minutes", "days"],
    grid,
};

const PLACE: &str = "supervised layer and heads, λ 10";
const LAMBDA: &str = "weight λ";
const MEMORY: &str = "memory, attention in segments";

fn grid(size: Size) -> Grid {
    let mut grid = Grid::new(OF_TRAINING, 3);
    match size {
        Size::Quick => {
            let base = shipped!("hallway-quick.toml");
            let steps = ["train.steps=2500"];
            places(&mut grid, base, &steps, 1, &[(1, "[1]"), (1, "[1,2]")]);
            places(&mut grid, base, &steps, 2, &[(1, "[1,2]"), (2, "[1,2]")]);
            lambdas(&mut grid, base, &steps, "[1,2]", &["0", "1", "100"]);
        }
        Size::Full => {
            let base = shipped!("hallway-paper.toml");
            let all = [(1, "[1]"), (1, "[1,2]"), (2, "[1]"), (3, "[1]"), (4, "[1]")];
            places(&mut grid, base, &[], 4, &all);
            lambdas(&mut grid, base, &[], "[1]", &["0", "0.1", "1", "100"]);
        }
    }
    let (base, steps): (_, &[&str]) = match size {
        Size::Quick => (
            shipped!("recall-quick.toml"),
            &["train.steps=800", "model.segment_steps=1"],
        ),
        Size::Full => (shipped!("hallway-memory-quick.toml"), &[]),
    };
    for lambda in ["0", "10"] {
        let set = format!("loss.lambda={lambda}");
        let set = [steps, &["loss.supervise=memory", &set]].concat();
        grid.cell(MEMORY, format!("memory, λ {lambda}"), base, &set);
    }
    grid
}

/// Layers and heads of attention that are supervised in a model of so many layers, with λ = 10.
fn places(grid: &mut Grid, base: Base, common: &[&str], layers: u32, places: &[(u32, &str)]) {
    let layers_set = format!("model.layers={layers}");
    for (layer, heads) in places {
        let (layer_set, heads_set) = (format!("loss.layer={layer}"), format!("loss.heads={heads}"));
        let set = [common, &[&layers_set, &layer_set, &heads_set]].concat();
        let name = format!("layer {layer} of {layers}, heads {heads}");
        grid.cell(PLACE, name, base, &set);
    }
}

/// Weights of the loss of heads of the first layer.
fn lambdas(grid: &mut Grid, base: Base, common: &[&str], heads: &str, lambdas: &[&str]) {
    let heads_set = format!("loss.heads={heads}");
    for lambda in lambdas {
        let lambda_set = format!("loss.lambda={lambda}");
        let set = [common, &["loss.layer=1", &heads_set, &lambda_set]].concat();
        grid.cell(LAMBDA, format!("heads {heads}, λ {lambda}"), base, &set);
    }
}
