//! Layer normalisation.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::LayerNorm));
}
