//! Linear maps, with and without adapters.

mod table;

fn main() {
    table::run(dtmem::bench::Group::Linear);
}
