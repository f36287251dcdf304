//! Layer normalisation.

mod table;

fn main() {
    table::run(dtmem::bench::Group::LayerNorm);
}
