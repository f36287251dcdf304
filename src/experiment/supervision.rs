//! What the memory loss supervises, and how much it weighs.

use super::grid::{Base, Grid, OF_TRAINING, shipped};
use super::{Experiment, Size};

pub(super) const SUPERVISION: Experiment = Experiment {
    name: "supervision",
    about: "which layer and heads the memory loss teaches, or the memory; its weight λ (Hallway)",
    takes: ["6 minutes", "days"],
    grid,
};

const LAYER: &str = "supervised layer and heads, λ 10";
const LAMBDA: &str = "weight λ, layer 1, heads [1]";
const MEMORY: &str = "memory, attention in segments";

fn grid(size: Size) -> Grid {
    let mut grid = Grid::new(OF_TRAINING, 3);
    match size {
        // The second layer takes the place of half of the feed-forward layer.
        Size::Quick => of_attention(
            &mut grid,
            shipped!("hallway-quick.toml"),
            &[
                "train.steps=2000",
                "model.layers=2",
                "model.feed_forward=512",
            ],
            &[(1, "[1]"), (1, "[1,2]"), (2, "[1,2]")],
            &["0", "1", "100"],
        ),
        Size::Full => of_attention(
            &mut grid,
            shipped!("hallway-paper.toml"),
            &[],
            &[(1, "[1]"), (1, "[1,2]"), (2, "[1]"), (3, "[1]"), (4, "[1]")],
            &["0", "0.1", "1", "100"],
        ),
    }
    let (base, steps): (_, &[&str]) = match size {
        Size::Quick => (shipped!("recall-quick.toml"), &["train.steps=300"]),
        Size::Full => (shipped!("hallway-memory-quick.toml"), &[]),
    };
    for lambda in ["0", "10"] {
        let set = format!("loss.lambda={lambda}");
        let set = [steps, &["loss.supervise=memory", &set]].concat();
        grid.cell(MEMORY, format!("memory, λ {lambda}"), base, &set);
    }
    grid
}

/// Attention heads: the layers and heads at λ = 10, and other λ at the first of them.
fn of_attention(
    grid: &mut Grid,
    base: Base,
    common: &[&str],
    places: &[(usize, &str)],
    lambdas: &[&str],
) {
    for (layer, heads) in places {
        let (layer_set, heads_set) = (format!("loss.layer={layer}"), format!("loss.heads={heads}"));
        let set = [common, &[&layer_set, &heads_set]].concat();
        grid.cell(LAYER, format!("layer {layer}, heads {heads}"), base, &set);
    }
    for lambda in lambdas {
        let lambda_set = format!("loss.lambda={lambda}");
        let set = [common, &["loss.layer=1", "loss.heads=[1]", &lambda_set]].concat();
        grid.cell(LAMBDA, format!("λ {lambda}"), base, &set);
    }
}
