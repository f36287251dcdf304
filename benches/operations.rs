//! The whole table in one program: what `scripts/gpu-bundle` has room for. `cargo bench` runs the others.

mod table;

fn main() {
    table::run(None);
}
