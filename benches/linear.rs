//! Linear maps, with and without adapters.

mod table;

fn main() {
    table::run(Some(dtmem::bench::Group::Linear));
}
